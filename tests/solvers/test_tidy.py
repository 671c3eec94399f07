from dataclasses import replace

import pytest

from memplan.problem import Block, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers.solution import Solution
from memplan.solvers.tidy import tidied

KEEP, RECOMPUTE = Option("keep", 100, 110, 120, 1.0), Option("recompute", 10, 110, 120, 1.3)


def chain(blocks: int, budget_bytes: int) -> Problem:
    links = tuple(Block(f"layers.{i}", 1000, (KEEP, RECOMPUTE)) for i in range(blocks))
    gaps = (Gap(1000, 1000),) * (blocks + 1)
    return Problem(budget_bytes, links, gaps, optimizer_bytes=1000, rest_s=1.0, optimizer_s=0.5)


def test_interchangeable_blocks_recompute_first() -> None:
    problem = chain(6, 10_000)
    mixed = Solution.of(problem, (0, 1, 0, 1, 1, 0), bound_s=1.0)
    tidy = tidied(problem, mixed)
    assert tidy.choice == (1, 1, 1, 0, 0, 0)
    assert simulate(problem, tidy.choice).step_s == pytest.approx(simulate(problem, (0, 1, 0, 1, 1, 0)).step_s)
    assert tidy.bound_s == mixed.bound_s


def test_blocks_that_differ_are_left_where_they_are() -> None:
    problem = chain(3, 10_000)
    dear = replace(problem.blocks[0], options=(KEEP, replace(RECOMPUTE, step_s=2.0)))
    problem = replace(problem, blocks=(dear, *problem.blocks[1:]))
    assert tidied(problem, Solution.of(problem, (0, 0, 1), bound_s=1.0)).choice == (0, 1, 0)


def test_an_order_over_the_budget_is_refused() -> None:
    """A last block whose backward is dear while it is kept cannot take the place of a recomputed one."""
    problem = chain(2, 0)
    last = replace(problem.blocks[1], options=(replace(KEEP, backward_bytes=500), RECOMPUTE))
    problem = replace(problem, blocks=(problem.blocks[0], last))
    choice = (0, 1)
    problem = replace(problem, budget_bytes=simulate(problem, choice).peak_bytes)
    assert simulate(problem, (1, 0)).peak_bytes > problem.budget_bytes
    assert tidied(problem, Solution.of(problem, choice, bound_s=1.0)).choice == choice


def test_no_plan_stays_no_plan() -> None:
    assert tidied(chain(2, 1), Solution.infeasible()) == Solution.infeasible()


def test_blocks_are_interchangeable_though_their_times_are_rounded_differently() -> None:
    problem = chain(3, 10_000)
    sums = replace(RECOMPUTE, step_s=RECOMPUTE.step_s + 1e-13)
    problem = replace(problem, blocks=(*problem.blocks[:2], replace(problem.blocks[2], options=(KEEP, sums))))
    assert tidied(problem, Solution.of(problem, (0, 0, 1), bound_s=1.0)).choice == (1, 0, 0)


def test_where_the_cheapest_cannot_come_first_the_dearest_backwards_do() -> None:
    """The option that holds more has the dearer backward, which only fits while little is held."""
    dear = Option("dear", 20, 110, 220, 1.1)
    problem = chain(4, 10_000)
    problem = replace(
        problem, blocks=tuple(replace(block, options=(RECOMPUTE, dear)) for block in problem.blocks), optimizer_bytes=0
    )
    mixed = (1, 0, 1, 0)
    problem = replace(problem, budget_bytes=simulate(problem, (1, 1, 0, 0)).peak_bytes)
    assert simulate(problem, (0, 0, 1, 1)).peak_bytes > problem.budget_bytes
    assert tidied(problem, Solution.of(problem, mixed, bound_s=1.0)).choice == (1, 1, 0, 0)
