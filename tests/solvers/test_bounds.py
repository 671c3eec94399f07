"""The bounds of chains that copy to the host, at prices on memory and link, against every choice there is."""

from dataclasses import replace

import pytest
from chains import (
    COPIED,
    PRICES,
    accepted,
    chain,
    choices,
    forced,
    largest_copy,
    offloading,
    rounding_s,
    tight,
    with_share,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.problem import Option, Problem
from memplan.solvers.bounds import NEAR, Bounds, Prices
from memplan.solvers.exact import relaxed

CHAIN = with_share(offloading(chain(16, 6, seed=5, same=False), seed=1, bytes_s=2.5e10), 0.3)
ASKED = Bounds(CHAIN, 15)
for number in range(len(ASKED.sizes)):
    ASKED.ask(number)


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
        forward_s = sum(option.forward_s for option in options[1:])  # the first block hides nothing
        backward_s = sum(option.step_s - option.forward_s for option in options[1:])
        excess_s = (link_s - forward_s, link_s - backward_s, link_s - host_s)
        waited_s = prices.out * excess_s[0] + prices.back * excess_s[1] + prices.host * excess_s[2]
        return sum(option.step_s for option in options) + waited_s

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


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_bound_is_bettered_until_it_is_enough(share: float) -> None:
    other = Bounds(CHAIN, 15)
    other.ask(0, ASKED.least_s[0] * share)
    assert ASKED.least_s[0] * share <= other.least_s[0] <= ASKED.least_s[0] * (1 + 2 * NEAR)


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
