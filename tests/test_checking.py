"""The search for a plan whose own trace is within a budget, on a card with an allocator of its own."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from memplan.checking import Tried, best, checked
from memplan.plan_record import Verdict
from memplan.planner import NoPlan, Outcome
from memplan.study import Planned, Study

BUDGET = 1000
STEP = 50  # plans need multiples of this


@dataclass
class Card:
    """Plans that use all they may, at a rate that grows with it; the allocator takes more than their peak."""

    excess: int
    guessed: int
    least: int = STEP
    larger_batch_from: int = 10**9  # peaks from here on are of twice the micro-batch, for which it takes twice as much
    excess_of: dict[int, int] = field(default_factory=dict)  # a peak -> what is taken beyond that one
    traced_peaks: list[int] = field(default_factory=list)

    def ask(self, usable: int) -> Outcome | NoPlan:
        peak = usable // STEP * STEP
        if peak < self.least:
            return NoPlan(1, 1, self.least, "too little")
        solution, timeline = SimpleNamespace(choice=(peak,)), SimpleNamespace(peak_bytes=peak)
        plan = {"micro_batch": 1 + (peak >= self.larger_batch_from), "accumulation": 1, "variant": "keep"}
        return cast(Outcome, SimpleNamespace(**plan, solution=solution, timeline=timeline, samples_per_s=peak))

    def expected_excess(self, peak_bytes: int) -> int:
        return self.guessed

    def traced(self, outcome: Outcome) -> Planned:
        peak = outcome.timeline.peak_bytes
        self.traced_peaks.append(peak)
        needs = peak + self.excess_of.get(peak, self.excess) * outcome.micro_batch
        return cast(Planned, SimpleNamespace(trace=SimpleNamespace(peak_bytes=peak), needs_bytes=needs))


def found_on(card: Card) -> int | None:
    def learn(_: int) -> None:
        raise AssertionError("the traces are as predicted")

    found = checked(Tried(cast(Study, cast(Any, card))), card.ask, learn, BUDGET)
    return None if found is None else found[0].timeline.peak_bytes


def test_a_good_guess_takes_one_trace() -> None:
    card = Card(excess=100, guessed=100)
    assert found_on(card) == 900
    assert card.traced_peaks == [900]


def test_a_guess_that_was_too_low_is_corrected() -> None:
    card = Card(excess=200, guessed=100)
    assert found_on(card) == 800
    assert card.traced_peaks == [900, 800]


def test_a_guess_that_was_too_high_leaves_nothing_unused() -> None:
    card = Card(excess=0, guessed=300)
    assert found_on(card) == 1000
    assert card.traced_peaks == [700, 1000]


def test_what_a_larger_batch_takes_is_not_asked_twice() -> None:
    """By what the smaller batch takes the larger one would fit; its own trace has shown that it does not."""
    card = Card(excess=200, guessed=200, larger_batch_from=700)
    assert found_on(card) == 600
    assert card.traced_peaks == [800, 600]


@pytest.mark.parametrize("excess", [0, 500])
def test_no_plan_is_no_plan(excess: int) -> None:
    card = Card(excess=excess, guessed=0, least=BUDGET - excess + STEP)
    assert found_on(card) is None


def best_on(card: Card, possible: int = BUDGET) -> tuple[int, int, Verdict]:
    """Its peak, what it needs, and the verdict."""
    leanest = card.ask(card.least)
    assert not isinstance(leanest, NoPlan)
    tried = Tried(cast(Study, cast(Any, card)))
    (outcome, planned), verdict = best(tried, card.ask, lambda _: None, lambda: leanest, BUDGET, possible)
    assert len(card.traced_peaks) == len(set(card.traced_peaks))
    return outcome.timeline.peak_bytes, planned.needs_bytes, verdict


def test_where_guesses_rule_all_out_the_leanest_plan_fits_and_faster_ones_are_looked_for() -> None:
    """All from 600 to 850 take so much that they do not fit; what they take is taken for that of the others."""
    card = Card(excess=100, guessed=0, least=400, excess_of=dict.fromkeys(range(600, 1001, STEP), 700))
    assert best_on(card) == (550, 650, Verdict.FITS)


def test_the_likeliest_to_fit_is_what_needs_the_least_not_what_has_the_smallest_peak() -> None:

    def card() -> Card:
        return Card(excess=500, guessed=0, least=800, excess_of={1000: 100, 1050: 50})

    assert best_on(card(), possible=1100) == (1000, 1100, Verdict.UNCERTAIN)
    assert best_on(card(), possible=1090)[1:] == (1100, Verdict.DOES_NOT_FIT)


def test_of_two_that_need_as_much_the_faster_is_taken() -> None:
    card = Card(excess=300, guessed=0, least=800, excess_of={1000: 100})
    assert best_on(card, possible=1100) == (1000, 1100, Verdict.UNCERTAIN)
