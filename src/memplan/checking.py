"""The search for a plan whose own trace, not only its profile, is within a budget."""

from collections.abc import Callable

from memplan.planner import NoPlan, Outcome
from memplan.progress import stage
from memplan.study import Planned, Study

_CORRECTIONS = 4
_GUESSES = 4
_FAR = 1e-2  # of the budget: by more than this the profile is off only where it is no straight line
_NEGLIGIBLE = 1e-4  # of the budget: what a profile may be off by before another plan is tried


def checked(
    study: Study, ask: Callable[[int], Outcome | NoPlan], learn: Callable[[int], None], budget_bytes: int
) -> tuple[Outcome, Planned] | None:
    """The best plan whose own trace is within a budget.

    What a trace shows beyond the profile, and a card's allocator beyond the trace, is taken off the budget; where the
    former is much, the profile learns from traces at that micro-batch, for another moment has become the peak. The
    latter is guessed before the first trace, so that fewer are needed.
    """
    asked, taken, seen = _first_to_ask(study, ask, budget_bytes), None, set()
    for _ in range(_CORRECTIONS):
        stage("solving")
        outcome = ask(asked)
        if isinstance(outcome, NoPlan):
            break
        key = (outcome.micro_batch, outcome.accumulation, outcome.variant, outcome.solution.choice)
        if key in seen:
            break
        seen.add(key)
        stage("checking")
        planned = study.traced(outcome)
        better = taken is None or outcome.samples_per_s > taken[0].samples_per_s
        if better and planned.needs_bytes <= budget_bytes:
            taken = outcome, planned
        surprise = planned.trace.peak_bytes - outcome.timeline.peak_bytes
        room = budget_bytes - (planned.needs_bytes - planned.trace.peak_bytes)
        as_asked = room - asked <= _FAR * budget_bytes
        if abs(surprise) <= _NEGLIGIBLE * budget_bytes and taken is not None and as_asked:
            break
        if abs(surprise) > _FAR * budget_bytes:
            learn(outcome.micro_batch)
            surprise = 0
        asked = room - surprise
    return taken


def _first_to_ask(study: Study, ask: Callable[[int], Outcome | NoPlan], budget_bytes: int) -> int:
    """The budget, less what a card's allocator will probably take beyond the peak of the plan that is found then."""
    asked, best, rate = budget_bytes, budget_bytes, 0.0
    for _ in range(_GUESSES):
        outcome = ask(asked)
        if isinstance(outcome, NoPlan):
            break
        excess = study.expected_excess(outcome.timeline.peak_bytes)
        if outcome.timeline.peak_bytes + excess <= budget_bytes and outcome.samples_per_s > rate:
            best, rate = asked, outcome.samples_per_s
        if asked == budget_bytes - excess:
            break
        asked = budget_bytes - excess
    return best
