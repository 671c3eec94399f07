"""A plan as one HTML file that needs nothing else: no network, no server, no memplan.

Everything in it is text of the record, made here; its script only shows and hides, follows a finger over the timeline,
and sorts. `page.html` is the template, `page.css` and `page.js` are set into it.
"""

import importlib.resources
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Final

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from memplan import __version__
from memplan.errors import PlanSchema
from memplan.gpus import all_gpus
from memplan.plan_record import FrontierPoint, Layer, Measured, Plan, Verdict
from memplan.prediction import Timeline
from memplan.problem import lever_of
from memplan.report.answers import answers
from memplan.report.charts import COLOURS, INK, class_of, frontier_svg, timeline_svg
from memplan.report.compare import head_of
from memplan.report.explain import explain
from memplan.report.paths import path_range, pattern_of
from memplan.units import format_budget, format_bytes, format_percent, format_rate, format_seconds

MOST_ROWS: Final = 1500
"""Modules beyond so many, the smallest ones, are one row of the breakdown: a page stays below a megabyte."""

WIDTHS: Final = (("narrow", 360), ("middle", 640), ("wide", 1000))  # the page shows the picture that suits it

_AGAIN: Final = "the plan is damaged, make it again"
_OPTIONS: Final = {  # lever -> letter in the strip, and what it does to a block
    None: ("K", "keeps all that it saves"),
    "recompute": ("R", "runs again in the backward"),
    "select": ("S", "drops a part of what it saves and makes it again"),
    "offload": ("O", "sends what it saves to the host"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One block in the strip."""

    mark: str
    kind: str  # class of its colour
    title: str


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring blocks that read the same."""

    name: str
    option: str
    kind: str
    count: int
    saves: str
    holds: str
    extra: str


@dataclass(frozen=True, slots=True)
class Shown:
    """One plan of the frontier, as the slider shows it."""

    peak_bytes: int
    step_s: float
    chosen: bool
    sentence: str
    beside: tuple[tuple[str, str], ...]  # what it does beside its blocks
    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(run.option for run in self.runs for _ in range(run.count)))


@dataclass(frozen=True, slots=True)
class Part:
    """A row of the breakdown."""

    category: str
    module: str
    n_bytes: int


def page_html(plan: Plan, measured: Measured | None = None) -> str:
    """The page as text. Raises PlanSchema if parts of the plan do not belong together."""
    parts, plans, found = parts_of(plan.breakdown), shown_plans(plan), explain(plan, all_gpus())
    levers = {_lever(run.option) for shown in plans for run in shown.runs}
    return _template().render(
        plan=plan,
        measured=measured,
        version=__version__,
        tone={Verdict.FITS: "good", Verdict.UNCERTAIN: "open", Verdict.DOES_NOT_FIT: "bad"}[plan.verdict],
        headline=_headline(plan),
        trained=plan.trained,
        answers=answers(plan),
        timelines=_pictures(lambda width: timeline_svg(plan, measured, width=width, key=False))
        if plan.timeline
        else [],
        timeline=plan.timeline,
        shown_categories=[name for name, sizes in plan.timeline.bytes.items() if any(sizes)] if plan.timeline else [],
        peak_moment=_peak_moment(plan.timeline),
        frontiers=_pictures(lambda width: frontier_svg(plan, measured, width=width)) if plan.frontier else [],
        plans=plans,
        parts=parts,
        categories=found.categories,
        parts_bytes=sum(part.n_bytes for part in parts),
        budget=_budget(plan),
        step=_step(plan),
        legend=[_OPTIONS[lever] for lever in _OPTIONS if lever in levers],
        colours={class_of(name): pair for name, pair in COLOURS.items()},
        ink=INK,
        style=_file("page.css"),
        script=_file("page.js"),
        cards=found.cards,
    )


def shown_plans(plan: Plan) -> tuple[Shown, ...]:
    """The plans of the frontier; the plan alone where it has none.

    Raises:
        PlanSchema: a plan of the frontier does not have an option for each block, or one that no block tells of; or
            none is the chosen one.
    """
    points = plan.frontier or (
        FrontierPoint(
            peak_bytes=plan.needs_bytes,
            step_s=plan.step_s,
            options=tuple(layer.option for layer in plan.layers),
            head=head_of(plan),
            stepping=plan.stepping,
            chosen=True,
        ),
    )
    plans = tuple(_shown(plan, point) for point in points)
    if not any(shown.chosen for shown in plans):
        raise PlanSchema(f"none of the plan's frontier is the chosen one: {_AGAIN}")
    return plans


def parts_of(breakdown: Mapping[str, int]) -> tuple[Part, ...]:
    """Categories, activations by module, the largest first; what is too small to be named is one row."""
    parts = []
    for name, n_bytes in breakdown.items():
        category, _, module = name.partition("/") if name.startswith("activations/") else (name, "", "")
        parts.append(Part(category, module, n_bytes))
    parts = sorted((part for part in parts if part.n_bytes), key=lambda part: -part.n_bytes)
    rest = parts[MOST_ROWS:]
    if rest:
        parts[MOST_ROWS:] = [Part("activations", f"{len(rest)} smaller", sum(part.n_bytes for part in rest))]
    return tuple(parts)


def _headline(plan: Plan) -> str:
    into = f"into {format_budget(plan.budget_bytes)}"
    texts = {
        Verdict.FITS: f"{plan.model} fits {into}",
        Verdict.UNCERTAIN: f"{plan.model} may or may not fit {into}",
        Verdict.DOES_NOT_FIT: f"{plan.model} does not fit {into}",
    }
    return texts[plan.verdict]


def _shown(plan: Plan, point: FrontierPoint) -> Shown:
    cells = tuple(
        Cell(_mark(option), _kind(option), f"{layer.path}: {option}")
        for layer, option in zip(plan.layers, point.options, strict=True)
    )
    beside = (("loss head", point.head), ("optimizer step", point.stepping))
    changed = tuple((name, how) for name, how in beside if how not in ("keep", "plain"))
    runs = _runs(plan.layers, point)
    return Shown(point.peak_bytes, point.step_s, point.chosen, _beside_chosen(plan, point), changed, cells, runs)


def _beside_chosen(plan: Plan, point: FrontierPoint) -> str:
    if point.chosen:
        return "The chosen plan."
    size, seconds = point.peak_bytes - plan.needs_bytes, point.step_s - plan.step_s
    over = point.peak_bytes - plan.budget_bytes
    return (
        f"{format_bytes(abs(size))} {'more' if size > 0 else 'less'} than the chosen plan, "
        f"{format_seconds(abs(seconds))} {'slower' if seconds > 0 else 'faster'}; "
        + (f"{format_bytes(over)} above the budget." if over > 0 else "within the budget.")
    )


def _runs(layers: Sequence[Layer], point: FrontierPoint) -> tuple[Run, ...]:
    def told(row: tuple[Layer, str]) -> tuple[str, str, str, str, str]:
        layer, option = row
        held_bytes, extra_s = layer.held_bytes, layer.extra_s
        if not point.chosen:
            if option not in layer.held or option not in layer.extra:
                raise PlanSchema(
                    f"{layer.path} has {option!r} in the frontier, but not what it holds and costs: {_AGAIN}"
                )
            held_bytes, extra_s = layer.held[option], layer.extra[option]
        extra = format_seconds(extra_s) if extra_s else "none"
        return pattern_of(layer.path), option, format_bytes(layer.keep_bytes), format_bytes(held_bytes), extra

    runs = []
    for (_, option, *texts), rows in groupby(zip(layers, point.options, strict=True), told):
        paths = [layer.path for layer, _ in rows]
        runs.append(Run(path_range(paths), option, _kind(option), len(paths), *texts))
    return tuple(runs)


def _mark(option: str) -> str:
    """ "keep" -> "K", "select-3" -> "S3"."""
    letter, _ = _OPTIONS[_lever(option)]
    last = option.rpartition("-")[2]
    return letter + last if last.isdecimal() else letter


def _kind(option: str) -> str:
    return f"o-{_lever(option) or 'keep'}"


def _lever(option: str) -> str | None:
    try:
        lever = lever_of(option)
    except ValueError as error:
        raise PlanSchema(f"{error}: {_AGAIN}") from error
    if lever not in _OPTIONS:
        raise PlanSchema(f"{option!r} is nothing that a block can do: {_AGAIN}")
    return lever


def _budget(plan: Plan) -> list[tuple[str, str, str]]:
    """Name, size, and the class of the row."""
    budget, spare = plan.budget, plan.budget_bytes - plan.needs_bytes
    needs = "reserved by the allocator at the peak" if plan.is_for_card else "predicted peak"
    return [
        (f"total of {budget.gpu}", format_budget(budget.total_bytes), ""),
        ("- other processes", format_bytes(budget.others_bytes), ""),
        ("- CUDA context", format_bytes(budget.context_bytes), ""),
        ("- margin", format_bytes(budget.margin_bytes), ""),
        ("= budget", format_budget(plan.budget_bytes), "sum"),
        (f"- {needs}", format_bytes(plan.needs_bytes), ""),
        ("= spare", format_budget(spare), "sum") if spare >= 0 else ("= too much", format_bytes(-spare), "sum bad"),
    ]


def _step(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("model", plan.model),
        ("micro-batch x accumulation", f"{plan.micro_batch} x {plan.accumulation} = {plan.effective_batch}"),
        ("optimizer", plan.optimizer + ("" if plan.stepping == "plain" else f", stepped {plan.stepping}")),
        ("autocast", plan.autocast or "none"),
        ("strategy", plan.strategy),
        ("peak of tensors", format_bytes(plan.peak_bytes)),
        ("the same without a plan", format_bytes(plan.unplanned_bytes)),
        ("least budget of any plan", format_bytes(plan.smallest_bytes)),
        ("time per step", f"{format_seconds(plan.step_s)} ({plan.basis})"),
        ("samples per second", format_rate(plan.samples_per_s, "samples").removesuffix(" samples/s")),
    ]


def _peak_moment(timeline: Timeline | None) -> int:
    return max(range(len(timeline.total)), key=timeline.total.__getitem__) if timeline else 0


def _pictures(draw: Callable[[int], str]) -> list[tuple[str, Markup]]:
    """Each with the class of the width that it is for. What is text in them was escaped where they were drawn."""
    return [(name, Markup(draw(width))) for name, width in WIDTHS]


def _file(name: str) -> Markup:
    return Markup((importlib.resources.files("memplan.report") / name).read_text(encoding="utf-8"))


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "size": format_bytes,
        "seconds": format_seconds,
        "percent": format_percent,
        "category_class": class_of,
    }
    return environment.from_string(_file("page.html"))
