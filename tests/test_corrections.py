"""What runs teach: bounded, never from themselves, and nothing without runs."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan.corrections import BOUNDS, Corrections, Run, seconds_by_lever
from memplan.roofline import StepTimes

MIB = 2**20
TIMES = StepTimes(
    blocks={
        ("a", "keep"): {2: 1.0, 4: 2.0},
        ("a", "recompute"): {2: 1.5, 4: 3.0},
        ("a", "select-0"): {2: 1.1, 4: 2.2},
    },
    rest={"keep": {2: 1.0, 4: 2.0}, "chunked-8": {2: 1.25, 4: 2.5}, "chunked-9": {2: 0.5, 4: 1.0}}
    | {"optimizer-single": {2: 1.0, 4: 2.0}},
    optimizer_s=0.5,
    how="measured",
    stepping={"optimizer-single": 0.25},
)


def run(**changes: Any) -> Run:
    values = {"seconds": {"keep": 1.0}, "times": "measured", "step_s": 1.0, "predicted_bytes": MIB, "peak_bytes": MIB}
    return Run(**(values | changes))


def test_without_runs_nothing_changes() -> None:
    none = Corrections()
    assert none.applied(TIMES) is TIMES
    assert none.excess_bytes == 0
    assert none.describe("measured") == ()


def test_one_run_is_laid_on_the_whole_step() -> None:
    learned = Corrections((run(seconds={"keep": 0.9, "recompute": 0.1}, step_s=1.25),))
    factors = learned.factors("measured")
    assert 1.15 < factors["keep"] < 1.25
    assert factors["recompute"] == pytest.approx(factors["keep"], rel=0.03)


def test_runs_of_other_plans_tell_the_levers_apart() -> None:
    kept = [run(seconds={"keep": 1.0}, step_s=1.0)] * 9
    recomputed = [run(seconds={"keep": 0.7, "recompute": 0.3}, step_s=0.7 + 1.5 * 0.3)] * 9
    factors = Corrections((*kept, *recomputed)).factors("measured")
    assert factors["keep"] == pytest.approx(1.0, abs=0.05)
    assert 1.2 < factors["recompute"] < 1.5


def test_many_runs_are_followed_to_the_end() -> None:
    assert Corrections((run(step_s=1.3),) * 50).factors("measured")["keep"] == pytest.approx(1.3, rel=0.01)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    st.lists(
        st.tuples(
            st.dictionaries(
                st.sampled_from(["keep", "recompute", "select", "loss-head"]), st.floats(1e-6, 1e3), min_size=1
            ),
            st.floats(1e-6, 1e4),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_was_measured_factors_are_bounded_and_recomputing_stays_the_slower(
    measured: list[tuple[dict[str, float], float]],
) -> None:
    learned = Corrections(tuple(run(seconds=seconds, step_s=step_s) for seconds, step_s in measured))
    assert all(BOUNDS[0] <= factor <= BOUNDS[1] for factor in learned.factors("measured").values())
    found = learned.applied(TIMES)
    for size in (2, 4):
        kept, select, recompute = (found.blocks["a", name][size] for name in ("keep", "select-0", "recompute"))
        assert kept < select
        assert kept < recompute
    assert found.how == "measured"


def test_each_lever_gets_its_factor() -> None:
    kept = [run(seconds={"keep": 1.0}, step_s=1.0)] * 9
    recomputed = [run(seconds={"keep": 0.5, "recompute": 0.5}, step_s=1.25)] * 9
    learned = Corrections((*kept, *recomputed))
    whole, recompute = learned.factors("measured").values()
    found = learned.applied(TIMES)
    assert found.blocks["a", "recompute"] == pytest.approx({2: whole + 0.5 * recompute, 4: 2 * whole + recompute})
    assert found.blocks["a", "select-0"] == pytest.approx({2: 1.1 * whole, 4: 2.2 * whole})  # no run selected
    assert found.rest["chunked-8"] == pytest.approx({2: 1.25 * whole, 4: 2.5 * whole})
    assert found.optimizer_s == pytest.approx(0.5 * whole)
    assert found.stepping == pytest.approx({"optimizer-single": 0.25 * whole})


def test_runs_count_only_for_times_of_the_same_kind() -> None:
    learned = Corrections((run(times="estimate", step_s=1.5),))
    assert learned.applied(TIMES) is TIMES
    assert learned.factors("estimate")["keep"] > 1.3
    assert learned.describe("measured") == ()


def test_a_run_without_a_time_says_nothing_of_times() -> None:
    learned = Corrections((run(step_s=None), run(seconds={}, step_s=1.0)))
    assert learned.factors("measured") == {}


@pytest.mark.parametrize(
    ("peaks", "excess"), [([MIB - 5], 0), ([MIB + 7, MIB + 9, MIB - 500], 9), ([3 * MIB], MIB // 10)]
)
def test_peaks_only_add(peaks: list[int], excess: int) -> None:
    assert Corrections(tuple(run(peak_bytes=peak) for peak in peaks)).excess_bytes == excess


def test_what_a_plan_says_of_it() -> None:
    learned = Corrections((run(step_s=1.25), run(step_s=1.25, peak_bytes=MIB + 2048)))
    assert learned.describe("measured") == (
        "times corrected by 2 measured runs on this machine: x1.21",
        "2.00 KiB at least are kept free: 1 measured run on this machine needed more than predicted",
    )


def test_the_seconds_of_a_step_add_up() -> None:
    found = seconds_by_lever(TIMES, {"a": "recompute"}, "keep", micro_batch=4, accumulation=3)
    assert found == {"keep": 3 * (2.0 + 2.0) + 0.5, "recompute": 3 * 1.0}
    found = seconds_by_lever(TIMES, {"a": "keep"}, "chunked-8", micro_batch=4, accumulation=1)
    assert found == {"keep": 2.0 + 2.0 + 0.5, "loss-head": 0.5}
    found = seconds_by_lever(TIMES, {"a": "select-0"}, "chunked-9", micro_batch=2, accumulation=1)
    assert found == pytest.approx({"keep": 1.0 + 1.0 + 0.5 - 0.5, "select": 0.1})
    found = seconds_by_lever(TIMES, {"a": "keep"}, "optimizer-single", micro_batch=2, accumulation=4)
    assert found == pytest.approx({"keep": 4 * (1.0 + 1.0) + 0.5, "optimizer": 0.25})  # once, behind all micro-steps
