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
from dataclasses import dataclass, replace
from math import inf, isclose
from typing import Protocol

from memplan.batches import splits
from memplan.errors import BadBatch
from memplan.problem import Problem, levers_of
from memplan.simulator import Timeline, simulate
from memplan.sizes import allowed, fastest, ladder, least_s
from memplan.solvers import SOLVERS, Solution, Solver, smallest_budget
from memplan.solvers.tidy import tidied
from memplan.strategy import Strategy

GIB = 2**30
FRONTIER_POINTS = 8
ROUGH = 0.01  # share of a step by which those may be slower than need be


class Profile(Protocol):
    """What a step costs at any micro-batch."""

    @property
    def can_split(self) -> bool:
        """False where layers couple the samples of a batch: the effective batch may not be split."""

    @property
    def largest_micro_batch(self) -> int:
        """The end of the range in which the profile speaks."""

    @property
    def variants(self) -> tuple[str, ...]:
        """The ways to run what lies outside the blocks; the first is the plain one, which pulls no lever."""

    def problem(self, micro_batch: int, accumulation: int, budget_bytes: int, variant: str) -> Problem:
        """One optimizer step of `accumulation` micro-steps of `micro_batch` samples each."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The plan that was found, accepted by the simulator, and how good it is."""

    micro_batch: int
    accumulation: int
    variant: str  # how what lies outside the blocks is run
    problem: Problem  # `solution.choice` counts its options: those that the strategy allows
    solution: Solution
    timeline: Timeline
    slowdown: float  # step / plain step with every block's fastest option at this micro-batch - 1; below 0: faster
    gap: float  # share of the step that another plan could save at most; see `search`
    shadow_price_s_per_gib: float  # seconds per step that 1 GiB more would save at this micro-batch and variant
    frontier: tuple[tuple[int, float], ...]  # (peak bytes, seconds per step) of those two, from the least peak
    smallest_bytes: int  # the least budget that some size tried would fit

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


@dataclass(frozen=True, slots=True)
class _Size:
    """A micro-batch, an accumulation, a variant, and what is known of it before solving."""

    micro_batch: int
    accumulation: int
    variant: str
    problem: Problem  # with the options that the strategy allows
    fastest_s: float  # seconds per plain step with every block's fastest option, allowed or not
    allowed_s: float  # no plan of this size is faster
    smallest_bytes: int

    @property
    def samples(self) -> int:
        return self.micro_batch * self.accumulation

    def asking(self, at_most_s: float = inf, enough: float = 0.0) -> "_Size":
        """The same, with what the solver is told to be of no interest: see `Problem`."""
        return replace(self, problem=replace(self.problem, at_most_s=at_most_s, enough=enough))


@dataclass(frozen=True, slots=True)
class _Solved:
    """A size with its plan, the fastest within the budget that was asked for."""

    size: _Size
    solution: Solution
    timeline: Timeline

    @property
    def bound_s(self) -> float:
        """No plan of this size is faster; that is true of 0 where the solver proves nothing."""
        return self.solution.bound_s or 0.0

    @property
    def slowdown(self) -> float:
        fastest_s = self.size.fastest_s
        return self.timeline.step_s / fastest_s - 1 if fastest_s > 0 else 0.0

    @property
    def rate(self) -> float:
        return self.size.samples / self.timeline.step_s


@dataclass(frozen=True, slots=True)
class _Task:
    """The arguments of one search."""

    profile: Profile
    budget_bytes: int
    strategy: Strategy
    solve: Solver
    link_bytes_s: float | None
    host_bytes: int | None

    @property
    def variants(self) -> tuple[str, ...]:
        """Those that the strategy allows."""
        levers = set(self.strategy.levers)
        return tuple(variant for variant in self.profile.variants if levers_of(variant) <= levers)

    def sizes(self, micro_batch: int, accumulation: int) -> list[_Size]:
        return [self.size(micro_batch, accumulation, variant) for variant in self.variants]

    def size(self, micro_batch: int, accumulation: int, variant: str) -> _Size:
        plain = self.profile.problem(micro_batch, accumulation, self.budget_bytes, self.profile.variants[0])
        every = plain
        if variant != self.profile.variants[0]:
            every = self.profile.problem(micro_batch, accumulation, self.budget_bytes, variant)
        problem = replace(allowed(every, self.strategy), link_bytes_s=self.link_bytes_s, host_bytes=self.host_bytes)
        return _Size(
            micro_batch=micro_batch,
            accumulation=accumulation,
            variant=variant,
            problem=problem,
            fastest_s=plain.step_s(fastest(plain)),
            allowed_s=least_s(problem),
            smallest_bytes=smallest_budget(problem),
        )

    def solved(self, size: _Size, budget_bytes: int) -> _Solved:
        """The fastest plan of a size within a budget that is not below its smallest."""
        problem = replace(size.problem, budget_bytes=budget_bytes)
        solution = tidied(problem, self.solve(problem))
        return _Solved(size, solution, _judged(problem, solution))

    def plan(self, size: _Size) -> _Solved | None:
        """The plan that the objective wants of a size; None if the budget or max_slowdown leave none."""
        wanted = self.least_bytes(size) if self.strategy.objective == "peak" else self.budget_bytes
        if wanted is None or not size.smallest_bytes <= wanted <= self.budget_bytes:
            return None
        solved = self.solved(size, wanted)
        return solved if self.is_quick(solved) else None

    def is_quick(self, solved: _Solved) -> bool:
        most = self.strategy.max_slowdown
        return most is None or solved.slowdown <= most

    def least_bytes(self, size: _Size) -> int | None:
        """The least budget at which a size has a plan within max_slowdown; None if no budget gives it one."""
        low, high = size.smallest_bytes, simulate(size.problem, fastest(size.problem)).peak_bytes
        if self.is_quick(self.solved(size, low)):
            return low
        if not self.is_quick(self.solved(size, high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.is_quick(self.solved(size, middle)) else (middle, high)
        return high


def _judged(problem: Problem, solution: Solution) -> Timeline:
    """The simulator's walk; the planner takes nothing that the simulator does not accept."""
    if solution.choice is None:
        raise RuntimeError("internal error: the solver found nothing where the smallest budget says that a choice fits")
    timeline = simulate(problem, solution.choice)
    if not timeline.fits or solution.step_s is None or not isclose(timeline.step_s, solution.step_s, rel_tol=1e-9):
        raise RuntimeError(
            f"internal error: the solver's choice needs {timeline.peak_bytes} of {problem.budget_bytes} bytes and "
            f"{timeline.step_s} s by the simulator, not {solution.peak_bytes} bytes and {solution.step_s} s"
        )
    return timeline


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
    task = _Task(profile, budget_bytes, strategy, solve, link_bytes_s, host_bytes)
    if strategy.levers_first:
        first = replace(strategy, levers=strategy.levers_first, levers_first=())
        found = _found(replace(task, strategy=first), effective_batch, micro_batch)
        if isinstance(found, Outcome):
            return found
    return _found(task, effective_batch, micro_batch)


def _found(task: _Task, effective_batch: int | None, micro_batch: int | None) -> Outcome | NoPlan:
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
        shadow_price_s_per_gib=_shadow_price(task, taken),
        frontier=_frontier(task, taken),
        smallest_bytes=min(size.smallest_bytes for size in sizes),
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


def _growing(task: _Task, variant: str) -> Iterator[_Size]:
    """Sizes of a variant, from 1 up to the largest that has a plan; the first is there even if it has none."""

    def has_plan(size: _Size) -> bool:
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


def _best(task: _Task, sizes: list[_Size]) -> tuple[_Solved, float] | None:
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


def _largest(task: _Task, sizes: list[_Size]) -> tuple[_Solved, float] | None:
    """The largest micro-batch that has a plan, in its fastest variant."""
    for micro_batch in sorted({size.micro_batch for size in sizes}, reverse=True):
        found = _quickest(task, [size for size in sizes if size.micro_batch == micro_batch])
        if found is not None:
            return found
    return None


def _quickest(task: _Task, sizes: list[_Size]) -> tuple[_Solved, float] | None:
    """The largest micro-batch within the tolerance of the most samples per second.

    Sizes are tried in the order of what they could reach at most; those that can no longer come within the tolerance
    are not solved.
    """
    share = 1 - task.strategy.tolerance
    plans: list[_Solved] = []
    bounds: list[tuple[int, float]] = []  # (samples, seconds) of each size; a step of other samples bounds nothing
    for size in sorted(sizes, key=lambda size: (size.allowed_s / size.samples, -size.micro_batch)):
        slowest = max((plan.rate for plan in plans), default=0.0) * share
        if size.samples < slowest * size.allowed_s:
            bounds.append((size.samples, size.allowed_s))
            continue
        plan = task.plan(size.asking(at_most_s=size.samples / slowest if slowest > 0 else inf))
        if plan is not None:
            plans.append(plan)
            bounds.append((size.samples, plan.bound_s))
    if not plans:
        return None
    good = [plan for plan in plans if plan.rate >= max(other.rate for other in plans) * share]
    taken = max(good, key=lambda plan: (plan.size.micro_batch, plan.rate))
    return taken, min(bound_s for samples, bound_s in bounds if samples == taken.size.samples)


def _shadow_price(task: _Task, taken: _Solved) -> float:
    """Seconds per step that 1 GiB above the plan's own budget would save, at the same micro-batch."""
    own_bytes = taken.timeline.peak_bytes if task.strategy.objective == "peak" else task.budget_bytes
    richer = task.solved(taken.size.asking(), own_bytes + GIB)
    return max(0.0, taken.timeline.step_s - richer.timeline.step_s)


def _frontier(task: _Task, taken: _Solved) -> tuple[tuple[int, float], ...]:
    """Peak against time from the smallest budget to the fastest options, and the plan taken; each step buys time."""
    size = taken.size.asking(enough=ROUGH)
    low, high = size.smallest_bytes, simulate(size.problem, fastest(size.problem)).peak_bytes
    budgets = {low + (high - low) * k // (FRONTIER_POINTS - 1) for k in range(FRONTIER_POINTS)}
    timelines = [task.solved(size, budget).timeline for budget in sorted(budgets)] + [taken.timeline]
    points: list[tuple[int, float]] = []
    for point in sorted({(timeline.peak_bytes, timeline.step_s) for timeline in timelines}):
        if not points or point[1] < points[-1][1]:
            points.append(point)
    return tuple(points)


def _no_plan(task: _Task, size: _Size) -> NoPlan:
    """Why the size that needs the least has no plan, and the budget from which it has one."""
    if size.smallest_bytes > task.budget_bytes:
        reason = "no plan by the strategy's levers fits the budget"
    else:
        reason = "every choice that fits is slower than the strategy's max_slowdown allows"
    return NoPlan(size.micro_batch, size.accumulation, task.least_bytes(size), reason)
