"""Copies to the host in the default solver: bounds at the best prices on memory and link, then plans near those prices.

`memplan.solvers.bounds` has a bound for each size of the largest copy, and the prices at which it is highest. Sizes are
asked in the order of their bounds until the least of all is one that was asked for: that is the bound. The bound knows
how busy the link is, but not when. So plans are built block by block with both queues in view, at the prices of the
sizes that promise most (`memplan.solvers.beam`), and at the end the best is polished block by block. Where the bound
still misses it by much, bytes and the forward's queue are followed for sizes that could beat it, until their bounds are
good enough too (`memplan.solvers.followed`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from math import inf
from typing import Self

import numpy as np

from memplan.problem import Choice, Problem
from memplan.solvers.beam import copying
from memplan.solvers.bounds import Bounds, Prices
from memplan.solvers.followed import followed
from memplan.solvers.labels import SLACK, Link, needs_of
from memplan.solvers.priced import Priced, sizes_of
from memplan.solvers.solution import Solution, gap_peaks
from memplan.solvers.tables import Tables

QUESTIONS = 12  # sizes of the largest copy whose best prices are looked for; 2 to 5 settle it
TRIED = 3  # sizes for which plans are built, the most promising
APART = 0.03  # share by which they differ
NEAR = 3  # blocks so far apart exchange their options at the end, for copies to be made a little earlier or later
DEARER = (1.0, 1.05, 1.15, 1.5, 3.0, 20.0)  # prices of memory, in those of the bound: dearer, more is copied
GOOD = 3e-3  # share of the blocks' time by which a plan may miss the bound without others being built
POLISHED = 0.03  # share of the blocks' time; polishing won 0.8 % on a chain of benchmarks/solver.py
PROVEN = 4e-3  # share of the blocks' time by which a bound at prices may miss the plan without being bettered, to GOOD
SEARCHED = 32 * 12  # blocks in all searches that better it
ENOUGH = 2e-4  # share of the blocks' time by which a plan may miss the bound without further questions


def improved(problem: Problem, plain: Solution) -> Solution:
    """The solution, or a faster one that copies to the host; its bound is one on all choices."""
    sizes = sizes_of(problem)
    if not sizes:
        return plain
    search = _Search(problem, plain.choice)
    plain_s = inf if plain.bound_s is None else problem.blocks_s(plain.bound_s)
    bounds = search.bounds()
    bound_s = float(bounds.least_s.min(initial=plain_s))
    for dearer, at in product(DEARER, bounds.promising(TRIED, APART)):
        if not search.is_enough(bounds.least_s[at]) and not search.is_enough(bound_s, GOOD):
            search.build(bounds, at, dearer)
    if search.best is None:
        search.fit(sizes)
    if search.best is None:
        return Solution.infeasible()
    search.polish(bound_s)
    if len(bounds.sizes) and not search.is_enough(bound_s, PROVEN):
        bound_s = search.proven(bounds, plain_s)
        search.polish(bound_s)
    return Solution.of(problem, search.best, problem.whole_s(bound_s))


def least_peak(problem: Problem) -> int:
    """The least peak of the blocks and gaps.

    Exact unless the host limit binds: then the least budget at which the choice of the fewest bytes copied obeys it.
    """
    sizes = sizes_of(problem)
    if not sizes:
        return needs_of([Link.plain(block) for block in problem.blocks], gap_peaks(problem))[0]
    search = _Search(problem, None)
    plain, *leasts = search.priced.least_budgets([0, *sizes])
    return min([plain, *(search.least_peak(most, least, plain) for most, least in zip(sizes, leasts, strict=True))])


@dataclass(frozen=True, slots=True)
class _Group:
    """Sizes of the largest copy, by number, from `start` up to `stop`; no choice of theirs is below the bound."""

    start: int
    stop: int
    bound_s: float
    is_searched: bool = False

    @classmethod
    def of(cls, bounds: Bounds, start: int, stop: int, bound_s: float = -inf) -> Self:
        return cls(start, stop, max(bound_s, float(bounds.least_s[start:stop].min())))

    @classmethod
    def every(cls, bounds: Bounds) -> list[Self]:
        """All sizes, those together that differ by no more than APART."""
        starts = [0]
        for at, size in enumerate(bounds.sizes.tolist()):
            if size > bounds.sizes[starts[-1]] * (1 + APART):
                starts.append(at)
        return [cls.of(bounds, start, stop) for start, stop in pairwise((*starts, len(bounds.sizes)))]

    @property
    def is_single(self) -> bool:
        return self.stop - self.start == 1

    def halves(self, bounds: Bounds) -> tuple[Self, Self]:
        middle = (self.start + self.stop) // 2
        return self.of(bounds, self.start, middle, self.bound_s), self.of(bounds, middle, self.stop, self.bound_s)


class _Search:
    """The plan in hand, and the questions that may better it."""

    def __init__(self, problem: Problem, plain: Choice | None) -> None:
        self.problem = problem
        self.priced = Priced(problem)
        self.best = plain
        self.best_s = inf if plain is None else problem.blocks_s(problem.step_s(plain))
        self.limit_s = inf if plain is None else problem.blocks_s(problem.at_most_s)
        self._spare: tuple[float, int] | None = None

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
            bounds.ask(at, self.limit_s)
            asked.add(at)
            at = bounds.lowest
            if self.is_enough(bounds.least_s[at]):
                break
        return bounds

    def build(self, bounds: Bounds, at: int, dearer: float) -> None:
        """Judge choices whose copies are made with the queues in view, the largest of size number `at`."""
        own = bounds.prices[at]
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
            self.best, self.best_s, self._spare = choice, blocks_s, None
        return True

    def polish(self, bound_s: float) -> None:
        """Better the plan in hand by one block's option, or by an exchange of two, until none is faster."""
        if self.best_s > self.limit_s * (1 + POLISHED):  # what is far off does not get there by single blocks
            return
        before_s = inf
        while self.best_s < before_s * (1 - 1e-9) and not self.is_enough(bound_s):
            before_s = self.best_s
            for i, ways in enumerate(self.ways):
                for k in ways:
                    self.change({i: k})
                for j in range(i + 1, min(i + 1 + NEAR, len(self.ways))):
                    assert self.best is not None
                    self.change({i: self.best[j], j: self.best[i]})

    def change(self, options: Mapping[int, int]) -> None:
        """Judge the plan in hand with other options for some blocks, unless it cannot be faster or holds too much."""
        best = self.best
        assert best is not None
        if not all(k in self.ways[i] for i, k in options.items()) or all(best[i] == k for i, k in options.items()):
            return
        more_s, more = 0.0, 0
        for i, k in options.items():
            (after_s, after), (before_s, before) = self.ways[i][k], self.ways[i][best[i]]
            more_s, more = more_s + after_s - before_s, more + after - before
        waited_s, room = self.spare
        if more_s < waited_s and more <= room:
            changed = list(best)
            for i, k in options.items():
                changed[i] = k
            self.is_judged(tuple(changed))

    @property
    def spare(self) -> tuple[float, int]:
        """Seconds that the plan in hand waits for the link, and bytes that it leaves free at the loss."""
        if self._spare is None:
            assert self.best is not None
            held = sum(option.hold_bytes for option in self.problem.chosen(self.best))
            room = self.problem.budget_bytes - held - int(self.tables.gaps[-1])
            self._spare = self.best_s - self.tables.sum_s(self.best), room
        return self._spare

    @cached_property
    def ways(self) -> list[dict[int, tuple[float, int]]]:
        """Per block, the seconds and the bytes held of each option that may be chosen."""
        links = [link for link, _, _ in self.priced.options]
        columns = [(link.index.tolist(), link.time.tolist(), link.hold.tolist()) for link in links]
        return [{k: (s, held) for k, s, held in zip(*every, strict=True)} for every in columns]

    def is_enough(self, bound_s: float, share: float = ENOUGH) -> bool:
        """Whether the plan in hand, or what it has to beat, misses a bound by no more than this share."""
        share = max(share, self.problem.enough)
        return self.to_beat_s < inf and self.to_beat_s - bound_s <= share * self.to_beat_s

    def proven(self, bounds: Bounds, plain_s: float) -> float:
        """A better bound, by searches for like sizes: those with the least bound are searched, then halved.

        `plain_s` bounds the choices that copy nothing. What a search finds is judged too: it is the best choice but for
        the backward's queue.
        """
        groups = _Group.every(bounds)
        for _ in range(max(1, SEARCHED // len(self.problem.blocks))):
            group = min(groups, key=lambda group: group.bound_s)
            if self.is_enough(min(group.bound_s, plain_s), PROVEN) or (group.is_searched and group.is_single):
                break
            groups.remove(group)
            groups += [
                self.searched(bounds, part) for part in (group.halves(bounds) if group.is_searched else (group,))
            ]
        return min(plain_s, *(group.bound_s for group in groups))

    def searched(self, bounds: Bounds, group: _Group) -> _Group:
        """The group with a better bound, unless its own is good enough."""
        if self.is_enough(group.bound_s, PROVEN):
            return group
        sizes = int(bounds.sizes[group.start]), int(bounds.sizes[group.stop - 1])
        prices = bounds.prices[group.start + int(np.argmin(bounds.least_s[group.start : group.stop]))]
        found = followed(self.priced, sizes, prices, group.bound_s, self.to_beat_s * (1 - 0.99 * GOOD))
        if found.choice is not None:
            self.judge(found.choice)
        return replace(group, bound_s=found.bound_s, is_searched=True)

    # -- the smallest budget ---------------------------------------------------------------------------------------

    def least_peak(self, most: int, least: int, plain: int) -> int:
        """The least budget for a staging area of this size, which is `least` or more; `plain` if that is no more."""
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
