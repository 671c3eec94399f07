"""`memplan report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.terminal import errors_as_exit_codes
from memplan.errors import PlanSchema, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.plan_record import Measured, Plan


def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="A plan that was saved.")],
    measured: Annotated[
        Path | None, typer.Argument(metavar="[MEASURED.JSON]", help="A run of it: fit.measured.model_dump_json().")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    svg: Annotated[
        Path | None, typer.Option(help="A folder for the pictures alone: timeline.svg and frontier.svg.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="The same as timeline.png and frontier.png, 2000 pixels wide. Needs resvg_py.")
    ] = None,
) -> None:
    """Draw a plan as one HTML page: memory over the step, every block, other plans, and the peak part by part."""
    from memplan.plan_record import Plan
    from memplan.report.charts import frontier_svg, timeline_svg
    from memplan.report.page import page_html

    with errors_as_exit_codes():
        record = Plan.load(plan)
        run = None if measured is None else _measured(measured, record)
        kinds: list[tuple[Path, str, Callable[[str], bytes]]] = []
        kinds += [(svg, "svg", str.encode)] if svg is not None else []
        kinds += [(png, "png", _rasteriser())] if png is not None else []
        _write(output, page_html(record, run).encode())
        for name, draw in (("timeline", timeline_svg), ("frontier", frontier_svg)) if kinds else ():
            try:
                picture = draw(record, run)
            except UsageError as error:
                typer.echo(f"memplan: no {name}: {error}", err=True)
                continue
            for folder, kind, encoded in kinds:
                _write(folder / f"{name}.{kind}", encoded(picture))


def _rasteriser() -> "Callable[[str], bytes]":
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UsageError("--png needs resvg_py: pip install 'memplan[png]', or take --svg") from error
    return lambda picture: bytes(svg_to_bytes(svg_string=picture, zoom=2))


def _measured(path: Path, plan: "Plan") -> "Measured":
    from pydantic import ValidationError

    from memplan.plan_record import Measured

    try:
        run = Measured.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the measurement {path}: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise PlanSchema(f"{path} is no measurement: write fit.measured.model_dump_json() into it") from error
    if run.predicted_bytes != plan.peak_bytes:
        raise UsageError(
            f"{path} was measured with another plan: that one predicted a peak of {run.predicted_bytes:,} bytes, this "
            f"one predicts {plan.peak_bytes:,}. Measure this plan, memplan.apply(model, plan).measure(), or name "
            "the plan that was measured."
        )
    return run


def _write(path: Path, content: bytes) -> None:
    from memplan.records import write_whole

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}. Name another place.") from error
    typer.echo(f"wrote {path}", err=True)
