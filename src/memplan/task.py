"""One search at one size: a micro-batch, an accumulation and a variant, solved within a budget and judged.

Pure arithmetic. Sizes are bytes, times are seconds.
"""

from dataclasses import dataclass, replace
from math import inf, isclose
from typing import Protocol

from memplan.problem import Problem, levers_of
from memplan.simulator import Timeline, simulate
from memplan.sizes import allowed, fastest, least_s
from memplan.solvers import Solution, Solver, smallest_budget
from memplan.solvers.tidy import tidied
from memplan.strategy import Strategy


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
class Size:
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

    def asking(self, at_most_s: float = inf, enough: float = 0.0) -> "Size":
        """The same, with what the solver is told to be of no interest: see `Problem`."""
        return replace(self, problem=replace(self.problem, at_most_s=at_most_s, enough=enough))


@dataclass(frozen=True, slots=True)
class Solved:
    """A size with its plan, the fastest within the budget that was asked for."""

    size: Size
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
class Task:
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

    def sizes(self, micro_batch: int, accumulation: int) -> list[Size]:
        plain = self._plain(micro_batch, accumulation)
        return [self._sized(plain, micro_batch, accumulation, variant) for variant in self.variants]

    def size(self, micro_batch: int, accumulation: int, variant: str) -> Size:
        return self._sized(self._plain(micro_batch, accumulation), micro_batch, accumulation, variant)

    def _plain(self, micro_batch: int, accumulation: int) -> Problem:
        return self.profile.problem(micro_batch, accumulation, self.budget_bytes, self.profile.variants[0])

    def _sized(self, plain: Problem, micro_batch: int, accumulation: int, variant: str) -> Size:
        every = plain
        if variant != self.profile.variants[0]:
            every = self.profile.problem(micro_batch, accumulation, self.budget_bytes, variant)
        problem = replace(allowed(every, self.strategy), link_bytes_s=self.link_bytes_s, host_bytes=self.host_bytes)
        return Size(
            micro_batch=micro_batch,
            accumulation=accumulation,
            variant=variant,
            problem=problem,
            fastest_s=plain.step_s(fastest(plain)),
            allowed_s=least_s(problem),
            smallest_bytes=smallest_budget(problem),
        )

    def solved(self, size: Size, budget_bytes: int) -> Solved:
        """The fastest plan of a size within a budget that is not below its smallest."""
        problem = replace(size.problem, budget_bytes=budget_bytes)
        solution = tidied(problem, self.solve(problem))
        return Solved(size, solution, _judged(problem, solution))

    def quickest(self, sizes: list[Size], budget_bytes: int) -> Solved:
        """The fastest plan of some sizes within a budget that is not below all their smallest."""
        found: list[Solved] = []
        limit_s = inf
        for size in sorted(sizes, key=lambda size: size.allowed_s):
            if size.smallest_bytes <= budget_bytes and size.allowed_s < limit_s:
                found.append(self.solved(size.asking(limit_s, size.problem.enough), budget_bytes))
                limit_s = min(limit_s, found[-1].timeline.step_s)
        return min(found, key=lambda solved: solved.timeline.step_s)

    def plan(self, size: Size) -> Solved | None:
        """The plan that the objective wants of a size; None if the budget or max_slowdown leave none."""
        wanted = self.least_bytes(size) if self.strategy.objective == "peak" else self.budget_bytes
        if wanted is None or not size.smallest_bytes <= wanted <= self.budget_bytes:
            return None
        solved = self.solved(size, wanted)
        return solved if self.is_quick(solved) else None

    def is_quick(self, solved: Solved) -> bool:
        most = self.strategy.max_slowdown
        return most is None or solved.slowdown <= most

    def least_bytes(self, size: Size) -> int | None:
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
