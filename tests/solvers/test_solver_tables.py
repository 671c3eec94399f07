"""The arrays say of every choice what the judge says."""

from chains import choices, offloading_problems
from hypothesis import given, settings

from memplan.problem import Problem
from memplan.simulator import simulate
from memplan.solvers.tables import Tables


@given(problem=offloading_problems())
@settings(deadline=None, max_examples=60)
def test_a_choice_fits_if_the_judge_says_so(problem: Problem) -> None:
    if not problem.blocks:
        return
    tables = Tables.of(problem)
    for choice in choices(problem):
        options = problem.chosen(choice)
        if all(problem.allows(option) for option in options):
            assert tables.fits(choice) == simulate(problem, choice).fits
            assert abs(tables.sum_s(choice) - sum(o.step_s for o in options)) <= 1e-9


@given(problem=offloading_problems())
@settings(deadline=None, max_examples=60)
def test_spreading_hands_out_the_same_options(problem: Problem) -> None:
    if not problem.blocks:
        return
    choice = tuple(i % len(block.options) for i, block in enumerate(problem.blocks))
    spread = Tables.of(problem).spread(choice)
    assert sorted(map(str, problem.chosen(spread))) == sorted(map(str, problem.chosen(choice)))
    assert all(0 <= k < len(block.options) for k, block in zip(spread, problem.blocks, strict=True))
