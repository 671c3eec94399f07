"""Laps on machines that are idle, busy now and then, or busy all the time; the laps are given, no clock is read."""

from collections.abc import Callable, Iterable
from itertools import chain, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.laps import AGREE, by_turns, doubted


def lasting(*seconds: float, then: float) -> Callable[[], float]:
    """Laps of these seconds, and any further ones of `then`."""
    laps: Iterable[float] = chain(seconds, repeat(then))
    return iter(laps).__next__


def counted(lap: Callable[[], float], count: list[int]) -> Callable[[], float]:
    def run() -> float:
        count[0] += 1
        return lap()

    return run


def test_an_idle_machine_needs_three_laps_and_one_to_warm_up() -> None:
    count = [0]
    laps = by_turns({"keep": counted(lasting(9.0e-3, then=5.0e-3), count)})
    assert laps.seconds == {"keep": 5.0e-3}
    assert (count[0], laps.doubt) == (4, 0.0)
    assert doubted(laps.doubt) == ()


def test_a_busy_moment_costs_laps_and_not_the_truth() -> None:
    """As many laps as it lasts, in whichever of the two."""
    busy = {"keep": lasting(2.0, 1.9, 1.5, 1.7, then=1.0), "recompute": lasting(2.0, 1.3, then=1.3)}
    laps = by_turns(busy)
    assert laps.seconds == {"keep": 1.0, "recompute": 1.3}
    assert laps.doubt <= AGREE


def test_a_machine_that_stays_busy_is_reported() -> None:
    growing = iter(0.1 * 1.3**n for n in range(100))
    laps = by_turns({"keep": growing.__next__})
    assert laps.doubt == pytest.approx(0.3)
    assert "differ by 30%" in doubted(laps.doubt)[0]


def test_long_laps_are_run_twice_if_they_agree() -> None:
    count = [0]
    assert by_turns({"keep": counted(lasting(then=30.0), count)}).seconds == {"keep": 30.0}
    assert count[0] == 2


def test_nobody_waits_for_ever_for_long_laps_to_agree() -> None:
    count = [0]
    growing = iter(30.0 * 1.3**n for n in range(100))
    assert by_turns({"keep": counted(growing.__next__, count)}).seconds == {"keep": 30.0}
    assert count[0] == 2


@given(st.lists(st.lists(st.floats(1e-6, 10.0), min_size=25, max_size=25), min_size=1, max_size=3))
def test_the_least_of_what_was_run_without_the_first(laps: list[list[float]]) -> None:
    given_s = {str(name): list(seconds) for name, seconds in enumerate(laps)}
    left = {name: iter(seconds) for name, seconds in given_s.items()}
    found = by_turns({name: seconds.__next__ for name, seconds in left.items()})
    for name, seconds in given_s.items():
        taken = seconds[: len(seconds) - len(list(left[name]))]
        counts = [s for turn, s in enumerate(taken) if turn or s > 2.0]
        assert found.seconds[name] == min(counts)
        assert 2 <= len(counts) <= 25
