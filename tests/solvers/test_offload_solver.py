"""Options that copy to the host: never over a limit, never below the bound, never slower for being allowed."""

from dataclasses import replace

import pytest
from chains import brute_force, chain, least_peak, offloading, offloading_problems, with_share
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.problem import Block, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import SOLVERS, Solver, Status, smallest_budget

EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
ULP = 1e-9
KEEP = Option("keep", 100, 110, 120, 3.0)
RECOMPUTE = Option("recompute", 10, 110, 120, 4.0, recompute_s=1.0)
OFFLOAD = Option("offload", 20, 110, 120, 3.0, link_bytes=80)


def blocks_of(count: int, *, budget_bytes: int, bytes_s: float | None, host_bytes: int | None) -> Problem:
    blocks = tuple(Block(f"layers.{i}", 0, (KEEP, RECOMPUTE, OFFLOAD)) for i in range(count))
    gaps = (Gap(0, 0),) * (count + 1)
    return Problem(budget_bytes, blocks, gaps, 0, 0.0, 0.0, link_bytes_s=bytes_s, host_bytes=host_bytes)


@EVERY_SOLVER
@given(problem=offloading_problems())
@settings(deadline=None, max_examples=80)
def test_no_limit_is_broken_and_the_bound_holds(solver: Solver, problem: Problem) -> None:
    solution, optimum = solver(problem), brute_force(problem)
    if solution.choice is None:
        assert optimum is None
        return
    timeline = simulate(problem, solution.choice)
    assert timeline.fits
    assert timeline.step_s == solution.step_s
    assert timeline.peak_bytes == solution.peak_bytes
    assert timeline.host_bytes <= (problem.host_bytes or 0)
    assert optimum is not None
    assert solution.bound_s is not None
    assert solution.bound_s <= problem.step_s(optimum) * (1 + ULP)


@EVERY_SOLVER
@given(problem=offloading_problems())
@settings(deadline=None, max_examples=40)
def test_answers_the_same_twice(solver: Solver, problem: Problem) -> None:
    assert solver(problem) == solver(problem)


@given(
    problem=offloading_problems(),
    share=st.sampled_from([0.5, 0.99, 1.0, 1.01, 2.0]),
    enough=st.sampled_from([0.0, 0.1]),
)
@settings(deadline=None, max_examples=80)
def test_what_is_of_no_interest_takes_nothing_from_the_proof(problem: Problem, share: float, enough: float) -> None:
    optimum = brute_force(problem)
    if optimum is not None:
        least_s = problem.step_s(optimum)
        solution = SOLVERS["dp"](replace(problem, at_most_s=least_s * share, enough=enough))
        assert solution.choice is not None
        assert simulate(problem, solution.choice).fits
        assert solution.bound_s is not None
        assert solution.bound_s <= least_s * (1 + ULP)


@given(problem=offloading_problems())
@settings(deadline=None, max_examples=80)
def test_being_allowed_to_copy_is_never_slower(problem: Problem) -> None:
    barred = SOLVERS["dp"](replace(problem, host_bytes=None))
    if barred.step_s is not None:
        allowed = SOLVERS["dp"](problem)
        assert allowed.step_s is not None
        assert allowed.step_s <= barred.step_s * (1 + ULP)


@given(problem=offloading_problems(), more=st.integers(0, 8) | st.integers(0, 10**11))
@settings(deadline=None, max_examples=80)
def test_more_budget_is_slower_by_no_more_than_the_gap(problem: Problem, more: int) -> None:
    tight = SOLVERS["dp"](problem)
    wide = SOLVERS["dp"](replace(problem, budget_bytes=problem.budget_bytes + more))
    if tight.step_s is not None:
        assert wide.bound_s is not None
        assert wide.bound_s <= tight.step_s * (1 + ULP)


@given(problem=offloading_problems(), options=st.lists(st.tuples(st.integers(0, 6), st.floats(0.1, 5.0)), max_size=3))
@settings(deadline=None, max_examples=60)
def test_more_options_that_copy_nothing_are_never_slower(problem: Problem, options: list[tuple[int, float]]) -> None:
    problem = replace(problem, host_bytes=None)
    more = tuple(Option("recompute", hold, 0, 0, seconds) for hold, seconds in options)
    richer = replace(problem, blocks=tuple(replace(b, options=b.options + more) for b in problem.blocks))
    before, after = SOLVERS["dp"](problem), SOLVERS["dp"](richer)
    if before.step_s is not None:
        assert after.step_s is not None
        assert after.step_s <= before.step_s * (1 + ULP)


@given(problem=offloading_problems())
@settings(deadline=None, max_examples=80)
def test_the_smallest_budget_fits_and_no_choice_does_with_less_where_the_host_has_room(problem: Problem) -> None:
    smallest = smallest_budget(problem)
    solution = SOLVERS["dp"](replace(problem, budget_bytes=smallest))
    assert solution.choice is not None
    assert smallest >= least_peak(problem)
    sizes = {option.link_bytes for block in problem.blocks for option in block.options} - {0}
    if len(sizes) <= 4 and (problem.host_bytes or 0) >= 10**13:
        assert smallest == least_peak(problem)


def test_a_fast_link_is_taken_and_a_slow_one_is_not() -> None:
    fast = SOLVERS["dp"](blocks_of(8, budget_bytes=500, bytes_s=1000.0, host_bytes=10**6))
    slow = SOLVERS["dp"](blocks_of(8, budget_bytes=500, bytes_s=1.0, host_bytes=10**6))
    assert fast.choice is not None
    assert slow.choice is not None
    assert 2 in fast.choice
    assert 2 not in slow.choice
    assert fast.step_s is not None
    assert fast.step_s < 25.0  # recomputing what does not fit costs four seconds more


@pytest.mark.parametrize(("bytes_s", "host_bytes"), [(None, 10**6), (1000.0, None), (1000.0, 79)])
def test_without_a_link_or_room_nothing_is_copied(bytes_s: float | None, host_bytes: int | None) -> None:
    for solve in SOLVERS.values():
        solution = solve(blocks_of(8, budget_bytes=500, bytes_s=bytes_s, host_bytes=host_bytes))
        assert solution.choice is not None
        assert 2 not in solution.choice
        assert solution.status is Status.OPTIMAL


@EVERY_SOLVER
def test_the_host_limit_is_shared_by_all_blocks(solver: Solver) -> None:
    free = solver(blocks_of(12, budget_bytes=600, bytes_s=1000.0, host_bytes=10**6))
    held = solver(blocks_of(12, budget_bytes=600, bytes_s=1000.0, host_bytes=5 * 80 + 79))
    assert free.choice is not None
    assert held.choice is not None
    assert held.choice.count(2) <= 5 < free.choice.count(2)


@pytest.mark.parametrize("host_bytes", [240, 280, 300, 320])
def test_a_plan_is_found_where_only_copies_fit_and_the_host_limit_binds(host_bytes: int) -> None:
    less = Option("offload-less", 40, 110, 120, 3.2, link_bytes=60, recompute_s=0.2)
    problem = blocks_of(5, budget_bytes=1, bytes_s=1000.0, host_bytes=host_bytes)
    blocks = tuple(replace(block, options=(KEEP, OFFLOAD, less)) for block in problem.blocks)
    problem = replace(problem, blocks=blocks)
    problem = replace(problem, budget_bytes=smallest_budget(problem))
    optimum, solution = brute_force(problem), SOLVERS["dp"](problem)
    assert optimum is not None
    assert solution.step_s == pytest.approx(problem.step_s(optimum))


@pytest.mark.parametrize("bytes_s", [1e10, 2.5e10, 1e11])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_gap_of_equal_blocks_is_small(bytes_s: float, share: float) -> None:
    plain = chain(64, 12, seed=76, same=True)
    problem = with_share(offloading(plain, seed=1, bytes_s=bytes_s), share)
    solution = SOLVERS["dp"](problem)
    assert solution.choice is not None
    assert solution.gap is not None
    assert simulate(problem, solution.choice).fits
    assert solution.gap <= 0.03


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_the_gap_is_small_where_few_blocks_and_few_copies_decide(same: bool, share: float) -> None:
    for shape in ("selective", "scattered"):
        problem = with_share(offloading(chain(32, 8, seed=3, same=same, shape=shape), seed=1, bytes_s=2.5e10), share)
        solution = SOLVERS["dp"](problem)
        assert solution.choice is not None
        assert solution.gap is not None
        assert simulate(problem, solution.choice).fits
        assert solution.gap <= 0.005
