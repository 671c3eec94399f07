"""The bounds of chains that copy to the host, not cut short by a plan in hand, against every choice there is."""

from dataclasses import replace

import pytest
from chains import accepted, choices, offloading_problems, with_share
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.link import staging_bytes
from memplan.problem import Block, Choice, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import smallest_budget
from memplan.solvers.exact import relaxed
from memplan.solvers.priced import Priced, Prices, groups_of

ROUNDING = 1e-9  # relative; HiGHS proves to as much
COPIED = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0.0, 1.0)
PRICES = st.builds(Prices, COPIED, COPIED, st.just(0.0) | st.floats(0.0, 4.0))


@st.composite
def tight(draw: st.DrawFn) -> Problem:
    """Of which the blocks are all there is, at budgets from the least that fits when copies help."""
    problem = replace(draw(offloading_problems()), accumulation=1, rest_s=0.0, optimizer_s=0.0)
    return with_share(problem, draw(st.sampled_from([0.0, 0.05, 0.3, 0.7])))


@st.composite
def forced(draw: st.DrawFn) -> Problem:
    """Every block has to copy, over a link about as fast as the blocks: here a wrong price shows."""
    sizes = st.integers(0, 6)
    seconds = st.floats(1.0, 5.0)
    copying = st.builds(
        Option, st.just("offload"), sizes, sizes, sizes, seconds, st.integers(1, 6), st.just(0.0) | st.floats(0.0, 1.0)
    )
    too_large = Option("keep", 10**6, 10**6, 10**6, 1.0)
    count = draw(st.integers(1, 4))
    blocks = tuple(
        Block(f"layers.{i}", 0, (too_large, *draw(st.lists(copying, min_size=1, max_size=3)))) for i in range(count)
    )
    problem = Problem(
        budget_bytes=1,
        blocks=blocks,
        gaps=(Gap(0, 0),) * (count + 1),
        optimizer_bytes=0,
        rest_s=0.0,
        optimizer_s=0.0,
        link_bytes_s=draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])),
        host_bytes=draw(st.just(10**6) | st.integers(6, 24)),
    )
    return replace(problem, budget_bytes=smallest_budget(problem) + draw(st.integers(0, 20)))


def largest_copy(problem: Problem, choice: Choice) -> int:
    return max((option.link_bytes for option in problem.chosen(choice)), default=0)


def rounding_s(problem: Problem, prices: Prices) -> float:
    """What sums of so many seconds may be off by."""
    host_s = (problem.host_bytes or 0) / (problem.link_bytes_s or 1.0)
    blocks_s = sum(max(option.step_s for option in block.options) for block in problem.blocks)
    copies_s = sum(max(option.link_bytes for option in block.options) for block in problem.blocks)
    return ROUNDING * (prices.host * host_s + blocks_s + copies_s / (problem.link_bytes_s or 1.0))


@given(problem=forced() | tight(), prices=PRICES)
@settings(deadline=None, max_examples=200)
def test_at_any_price_no_choice_of_a_group_is_below_its_bound(problem: Problem, prices: Prices) -> None:
    every = accepted(problem)
    for least, most in groups_of(problem):
        steps = [problem.step_s(c) for c in every if least <= largest_copy(problem, c) <= most]
        found = Priced(problem).cheapest(prices, least, most)
        if steps:
            assert found is not None
            assert found.bound_s <= min(steps) + rounding_s(problem, prices)


@given(problem=forced() | tight(), prices=PRICES)
@settings(deadline=None, max_examples=80)
def test_the_bound_is_the_cheapest_of_all_choices_beside_the_staging_area(problem: Problem, prices: Prices) -> None:
    assert problem.link_bytes_s is not None
    host_s = (problem.host_bytes or 0) / problem.link_bytes_s

    def cost_s(options: list[Option]) -> float:
        link_s = sum(option.link_bytes for option in options) / (problem.link_bytes_s or 1.0)
        forward_s = sum(option.forward_s for option in options)
        backward_s = sum(option.step_s - option.forward_s for option in options)
        excess_s = (link_s - forward_s, link_s - backward_s, link_s - host_s)
        waited_s = prices.out * excess_s[0] + prices.back * excess_s[1] + prices.host * excess_s[2]
        return forward_s + backward_s + waited_s

    for least, most in groups_of(problem):
        roomy = beside(problem, staging_bytes([least]))
        allowed = [
            problem.chosen(choice)
            for choice in choices(problem)
            if largest_copy(problem, choice) <= most and simulate(roomy, choice).fits
        ]
        found = Priced(problem).cheapest(prices, least, most)
        assert (found is None) == (not allowed)
        if found is not None:
            least_s = min(map(cost_s, allowed))
            assert found.bound_s == pytest.approx(least_s, rel=0.0, abs=rounding_s(problem, prices))


def beside(problem: Problem, staging: int) -> Problem:
    """The same without a link, the staging area lying wherever copies may be in flight."""
    blocks = tuple(
        replace(
            block,
            base_bytes=block.base_bytes + staging,
            options=tuple(replace(option, link_bytes=0) for option in block.options),
        )
        for block in problem.blocks
    )
    first, *between, last = problem.gaps
    raised = (Gap(gap.forward_bytes + staging, gap.backward_bytes + staging) for gap in between)
    return replace(problem, blocks=blocks, gaps=(first, *raised, last), link_bytes_s=None, host_bytes=None)


@given(problem=forced() | tight())
@settings(deadline=None, max_examples=80)
def test_no_choice_is_below_the_bound_of_the_exact_solver(problem: Problem) -> None:
    found = relaxed(problem)
    steps = [problem.step_s(choice) for choice in accepted(problem)]
    if steps:
        assert found is not None
        assert found.bound_s <= min(steps) + 10 * rounding_s(problem, Prices())


@pytest.mark.parametrize("wrong", [{"out": 1.01}, {"back": 1.01}, {"out": -0.01}, {"back": -0.01}, {"host": -0.01}])
def test_a_price_that_bounds_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="bounds nothing"):
        Prices(**wrong)
