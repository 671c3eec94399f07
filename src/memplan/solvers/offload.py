"""Copies to the host in the default solver: a price on the link, found by crossing lines, then a judged mixture.

Of one micro-step let t be the blocks' seconds, F and B the parts of t in the forward and in the backward, and L the
seconds that the link is busy in each direction. Whatever the queues do, the step takes at least
t + max(0, L - F) + max(0, L - B), and the host limit says L <= H. So for all prices p, q in [0, 1] and r >= 0

    step >= t + p (L - F) + q (L - B) + r (L - H)

whose right side adds up over the blocks: the chain of `memplan.solvers.labels` minimises it exactly under the budget
(Lagrangian relaxation; Everett, Operations Research 11, 1963). The choice at one price that overloads the link and the
one at another that does not are two lines over the price; where they cross is the next price to ask at, and when
nothing new lies below the crossing, that is the best bound. The plan itself is the best mixture of those two choices
by `Problem.step_s`, which walks the queues: with many identical blocks either choice alone treats all of them alike.
At the end it is polished block by block, since the bound knows how busy the link is, but not when.

The staging area is as large as the largest copy chosen, so the question is asked once per size of it (GROUPS at most),
largest copy by largest copy; a group that cannot beat the plan in hand ends at its first question.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf

import numpy as np

from memplan.link import staging_bytes
from memplan.problem import Choice, Problem
from memplan.solvers.labels import Bytes, Chain, Link, Seconds, chained, fastest, needs_of
from memplan.solvers.solution import Solution, gap_peaks, peak_bytes

GROUPS = 4  # sizes of the staging area that are told apart
QUESTIONS = 12  # prices asked for in one group and direction; lines cross for good after 3 to 6
NEAR = 3  # blocks so far apart exchange their options at the end, for copies to be made a little earlier or later
ENOUGH = 2e-4  # share of the blocks' time by which a plan may miss the bound without further questions


@dataclass(frozen=True, slots=True)
class _Prices:
    """Seconds per second that the link is busy beyond what the forward, the backward and the host limit allow."""

    out: float = 0.0
    back: float = 0.0
    host: float = 0.0


@dataclass(frozen=True, slots=True)
class _Use:
    """What a choice takes in one micro-step, in seconds but for the choice itself."""

    choice: Choice
    blocks_s: float  # without waiting
    forward_s: float
    link_s: float  # each way

    def excess(self, axis: str, host_s: float) -> float:
        """By how much the link is busier than one of the three limits allows."""
        limits = {"out": self.forward_s, "back": self.blocks_s - self.forward_s, "host": host_s}
        return self.link_s - limits[axis]


def improved(problem: Problem, plain: Solution) -> Solution:
    """The solution, or a faster one that copies to the host; its bound is one on all choices."""
    if not _sizes(problem):
        return plain
    search = _Search(problem, plain.choice)
    bound_s = inf if plain.bound_s is None else search.blocks_of(plain.bound_s)
    for least, most in _groups(_sizes(problem)):
        bound_s = min(bound_s, search.group(least, most))
    if search.best is None:
        return Solution.infeasible()
    search.polish(bound_s)
    bound_s = problem.accumulation * (bound_s + problem.rest_s) + problem.optimizer_s
    return Solution.of(problem, search.best, min(bound_s, problem.step_s(search.best)))


def least_peak(problem: Problem, plain: int) -> int:
    """The least peak of the blocks and gaps when copies are allowed; `plain` is that without them.

    Exact unless the host limit binds: then the least budget at which the choice of the fewest bytes copied obeys it.
    """
    search = _Search(problem, None)
    return min([plain, *(search.least_peak(most, plain) for _, most in _groups(_sizes(problem)))])


def _sizes(problem: Problem) -> list[int]:
    """The different sizes of copies that may be chosen."""
    if problem.link_bytes_s is None or problem.host_bytes is None:
        return []
    every = {option.link_bytes for block in problem.blocks for option in block.options if problem.allows(option)}
    return sorted(every - {0})


def _groups(sizes: list[int]) -> list[tuple[int, int]]:
    """(least, largest) of at most GROUPS runs of sizes."""
    count = min(GROUPS, len(sizes))
    edges = [len(sizes) * k // count for k in range(count + 1)] if count else []
    return [(sizes[start], sizes[stop - 1]) for start, stop in pairwise(edges)]


class _Search:
    """The plan in hand, and the questions that may better it."""

    def __init__(self, problem: Problem, plain: Choice | None) -> None:
        self.problem = problem
        self.best = plain
        self.best_s = inf if plain is None else self.blocks_of(problem.step_s(plain))

    @cached_property
    def bytes_s(self) -> float:
        assert self.problem.link_bytes_s is not None  # or nothing may be copied, and nobody asks
        return self.problem.link_bytes_s

    @cached_property
    def host_s(self) -> float:
        return (self.problem.host_bytes or 0) / self.bytes_s

    def blocks_of(self, step_s: float) -> float:
        """The blocks' share of a step, per micro-step."""
        return (step_s - self.problem.optimizer_s) / self.problem.accumulation - self.problem.rest_s

    def used(self, choice: Choice) -> _Use:
        options = self.problem.chosen(choice)
        link_s = sum(option.link_bytes for option in options) / self.bytes_s
        return _Use(choice, sum(o.step_s for o in options), sum(o.forward_s for o in options), link_s)

    # -- one size of the staging area ------------------------------------------------------------------------------

    def group(self, least: int, most: int) -> float:
        """A bound on the choices whose largest copy is between these; betters the plan in hand where it can."""
        asked = self.asked(_Prices(), least, most)
        if asked is None:
            return inf
        bound_s, use = asked
        prices = _Prices()
        for axis in ("host", "out", "back"):
            if use is None or self.is_enough(bound_s):
                return bound_s
            if use.excess(axis, self.host_s) <= 0:
                continue
            found = self.raised(prices, axis, use, least, most)
            if found is None:
                return inf
            better_s, prices, use = found
            bound_s = max(bound_s, better_s)
        return bound_s

    def raised(
        self, prices: _Prices, axis: str, over: _Use, least: int, most: int
    ) -> tuple[float, _Prices, _Use | None] | None:
        """Raise one price until the link is no longer too busy: (best bound, prices, choice there).

        None: even the least that can be copied is above the host limit.
        """
        if axis == "host":
            under = self.sparest(least, most)
            if under is None or under.excess(axis, self.host_s) > 0:
                return None
            best_s = 0.0
        else:
            asked = self.asked(replace(prices, **{axis: 1.0}), least, most)
            assert asked is not None  # the same chain fitted at other prices
            best_s, at_one = asked
            if at_one is None or at_one.excess(axis, self.host_s) > 0:
                return best_s, replace(prices, **{axis: 1.0}), at_one
            under = at_one
        for _ in range(QUESTIONS):
            steep, flat = over.excess(axis, self.host_s), under.excess(axis, self.host_s)
            base_s = self.value_s(under, prices) - self.value_s(over, prices)
            crossing = replace(prices, **{axis: max(0.0, base_s / (steep - flat))})
            asked = self.asked(crossing, least, most)
            assert asked is not None
            bound_s, use = asked
            best_s = max(best_s, bound_s)
            if use is None or self.is_enough(best_s):
                return best_s, crossing, None
            if self.value_s(use, crossing) >= self.value_s(over, crossing) * (1 - 1e-9):
                break
            over, under = (use, under) if use.excess(axis, self.host_s) > 0 else (over, use)
        self.mix(over.choice, under.choice)
        return best_s, crossing, under

    def value_s(self, use: _Use, prices: _Prices) -> float:
        return use.blocks_s + sum(
            price * use.excess(axis, self.host_s)
            for axis, price in (("out", prices.out), ("back", prices.back), ("host", prices.host))
        )

    def asked(self, prices: _Prices, least: int, most: int) -> tuple[float, _Use | None] | None:
        """A bound on the step's blocks and the choice at these prices; None if nothing fits.

        The choice is None when no choice is faster than the plan in hand by more than the bound leaves open.
        """
        spent_s = prices.host * self.host_s
        chain = self.chain(least, most, prices)
        if chain is None:
            return None
        found = fastest(chain, self.best_s + spent_s, ENOUGH)
        if found.choice is None:
            return found.bound_s - spent_s, None
        if not self.judge(found.choice) and least < most:
            roomy = self.chain(most, most, prices)
            other = None if roomy is None else fastest(roomy, self.best_s + spent_s, ENOUGH).choice
            if other is not None:
                self.judge(other)
        return found.bound_s - spent_s, self.used(found.choice)

    def sparest(self, least: int, most: int) -> _Use | None:
        """The choice that copies the fewest bytes; None if nothing fits."""
        found: list[Choice] = []
        for staged_for in sorted(
            {most, least}
        ):  # the smaller area for the bound; the larger, where it fits, for a plan
            chain = self.chain(staged_for, most, None)
            choice = None if chain is None else fastest(chain).choice
            if choice is not None:
                self.judge(choice)
                found.append(choice)
        return self.used(found[0]) if found else None

    # -- the chain -------------------------------------------------------------------------------------------------

    def chain(self, staged_for: int, most: int, prices: _Prices | None) -> Chain | None:
        """Options that copy at most `most`, beside a staging area for `staged_for`; without prices, copies are time."""
        if self.problem.optimizer_bytes > self.problem.budget_bytes:
            return None
        links, gaps = self.staged(staged_for, most, prices)
        return chained(links, gaps, self.problem.budget_bytes)

    def staged(self, staged_for: int, most: int, prices: _Prices | None) -> tuple[list[Link], list[int]]:
        staging = staging_bytes([staged_for])
        first, *between, last = gap_peaks(self.problem)
        links = []
        for link, copies, forward_s in self.options:
            where = np.flatnonzero(copies <= most)
            time = self.priced(link.time, copies, forward_s, prices)
            links.append(replace(link, load=link.load + staging, time=time).taken(where))
        return links, [first, *(gap + staging for gap in between), last]

    @cached_property
    def options(self) -> list[tuple[Link, Bytes, Seconds]]:
        """Per block the options that may be chosen, with their copies and their forward's seconds."""
        every = []
        for block in self.problem.blocks:
            index = [k for k, option in enumerate(block.options) if self.problem.allows(option)]
            copies = np.array([block.options[k].link_bytes for k in index], dtype=np.int64)
            forward_s = np.array([block.options[k].forward_s for k in index])
            every.append((Link.of(block, index), copies, forward_s))
        return every

    def priced(self, time: Seconds, copies: Bytes, forward_s: Seconds, prices: _Prices | None) -> Seconds:
        busy_s = copies / self.bytes_s
        if prices is None:
            return busy_s
        out, back = prices.out * (busy_s - forward_s), prices.back * (busy_s - (time - forward_s))
        return np.maximum(time + out + back + prices.host * busy_s, 0.0)

    # -- plans -----------------------------------------------------------------------------------------------------

    def judge(self, choice: Choice) -> bool:
        """Take the choice, as it is or spread, if it is faster than the plan in hand; False if it does not fit."""
        spread = self.spread(choice)
        if spread != choice:
            self.is_judged(spread)
        return self.is_judged(choice)

    def spread(self, choice: Choice) -> Choice:
        """The same options handed out anew among equal blocks, so that the link is busy evenly and not at the end."""
        spread = list(choice)
        for members in self.equal_blocks:
            options = self.problem.blocks[members[0]].options
            counts = Counter(choice[i] for i in members)
            # Of n blocks with one option the j-th lies at about (j + 1/2) / n of the group, copies a little earlier.
            places = [
                ((j + (0.25 if options[k].link_bytes else 0.75)) / count, k)
                for k, count in counts.items()
                for j in range(count)
            ]
            for i, (_, k) in zip(members, sorted(places), strict=True):
                spread[i] = k
        return tuple(spread)

    @cached_property
    def equal_blocks(self) -> list[list[int]]:
        groups: dict[object, list[int]] = defaultdict(list)
        for i, block in enumerate(self.problem.blocks):
            groups[block.options].append(i)
        return [members for members in groups.values() if len(members) > 1]

    def is_judged(self, choice: Choice) -> bool:
        options = self.problem.chosen(choice)
        if sum(option.link_bytes for option in options) > (self.problem.host_bytes or 0):
            return False
        if peak_bytes(self.problem, choice) > self.problem.budget_bytes:
            return False
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
                if sum(o.step_s for o in self.problem.chosen(tuple(mixed))) < self.best_s:
                    self.judge(tuple(mixed))

    def polish(self, bound_s: float) -> None:
        """Better the plan in hand by one block's option, or by an exchange of two, until none is faster."""
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
        choice = tuple(options.get(i, k) for i, k in enumerate(self.best))
        if choice == self.best or not all(k in self.times[i] for i, k in options.items()):
            return
        if sum(times[k] for times, k in zip(self.times, choice, strict=True)) < self.best_s:
            self.is_judged(choice)

    @cached_property
    def times(self) -> list[dict[int, float]]:
        """Per block, the seconds of each option that may be chosen."""
        return [dict(zip(link.index.tolist(), link.time.tolist(), strict=True)) for link, _, _ in self.options]

    def is_enough(self, bound_s: float) -> bool:
        return self.best_s - bound_s <= ENOUGH * self.best_s

    def least_peak(self, most: int, plain: int) -> int:
        """The least budget for a staging area of this size; `plain` if that is no more."""
        least = needs_of(*self.staged(most, most, None))[0]
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
        chain = chained(*self.staged(most, most, None), budget)
        assert chain is not None  # nobody asks below the least need
        choice = fastest(chain).choice
        assert choice is not None
        return self.used(choice).excess("host", self.host_s) <= 0
