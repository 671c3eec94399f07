"""The judge against a step that was walked by hand, and against the definition of the peak."""

from dataclasses import replace

import pytest

from memplan.problem import Block, Gap, Option, Problem
from memplan.simulator import Moment, simulate

KEEP = Option("keep", hold_bytes=10, forward_bytes=12, backward_bytes=15, step_s=3.0)
RECOMPUTE = Option("recompute", hold_bytes=2, forward_bytes=11, backward_bytes=17, step_s=4.0)


def two_blocks(budget_bytes: int = 1000, accumulation: int = 1) -> Problem:
    return Problem(
        budget_bytes=budget_bytes,
        blocks=(Block("a", 100, (KEEP, RECOMPUTE)), Block("b", 200, (KEEP, RECOMPUTE))),
        gaps=(Gap(90, 91), Gap(92, 93), Gap(300, 301)),
        optimizer_bytes=150,
        rest_s=1.0,
        optimizer_s=0.5,
        accumulation=accumulation,
    )


def test_the_walk_is_the_one_done_by_hand() -> None:
    assert simulate(two_blocks(), (0, 1)).moments == (
        Moment("forward", "", 90),
        Moment("forward", "a", 112),
        Moment("forward", "", 10 + 92),
        Moment("forward", "b", 10 + 211),
        Moment("loss", "", 12 + 300),
        Moment("backward", "", 12 + 301),
        Moment("backward", "b", 10 + 217),
        Moment("backward", "", 10 + 93),
        Moment("backward", "a", 115),
        Moment("backward", "", 91),
        Moment("optimizer", "", 150),
    )


def test_the_peak_is_named_by_phase_and_place() -> None:
    timeline = simulate(two_blocks(), (0, 1))
    assert (timeline.peak_bytes, timeline.peak_phase, timeline.peak_where) == (313, "backward", "")


def test_the_first_of_equal_peaks_is_named() -> None:
    problem = Problem(9, (), (Gap(7, 7),), optimizer_bytes=7, rest_s=0.0, optimizer_s=0.0)
    assert simulate(problem, ()).peak_phase == "loss"


@pytest.mark.parametrize(("budget_bytes", "fits"), [(312, False), (313, True), (314, True)])
def test_fits_is_at_most_the_budget(budget_bytes: int, fits: bool) -> None:
    assert simulate(two_blocks(budget_bytes), (0, 1)).fits is fits


def test_the_step_is_every_micro_step_and_the_optimizer() -> None:
    assert simulate(two_blocks(accumulation=3), (0, 1)).step_s == 3 * (3.0 + 4.0 + 1.0) + 0.5


def test_without_blocks_there_is_the_gap_and_the_optimizer() -> None:
    problem = Problem(100, (), (Gap(30, 40),), optimizer_bytes=35, rest_s=1.0, optimizer_s=0.0)
    assert simulate(problem, ()).moments == (
        Moment("loss", "", 30),
        Moment("backward", "", 40),
        Moment("optimizer", "", 35),
    )


@pytest.mark.parametrize("choice", [(), (0,), (0, 0, 0)])
def test_a_choice_of_another_length_is_refused(choice: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 blocks need 2 option indices"):
        simulate(two_blocks(), choice)


@pytest.mark.parametrize("choice", [(0, 2), (0, -1)])
def test_an_option_that_a_block_does_not_have_is_refused(choice: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="b has options 0 to 1"):
        simulate(two_blocks(), choice)


OFFLOAD = Option("offload", hold_bytes=4, forward_bytes=12, backward_bytes=15, step_s=3.0, link_bytes=6)


def with_link(bytes_s: float | None = 3.0, host_bytes: int | None = 12) -> Problem:
    blocks = tuple(Block(path, base, (KEEP, OFFLOAD)) for path, base in (("a", 100), ("b", 200)))
    return replace(two_blocks(), blocks=blocks, link_bytes_s=bytes_s, host_bytes=host_bytes)


def test_bytes_in_flight_are_there_from_the_first_block_to_the_last_but_not_at_the_head() -> None:
    timeline = simulate(with_link(), (1, 0))
    staging = 2 * 6
    assert [moment.bytes for moment in timeline.moments] == [
        90,
        112 + staging,
        4 + 92 + staging,
        4 + 212 + staging,
        14 + 300,
        14 + 301,
        4 + 215 + staging,
        4 + 93 + staging,
        115 + staging,
        91,
        150,
    ]
    assert timeline.host_bytes == 6


def test_the_step_waits_for_the_link() -> None:
    """A copy takes 2 s each way, a block's forward 1 s and its backward 2 s, so two copies out end at 3 s and 5 s."""
    problem = with_link()
    compute_s = 3.0 + 3.0 + 1.0 + 0.5
    assert simulate(problem, (0, 0)).step_s == compute_s
    assert simulate(problem, (1, 0)).step_s == pytest.approx(compute_s + 1.0)  # copied at 3 s, the forward ends at 2 s
    assert simulate(problem, (1, 1)).step_s == pytest.approx(compute_s + 3.0 + 2.0)  # and block b's copy comes first


@pytest.mark.parametrize(
    ("bytes_s", "host_bytes", "fits"),
    [(3.0, 12, True), (3.0, 11, False), (3.0, None, False), (None, 12, False)],
)
def test_what_is_copied_needs_a_link_and_room(bytes_s: float | None, host_bytes: int | None, fits: bool) -> None:
    assert simulate(with_link(bytes_s, host_bytes), (1, 1)).fits is fits
    assert simulate(with_link(bytes_s, host_bytes), (0, 0)).fits
