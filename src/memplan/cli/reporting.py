"""`memplan report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.terminal import errors_as_exit_codes
from memplan.errors import PlanSchema, UsageError

if TYPE_CHECKING:
    from memplan.plan_record import Measured


def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="A plan that was saved.")],
    measured: Annotated[
        Path | None, typer.Argument(metavar="[MEASURED.JSON]", help="A run of it: fit.measured.model_dump_json().")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    svg: Annotated[
        Path | None, typer.Option(help="A folder for the pictures alone: timeline.svg and frontier.svg.")
    ] = None,
) -> None:
    """Draw a plan as one HTML page: memory over the step, every block, other plans, and the peak part by part."""
    from memplan.plan_record import Plan
    from memplan.report.charts import frontier_svg, timeline_svg
    from memplan.report.page import page_html

    with errors_as_exit_codes():
        record = Plan.load(plan)
        run = None if measured is None else _measured(measured)
        _write(output, page_html(record, run))
        if svg is None:
            return
        for name, draw in (("timeline.svg", timeline_svg), ("frontier.svg", frontier_svg)):
            try:
                picture = draw(record, run)
            except UsageError as error:
                typer.echo(f"memplan: no {name}: {error}", err=True)
            else:
                _write(svg / name, picture)


def _measured(path: Path) -> "Measured":
    from pydantic import ValidationError

    from memplan.plan_record import Measured

    try:
        return Measured.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the measurement {path}: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise PlanSchema(f"{path} is no measurement: write fit.measured.model_dump_json() into it") from error


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}. Name another place.") from error
    typer.echo(f"wrote {path}", err=True)
