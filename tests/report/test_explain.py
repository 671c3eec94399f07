import datetime
from typing import Any

import pytest
from records_made import GIB, MIB, make_plan

from memplan.gpus import Gpu
from memplan.plan_record import FrontierPoint, Plan, Verdict
from memplan.prediction import Timeline
from memplan.report.explain import Again, Shift, explain, shift_bytes


def point(
    size_gib: float, step_s: float, options: str = "kkkkk", chosen: bool = False, **changes: Any
) -> FrontierPoint:
    names = {"k": "keep", "r": "recompute", "s": "select-2"}
    values = {"head": "keep", "stepping": "plain"} | changes
    size = int(size_gib * GIB)
    return FrontierPoint(
        peak_bytes=size, step_s=step_s, options=tuple(names[o] for o in options), chosen=chosen, **values
    )


FRONTIER = (
    point(20, 1.5, "rrrrr", head="chunked-512"),
    point(21, 1.2, "rrrkk", chosen=True),
    point(22.5, 1.15, "rrkkk"),
    point(30, 1.0),
)


def a_plan(**changes: Any) -> Plan:
    """Of a card with 22 GiB to plan with, one of which is spare."""
    values: dict[str, Any] = {"frontier": FRONTIER, "step_s": 1.2, "fits_bytes": 21 * GIB, "shadow_price": 0.06}
    return make_plan(**(values | changes))


def card(name: str, gib: int) -> Gpu:
    return Gpu(name=name, kind="cuda", total_bytes=gib * GIB, date=datetime.date(2025, 1, 1))


def test_the_parts_sum_to_the_peak_and_with_what_is_beside_it_to_the_card() -> None:
    plan = a_plan(fits_bytes=21 * GIB + 300 * MIB)
    found = explain(plan)
    assert sum(found.categories.values()) == plan.peak_bytes
    assert sum(found.activations.values()) == found.categories["activations"]
    assert plan.peak_bytes + sum(found.beside.values()) == plan.budget.total_bytes
    assert found.beside["reserved beyond the peak"] == 300 * MIB


def test_modules_that_differ_in_a_number_are_one() -> None:
    parts = {"params": GIB, **{f"activations/layers.{i}.mlp": MIB for i in range(3)}, "activations/head": 2 * MIB}
    assert explain(a_plan(breakdown=parts)).activations == {"layers.0-2.mlp": 3 * MIB, "head": 2 * MIB}


def test_each_phase_has_its_most() -> None:
    timeline = Timeline(phase=("forward", "forward", "backward"), bytes={"params": (1, 2, 2), "activations": (1, 2, 5)})
    assert explain(a_plan(timeline=timeline)).phases == {"backward": 7, "forward": 4}
    assert explain(a_plan()).phases == {}


def test_the_neighbours_say_what_they_cost_and_what_they_do() -> None:
    found = explain(a_plan())
    assert found.smaller is not None
    assert found.faster is not None
    assert (found.smaller.more_bytes, found.faster.more_bytes) == (-GIB, 3 * GIB // 2)
    assert (found.smaller.more_s, found.faster.more_s) == (pytest.approx(0.3), pytest.approx(-0.05))
    assert found.smaller.changes == (
        "model.layers.3-4: recompute instead of keep",
        "the loss head: chunked-512 instead of whole",
    )
    assert found.faster.changes == ("model.layers.2: keep instead of recompute",)


@pytest.mark.parametrize(("kept", "missing"), [((0, 1), "faster"), ((1, 2), "smaller"), ((), "faster")])
def test_at_the_ends_there_is_no_neighbour(kept: tuple[int, ...], missing: str) -> None:
    found = explain(a_plan(frontier=tuple(FRONTIER[i] for i in kept)))
    assert getattr(found, missing) is None


def test_a_budget_is_moved_by_two_gib_and_a_small_one_by_a_quarter() -> None:
    assert shift_bytes(a_plan()) == 2 * GIB
    budget = a_plan().budget.model_copy(update={"total_bytes": 6 * GIB})
    assert shift_bytes(a_plan(budget=budget)) == GIB


def test_other_budgets_are_read_off_the_frontier() -> None:
    found = explain(a_plan())
    assert found.less.model_dump() == pytest.approx(
        {"by_bytes": -2 * GIB, "step_s": 1.5, "more_s": 0.3, "exact": False}
    )
    assert found.more.model_dump() == pytest.approx(
        {"by_bytes": 2 * GIB, "step_s": 1.14, "more_s": -0.06, "exact": False}
    )


def test_where_the_frontier_is_better_than_the_price_of_one_gib_it_counts() -> None:
    assert explain(a_plan(shadow_price=0.01)).more.step_s == 1.15


def test_below_the_least_that_fits_there_is_nothing() -> None:
    found = explain(a_plan(smallest_bytes=21 * GIB, frontier=FRONTIER[1:]))
    assert found.less == Shift(by_bytes=-2 * GIB, step_s=None, more_s=None, exact=True)


def test_a_plan_that_needs_less_than_the_smaller_budget_stays() -> None:
    frontier = (point(18, 1.5, "rrrrr"), point(19, 1.2, chosen=True))
    found = explain(a_plan(frontier=frontier, fits_bytes=19 * GIB, peak_bytes=19 * GIB))
    assert found.less == Shift(by_bytes=-2 * GIB, step_s=1.2, more_s=0.0, exact=True)


def test_a_plan_that_does_not_fit_is_told_from_which_budget_on() -> None:
    plan = a_plan(smallest_bytes=25 * GIB, fits_bytes=25 * GIB, frontier=(point(25, 1.5, chosen=True), point(30, 1.0)))
    assert explain(plan).more == Shift(by_bytes=2 * GIB, step_s=None, more_s=None, exact=True)


def test_beyond_the_fastest_plan_memory_buys_nothing() -> None:
    frontier = (point(20, 1.5, "rrrrr"), point(21, 1.2, chosen=True))
    found = explain(a_plan(frontier=frontier, shadow_price=0.0))
    assert found.more == Shift(by_bytes=2 * GIB, step_s=1.2, more_s=0.0, exact=True)


def test_what_was_solved_again_wins_over_the_frontier() -> None:
    again = Again(None, a_plan(step_s=1.0), a_plan(step_s=0.875), a_plan(step_s=0.9))
    found = explain(a_plan(), again=again)
    assert found.price is not None
    assert found.price.model_dump() == pytest.approx({"told_s": 0.06, "solved_s": 0.12})
    assert found.less == Shift(by_bytes=-2 * GIB, step_s=None, more_s=None, exact=True)
    assert found.more.model_dump() == pytest.approx(
        {"by_bytes": 2 * GIB, "step_s": 1.05, "more_s": -0.15, "exact": True}
    )


def test_the_smallest_cards_for_the_plan_and_for_keeping_everything() -> None:
    cards = [card("large", 80), card("small", 16), card("same", 24), card("middle", 32)]
    found = explain(a_plan(), cards).cards
    assert found is not None
    assert found.plan == ("same", "middle", "large")  # of 24 GiB less 0.5 of context and 0.5/23 kept free
    assert found.everything == ("middle", "large")


def test_a_plan_for_a_cpu_names_no_card() -> None:
    assert explain(a_plan(fits_bytes=None), [card("large", 80)]).cards is None


def test_for_a_plan_that_does_not_fit_only_the_others_times_are_known() -> None:
    found = explain(a_plan(), again=Again(None, None, a_plan(step_s=1.5), None))
    assert found.more == Shift(by_bytes=2 * GIB, step_s=1.5, more_s=1.5 - 1.2, exact=True)


def test_a_plan_over_its_budget_is_what_more_memory_pays_for() -> None:
    over = a_plan(verdict=Verdict.UNCERTAIN, fits_bytes=23 * GIB, smallest_bytes=23 * GIB, frontier=())
    found = explain(over)
    assert found.less == Shift(by_bytes=-2 * GIB, step_s=None, more_s=None, exact=True)
    assert found.more == Shift(by_bytes=2 * GIB, step_s=1.2, more_s=0.0, exact=False)


def test_the_leanest_plan_has_cards_of_its_own() -> None:
    cards = [card("large", 80), card("small", 16), card("same", 24)]
    found = explain(a_plan(smallest_bytes=14 * GIB), cards).cards
    assert found is not None
    assert found.least == ("small", "same", "large")
