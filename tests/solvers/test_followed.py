"""Bounds with bytes and the forward's queue followed block by block, against every choice and against prices alone."""

from dataclasses import replace
from itertools import product
from math import inf

import pytest
from chains import PRICES, accepted, chain, forced, largest_copy, offloading, rounding_s, tight, with_share
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.problem import Problem
from memplan.solvers import followed as module
from memplan.solvers.bounds import Bounds, Prices
from memplan.solvers.followed import Followed, followed
from memplan.solvers.priced import Priced

SOME = st.integers(0, 4)
OFF_S = 1e-6  # relative; far above what sums of seconds are rounded by


def copies_of(problem: Problem) -> list[int]:
    allowed = (option for block in problem.blocks for option in block.options if problem.allows(option))
    return sorted({option.link_bytes for option in allowed} - {0})


def slowest_s(problem: Problem) -> float:
    """What no choice that fits takes."""
    return 1.0 + 2 * sum(
        max(o.step_s + 2 * o.link_bytes / (problem.link_bytes_s or 1.0) for o in block.options)
        for block in problem.blocks
    )


def asked(problem: Problem, sizes: tuple[int, int], prices: Prices, limit_s: float) -> Followed:
    return followed(Priced(problem), sizes, prices, -inf, limit_s)


@pytest.mark.parametrize("labels", [1, 10, module.LABELS])
@given(problem=forced() | tight(), prices=PRICES, first=SOME, last=SOME, share=st.sampled_from([0.3, 0.9, 1.0]))
@settings(deadline=None, max_examples=150)
def test_no_choice_of_those_sizes_is_below_the_bound(
    labels: int, problem: Problem, prices: Prices, first: int, last: int, share: float
) -> None:
    copies = copies_of(problem)
    if not copies:
        return
    smallest, largest = sorted((copies[first % len(copies)], copies[last % len(copies)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LABELS", labels * len(problem.blocks))
        found = asked(problem, (smallest, largest), prices, share * slowest_s(problem))
    assert found.bound_s <= share * slowest_s(problem)
    for choice in accepted(problem):
        if smallest <= largest_copy(problem, choice) <= largest:
            assert found.bound_s <= problem.step_s(choice) + rounding_s(problem, prices)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bytes_s", [1e10, 3e10, 1e12])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_neither_a_narrow_search_nor_one_for_many_sizes_proves_too_much(
    seed: int, bytes_s: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(chain(5, 2, seed=seed, shape="scattered"), rest_s=0.0, optimizer_s=0.0)
    problem = with_share(offloading(plain, seed=seed, bytes_s=bytes_s), share)
    steps = [(largest_copy(problem, choice), problem.step_s(choice)) for choice in accepted(problem)]
    copies, bounds = copies_of(problem), Bounds(problem, 4)
    for at in range(len(bounds.sizes)):
        bounds.ask(at)
    for labels, smallest, largest in product((1, 2, 4, 1000), copies, copies):
        of_sizes = [step_s for size, step_s in steps if smallest <= size <= largest]
        monkeypatch.setattr(module, "LABELS", labels * len(problem.blocks))
        for prices in (Prices(), *bounds.prices[:1]) if of_sizes else ():
            found = asked(problem, (smallest, largest), prices, slowest_s(problem))
            assert found.bound_s <= min(of_sizes)


@given(problem=forced() | tight(), prices=PRICES)
@settings(deadline=None, max_examples=100)
def test_the_bound_is_no_lower_than_that_of_prices_alone(problem: Problem, prices: Prices) -> None:
    if not copies_of(problem):
        return
    alone = Bounds(problem, len(problem.blocks) - 1)
    alone.take(prices)
    for size, bound_s in zip(alone.sizes.tolist(), alone.least_s.tolist(), strict=True):
        found = asked(problem, (size, size), prices, slowest_s(problem))
        assert found.bound_s >= min(bound_s, slowest_s(problem)) - OFF_S * (abs(bound_s) + rounding_s(problem, prices))


@given(problem=forced() | tight(), at=SOME)
@settings(deadline=None, max_examples=100)
def test_where_nothing_waits_the_choice_is_the_fastest(problem: Problem, at: int) -> None:
    copies = copies_of(problem)
    if not copies:
        return
    size = copies[at % len(copies)]
    found = asked(problem, (size, size), Prices(), slowest_s(problem))
    fitting = set(accepted(problem))
    if found.choice in fitting and problem.step_s(found.choice) <= found.bound_s * (1 + OFF_S):
        steps = [problem.step_s(choice) for choice in fitting if largest_copy(problem, choice) == size]
        assert problem.step_s(found.choice) <= min(steps, default=inf) * (1 + OFF_S)


def test_what_is_known_already_ends_the_search() -> None:
    problem = with_share(offloading(chain(8, 4, seed=5), seed=1, bytes_s=2.5e10), 0.3)
    size = copies_of(problem)[-1]
    assert followed(Priced(problem), (size, size), Prices(), 1e9, 1e8) == Followed(1e9, None)
