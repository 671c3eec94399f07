"""What a solver answers: a choice, what it costs, and how far from the best it can be at most."""

from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Self

from memplan.problem import Choice, Problem, staging_of


class Status(Enum):
    """How good the answer is; the value is the sentence that the user reads."""

    OPTIMAL = "no choice within the budget is faster"
    BOUNDED = "a faster choice may exist, but none faster than the proven bound"
    INFEASIBLE = "no choice fits the budget"


@dataclass(frozen=True, slots=True)
class Solution:
    """A solver's answer. All fields but `status` are None exactly when nothing fits."""

    status: Status
    choice: Choice | None = None
    step_s: float | None = None  # of the whole optimizer step under `choice`
    bound_s: float | None = None  # no choice within the budget has a shorter step
    peak_bytes: int | None = None  # the solver's own claim; the simulator is the judge of it

    @classmethod
    def infeasible(cls) -> Self:
        """The answer when no choice fits."""
        return cls(Status.INFEASIBLE)

    @classmethod
    def of(cls, problem: Problem, choice: Choice, bound_s: float) -> Self:
        """The answer `choice`, when no feasible step can be shorter than `bound_s` seconds."""
        step_s = problem.step_s(choice)
        status = Status.BOUNDED if bound_s < step_s else Status.OPTIMAL
        return cls(status, choice, step_s, min(bound_s, step_s), peak_bytes(problem, choice))

    @property
    def gap(self) -> float | None:
        """The share of the step, 0 to 1, that a better choice could save at most: (step - bound) / step.

        This is the relative MIP gap as HiGHS and Gurobi define it. None when nothing fits.
        """
        if self.step_s is None or self.bound_s is None:
            return None
        return (self.step_s - self.bound_s) / self.step_s if self.step_s > 0 else 0.0


def gap_peaks(problem: Problem) -> list[int]:
    """The larger peak of each gap, the holds before it taken off."""
    return [max(gap.forward_bytes, gap.backward_bytes) for gap in problem.gaps]


def peak_bytes(problem: Problem, choice: Choice) -> int:
    """The largest of all moments under `choice`, by the formula that the solvers use: constants + prefix of holds."""
    chosen = problem.chosen(choice)
    staged = staging_of(chosen)
    before = list(accumulate((option.hold_bytes for option in chosen), initial=0))
    first, *between = gap_peaks(problem)
    loss = before[-1] + between.pop() if between else 0
    gaps = (s + gap + staged for s, gap in zip(before[1:], between, strict=False))
    blocks = (
        s + block.base_bytes + max(option.forward_bytes, option.backward_bytes) + staged
        for s, block, option in zip(before, problem.blocks, chosen, strict=False)
    )
    return max(problem.optimizer_bytes, first, loss, *gaps, *blocks)
