"""Why a plan is as it is: what takes the memory, which moment binds, what other plans and budgets would change."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import Field

from memplan.advice import large_enough
from memplan.gpus import Gpu
from memplan.plan_record import FrontierPoint, Layer, Plan
from memplan.prediction import activations_in, by_category
from memplan.records import Record
from memplan.report.paths import path_range, pattern_of

GIB = 2**30
_STEP_BYTES = 2 * GIB  # by so much the budget is moved, to see what changes ...
_STEP_SHARE = 4  # ... but by no more than this part of it
_CARDS = 3  # are named, from the smallest


class Neighbour(Record):
    """The next plan of the frontier, against the plan. Bytes and seconds may be below 0."""

    more_bytes: int
    more_s: float = Field(description="per step")
    changes: tuple[str, ...] = Field(description="what it does otherwise, a phrase each")


class Shift(Record):
    """The plan for another budget on the same card, in the same batch."""

    by_bytes: int = Field(description="more than the plan's budget; below 0: less")
    step_s: float | None = Field(description="per step; None: nothing fits")
    more_s: float | None = Field(description="than the plan's")
    exact: bool = Field(description="False: read off the frontier, and a step may take less time than that")


class Price(Record):
    """What one GiB more in the budget would save of a step, at the same micro-batch."""

    told_s: float = Field(description="as the plan says")
    solved_s: float = Field(description="as it was solved again for that budget")


class Cards(Record):
    """The smallest cards of the catalogue, of those with kernels like the plan's, with as large a share kept free."""

    least: tuple[str, ...] = Field(description="for the plan of the same strategy that needs the least")
    plan: tuple[str, ...] = Field(description="for the plan as it is")
    everything: tuple[str, ...] = Field(description="with nothing dropped, for the same batch")

    @property
    def sentences(self) -> tuple[str, ...]:
        """Which are large enough for what, and how sure that is."""
        texts = {"With the least memory": self.least, "For this plan": self.plan}
        texts |= {"With nothing dropped, for the same batch": self.everything}
        named = [f"{what}: {', '.join(names) or 'none of the catalogue'}." for what, names in texts.items()]
        return *named, (
            f"These are the {_CARDS} smallest by size, of cards with kernels like this one's: memplan plan --gpu CARD "
            "says for sure, and in what time."
        )


@dataclass(frozen=True, slots=True)
class Again:
    """A plan, solved again by one measure of time for four budgets. None: nothing fits, or it was not asked."""

    less: Plan | None  # `shift_bytes` less
    same: Plan | None
    more: Plan | None
    one_gib_more: Plan | None


class Explanation(Record):
    """A plan, explained. The tables are sorted from the largest."""

    schema_version: int = 1
    categories: dict[str, int] = Field(description="bytes at the peak; sums to Plan.peak_bytes")
    activations: dict[str, int] = Field(description="their part in that, by ranges of modules")
    beside: dict[str, int] = Field(description="what else there is; with the peak it sums to the budget's total")
    phases: dict[str, int] = Field(description="the most bytes in each phase of the step; empty without a timeline")
    smaller: Neighbour | None = Field(description="the next plan that needs less memory; None: there is none")
    faster: Neighbour | None = Field(description="the next plan that takes less time; None: there is none")
    less: Shift
    more: Shift
    price: Price | None = Field(description="None: not solved again, or the strategy would leave more memory unused")
    cards: Cards | None = Field(description="None for a plan for a CPU, whose kernels need other memory than a card's")


def shift_bytes(plan: Plan) -> int:
    """By how much the budget is moved: 2 GiB, less where the budget is small."""
    return min(_STEP_BYTES, plan.budget_bytes // _STEP_SHARE)


def explain(plan: Plan, gpus: Iterable[Gpu] = (), again: Again | None = None) -> Explanation:
    """What there is to say of a plan.

    Args:
        plan: the plan.
        gpus: the cards to look for a smaller or a larger one in.
        again: the plan for other budgets; None: what they would be is read off the frontier.
    """
    if again is None:
        shifts, price = (_below(plan), _above(plan)), None
    else:
        shifts = _solved(plan, again.less, again.same, -1), _solved(plan, again.more, again.same, 1)
        price = _price(plan, again)
    smaller, faster = _neighbours(plan)
    return Explanation(
        categories=_sorted(Counter(by_category(plan.breakdown))),
        activations=_by_range(activations_in(plan.breakdown)),
        beside=_beside(plan),
        phases=_phases(plan),
        smaller=smaller,
        faster=faster,
        less=shifts[0],
        more=shifts[1],
        price=price,
        cards=_cards(plan, gpus) if plan.is_for_card else None,
    )


# --- where the memory is --------------------------------------------------------------------------------------------


def _sorted(sizes: Counter[str]) -> dict[str, int]:
    return {name: size for name, size in sizes.most_common() if size}


def _by_range(sizes: Mapping[str, int]) -> dict[str, int]:
    """Modules of one pattern together."""
    groups: dict[str, list[str]] = {}
    for path in sizes:
        groups.setdefault(pattern_of(path), []).append(path)
    return _sorted(Counter({path_range(paths): sum(sizes[path] for path in paths) for paths in groups.values()}))


def _beside(plan: Plan) -> dict[str, int]:
    budget = plan.budget
    return {
        "reserved beyond the peak": plan.needs_bytes - plan.peak_bytes,
        "spare": plan.budget_bytes - plan.needs_bytes,
        "margin": budget.margin_bytes,
        "CUDA context": budget.context_bytes,
        "other processes": budget.others_bytes,
    }


def _phases(plan: Plan) -> dict[str, int]:
    most: Counter[str] = Counter()
    if plan.timeline is not None:
        for phase, size in zip(plan.timeline.phase, plan.timeline.total, strict=True):
            most[phase] = max(most[phase], size)
    return _sorted(most)


# --- other plans ----------------------------------------------------------------------------------------------------


def _neighbours(plan: Plan) -> tuple[Neighbour | None, Neighbour | None]:
    smaller = faster = None
    for left, right in pairwise(plan.frontier):
        if right.chosen:
            smaller = _neighbour(plan, right, left)
        if left.chosen:
            faster = _neighbour(plan, left, right)
    return smaller, faster


def _neighbour(plan: Plan, own: FrontierPoint, other: FrontierPoint) -> Neighbour:
    changes = differences(plan.layers, own.options, other.options)
    changes += [f"the loss head: {_head(other.head)} instead of {_head(own.head)}"] if other.head != own.head else []
    if other.stepping != own.stepping:
        changes.append(f"the optimizer steps {other.stepping} instead of {own.stepping}")
    return Neighbour(
        more_bytes=other.peak_bytes - own.peak_bytes, more_s=other.step_s - own.step_s, changes=tuple(changes)
    )


def _head(option: str) -> str:
    return "whole" if option == "keep" else option


def differences(layers: Sequence[Layer], own: Sequence[str], other: Sequence[str]) -> list[str]:
    """Which blocks do what instead of what, as "layers.0-3: recompute instead of keep"."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for layer, before, after in zip(layers, own, other, strict=True):
        if before != after:
            groups.setdefault((pattern_of(layer.path), before, after), []).append(layer.path)
    return [f"{path_range(paths)}: {after} instead of {before}" for (_, before, after), paths in groups.items()]


# --- other budgets --------------------------------------------------------------------------------------------------


def _solved(plan: Plan, other: Plan | None, same: Plan | None, sign: int) -> Shift:
    step_s = None if other is None else _in_its_measure(plan, other, same)
    return _shift(plan, sign * shift_bytes(plan), step_s, exact=True)


def _price(plan: Plan, again: Again) -> Price | None:
    if again.one_gib_more is None:
        return None
    saved_s = plan.step_s - _in_its_measure(plan, again.one_gib_more, again.same)
    return Price(told_s=plan.shadow_price, solved_s=max(0.0, saved_s))  # a plan within the solver's gap is no loss


def _in_its_measure(plan: Plan, other: Plan, same: Plan | None) -> float:
    """By the share of time between the two that were solved again: the plan's own times may be of another measure."""
    return other.step_s if same is None else other.step_s * plan.step_s / same.step_s


def _below(plan: Plan) -> Shift:
    by_bytes = -shift_bytes(plan)
    budget_bytes = plan.budget_bytes + by_bytes
    if plan.needs_bytes <= budget_bytes:
        return _shift(plan, by_bytes, plan.step_s, exact=True)
    fitting = [point.step_s for point in plan.frontier if point.peak_bytes <= budget_bytes]
    is_none = not fitting and budget_bytes < plan.smallest_bytes
    return _shift(plan, by_bytes, min(fitting, default=None), exact=is_none)


def _above(plan: Plan) -> Shift:
    """Of the frontier's points and the price of one GiB, what is better.

    Each is sure on a CPU; on a card what other plans need is an estimate, and the price is of tensors alone.
    """
    by_bytes = shift_bytes(plan)
    budget_bytes = plan.budget_bytes + by_bytes
    if budget_bytes < plan.smallest_bytes:
        return _shift(plan, by_bytes, None, exact=True)
    if plan.faster_within_budget is not None:  # the strategy does not want the memory that there is
        return _shift(plan, by_bytes, plan.step_s, exact=True)
    known = [point.step_s for point in plan.frontier if point.peak_bytes <= budget_bytes]
    if plan.needs_bytes <= budget_bytes:
        known.append(plan.step_s)
    if plan.needs_bytes <= plan.budget_bytes and by_bytes >= GIB:
        known.append(plan.step_s - plan.shadow_price)
    fastest = bool(plan.frontier) and plan.frontier[-1].peak_bytes <= budget_bytes
    sure = fastest and (plan.frontier[-1].chosen or not plan.is_for_card)
    return _shift(plan, by_bytes, min(known, default=None), exact=sure)


def _shift(plan: Plan, by_bytes: int, step_s: float | None, *, exact: bool) -> Shift:
    more_s = None if step_s is None else step_s - plan.step_s
    return Shift(by_bytes=by_bytes, step_s=step_s, more_s=more_s, exact=exact)


# --- other cards ----------------------------------------------------------------------------------------------------


def _cards(plan: Plan, gpus: Iterable[Gpu]) -> Cards:
    known = tuple(gpus)

    def enough(needs_bytes: int) -> tuple[str, ...]:
        return large_enough(needs_bytes, plan.budget, known)[:_CARDS]

    return Cards(
        least=enough(plan.smallest_bytes),
        plan=enough(plan.needs_bytes),
        everything=enough(plan.unplanned_needs_bytes),
    )
