"""The outer search: which micro-batch, how often accumulated, in which variant, and what each block does about memory.

For one micro-batch and one variant (a way to run what lies outside the blocks: the loss head, the optimizer) the
solvers find the best choice. This file finds those two: it asks the profile for the problem at every size worth trying,
skips those whose fastest imaginable step cannot win, and believes a solver only after the simulator has walked its
choice. Pure arithmetic: no device, no clock, the same answer twice.

What is tried:

* a given micro-batch: that one;
* a given effective batch: every divisor (only the whole, where the profile says that a batch must not be split);
* neither: one micro-batch per step, of 1, 2, 3, 4, 6, 8, 12, ... samples, and by bisection the largest that is
  accepted. This takes it that memory and slowdown only grow with the micro-batch, so that what fits is an interval.

Each is tried with every variant whose levers the strategy allows. Sizes are bytes, times are seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf

from memplan.batches import splits
from memplan.errors import BadBatch
from memplan.problem import Problem
from memplan.simulator import Timeline
from memplan.sizes import ladder
from memplan.solvers import SOLVERS, Solution, Solver
from memplan.strategy import Lever, Strategy
from memplan.task import Profile, Size, Solved, Task
from memplan.tradeoff import Point, frontier, shadow_price


@dataclass(frozen=True)
class Outcome:
    """The plan that was found, accepted by the simulator, and how good it is.

    What memory would buy beside it is only found out when it is asked for: that takes as long as the search.
    """

    micro_batch: int
    accumulation: int
    variant: str  # how what lies outside the blocks is run
    problem: Problem  # `solution.choice` counts its options: those that the strategy allows
    solution: Solution
    timeline: Timeline
    slowdown: float  # step / plain step with every block's fastest option at this micro-batch - 1; below 0: faster
    gap: float  # share of the step that another plan could save at most; see `search`
    smallest_bytes: int  # the least budget that some size tried would fit
    _task: Task = field(repr=False, compare=False)
    _taken: Solved = field(repr=False, compare=False)

    @cached_property
    def shadow_price_s_per_gib(self) -> float:
        """Seconds per step that 1 GiB more would save at this micro-batch."""
        return shadow_price(self._task, self._taken, self._ways)

    @cached_property
    def frontier(self) -> tuple[Point, ...]:
        """Plans at this micro-batch, from the least peak; this one is among them."""
        return frontier(self._task, self._taken, self._ways)

    @cached_property
    def _ways(self) -> list[Size]:
        return self._task.sizes(self.micro_batch, self.accumulation)

    @property
    def levers(self) -> tuple[Lever, ...]:
        """By which the plans were made that were compared: the strategy's, or those that it wants tried first."""
        return self._task.strategy.levers

    @property
    def samples_per_s(self) -> float:
        return self.micro_batch * self.accumulation / self.timeline.step_s


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Nothing that was tried is within the budget and the strategy."""

    micro_batch: int  # of the size that comes closest
    accumulation: int
    smallest_bytes: int | None  # the least budget at which that size has a plan; None: no budget helps
    reason: str  # one sentence


def search(
    profile: Profile,
    budget_bytes: int,
    strategy: Strategy,
    *,
    effective_batch: int | None = None,
    micro_batch: int | None = None,
    link_bytes_s: float | None = None,
    host_bytes: int | None = None,
    solve: Solver = SOLVERS["dp"],
) -> Outcome | NoPlan:
    """The best plan within `budget_bytes`, the strategy's share of the memory already taken.

    The strategy's objective decides between sizes: "samples-per-second" takes the fastest and, of those within its
    tolerance, the largest micro-batch; "micro-batch" the largest micro-batch, run as fast as it can be; "peak" the
    smallest peak (of micro-batch 1 when neither batch is given), run as fast as that peak allows.

    Nothing is copied to the host unless its link's speed (bytes per second, each way) and the bytes that may lie there
    are both given. Levers that the strategy wants tried first are tried alone first.

    `Outcome.gap` is the distance to the proven bound on what was compared: on all sizes when the effective batch is
    given and speed is the objective (the tolerance is then part of it), else on all variants and choices at the
    micro-batch taken; where the peak is the objective, on all choices within that peak.

    Raises:
        BadBatch: the batch sizes contradict each other or what the profile covers.
    """
    task = Task(profile, budget_bytes, strategy, solve, link_bytes_s, host_bytes)
    if strategy.levers_first:
        first = replace(strategy, levers=strategy.levers_first, levers_first=())
        found = _found(replace(task, strategy=first), effective_batch, micro_batch)
        if isinstance(found, Outcome):
            return found
    return _found(task, effective_batch, micro_batch)


def _found(task: Task, effective_batch: int | None, micro_batch: int | None) -> Outcome | NoPlan:
    if effective_batch is not None or micro_batch is not None:
        pairs = _given(task.profile, effective_batch, micro_batch)
        sizes = [size for m, k in pairs for size in task.sizes(m, k)]
    elif task.strategy.objective == "peak":
        sizes = task.sizes(1, 1)
    else:
        sizes = [size for variant in task.variants for size in _growing(task, variant)]
    best = _best(task, sizes)
    if best is None:
        return _no_plan(task, min(sizes, key=lambda size: size.smallest_bytes))
    taken, bound_s = best
    step_s = taken.timeline.step_s
    return Outcome(
        micro_batch=taken.size.micro_batch,
        accumulation=taken.size.accumulation,
        variant=taken.size.variant,
        problem=replace(taken.size.asking().problem, budget_bytes=task.budget_bytes),
        solution=taken.solution,
        timeline=taken.timeline,
        slowdown=taken.slowdown,
        gap=max(0.0, (step_s - bound_s) / step_s) if step_s > 0 else 0.0,
        smallest_bytes=min(size.smallest_bytes for size in sizes),
        _task=task,
        _taken=taken,
    )


# --- which sizes ----------------------------------------------------------------------------------------------------


def _given(profile: Profile, effective_batch: int | None, micro_batch: int | None) -> list[tuple[int, int]]:
    """The (micro-batch, accumulation) pairs that the caller's batch sizes leave."""
    pairs = splits(effective_batch, micro_batch, profile.can_split)
    covered = [(n, k) for n, k in pairs if n <= profile.largest_micro_batch]
    if not covered:
        most = profile.largest_micro_batch
        raise BadBatch(f"a micro-batch of {pairs[0][0]} is beyond the {most} that this profile covers")
    return covered


def _growing(task: Task, variant: str) -> Iterator[Size]:
    """Sizes of a variant, from 1 up to the largest that has a plan; the first is there even if it has none."""

    def has_plan(size: Size) -> bool:
        if task.strategy.max_slowdown is None:  # then it need not be solved to know
            return size.smallest_bytes <= task.budget_bytes
        return task.plan(size) is not None

    size = task.size(1, 1, variant)
    yield size
    if not has_plan(size):
        return
    low, high = 1, task.profile.largest_micro_batch + 1
    for micro_batch in ladder(task.profile.largest_micro_batch):
        size = task.size(micro_batch, 1, variant)
        if not has_plan(size):
            high = micro_batch
            break
        yield size
        low = micro_batch
    while high - low > 1:
        size = task.size((low + high) // 2, 1, variant)
        if has_plan(size):
            yield size
            low = size.micro_batch
        else:
            high = size.micro_batch


# --- the best of them -----------------------------------------------------------------------------------------------


def _best(task: Task, sizes: list[Size]) -> tuple[Solved, float] | None:
    """The plan that the objective prefers and a lower bound on what it was compared with; None if no size has one."""
    if task.strategy.objective == "samples-per-second":
        return _quickest(task, sizes)
    if task.strategy.objective == "micro-batch":
        return _largest(task, sizes)
    found = [plan for plan in map(task.plan, sizes) if plan is not None]
    if not found:
        return None
    taken = min(found, key=lambda plan: (plan.timeline.peak_bytes, -plan.rate, -plan.size.micro_batch))
    return taken, taken.bound_s


def _largest(task: Task, sizes: list[Size]) -> tuple[Solved, float] | None:
    """The largest micro-batch that has a plan, in its fastest variant."""
    for micro_batch in sorted({size.micro_batch for size in sizes}, reverse=True):
        found = _quickest(task, [size for size in sizes if size.micro_batch == micro_batch])
        if found is not None:
            return found
    return None


def _quickest(task: Task, sizes: list[Size]) -> tuple[Solved, float] | None:
    """The largest micro-batch within the tolerance of the most samples per second.

    Sizes are tried in the order of what they could reach at most; those that can no longer come within the tolerance
    are not solved.
    """
    share = 1 - task.strategy.tolerance
    plans: list[Solved] = []
    bounds: list[tuple[int, float]] = []  # (samples, seconds) of each size; a step of other samples bounds nothing
    for size in sorted(sizes, key=lambda size: (size.allowed_s / size.samples, -size.micro_batch)):
        slowest = max((plan.rate for plan in plans), default=0.0) * share
        if size.samples < slowest * size.allowed_s:
            bounds.append((size.samples, size.allowed_s))
            continue
        if plans and size.micro_batch <= _taken(plans, share).size.micro_batch:
            slowest = max(slowest, _taken(plans, share).rate)  # it is not taken for its size
        plan = task.plan(size.asking(at_most_s=size.samples / slowest if slowest > 0 else inf))
        if plan is not None:
            plans.append(plan)
            bounds.append((size.samples, plan.bound_s))
    if not plans:
        return None
    taken = _taken(plans, share)
    return taken, min(bound_s for samples, bound_s in bounds if samples == taken.size.samples)


def _taken(plans: list[Solved], share: float) -> Solved:
    """The largest micro-batch among the plans of at least this share of the most samples per second."""
    good = [plan for plan in plans if plan.rate >= max(other.rate for other in plans) * share]
    return max(good, key=lambda plan: (plan.size.micro_batch, plan.rate))


def _no_plan(task: Task, size: Size) -> NoPlan:
    """Why the size that needs the least has no plan, and the budget from which it has one."""
    if size.smallest_bytes > task.budget_bytes:
        reason = "no plan by the strategy's levers fits the budget"
    else:
        reason = "every choice that fits is slower than the strategy's max_slowdown allows"
    return NoPlan(size.micro_batch, size.accumulation, task.least_bytes(size), reason)
