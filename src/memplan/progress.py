"""A bar on stderr while somebody waits at a terminal, and nothing anywhere else.

It is drawn when there is something new, by the thread that works: one that draws by itself would be in what is timed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

STAGES: Final = ("tracing", "timing", "solving", "checking")  # of planning, in this order

_Place = tuple[bool, int]  # whether it is of the parts, which come after all stages; and how many are behind it

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
        console: where to draw; stderr if left out.
    """
    if _reached.get() is not None or not (sys.stderr.isatty() if console is None else console.is_terminal):
        yield
        return
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
    at: _Place = (False, -1)

    def tell(place: _Place, of: int, words: str) -> None:
        nonlocal at
        if place > at:
            at = place
            bar.update(task, completed=place[1], total=of, stage=words, refresh=True)

    with bar:
        token = _reached.set(tell)
        try:
            yield
        finally:
            _reached.reset(token)
