"""The bounds of chains that copy to the host, at prices on memory and link, against every choice there is."""

from dataclasses import replace

import pytest
from chains import accepted, chain, choices, offloading, offloading_problems, with_share
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.problem import Block, Choice, Gap, Option, Problem
from memplan.solvers import smallest_budget
from memplan.solvers.bounds import NEAR, Bounds, Prices
from memplan.solvers.exact import relaxed

ROUNDING = 1e-9  # relative; HiGHS proves to as much
COPIED = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0.0, 1.0)
MEMORY = st.just(0.0) | st.floats(0.0, 1.0) | st.floats(0.0, 1e-9)
PRICES = st.builds(Prices, COPIED, COPIED, st.just(0.0) | st.floats(0.0, 4.0), MEMORY, MEMORY)
CHAIN = with_share(offloading(chain(16, 6, seed=5, same=False), seed=1, bytes_s=2.5e10), 0.3)
ASKED = Bounds(CHAIN, 15)
for number in range(len(ASKED.sizes)):
    ASKED.ask(number)


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


def bounds_of(problem: Problem, pressing: int) -> Bounds:
    return Bounds(problem, pressing % len(problem.blocks))


@given(problem=forced() | tight(), prices=PRICES, pressing=st.integers(0, 4))
@settings(deadline=None, max_examples=200)
def test_at_any_price_no_choice_of_a_size_is_below_its_bound(problem: Problem, prices: Prices, pressing: int) -> None:
    if not problem.blocks:
        return
    bounds = bounds_of(problem, pressing)
    bounds.take(prices)
    found = dict(zip(bounds.sizes.tolist(), bounds.least_s.tolist(), strict=True))
    for choice in accepted(problem):
        size = largest_copy(problem, choice)
        if size:
            assert found[size] <= problem.step_s(choice) + rounding_s(problem, prices)


@given(problem=forced() | tight(), prices=PRICES)
@settings(deadline=None, max_examples=80)
def test_without_a_price_on_memory_a_bound_is_the_cheapest_of_all_choices(problem: Problem, prices: Prices) -> None:
    if not problem.blocks:
        return
    assert problem.link_bytes_s is not None
    prices = replace(prices, inside=0.0, loss=0.0)
    host_s = (problem.host_bytes or 0) / problem.link_bytes_s

    def cost_s(options: list[Option]) -> float:
        link_s = sum(option.link_bytes for option in options) / (problem.link_bytes_s or 1.0)
        forward_s = sum(option.forward_s for option in options)
        backward_s = sum(option.step_s - option.forward_s for option in options)
        excess_s = (link_s - forward_s, link_s - backward_s, link_s - host_s)
        waited_s = prices.out * excess_s[0] + prices.back * excess_s[1] + prices.host * excess_s[2]
        return forward_s + backward_s + waited_s

    bounds = bounds_of(problem, 0)
    bounds.take(prices)
    every = [problem.chosen(choice) for choice in choices(problem)]
    every = [options for options in every if all(map(problem.allows, options))]
    for size, bound_s in zip(bounds.sizes.tolist(), bounds.least_s.tolist(), strict=True):
        least_s = min(cost_s(options) for options in every if all(option.link_bytes <= size for option in options))
        assert bound_s == pytest.approx(least_s, rel=0.0, abs=3 * rounding_s(problem, prices))


@given(prices=st.builds(Prices, COPIED, COPIED, st.just(0.0), *[st.floats(0.0, 1e-10)] * 2))
@settings(deadline=None, max_examples=40)
def test_at_no_price_the_bound_that_was_asked_for_is_higher(prices: Prices) -> None:
    for at in range(len(ASKED.sizes)):
        other = Bounds(CHAIN, 15)
        other.take(prices)
        assert other.least_s[at] <= ASKED.least_s[at] * (1 + 2 * NEAR)


@given(problem=forced() | tight())
@settings(deadline=None, max_examples=80)
def test_no_choice_is_below_the_bound_of_the_exact_solver(problem: Problem) -> None:
    found = relaxed(problem)
    steps = [problem.step_s(choice) for choice in accepted(problem)]
    if steps:
        assert found is not None
        assert found.bound_s <= min(steps) + 10 * rounding_s(problem, Prices())


@pytest.mark.parametrize(
    "wrong", [{"out": 1.01}, {"back": 1.01}, {"out": -0.01}, {"back": -0.01}, {"host": -0.01}, {"loss": -0.01}]
)
def test_a_price_that_bounds_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="bounds nothing"):
        Prices(**wrong)
