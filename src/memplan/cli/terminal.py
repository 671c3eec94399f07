"""What all commands share: where they print, how they fail, and what they show while one waits.

Tables go to stderr and the record's JSON to stdout, so that a pipe carries nothing else. Exit codes: 0 it fits, or what
was asked for was found; 2 what was asked for cannot be used; 3 no plan fits.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Final

import typer

from memplan.errors import DoesNotFit, MemplanError, UsageError
from memplan.progress import shown

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from memplan.plan_record import Plan

EXIT_USAGE: Final = 2
EXIT_DOES_NOT_FIT: Final = 3
EXIT_INTERRUPTED: Final = 130  # 128 and the signal's number
PLAIN_WIDTH: Final = 120  # columns, where nobody's terminal says how many there are

JsonOption = Annotated[bool, typer.Option("--json", help="Also write the record as JSON to stdout.")]


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """A line on stderr for what memplan raises on purpose; anything else is a bug and keeps its traceback.

    What does not fit may have a few lines, as a plan that is described has.
    """
    try:
        yield
    except MemplanError as error:
        said = str(error) if isinstance(error, DoesNotFit) else " ".join(str(error).split())
        typer.echo(f"memplan: {said}", err=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT if isinstance(error, DoesNotFit) else EXIT_USAGE) from error


def check_writable(*paths: "Path | None") -> None:
    """Before the work: that files can be made where its results are to go. Raises UsageError."""
    for path in paths:
        if path is None or path.exists():
            continue
        try:
            with TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}. Name another file.") from error


def hand_out(plan: "Plan", save: "Path | None", *, as_json: bool) -> None:
    """The plan as JSON to stdout, and to a file, where that was asked for."""
    if as_json:
        typer.echo(plan.model_dump_json(indent=1))
    if save is not None:
        with errors_as_exit_codes():
            plan.save(save)


def stderr_console() -> "Console":
    """Stderr, for people: plain text where it is not a terminal or NO_COLOR is set."""
    from rich.console import Console

    return Console(
        stderr=True,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if sys.stderr.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
    )


def progress(console: "Console", doing: str) -> AbstractContextManager[object]:
    return shown(doing, console)
