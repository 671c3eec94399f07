"""What every solver promises, whichever it is: add a line to the table and these tests hold for it too."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from chains import brute_force, fastest, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.problem import Block, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import SOLVERS, Solution, Solver, Status

EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
ULP = 1e-12  # times are sums of floats: another order of the same blocks differs by this much
TOLERANCE = 1e-8  # relative, to which HiGHS proves its optimum


def check_equals_brute_force(solver: Solver, problem: Problem) -> None:
    solution, optimum = solver(problem), brute_force(problem)
    if optimum is None:
        assert solution == Solution(Status.INFEASIBLE)
        return
    best_s = problem.step_s(optimum)
    assert solution.step_s == pytest.approx(best_s, rel=TOLERANCE)
    assert solution.bound_s is not None
    assert solution.step_s is not None
    assert solution.bound_s <= best_s * (1 + ULP) <= solution.step_s * (1 + 2 * ULP)


def check_the_judge_agrees(solver: Solver, problem: Problem) -> None:
    solution = solver(problem)
    if solution.choice is not None:
        timeline = simulate(problem, solution.choice)
        assert timeline.fits
        assert timeline.peak_bytes == solution.peak_bytes
        assert timeline.step_s == solution.step_s


def check_more_budget_is_never_slower(solver: Solver, problem: Problem, more: int) -> None:
    tight, wide = solver(problem), solver(replace(problem, budget_bytes=problem.budget_bytes + more))
    if tight.step_s is not None:
        assert wide.step_s is not None
        assert wide.step_s <= tight.step_s * (1 + TOLERANCE)


def check_the_same_twice(solver: Solver, problem: Problem) -> None:
    assert solver(problem) == solver(problem)


def check_plentiful_memory_recomputes_nothing(solver: Solver, problem: Problem) -> None:
    solution = solver(replace(problem, budget_bytes=10**14))
    assert solution.status is Status.OPTIMAL
    assert solution.step_s == pytest.approx(problem.step_s(fastest(problem)), rel=ULP)


@EVERY_SOLVER
@given(problem=problems())
@settings(deadline=None, max_examples=120)
def test_equals_brute_force(solver: Solver, problem: Problem) -> None:
    check_equals_brute_force(solver, problem)


@EVERY_SOLVER
@given(problem=problems())
@settings(deadline=None, max_examples=100)
def test_is_never_above_the_budget_by_the_simulator(solver: Solver, problem: Problem) -> None:
    check_the_judge_agrees(solver, problem)


@EVERY_SOLVER
@given(problem=problems(), more=st.integers(0, 8) | st.integers(0, 10**11))
@settings(deadline=None, max_examples=100)
def test_more_budget_is_never_slower(solver: Solver, problem: Problem, more: int) -> None:
    check_more_budget_is_never_slower(solver, problem, more)


@EVERY_SOLVER
@given(problem=problems())
@settings(deadline=None, max_examples=60)
def test_answers_the_same_twice(solver: Solver, problem: Problem) -> None:
    check_the_same_twice(solver, problem)


@EVERY_SOLVER
@given(problem=problems())
@settings(deadline=None, max_examples=60)
def test_recomputes_nothing_when_memory_is_plentiful(solver: Solver, problem: Problem) -> None:
    check_plentiful_memory_recomputes_nothing(solver, problem)


# --- edges ----------------------------------------------------------------------------------------------------------

KEEP = Option("keep", hold_bytes=10, forward_bytes=12, backward_bytes=15, step_s=3.0)
RECOMPUTE = Option("recompute", hold_bytes=2, forward_bytes=11, backward_bytes=15, step_s=4.0)


def chain_of(*blocks: Block, budget_bytes: int) -> Problem:
    gaps = (Gap(5, 5),) * len(blocks) + (Gap(20, 20),)
    return Problem(budget_bytes, blocks, gaps, optimizer_bytes=8, rest_s=1.0, optimizer_s=1.0)


@EVERY_SOLVER
@pytest.mark.parametrize(("budget_bytes", "status"), [(19, Status.INFEASIBLE), (20, Status.OPTIMAL)])
def test_no_block_at_all(solver: Solver, budget_bytes: int, status: Status) -> None:
    solution = solver(chain_of(budget_bytes=budget_bytes))
    assert solution.status is status
    if status is Status.OPTIMAL:
        assert (solution.choice, solution.step_s, solution.gap, solution.peak_bytes) == ((), 2.0, 0.0, 20)


@EVERY_SOLVER
@pytest.mark.parametrize(("budget_bytes", "choice"), [(21, None), (22, (1,)), (29, (1,)), (30, (0,)), (10**15, (0,))])
def test_one_block(solver: Solver, budget_bytes: int, choice: tuple[int] | None) -> None:
    assert solver(chain_of(Block("a", 1, (KEEP, RECOMPUTE)), budget_bytes=budget_bytes)).choice == choice


@EVERY_SOLVER
@pytest.mark.parametrize("budget_bytes", [-1, 0, 1])
def test_a_budget_below_everything(solver: Solver, budget_bytes: int) -> None:
    solution = solver(chain_of(Block("a", 1, (KEEP,)), budget_bytes=budget_bytes))
    assert solution == Solution.infeasible()
    assert solution.gap is None


@EVERY_SOLVER
def test_the_optimizer_alone_can_be_too_much(solver: Solver) -> None:
    problem = replace(chain_of(Block("a", 1, (KEEP,)), budget_bytes=100), optimizer_bytes=101)
    assert solver(problem).status is Status.INFEASIBLE


@EVERY_SOLVER
def test_the_last_block_is_kept_unless_the_loss_binds(solver: Solver) -> None:
    """Recomputing it would bring nothing: its own backward needs the same bytes again."""
    blocks = tuple(Block(path, 1, (KEEP, RECOMPUTE)) for path in "abc")
    problem = replace(chain_of(*blocks, budget_bytes=30), gaps=(Gap(0, 0),) * 4)
    assert solver(problem).choice in {(0, 1, 0), (1, 0, 0)}


# --- the checks themselves ------------------------------------------------------------------------------------------


def greedy(problem: Problem) -> Solution:
    """Wrong: keeps from the front while the block itself fits, and claims that it is the optimum."""
    choice: tuple[int, ...] = ()
    held = 0
    for block in problem.blocks:
        fits = [
            k
            for k, option in enumerate(block.options)
            if held + block.base_bytes + max(option.forward_bytes, option.backward_bytes) <= problem.budget_bytes
        ]
        if not fits:
            return Solution.infeasible()
        choice += (min(fits, key=lambda k: block.options[k].step_s),)
        held += block.options[choice[-1]].hold_bytes
    return Solution.of(problem, choice, bound_s=problem.step_s(choice))


def frugal(problem: Problem) -> Solution:
    """Wrong: fits whenever something does, but recomputes whatever memory there is."""
    solution = SOLVERS["dp"](problem)
    if solution.choice is None:
        return solution
    least = tuple(min(range(len(b.options)), key=lambda k: b.options[k].hold_bytes) for b in problem.blocks)
    fits = simulate(problem, least).fits
    return Solution.of(problem, least, bound_s=problem.step_s(least)) if fits else solution


TRAP = chain_of(*(Block(path, 1, (KEEP, RECOMPUTE)) for path in "abc"), budget_bytes=40)


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (greedy, check_equals_brute_force),
        (greedy, check_the_judge_agrees),
        (frugal, check_equals_brute_force),
        (frugal, check_plentiful_memory_recomputes_nothing),
    ],
)
def test_the_checks_catch_a_wrong_solver(wrong: Solver, check: Callable[[Solver, Problem], None]) -> None:
    check(SOLVERS["dp"], TRAP)
    with pytest.raises(AssertionError):
        check(wrong, TRAP)


def test_the_checks_catch_a_solver_that_gets_slower_with_budget() -> None:
    def erratic(problem: Problem) -> Solution:
        return frugal(problem) if problem.budget_bytes > TRAP.budget_bytes else SOLVERS["dp"](problem)

    with pytest.raises(AssertionError):
        check_more_budget_is_never_slower(erratic, TRAP, more=1)


def test_without_highs_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highspy", None)
    with pytest.raises(ValueError, match=r"memplan\[exact\]"):
        SOLVERS["exact"](TRAP)


def test_highs_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    SOLVERS["exact"](TRAP)
    assert capfd.readouterr() == ("", "")
