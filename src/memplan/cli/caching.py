"""`memplan cache show` and `memplan cache clear`: what measured runs have taught on this machine."""

import json
from typing import Final

import typer

from memplan.cli.terminal import JsonOption, errors_as_exit_codes, stderr_console

_OFF: Final = "the cache is switched off (MEMPLAN_CACHE, or the setting cache)"

cache = typer.Typer(
    no_args_is_help=True, help="What measured runs teach later plans on this machine. MEMPLAN_CACHE=off does without."
)


@cache.command()
def show(as_json: JsonOption = False) -> None:
    """List the models that were measured here, and what is corrected by it."""
    from memplan.cache import all_runs, folder
    from memplan.corrections import Corrections
    from memplan.report.tables import learned_tables

    with errors_as_exit_codes():
        place, learned = folder(), {key: Corrections(runs) for key, runs in all_runs().items()}
    console = stderr_console()
    if learned:
        console.print(learned_tables(learned))
    count = sum(len(found.runs) for found in learned.values())
    console.print(_OFF if place is None else f"{count} runs in {place}", soft_wrap=True)  # a path in one piece
    if as_json:
        entries = [
            {"key": key.model_dump(), "runs": [run.model_dump() for run in found.runs]}
            for key, found in learned.items()
        ]
        typer.echo(json.dumps({"schema_version": 1, "entries": entries}, indent=1))


@cache.command()
def clear() -> None:
    """Forget what was measured."""
    from memplan.cache import clear as clear_all
    from memplan.cache import folder

    with errors_as_exit_codes():
        typer.echo(_OFF if folder() is None else f"forgot {clear_all()} runs", err=True)
