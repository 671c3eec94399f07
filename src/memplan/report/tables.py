"""Records as rich tables. What is needed is rounded up, what is there is rounded down; see `memplan.units`."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan.cache import Key
from memplan.corrections import Corrections, factors_text
from memplan.gpus import Gpu
from memplan.plan_record import Layer, Plan, Verdict, count_text
from memplan.prediction import Prediction, by_category
from memplan.report.paths import Share, module_shares, path_range, pattern_of
from memplan.report.rows import Rows
from memplan.units import format_budget, format_bytes, format_percent, format_rate, format_seconds

_STYLES: Final = {Verdict.FITS: "bold green", Verdict.UNCERTAIN: "bold yellow", Verdict.DOES_NOT_FIT: "bold red"}


def prediction_tables(prediction: Prediction, top: int = 8) -> RenderableType:
    """The peak, what it is made of, and what each module keeps for its backward.

    Repeated modules are one row, and under it are the `top` kinds of modules inside them that keep most.
    """
    where = f" of {prediction.module}" if prediction.module else ""
    precision = f"autocast to {prediction.autocast}" if prediction.autocast else "no autocast"
    return Group(
        Text(f"peak {format_bytes(prediction.peak_bytes)} in {prediction.phase}{where}", style="bold"),
        f"micro-batch {prediction.micro_batch} x {prediction.accumulation} accumulated, {prediction.optimizer}, "
        f"{precision}, {prediction.how} run",
        *([prediction.needs()] if prediction.needs() else []),
        "",
        _categories(prediction.breakdown),
        _modules(prediction.saved, prediction.activations, top),
        *_sentences("Assumed", prediction.assumptions),
    )


def plan_tables(plan: Plan) -> RenderableType:
    """The verdict, the budget, the batch and its time, the blocks, the predicted peak, and the ways out of no fit."""
    return Group(
        Text.assemble((str(plan.verdict), _STYLES[plan.verdict]), f": {plan.reason}"),
        "",
        _budget(plan),
        "",
        _step(plan),
        "",
        *([_layers(plan.layers)] if plan.layers else []),
        _categories(plan.breakdown),
        *_sentences("Ways out", plan.ways_out),
        *_sentences("Assumed", plan.assumptions),
    )


def gpu_table(gpus: Iterable[Gpu]) -> RenderableType:
    """One row per card: its memory as torch sees it, its peak rates, and when they were looked up."""
    table = Rows("", "Card", "Memory", "GB/s", "bf16\nTFLOP/s", "fp32\nTFLOP/s", "Compute", "As of", text=0)
    for gpu in gpus:
        table.add_row(
            gpu.name,
            format_budget(gpu.total_bytes) if gpu.total_bytes is not None else "",
            _in_units(gpu.bandwidth_bytes_s, 1e9),
            _in_units(gpu.flops.get("bfloat16"), 1e12),
            _in_units(gpu.flops.get("float32"), 1e12),
            ".".join(map(str, gpu.compute_capability or ())),
            gpu.date.isoformat() if gpu.date else "",
        )
    return table


def learned_tables(learned: Mapping[Key, Corrections]) -> RenderableType:
    """For each model and machine: the runs, what times are multiplied by, and what is kept free at least."""
    tables = []
    for key, found in learned.items():
        facts: dict[str, str | Text] = {"on": key.card, "runs": str(len(found.runs))}
        for how in ("measured", "estimate"):
            if found.timed(how):
                facts[f"times, {how}"] = factors_text(found.factors(how))
        if ratios := [run.time_ratio for run in found.runs if run.time_ratio]:
            facts["steps took"] = _beside([ratio - 1 for ratio in ratios])
        if found.runs:
            facts["peaks were"] = _beside([run.excess_bytes / run.predicted_bytes for run in found.runs])
        if found.excess_bytes:
            facts["kept free"] = format_bytes(found.excess_bytes)
        tables += [_facts(f"{key.model}, {key.optimizer}", facts), ""]
    return Group(*tables)


def _beside(shares: Sequence[float]) -> str:
    """What runs were off by, as "+0.1 % to +2.0 % beside the prediction"."""
    least, most = (f"{share:+.1%}" for share in (min(shares), max(shares)))
    return f"{least if least == most else f'{least} to {most}'} beside the prediction"


def _budget(plan: Plan) -> RenderableType:
    budget, spare_bytes = plan.budget, plan.budget_bytes - plan.needs_bytes
    if spare_bytes >= 0:
        spare = Text(f"{format_budget(spare_bytes)} spare")
    else:
        spare = Text(f"{format_bytes(-spare_bytes)} too much", style="red")
    beside_peak: tuple[str | Text, ...] = (", ", spare)
    on_card: dict[str, str | Text] = {}
    about = "about " if plan.is_for_card else ""
    if plan.fits_bytes is not None:
        beside_peak = ()
        on_card["reserved"] = Text.assemble((plan.beside_budget(plan.fits_bytes), "bold"), " by the allocator, ", spare)
    facts: dict[str, str | Text] = {
        "total": format_budget(budget.total_bytes),
        "- other processes": format_bytes(budget.others_bytes),
        "- CUDA context": format_bytes(budget.context_bytes),
        "- margin": format_bytes(budget.margin_bytes),
        "= budget": Text(format_budget(plan.budget_bytes), style="bold"),
        "predicted peak": Text.assemble(
            (plan.beside_budget(plan.peak_bytes), "bold"), f" in {plan.peak_phase}", *beside_peak
        ),
        **on_card,
        "without a plan": f"{about}{format_bytes(plan.unplanned_needs_bytes)} at the same micro-batch",
        "least that fits": f"{format_bytes(plan.smallest_bytes)} with the strategy {plan.strategy!r}",
    }
    return _facts(f"Budget on {budget.gpu}", facts)


def _step(plan: Plan) -> RenderableType:
    within = "" if plan.faster_within_budget is None else " that needs no more"
    facts: dict[str, str | Text] = {
        "batch": Text.assemble(
            (f"{plan.micro_batch} x {plan.accumulation}", "bold"),
            f" (micro-batch x accumulation) = {plan.effective_batch}",
        ),
        "blocks": count_text(plan),
        "time": f"{format_seconds(plan.step_s)} ({plan.basis}), {format_rate(plan.samples_per_s, 'samples')}",
        "slowdown": f"{format_percent(plan.slowdown)} against keeping everything",
        "gap": f"{format_percent(plan.gap)} at most to the fastest plan of its levers{within}",
    }
    if plan.shadow_price > 0 and not within:
        facts["one GiB more"] = f"would save {format_seconds(plan.shadow_price)}"
    return _facts("Step", facts)


def _layers(layers: Sequence[Layer]) -> RenderableType:
    """One row per run of neighbours that read the same."""
    table = Rows("Blocks, each for one micro-batch", "Block", "Plan", "n", "Saves", "Holds", "Extra time", text=2)

    def cells(layer: Layer) -> tuple[str, ...]:
        sizes = format_bytes(layer.keep_bytes), format_bytes(layer.held_bytes)
        return pattern_of(layer.path), layer.option, *sizes, format_seconds(layer.extra_s)

    for (_, option, saves, holds, extra), run in groupby(layers, cells):
        paths = [layer.path for layer in run]
        style = None if option == "keep" else "bold"
        table.add_row(path_range(paths), option, str(len(paths)), saves, holds, extra, style=style)
    return table


def _categories(breakdown: Mapping[str, int]) -> RenderableType:
    sizes = by_category(breakdown)
    total = sum(sizes.values())
    table = Rows("Predicted at the peak", "Category", "Size", "Share")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size:
            table.add_row(name, format_bytes(size), format_percent(size / total))
    table.add_section()
    table.add_row("sum", format_bytes(total), "")
    return table


def _modules(kept: Mapping[str, int], at_peak: Mapping[str, int], top: int) -> RenderableType:
    table = Rows("Activations by module", "Module", "n", "Kept for backward", "Each", "At the peak")
    _add_shares(table, module_shares(kept, at_peak), top, indent="")
    table.add_section()
    table.add_row("sum", "", format_bytes(sum(kept.values())), "", format_bytes(sum(at_peak.values())))
    return table


def _add_shares(table: Rows, shares: Sequence[Share], top: int, indent: str) -> None:
    for share in shares[:top]:
        each = f"{'' if share.alike else 'up to '}{format_bytes(share.largest_bytes)}" if share.count > 1 else ""
        count = str(share.count) if share.count > 1 else ""
        sizes = format_bytes(share.kept_bytes), each, format_bytes(share.peak_bytes)
        table.add_row(f"{indent}{share.name or '(itself)'}", count, *sizes, style="bold" if share.inner else None)
        _add_shares(table, share.inner, top, indent=f"{indent}  ")
    if rest := shares[top:]:
        sums = format_bytes(sum(share.kept_bytes for share in rest)), format_bytes(sum(s.peak_bytes for s in rest))
        table.add_row(f"{indent}{len(rest)} smaller", "", sums[0], "", sums[1], style="dim")


def _facts(title: str, facts: Mapping[str, str | Text]) -> RenderableType:
    grid = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(f"  {name}", value)
    return grid


def _sentences(title: str, sentences: Sequence[str]) -> list[RenderableType]:
    if not sentences:
        return []
    return [Text(title, style="bold"), *(Padding(Text(f"- {sentence}"), (0, 0, 0, 2)) for sentence in sentences), ""]


def _in_units(value: float | None, unit: float) -> str:
    return f"{value / unit:,.0f}" if value is not None else ""
