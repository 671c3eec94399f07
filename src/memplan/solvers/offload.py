"""Copies to the host in the default solver: bounds at the best prices on memory and link, then plans near those prices.

`memplan.solvers.bounds` has a bound for each size of the largest copy, and the prices at which it is highest. Sizes are
asked in the order of their bounds until the least of all is one that was asked for: that is the bound. The bound knows
how busy the link is, but not when. So plans are built block by block with both queues in view, at the prices of the
sizes that promise most (`memplan.solvers.beam`), and at the end the best is polished block by block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf

from memplan.problem import Choice, Problem
from memplan.solvers.beam import copying
from memplan.solvers.bounds import Bounds, Prices
from memplan.solvers.labels import SLACK
from memplan.solvers.priced import Priced, sizes_of
from memplan.solvers.solution import Solution
from memplan.solvers.tables import Tables

QUESTIONS = 12  # sizes of the largest copy whose best prices are looked for; 2 to 5 settle it
TRIED = 3  # sizes for which plans are built, the most promising
APART = 0.03  # share by which they differ
NEAR = 3  # blocks so far apart exchange their options at the end, for copies to be made a little earlier or later
DEARER = (1.0, 1.15, 1.5, 3.0, 20.0)  # prices of memory, in those of the bound: dearer, more is copied
GOOD = 3e-3  # share of the blocks' time by which a plan may miss the bound without others being built
POLISHED = 0.03  # share of the blocks' time; polishing won 0.8 % on a chain of benchmarks/solver.py
ENOUGH = 2e-4  # share of the blocks' time by which a plan may miss the bound without further questions


def improved(problem: Problem, plain: Solution) -> Solution:
    """The solution, or a faster one that copies to the host; its bound is one on all choices."""
    sizes = sizes_of(problem)
    if not sizes:
        return plain
    search = _Search(problem, plain.choice)
    bound_s = inf if plain.bound_s is None else problem.blocks_s(plain.bound_s)
    bounds = search.bounds()
    bound_s = float(bounds.least_s.min(initial=bound_s))
    for at in bounds.promising(TRIED, APART):
        if not search.is_enough(bounds.least_s[at]):
            search.build(bounds, at, bound_s)
    if search.best is None:
        search.fit(sizes)
    if search.best is None:
        return Solution.infeasible()
    search.polish(bound_s)
    return Solution.of(problem, search.best, problem.whole_s(bound_s))


def least_peak(problem: Problem, plain: int) -> int:
    """The least peak of the blocks and gaps when copies are allowed; `plain` is that without them.

    Exact unless the host limit binds: then the least budget at which the choice of the fewest bytes copied obeys it.
    """
    search = _Search(problem, None)
    return min([plain, *(search.least_peak(most, plain) for most in sizes_of(problem))])


class _Search:
    """The plan in hand, and the questions that may better it."""

    def __init__(self, problem: Problem, plain: Choice | None) -> None:
        self.problem = problem
        self.priced = Priced(problem)
        self.best = plain
        self.best_s = inf if plain is None else problem.blocks_s(problem.step_s(plain))
        self.limit_s = inf if plain is None else problem.blocks_s(problem.at_most_s)

    @property
    def to_beat_s(self) -> float:
        """Slower choices are of no interest."""
        return min(self.best_s, self.limit_s)

    @cached_property
    def tables(self) -> Tables:
        return Tables.of(self.problem)

    # -- prices and plans --------------------------------------------------------------------------------------------

    def bounds(self) -> Bounds:
        """The bounds of all sizes of the largest copy, the least of them at its best prices."""
        bounds = Bounds(self.problem, len(self.problem.blocks) - 1)
        asked, at = set[int](), len(bounds.sizes) - 1
        while len(bounds.sizes) and at not in asked and len(asked) < QUESTIONS:
            bounds.ask(at)
            asked.add(at)
            at = bounds.lowest
            if self.is_enough(bounds.least_s[at]):
                break
        return bounds

    def build(self, bounds: Bounds, at: int, bound_s: float) -> None:
        """Judge choices whose copies are made with the queues in view, the largest of size number `at`."""
        own = bounds.prices[at]
        for dearer in DEARER:
            if self.is_enough(bound_s, GOOD):
                return
            prices = replace(own, inside=own.inside * dearer, loss=own.loss * dearer)
            self.complete(copying(bounds, at, prices), own)

    def complete(self, pattern: Sequence[int], own: Prices) -> None:
        """Judge the choices that copy what these options do, or less where the link is too busy for that."""
        for prices in (Prices(), own):
            found = self.priced.completed(pattern, prices, self.to_beat_s)
            if found is None or found.choice is None:
                return
            self.judge(found.choice)
            if self.best_s <= found.time_s * (1 + SLACK):  # it does not wait
                return

    def fit(self, sizes: Sequence[int]) -> None:
        """Judge the choices that copy the fewest bytes, for when nothing else fits."""
        for most in sizes:
            sparest = self.priced.sparest(most, self.problem.budget_bytes)
            if sparest is not None and sparest.choice is not None:
                self.judge(sparest.choice)

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
        blocks_s = self.problem.blocks_s(self.problem.step_s(choice))
        if blocks_s < self.best_s:
            self.best, self.best_s = choice, blocks_s
        return True

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

    def is_enough(self, bound_s: float, share: float = ENOUGH) -> bool:
        """Whether the plan in hand, or what it has to beat, misses a bound by no more than this share."""
        share = max(share, self.problem.enough)
        return self.to_beat_s < inf and self.to_beat_s - bound_s <= share * self.to_beat_s

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
        found = self.priced.sparest(most, budget)
        assert found is not None  # nobody asks below the least need
        assert found.choice is not None
        return sum(o.link_bytes for o in self.problem.chosen(found.choice)) <= (self.problem.host_bytes or 0)
