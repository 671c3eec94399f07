"""Explanations and comparisons for a terminal of any width. Needs are rounded up, budgets down; see `memplan.units`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan.plan_record import Plan
from memplan.report.answers import answers
from memplan.report.compare import Comparison
from memplan.report.explain import Explanation, Neighbour, Price, Shift
from memplan.units import format_budget, format_bytes, format_percent, format_rate, format_seconds

_TOP: Final = 6  # ranges of modules are named
_WORDS: Final = {
    "needs_bytes": "what it needs",
    "peak_bytes": "peak of tensors",
    "unplanned_needs_bytes": "without a plan",
    "smallest_bytes": "least that fits",
    "host_bytes": "on the host",
    "how": "traced",
    "samples_per_s": "rate",
    "gap": "gap to the bound",
    "shadow_price": "one GiB more saves",
}
_LONGEST_BAR: Final = 40
_BESIDE_BAR: Final = 30  # columns: a mark, a size, a time, and what lies between


def explanation_sheet(plan: Plan, found: Explanation) -> RenderableType:
    """A plan in answers, then where its memory is, what binds, and what else could be."""
    return Group(
        *(
            part
            for answer in answers(plan)
            for part in (_title(f"{answer.question} {answer.short}"), *_indented(answer.sentences))
        ),
        _memory(plan, found),
        _title("Which moment binds?"),
        *_indented(_binding(plan, found)),
        _title("Why not another plan?"),
        *_indented(_other_plans(plan, found)),
        _title("With another budget, in the same batch"),
        *_indented([_shift_text(plan, found.less), _shift_text(plan, found.more), *_price_texts(plan, found.price)]),
        _title("Which card is enough?"),
        *_indented(_card_texts(found)),
        *([_title("Ways out"), *_indented(plan.ways_out)] if plan.ways_out else []),
        *([_title("Memory against time"), Frontier(plan)] if plan.frontier else []),
        *([_title("What is assumed"), *_indented(plan.assumptions)] if plan.assumptions else []),
    )


def comparison_sheet(found: Comparison, names: tuple[str, str]) -> RenderableType:
    """Two columns, a row for each thing that differs."""
    if found.is_empty:
        return Text("The plans do not differ.")
    parts: list[RenderableType] = []
    if not found.same_model:
        parts.append(Text("The plans are of different models: their modules or the shapes of their weights differ."))
    table = _grid("", *names)
    for name, words in found.facts.items():
        table.add_row(_spoken(name), *words)
    for name, sizes in found.sizes.items():
        text: Callable[[int], str] = format_budget if name == "budget_bytes" else format_bytes
        table.add_row(_spoken(name), *map(text, sizes))
    for name, times in found.times.items():
        table.add_row(_spoken(name), *(_time_text(name, value) for value in times))
    for name, sizes in found.categories.items():
        table.add_row(f"peak: {name}", *map(format_bytes, sizes))
    for blocks in found.blocks:
        label = blocks.paths if blocks.count == 1 else f"{blocks.paths} ({blocks.count}, each)"
        cells = zip(blocks.options, blocks.held_bytes, blocks.extra_s, strict=True)
        table.add_row(label, *(f"{o}, holds {format_bytes(h)}, {format_seconds(s)} extra" for o, h, s in cells))
    if any(found.alone):
        table.add_row("blocks only here", *map(str, found.alone))
    parts.append(table)
    for name, lines in zip(names, found.assumed, strict=True):
        parts += [_title(f"Assumed only in {name}"), *_indented(lines)] if lines else []
    return Group(*parts)


@dataclass(frozen=True, slots=True)
class Frontier:
    """The frontier as rows from the least memory to the least time; a bar is the time over that of the fastest."""

    plan: Plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        points = self.plan.frontier
        least, most = points[-1].step_s, points[0].step_s
        longest = max(0, min(_LONGEST_BAR, options.max_width - _BESIDE_BAR))
        budget = Text(f"  {format_budget(self.plan.budget_bytes):>11} - budget", style="yellow")
        above = False
        for point in points:
            if point.peak_bytes > self.plan.budget_bytes and not above:
                above = True
                yield budget
            share = (point.step_s - least) / (most - least) if most > least else 0.0
            mark, bar = ">" if point.chosen else " ", "#" * round(share * longest)
            row = f"{mark} {format_bytes(point.peak_bytes):>11}  {format_seconds(point.step_s):>9}  {bar}"
            yield Text(row.rstrip(), style="bold" if point.chosen else "")
        if not above:
            yield budget


# --- an explanation -------------------------------------------------------------------------------------------------


def _memory(plan: Plan, found: Explanation) -> RenderableType:
    table = _grid("Where the memory goes", "", "")
    for name, size in found.categories.items():
        table.add_row(name, format_bytes(size), format_percent(size / plan.peak_bytes))
        if name == "activations":
            _add_modules(table, found.activations)
    table.add_row(Text("= peak", style="bold"), Text(format_bytes(plan.peak_bytes), style="bold"), "")
    for name, size in found.beside.items():
        if size:
            text = format_budget if name == "spare" and size > 0 else format_bytes
            table.add_row(f"+ {name}", text(size), "")
    table.add_row(Text("= all there is", style="bold"), format_budget(plan.budget.total_bytes), "")
    return table


def _add_modules(table: Table, sizes: Mapping[str, int]) -> None:
    named = list(sizes.items())
    for path, size in named[:_TOP]:
        table.add_row(f"  {path or 'the model itself'}", format_bytes(size), "", style="dim")
    if rest := named[_TOP:]:
        table.add_row(f"  {len(rest)} smaller", format_bytes(sum(size for _, size in rest)), "", style="dim")


def _binding(plan: Plan, found: Explanation) -> list[str]:
    where = f" of {plan.peak_module}" if plan.peak_module else ""
    sentences = [f"The peak is in {plan.peak_phase}{where}."]
    peak = found.phases.get(plan.peak_phase, 0)
    sentences += [
        f"{phase} reaches {format_bytes(size)}, {format_budget(peak - size)} less."
        for phase, size in found.phases.items()
        if phase != plan.peak_phase
    ]
    return sentences


def _other_plans(plan: Plan, found: Explanation) -> list[str]:
    if not plan.frontier:
        return ["The plan does not say: it has no frontier."]
    texts = []
    if found.smaller is None:
        texts.append("None for this batch needs less memory.")
    else:
        saved, cost = format_budget(-found.smaller.more_bytes), format_seconds(found.smaller.more_s)
        share = format_percent(found.smaller.more_s / plan.step_s)
        texts.append(
            f"The next smaller needs {saved} less and takes {cost} ({share}) more a step: {_does(found.smaller)}."
        )
    if found.faster is None:
        texts.append("None for this batch is faster.")
    else:
        needs, saved = format_bytes(found.faster.more_bytes), format_seconds(-found.faster.more_s)
        over = found.faster.more_bytes - found.beside["spare"]
        room = f", {format_bytes(over)} over the budget" if over > 0 else ""
        share = format_percent(-found.faster.more_s / plan.step_s)
        texts.append(
            f"The next faster saves {saved} ({share}) a step and needs {needs} more{room}: {_does(found.faster)}."
        )
    if plan.is_for_card and len(plan.frontier) > 1:
        texts.append("What others need of the card is an estimate, from what this one needs.")
    return texts


def _does(other: Neighbour) -> str:
    named = "; ".join(other.changes[:_TOP])
    return f"{named}; and {len(other.changes) - _TOP} more" if len(other.changes) > _TOP else named


def _shift_text(plan: Plan, shift: Shift) -> str:
    moved = f"{format_budget(abs(shift.by_bytes))} {'more' if shift.by_bytes > 0 else 'less'}"
    if shift.step_s is None:
        if not shift.exact:
            return f"{moved}: no plan for this micro-batch is known."
        is_below = plan.budget_bytes + shift.by_bytes < plan.smallest_bytes
        return f"{moved}: nothing fits{f' below {format_bytes(plan.smallest_bytes)}' if is_below else ''}."
    gained = shift.more_s or 0.0
    if not gained:
        return f"{moved}: {'no' if shift.exact else 'no known'} change."
    share = format_percent(abs(gained) / plan.step_s)
    change = f"{format_seconds(abs(gained))} ({share}) {'more' if gained > 0 else 'less'}"
    took = format_seconds(shift.step_s)
    if shift.exact:
        return f"{moved}: {took} a step, {change}."
    bound = "about" if plan.is_for_card else "at most"
    return f"{moved}: {bound} {took} a step, {change} (read off the frontier, not solved again)."


def _price_texts(plan: Plan, price: Price | None) -> list[str]:
    if price is None:
        return []
    solved, told = (
        f"{format_seconds(saved_s)} ({format_percent(saved_s / plan.step_s)})" if saved_s else "nothing"
        for saved_s in (price.solved_s, price.told_s)
    )
    beside = ", by its tensors alone" if plan.is_for_card else ""  # the allocator rounds anew in each plan
    if solved == told:
        return [f"One GiB more, solved again, saves {solved} of a step, as the plan says."]
    return [f"One GiB more, solved again, saves {solved} of a step; the plan says {told}{beside}."]


def _card_texts(found: Explanation) -> list[str]:
    if found.cards is None:
        return ["This plan is for a CPU. A card's kernels and allocator need other memory: plan for a card to know."]
    return list(found.cards.sentences)


# --- a comparison ---------------------------------------------------------------------------------------------------


def _spoken(field: str) -> str:
    return _WORDS.get(field) or field.removesuffix("_bytes").removesuffix("_s").replace("_", " ")


def _time_text(name: str, value: float) -> str:
    if name in ("slowdown", "gap"):
        return format_percent(value)
    return format_rate(value, "samples") if name == "samples_per_s" else format_seconds(value)


# --- both -----------------------------------------------------------------------------------------------------------


def _title(text: str) -> RenderableType:
    return Text(text, style="bold")


def _indented(sentences: Iterable[str]) -> list[RenderableType]:
    return [Padding(Text(sentence), (0, 0, 0, 2)) for sentence in sentences]


def _grid(title: str, *columns: str) -> Table:
    """Words on the left, values on the right; everything folds."""
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=any(columns),
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="left" if any(columns) else "right")
    return table
