"""`memplan explain`, `memplan compare`, `memplan doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from memplan.cli.options import (
    ConfigOption,
    DtypeOption,
    LoraRankOption,
    Method,
    MethodOption,
    ModelArgument,
    build,
    one_model,
)
from memplan.cli.terminal import EXIT_USAGE, JsonOption, errors_as_exit_codes, progress, stderr_console

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as `memplan plan --save` writes it.")]


def explain(
    plan: PlanArgument,
    model: ModelArgument = None,
    config: ConfigOption = None,
    method: MethodOption = Method.FULL,
    lora_rank: LoraRankOption = 16,
    dtype: DtypeOption = None,
    strategy: Annotated[str | None, typer.Option(help="The TOML file, where the plan is of such a strategy.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say where a plan's memory goes, what binds, and what other plans, budgets and cards would change.

    With the plan's model, other budgets are solved again; without it they are read off the plan's frontier.
    """
    from memplan.gpus import all_gpus
    from memplan.plan_record import Plan
    from memplan.report import explain as facts
    from memplan.report.sheets import explanation_sheet

    console = stderr_console()
    with errors_as_exit_codes():
        read = Plan.load(plan)
        again = None
        if model is not None or config is not None:
            built = build(console, one_model(model, config), method, lora_rank, dtype)
            with progress(console, "solving again"):
                from memplan.resolving import solved_again

                again = solved_again(built, read, facts.shift_bytes(read), strategy)
    found = facts.explain(read, all_gpus(), again)
    console.print(explanation_sheet(read, found))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))


def compare(
    first: PlanArgument,
    second: PlanArgument,
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two plans."""
    from memplan.plan_record import Plan
    from memplan.report import compare as facts
    from memplan.report.sheets import comparison_sheet

    with errors_as_exit_codes():
        found = facts.compare(Plan.load(first), Plan.load(second))
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    stderr_console().print(comparison_sheet(found, names))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))


def doctor(as_json: JsonOption = False) -> None:
    """Look at versions, cards, settings and memory, and say what would go wrong here and how to mend it."""
    from memplan.doctor import examine
    from memplan.report.diagnosis import diagnosis_sheet

    console = stderr_console()
    with progress(console, "looking around"):
        found = examine()
    console.print(diagnosis_sheet(found))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    if not found.is_usable:
        raise typer.Exit(EXIT_USAGE)
