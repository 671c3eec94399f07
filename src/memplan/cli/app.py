"""The table of commands.

Torch, transformers and the tables are imported by the commands that need them, never for `--help`.
"""

import errno
import sys
from typing import Annotated, Final

import typer

from memplan import __version__
from memplan.cli import caching, explaining, fitting_cards, planning, reporting, tuning
from memplan.cli.terminal import EXIT_USAGE

COMMANDS: Final = (
    planning.predict,
    planning.plan,
    tuning.tune,
    fitting_cards.fit,
    explaining.explain,
    explaining.compare,
    reporting.report,
    planning.gpus,
    explaining.doctor,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fit any PyTorch training step into a memory budget.",
    epilog="Exit codes: 0 fits, 2 bad usage, 3 does not fit.",
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(caching.cache, name="cache")


def main() -> None:
    """The `memplan` command."""
    try:
        app(prog_name="memplan")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        typer.echo(f"memplan: {error.strerror} where stdout goes. Send it elsewhere.", err=True)
        sys.exit(EXIT_USAGE)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _print_version(asked), help="Show it.")
    ] = False,
) -> None:
    pass


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"memplan {__version__}")
        raise typer.Exit
