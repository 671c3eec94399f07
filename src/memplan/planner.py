"""The outer search: which micro-batch, how often accumulated, and what each block does about memory.

For one micro-batch the solvers find the best choice. This file finds the micro-batch: it asks the profile for the
problem at every size worth trying, skips those whose fastest imaginable step cannot win, and believes a solver only
after the simulator has walked its choice. Pure arithmetic: no device, no clock, the same answer twice.

What is tried:

* a given micro-batch: that one;
* a given effective batch: every divisor (only the whole, where the profile says that a batch must not be split);
* neither: one micro-batch per step, of 1, 2, 3, 4, 6, 8, 12, ... samples, and by bisection the largest that is
  accepted. This takes it that memory and slowdown only grow with the micro-batch, so that what fits is an interval.

Sizes are bytes, times are seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isclose
from typing import Protocol

from memplan.batches import splits
from memplan.errors import BadBatch
from memplan.problem import Block, Choice, Problem
from memplan.simulator import Timeline, simulate
from memplan.solvers import SOLVERS, Solution, Solver, smallest_budget
from memplan.solvers.tidy import tidied
from memplan.strategy import Recompute, Strategy

GIB = 2**30
FRONTIER_POINTS = 8


class Profile(Protocol):
    """What a step costs at any micro-batch."""

    @property
    def can_split(self) -> bool:
        """False where layers couple the samples of a batch: the effective batch may not be split."""

    @property
    def largest_micro_batch(self) -> int:
        """The end of the range in which the profile speaks."""

    def problem(self, micro_batch: int, accumulation: int, budget_bytes: int) -> Problem:
        """One optimizer step of `accumulation` micro-steps of `micro_batch` samples each."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The plan that was found, accepted by the simulator, and how good it is."""

    micro_batch: int
    accumulation: int
    problem: Problem  # `solution.choice` counts its options: those that the strategy allows
    solution: Solution
    timeline: Timeline
    slowdown: float  # share of time lost: step / step with every block's fastest option at this micro-batch - 1
    gap: float  # share of the step that another plan could save at most; see `search`
    shadow_price_s_per_gib: float  # seconds per step that 1 GiB more would save at this micro-batch
    frontier: tuple[tuple[int, float], ...]  # (peak bytes, seconds per step) at this micro-batch, from the least peak
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
    """A micro-batch, an accumulation, and what is known of it before solving."""

    micro_batch: int
    accumulation: int
    problem: Problem  # with the options that the strategy allows
    fastest_s: float  # seconds per step with every block's fastest option, allowed or not
    allowed_s: float  # the same with allowed options: no plan of this size is faster
    smallest_bytes: int

    @property
    def samples(self) -> int:
        return self.micro_batch * self.accumulation


@dataclass(frozen=True, slots=True)
class _Solved:
    """A size with its plan."""

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

    def size(self, micro_batch: int, accumulation: int) -> _Size:
        every = self.profile.problem(micro_batch, accumulation, self.budget_bytes)
        allowed = _allowed(every, self.strategy.recompute)
        fastest_s, allowed_s = every.step_s(_fastest(every)), allowed.step_s(_fastest(allowed))
        return _Size(micro_batch, accumulation, allowed, fastest_s, allowed_s, smallest_budget(allowed))

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
        low, high = size.smallest_bytes, simulate(size.problem, _fastest(size.problem)).peak_bytes
        if self.is_quick(self.solved(size, low)):
            return low
        if not self.is_quick(self.solved(size, high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.is_quick(self.solved(size, middle)):
                high = middle
            else:
                low = middle
        return high


def search(
    profile: Profile,
    budget_bytes: int,
    strategy: Strategy,
    *,
    effective_batch: int | None = None,
    micro_batch: int | None = None,
    solve: Solver = SOLVERS["dp"],
) -> Outcome | NoPlan:
    """The best plan within `budget_bytes`, the strategy's share of the memory already taken.

    The strategy's objective decides between sizes: "samples-per-second" takes the fastest and, of those within its
    tolerance, the largest micro-batch; "micro-batch" the largest micro-batch, run as fast as it can be; "peak" the
    smallest peak (of micro-batch 1 when neither batch is given), run as fast as that peak allows.

    `Outcome.gap` is the distance to the proven bound on what was compared: on all sizes when the effective batch is
    given and speed is the objective (the tolerance is then part of it), else on all choices at the micro-batch taken.

    Raises:
        BadBatch: the batch sizes contradict each other or what the profile covers.
    """
    task = _Task(profile, budget_bytes, strategy, solve)
    if effective_batch is None and micro_batch is None:
        sizes = [task.size(1, 1)] if strategy.objective == "peak" else list(_growing(task))
    else:
        sizes = [task.size(m, k) for m, k in _given(profile, effective_batch, micro_batch)]
    best = _best(task, sizes)
    if best is None:
        return _no_plan(task, min(sizes, key=lambda size: size.smallest_bytes))
    taken, bound_s = best
    step_s = taken.timeline.step_s
    problem = replace(taken.size.problem, budget_bytes=budget_bytes)
    return Outcome(
        micro_batch=taken.size.micro_batch,
        accumulation=taken.size.accumulation,
        problem=problem,
        solution=taken.solution,
        timeline=_judged(problem, taken.solution),
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
        raise BadBatch(
            f"a micro-batch of {pairs[0][0]} is beyond the {profile.largest_micro_batch} that this profile covers"
        )
    return covered


def _growing(task: _Task) -> Iterator[_Size]:
    """Sizes from 1 up to the largest that has a plan; the first is there even if it has none."""

    def has_plan(size: _Size) -> bool:
        if task.strategy.max_slowdown is None:  # then it need not be solved to know
            return size.smallest_bytes <= task.budget_bytes
        return task.plan(size) is not None

    size = task.size(1, 1)
    yield size
    if not has_plan(size):
        return
    low, high = 1, task.profile.largest_micro_batch + 1
    for micro_batch in _ladder(task.profile.largest_micro_batch):
        size = task.size(micro_batch, 1)
        if not has_plan(size):
            high = micro_batch
            break
        yield size
        low = micro_batch
    while high - low > 1:
        size = task.size((low + high) // 2, 1)
        if has_plan(size):
            yield size
            low = size.micro_batch
        else:
            high = size.micro_batch


def _ladder(largest: int) -> Iterator[int]:
    """2, 3, 4, 6, 8, 12, 16, ... and last `largest`."""
    power = 2
    while power < largest:
        yield power
        if power * 3 // 2 < largest:
            yield power * 3 // 2
        power *= 2
    if largest > 1:
        yield largest


# --- the best of them -----------------------------------------------------------------------------------------------


def _best(task: _Task, sizes: list[_Size]) -> tuple[_Solved, float] | None:
    """The plan that the objective prefers and a lower bound on what it was compared with; None if no size has one."""
    if task.strategy.objective == "samples-per-second":
        return _quickest(task, sizes)
    plans = (task.plan(size) for size in sorted(sizes, key=lambda size: -size.micro_batch))
    found = [plan for plan in plans if plan is not None]
    if not found:
        return None
    taken = found[0]
    if task.strategy.objective == "peak":
        taken = min(found, key=lambda plan: (plan.timeline.peak_bytes, plan.timeline.step_s / plan.size.samples))
    return taken, taken.bound_s


def _quickest(task: _Task, sizes: list[_Size]) -> tuple[_Solved, float] | None:
    """The largest micro-batch within the tolerance of the most samples per second.

    Sizes are tried in the order of what they could reach at most, so the first that can no longer come within the
    tolerance ends the search.
    """
    share = 1 - task.strategy.tolerance
    plans: list[_Solved] = []
    bounds_s: list[float] = []
    for size in sorted(sizes, key=lambda size: (size.allowed_s / size.samples, -size.micro_batch)):
        if plans and size.samples < max(plan.rate for plan in plans) * share * size.allowed_s:
            bounds_s.append(size.allowed_s)
            break
        plan = task.plan(size)
        if plan is not None:
            plans.append(plan)
            bounds_s.append(plan.bound_s)
    if not plans:
        return None
    top = max(plan.rate for plan in plans)
    taken = max((plan for plan in plans if plan.rate >= top * share), key=lambda plan: plan.size.micro_batch)
    comparable = len({size.samples for size in sizes}) == 1  # a step of other samples bounds nothing
    return taken, min(bounds_s) if comparable else taken.bound_s


def _shadow_price(task: _Task, taken: _Solved) -> float:
    """Seconds per step that 1 GiB above the plan's own budget would save, at the same micro-batch."""
    richer = task.solved(taken.size, _budget_of(task, taken) + GIB)
    return max(0.0, taken.timeline.step_s - richer.timeline.step_s)


def _budget_of(task: _Task, taken: _Solved) -> int:
    return taken.timeline.peak_bytes if task.strategy.objective == "peak" else task.budget_bytes


def _frontier(task: _Task, taken: _Solved) -> tuple[tuple[int, float], ...]:
    """Peak against time from the smallest budget to the fastest options, and the plan taken; each step buys time."""
    size = taken.size
    low, high = size.smallest_bytes, simulate(size.problem, _fastest(size.problem)).peak_bytes
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
        reason = "no choice of what to recompute fits the budget"
    else:
        reason = "every choice that fits is slower than the strategy's max_slowdown allows"
    return NoPlan(size.micro_batch, size.accumulation, task.least_bytes(size), reason)


# --- small pieces ---------------------------------------------------------------------------------------------------


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


def _allowed(problem: Problem, recompute: Recompute) -> Problem:
    """The problem with the options that the strategy allows; a block without such an option keeps all it has."""
    if recompute == "planned":
        return problem
    wanted = "recompute" if recompute == "all" else "keep"
    return replace(problem, blocks=tuple(_only(block, wanted) for block in problem.blocks))


def _only(block: Block, name: str) -> Block:
    options = tuple(option for option in block.options if option.name == name)
    return replace(block, options=options or block.options)


def _fastest(problem: Problem) -> Choice:
    """Every block's fastest option, of equally fast ones the one that holds less."""
    return tuple(
        min(range(len(options)), key=lambda k: (options[k].step_s, options[k].hold_bytes, k))
        for options in (block.options for block in problem.blocks)
    )
