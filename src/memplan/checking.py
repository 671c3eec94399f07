"""The search for a plan whose own trace, not only its profile, is within a budget."""

from collections.abc import Callable, Mapping

from memplan.plan_record import Verdict
from memplan.planner import NoPlan, Outcome
from memplan.progress import stage
from memplan.study import Planned, Study

Found = tuple[Outcome, Planned]


class Tried:
    """The plans of a study that were traced, each once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._known: dict[object, Found] = {}

    def traced(self, outcome: Outcome) -> Planned:
        key = (*_kind(outcome), outcome.solution.choice)
        if key not in self._known:
            self._known[key] = outcome, self.study.traced(outcome)
        return self._known[key][1]

    @property
    def leanest(self) -> Found:
        """That needs the least, and of several the fastest. On a card its tensors need not be the fewest."""
        return min(self._known.values(), key=lambda found: (found[1].needs_bytes, -found[0].samples_per_s))

    def too_large(self, budget_bytes: int) -> int:
        """The smallest peak in the profile of one that needs more than a budget; the budget if there is none."""
        beyond = (o.timeline.peak_bytes for o, planned in self._known.values() if planned.needs_bytes > budget_bytes)
        return min(beyond, default=budget_bytes)


_CORRECTIONS = 4
_HALVINGS = 4
_GUESSES = 4
_FAR = 1e-2  # of the budget: by more than this the profile is off only where it is no straight line
_NEGLIGIBLE = 1e-4  # of the budget: what a profile may be off by before another plan is tried


def best(
    tried: Tried,
    ask: Callable[[int], Outcome | NoPlan],
    learn: Callable[[int], None],
    leanest: Callable[[], Outcome],
    fits_bytes: int,
    possible_bytes: int,
) -> tuple[Found, Verdict]:
    """The best plan that is sure to fit; where there is none, the one that is the likeliest to.

    Args:
        leanest: makes the plan of the fewest bytes of tensors.
        fits_bytes: what a plan may need to fit.
        possible_bytes: what a plan may need not to be ruled out.
    """
    if (found := checked(tried, ask, learn, fits_bytes)) is not None:
        return found, Verdict.FITS
    checked(tried, ask, learn, possible_bytes)
    tried.traced(leanest())
    needs = tried.leanest[1].needs_bytes
    if needs <= fits_bytes:
        return faster(tried, ask, fits_bytes), Verdict.FITS
    return tried.leanest, Verdict.UNCERTAIN if needs <= possible_bytes else Verdict.DOES_NOT_FIT


def checked(
    tried: Tried, ask: Callable[[int], Outcome | NoPlan], learn: Callable[[int], None], budget_bytes: int
) -> Found | None:
    """The best plan whose own trace is within a budget.

    What a trace shows beyond the profile, and a card's allocator beyond the trace, is taken off the budget; where the
    former is much, the profile learns from traces at that micro-batch, for another moment has become the peak. The
    latter is guessed before the first trace, so that fewer are needed, and known of plans of a kind that was traced.
    """
    asked, taken = _first_to_ask(tried.study, ask, budget_bytes), None
    beyond: dict[object, int] = {}  # kind of plan -> what the last one of it needed beyond its peak in the profile
    for _ in range(_CORRECTIONS):
        stage("solving")
        outcome = _worth_tracing(ask, asked, beyond, budget_bytes)
        if outcome is None or (taken is not None and outcome.samples_per_s <= taken[0].samples_per_s):
            break
        stage("checking")
        planned = tried.traced(outcome)
        if planned.needs_bytes <= budget_bytes:
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
        beyond[_kind(outcome)] = budget_bytes - asked
    return taken


def faster(tried: Tried, ask: Callable[[int], Outcome | NoPlan], budget_bytes: int) -> Found:
    """The fastest that is found within a budget between the leanest plan, which is within it, and what was not.

    What an allocator takes beyond the peak is another with each plan, by more than the peaks differ where the budget is
    little more than the least. There what one plan takes says nothing of the next, so that what is asked is halved.
    """
    taken = tried.leanest
    low = taken[0].timeline.peak_bytes
    high = max(low, tried.too_large(budget_bytes))
    for _ in range(_HALVINGS):
        asked = (low + high) // 2
        outcome = ask(asked)
        if isinstance(outcome, NoPlan) or outcome.samples_per_s <= taken[0].samples_per_s:
            low = asked
            continue
        planned = tried.traced(outcome)
        if planned.needs_bytes <= budget_bytes:
            taken, low = (outcome, planned), asked
        else:
            high = asked
    return taken


def _worth_tracing(
    ask: Callable[[int], Outcome | NoPlan], asked: int, beyond: Mapping[object, int], budget_bytes: int
) -> Outcome | None:
    """The best plan for what is asked; where others of its kind rule it out, for what they leave."""
    while not isinstance(outcome := ask(asked), NoPlan):
        least = budget_bytes - beyond.get(_kind(outcome), budget_bytes - asked)
        if outcome.timeline.peak_bytes <= least:
            return outcome
        asked = least
    return None


def _kind(outcome: Outcome) -> tuple[int, int, str]:
    return outcome.micro_batch, outcome.accumulation, outcome.variant


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
