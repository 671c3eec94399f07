"""A bar on stderr while somebody waits at a terminal, or below the cell of a notebook, and nothing anywhere else.

It is drawn when there is something new, by the thread that works: one that draws by itself would be in what is timed.
"""

import html
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

STAGES: Final = ("tracing", "timing", "solving", "checking")  # of planning, in this order

_Place = tuple[bool, int]  # whether it is of the parts, which come after all stages; and how many are behind it

_Draw = Callable[[int, int, str], None]  # how much is done, of how much, and what it is at

_reached: ContextVar[Callable[[_Place, int, str], None] | None] = ContextVar("_reached", default=None)


def stage(name: str) -> None:
    """Say which of `STAGES` the work is in. A bar never goes back: tracing once more, to check, is checking."""
    _tell((False, STAGES.index(name)), len(STAGES), name)


def part(number: int, of: int, what: str) -> None:
    """Say which of its parts the work is at, counted from 1. They come after all stages."""
    _tell((True, number - 1), of, f"{what} {number} of {of}")


def _tell(place: _Place, of: int, words: str) -> None:
    tell = _reached.get()
    if tell is not None:
        tell(place, of, words)


@contextmanager
def shown(doing: str, console: "Console | None" = None) -> Iterator[None]:
    """A bar that is gone when the work is done; inside another one's work that one's bar goes on.

    Args:
        console: where to draw; stderr if left out, or the notebook that this runs in.
    """
    is_seen = sys.stderr.isatty() if console is None else console.is_terminal
    in_notebook = console is None and _in_notebook()
    if _reached.get() is not None or not (is_seen or in_notebook):
        yield
        return
    at: _Place = (False, -1)
    with _in_cell(doing) if in_notebook else _in_terminal(doing, console) as draw:

        def tell(place: _Place, of: int, words: str) -> None:
            nonlocal at
            if place > at:
                at = place
                draw(place[1], of, words)

        token = _reached.set(tell)
        try:
            yield
        finally:
            _reached.reset(token)


@contextmanager
def _in_terminal(doing: str, console: "Console | None") -> Iterator[_Draw]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task(doing, total=len(STAGES), stage="")

    def draw(done: int, of: int, words: str) -> None:
        bar.update(task, completed=done, total=of, stage=words, refresh=True)

    with bar:
        yield draw


@contextmanager
def _in_cell(doing: str) -> Iterator[_Draw]:
    """HTML's own bar below the cell, which needs no widgets."""
    cells = importlib.import_module("IPython.display")
    handle = cells.display(cells.HTML(""), display_id=True)

    def draw(done: int, of: int, words: str) -> None:
        bar = f'<progress value="{done}" max="{of}"></progress>'
        handle.update(cells.HTML(f"{html.escape(doing)} {bar} {html.escape(words)}"))

    try:
        yield draw
    finally:
        handle.update(cells.HTML(""))


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs this: nobody else's IPython has one."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
