"""Copies to the host in the default solver: prices on the link, found by crossing lines, then judged mixtures.

At any price of the link the cheapest chain bounds every choice from below (`memplan.solvers.priced`). The choice at one
price that overloads the link and the one at another that does not are two lines over the price; where they cross is the
next price to ask at, and when nothing new lies below the crossing, that is the best bound. The plan itself is the best
mixture of those two choices by `Problem.step_s`, which walks the queues: with many identical blocks either choice alone
treats all of them alike. The bound knows how busy the link is, but not when: so plans are also built block by block
with both queues in view (`memplan.solvers.beam`), and at the end the best is polished block by block.

All this is done per size of the staging area; one that cannot beat the plan in hand ends at its first question.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import product
from math import inf

from memplan.problem import Choice, Problem
from memplan.solvers.beam import promising
from memplan.solvers.labels import SLACK
from memplan.solvers.priced import Priced, Prices, Use, groups_of
from memplan.solvers.solution import Solution
from memplan.solvers.tables import Tables

QUESTIONS = 12  # prices asked for in one group and direction; lines cross for good after 3 to 6
NEAR = 3  # blocks so far apart exchange their options at the end, for copies to be made a little earlier or later
# On top of the bound's prices when plans are built: each was best on some of benchmarks/solver.py's own chains.
MORE = (0.0, 0.03, 0.1)
POLISHED = 0.03  # share of the blocks' time; polishing won 0.8 % on a chain of benchmarks/solver.py
ENOUGH = 2e-4  # share of the blocks' time by which a plan may miss the bound without further questions


def improved(problem: Problem, plain: Solution) -> Solution:
    """The solution, or a faster one that copies to the host; its bound is one on all choices."""
    groups = groups_of(problem)
    if not groups:
        return plain
    search = _Search(problem, plain.choice)
    bound_s = inf if plain.bound_s is None else search.blocks_of(plain.bound_s)
    asked = [(*search.group(least, most), least, most) for least, most in groups]
    bound_s = min([bound_s, *(group_s for group_s, *_ in asked)])
    for group_s, prices, least, most in sorted(asked, key=lambda group: group[0]):
        if not (search.is_enough(group_s) or search.is_enough(bound_s)):
            search.build(least, most, prices)
    if search.best is None:
        return Solution.infeasible()
    search.polish(bound_s)
    bound_s = problem.accumulation * (bound_s + problem.rest_s) + problem.optimizer_s
    return Solution.of(problem, search.best, bound_s)


def least_peak(problem: Problem, plain: int) -> int:
    """The least peak of the blocks and gaps when copies are allowed; `plain` is that without them.

    Exact unless the host limit binds: then the least budget at which the choice of the fewest bytes copied obeys it.
    """
    search = _Search(problem, None)
    return min([plain, *(search.least_peak(most, plain) for _, most in groups_of(problem))])


class _Search:
    """The plan in hand, and the questions that may better it."""

    def __init__(self, problem: Problem, plain: Choice | None) -> None:
        self.problem = problem
        self.priced = Priced(problem)
        self.best = plain
        self.best_s = inf if plain is None else self.blocks_of(problem.step_s(plain))
        self.limit_s = inf if plain is None else self.blocks_of(problem.at_most_s)

    @property
    def to_beat_s(self) -> float:
        """Slower choices are of no interest."""
        return min(self.best_s, self.limit_s)

    def blocks_of(self, step_s: float) -> float:
        """The blocks' share of a step, per micro-step."""
        return (step_s - self.problem.optimizer_s) / self.problem.accumulation - self.problem.rest_s

    @cached_property
    def tables(self) -> Tables:
        return Tables.of(self.problem)

    # -- one size of the staging area ------------------------------------------------------------------------------

    def group(self, least: int, most: int) -> tuple[float, Prices]:
        """A bound on the choices whose largest copy is between these, and its prices; betters the plan in hand."""
        asked = self.asked(Prices(), least, most)
        if asked is None:
            return inf, Prices()
        bound_s, use = asked
        prices = Prices()
        for axis in ("host", "out", "back"):
            if use is None or self.is_enough(bound_s):
                return bound_s, prices
            if self.excess_s(use, axis) <= 0:
                continue
            found = self.raised(prices, axis, use, least, most)
            if found is None:
                return inf, prices
            better_s, prices, use = found
            bound_s = max(bound_s, better_s)
        return bound_s, prices

    def build(self, least: int, most: int, prices: Prices) -> None:
        """Judge choices made block by block: with copies between these sizes only, and with all up to the largest."""
        for smallest, more in product(dict.fromkeys((least, 1)), MORE):
            raised = Prices(min(1.0, prices.out + more), min(1.0, prices.back + more), prices.host)
            for choice in promising(self.priced, raised, smallest, most):
                self.judge(choice)

    def raised(
        self, prices: Prices, axis: str, over: Use, least: int, most: int
    ) -> tuple[float, Prices, Use | None] | None:
        """Raise one price until the link is no longer too busy: (best bound, prices, choice there).

        None: even the least that can be copied is above the host limit.
        """
        if axis == "host":
            under, is_proven = self.sparest(least, most)
            if self.excess_s(under, axis) > 0:
                return None if is_proven else (0.0, prices, None)
            best_s, highest = 0.0, inf
        else:
            top = replace(prices, **{axis: 1.0})
            asked = self.asked(top, least, most)
            assert asked is not None  # the same chain fitted at other prices
            best_s, at_one = asked
            if at_one is None or self.excess_s(at_one, axis) > 0:
                return best_s, top, at_one
            under, highest = at_one, 1.0
        for _ in range(QUESTIONS):
            steep, flat = self.excess_s(over, axis), self.excess_s(under, axis)
            base_s = self.priced.value_s(under, prices) - self.priced.value_s(over, prices)
            # Choices are the cheapest by all but `enough`, so that their lines may cross where no price may be.
            crossing = replace(prices, **{axis: min(max(0.0, base_s / (steep - flat)), highest)})
            asked = self.asked(crossing, least, most)
            assert asked is not None
            bound_s, use = asked
            best_s = max(best_s, bound_s)
            if use is None or self.is_enough(best_s):
                return best_s, crossing, None
            over_s = self.priced.value_s(over, crossing)
            if over_s - self.priced.value_s(use, crossing) <= self.enough * abs(over_s):
                break
            over, under = (use, under) if self.excess_s(use, axis) > 0 else (over, use)
        self.mix(over.choice, under.choice)
        return best_s, crossing, under

    def excess_s(self, use: Use, axis: str) -> float:
        return use.excess_s(axis, self.priced.host_s)

    def asked(self, prices: Prices, least: int, most: int) -> tuple[float, Use | None] | None:
        """A bound on the step's blocks and the choice at these prices; None if nothing fits.

        The choice is None when no choice is faster than the plan in hand by more than the bound leaves open.
        """
        found = self.priced.cheapest(prices, least, most, self.to_beat_s, self.enough)
        if found is None:
            return None
        if found.choice is None:
            return found.bound_s, None
        if not self.judge(found.choice) and least < most:
            roomy = self.priced.cheapest(prices, most, most, self.to_beat_s, self.enough)
            if roomy is not None and roomy.choice is not None:
                self.judge(roomy.choice)
        return found.bound_s, self.priced.used(found.choice)

    def sparest(self, least: int, most: int) -> tuple[Use, bool]:
        """The choice that copies the fewest bytes of a group that fits, and whether none obeys the host limit."""
        if least < most:  # the larger area, where it fits, for a plan; the smaller for the bound
            roomy = self.priced.sparest(most, most, self.problem.budget_bytes)
            if roomy is not None and roomy.choice is not None:
                self.judge(roomy.choice)
        found = self.priced.sparest(least, most, self.problem.budget_bytes)
        assert found is not None  # the same chain fitted at a price
        assert found.choice is not None  # no limit was set
        self.judge(found.choice)
        return self.priced.used(found.choice), found.bound_s > self.priced.host_s * (1 + SLACK)

    # -- plans -----------------------------------------------------------------------------------------------------

    def judge(self, choice: Choice) -> bool:
        """Take the choice, as it is or spread, if it is faster than the plan in hand; False if it does not fit."""
        spread = self.tables.spread(choice)
        if spread != choice:
            self.is_judged(spread)
        return self.is_judged(choice)

    def is_judged(self, choice: Choice) -> bool:
        if not self.tables.fits(choice):
            return False
        if self.tables.sum_s(choice) >= self.best_s:
            return True
        blocks_s = self.blocks_of(self.problem.step_s(choice))
        if blocks_s < self.best_s:
            self.best, self.best_s = choice, blocks_s
        return True

    def mix(self, one: Choice, other: Choice) -> None:
        """Judge choices that are one here and the other there: spread evenly, or one first, or the other first."""
        differ = [i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        count = len(differ)
        for k in range(1, count):
            even = [i for at, i in enumerate(differ) if (at + 1) * k // count > at * k // count]
            for ones in (even, differ[:k], differ[count - k :]):
                mixed = list(other)
                for i in ones:
                    mixed[i] = one[i]
                if self.tables.sum_s(tuple(mixed)) < self.to_beat_s:
                    self.judge(tuple(mixed))

    def polish(self, bound_s: float) -> None:
        """Better the plan in hand by one block's option, or by an exchange of two, until none is faster."""
        if self.best_s > self.limit_s * (1 + POLISHED):  # what is far off does not get there by single blocks
            return
        before_s = inf
        while self.best_s < before_s * (1 - 1e-9) and not self.is_enough(bound_s):
            before_s = self.best_s
            for i, times in enumerate(self.times):
                for k in times:
                    self.change({i: k})
                for j in range(i + 1, min(i + 1 + NEAR, len(self.times))):
                    assert self.best is not None
                    self.change({i: self.best[j], j: self.best[i]})

    def change(self, options: Mapping[int, int]) -> None:
        """Judge the plan in hand with other options for some blocks, unless it cannot be faster."""
        assert self.best is not None
        if not all(k in self.times[i] for i, k in options.items()):
            return
        gained_s = sum(self.times[i][self.best[i]] - self.times[i][k] for i, k in options.items())
        if any(self.best[i] != k for i, k in options.items()) and self.tables.sum_s(self.best) - gained_s < self.best_s:
            changed = list(self.best)
            for i, k in options.items():
                changed[i] = k
            self.is_judged(tuple(changed))

    @cached_property
    def times(self) -> list[dict[int, float]]:
        """Per block, the seconds of each option that may be chosen."""
        links = (link for link, _, _ in self.priced.options)
        return [dict(zip(link.index.tolist(), link.time.tolist(), strict=True)) for link in links]

    def is_enough(self, bound_s: float) -> bool:
        return self.to_beat_s < inf and self.to_beat_s - bound_s <= self.enough * self.to_beat_s

    @cached_property
    def enough(self) -> float:
        return max(ENOUGH, self.problem.enough)

    # -- the smallest budget ---------------------------------------------------------------------------------------

    def least_peak(self, most: int, plain: int) -> int:
        """The least budget for a staging area of this size; `plain` if that is no more."""
        least = self.priced.least_budget(most)
        if least >= plain or self.is_within_host(least, most):
            return min(least, plain)
        while plain - least > 1:
            middle = (least + plain) // 2
            if self.is_within_host(middle, most):
                plain = middle
            else:
                least = middle
        return plain

    def is_within_host(self, budget: int, most: int) -> bool:
        every = [copies[copies <= most].max() for _, copies, _ in self.priced.options]
        if sum(map(int, every)) <= (self.problem.host_bytes or 0):
            return True  # whatever is chosen
        found = self.priced.sparest(most, most, budget)
        assert found is not None  # nobody asks below the least need
        assert found.choice is not None
        return self.excess_s(self.priced.used(found.choice), "host") <= 0
