"""A price on the link to the host: lower bounds on what a chain takes when its blocks may copy.

Of one micro-step let t be the blocks' seconds, F and B the parts of t in the forward and in the backward, and L the
seconds that the link is busy in each direction. Whatever the queues do, the step takes at least
t + max(0, L - F) + max(0, L - B), and the host limit says L <= H. So for all prices p, q in [0, 1] and r >= 0

    step >= t + p (L - F) + q (L - B) + r (L - H)

whose right side adds up over the blocks: the chain of `memplan.solvers.labels` minimises it exactly under the budget
(Lagrangian relaxation; Everett, Operations Research 11, 1963).

The staging area is as large as the largest copy chosen, so the question is asked once per size of it, GROUPS at most:
of a group of sizes the bound takes the area that its least size needs, and a plan that fits for certain that of its
largest.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf

import numpy as np

from memplan.link import staging_bytes
from memplan.problem import Choice, Problem
from memplan.solvers.labels import Bytes, Chain, Fastest, Index, Link, Seconds, chained, fastest, needs_of
from memplan.solvers.solution import gap_peaks

GROUPS = 4  # sizes of the staging area that are told apart


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds per second that the link is busy beyond what the forward, the backward and the host limit allow.

    The bound holds at these prices only: beyond 1 a second of waiting would count for more than it takes.
    """

    out: float = 0.0
    back: float = 0.0
    host: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.out <= 1 and 0 <= self.back <= 1 and self.host >= 0):
            raise ValueError(f"{self} bounds nothing: out and back have to be from 0 to 1, host at least 0")


@dataclass(frozen=True, slots=True)
class Use:
    """What a choice takes in one micro-step, in seconds but for the choice itself."""

    choice: Choice
    blocks_s: float  # without waiting
    forward_s: float
    link_s: float  # each way

    def excess_s(self, axis: str, host_s: float) -> float:
        """By how much the link is busier than one of the three limits allows."""
        limits = {"out": self.forward_s, "back": self.blocks_s - self.forward_s, "host": host_s}
        return self.link_s - limits[axis]


def groups_of(problem: Problem) -> list[tuple[int, int]]:
    """(least, largest) of at most GROUPS runs of the sizes of copies that may be chosen, in bytes; [] if none may."""
    if problem.link_bytes_s is None or problem.host_bytes is None:
        return []
    every = {option.link_bytes for block in problem.blocks for option in block.options if problem.allows(option)}
    sizes = sorted(every - {0})
    count = min(GROUPS, len(sizes))
    edges = [len(sizes) * k // count for k in range(count + 1)] if count else []
    return [(sizes[start], sizes[stop - 1]) for start, stop in pairwise(edges)]


def copying(copies: Bytes, least: int, most: int) -> Index:
    """Which of a block's options copy nothing, or a size from `least` to `most`."""
    return np.flatnonzero((copies == 0) | ((copies >= least) & (copies <= most)))


class Priced:
    """A problem in which something may be copied, asked at prices; all seconds are those of one micro-step's blocks."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    # -- questions -------------------------------------------------------------------------------------------------

    def cheapest(
        self, prices: Prices, least: int, most: int, at_most_s: float = inf, enough: float = 0.0
    ) -> Fastest | None:
        """The cheapest choice at these prices, and a bound on all choices whose largest copy is of these bytes.

        The bound is at most `at_most_s`, and above what else bounds it only where no choice is cheaper than that.

        Args:
            prices: of the link.
            least: bytes of the largest copy at least; the staging area is as large as this one needs.
            most: and at most.
            at_most_s: dearer choices are of no interest.
            enough: as of `labels.fastest`.

        Returns:
            None if nothing fits the budget.
        """
        chain = self.chain(least, most, prices)
        if chain is None:
            return None
        spent_s = prices.host * self.host_s
        found = fastest(chain, at_most_s + spent_s, enough)
        return replace(found, time_s=found.time_s - spent_s, bound_s=found.bound_s - spent_s)

    def sparest(self, staged_for: int, most: int, budget: int) -> Fastest | None:
        """The choice that keeps the link busy for the fewest seconds, which are its time; None if nothing fits."""
        chain = chained(*self.staged(staged_for, most, None), budget)
        return None if chain is None else fastest(chain)

    def least_budget(self, most: int) -> int:
        """At which the blocks and gaps of some choice fit beside the staging area of this largest copy."""
        return needs_of(*self.staged(most, most, None))[0]

    def value_s(self, use: Use, prices: Prices) -> float:
        """What a choice costs at these prices: no more than its blocks take with waiting, if it obeys the limits."""
        return use.blocks_s + sum(
            price * use.excess_s(axis, self.host_s)
            for axis, price in (("out", prices.out), ("back", prices.back), ("host", prices.host))
        )

    # -- seconds ---------------------------------------------------------------------------------------------------

    @cached_property
    def bytes_s(self) -> float:
        assert self.problem.link_bytes_s is not None  # or nothing may be copied, and nobody asks
        return self.problem.link_bytes_s

    @cached_property
    def host_s(self) -> float:
        return (self.problem.host_bytes or 0) / self.bytes_s

    def used(self, choice: Choice) -> Use:
        options = self.problem.chosen(choice)
        link_s = sum(option.link_bytes for option in options) / self.bytes_s
        return Use(choice, sum(o.step_s for o in options), sum(o.forward_s for o in options), link_s)

    # -- the chain -------------------------------------------------------------------------------------------------

    def chain(self, staged_for: int, most: int, prices: Prices, least: int = 1) -> Chain | None:
        """As `staged`; None if nothing fits."""
        if self.problem.optimizer_bytes > self.problem.budget_bytes:
            return None
        return chained(*self.staged(staged_for, most, prices, least), self.problem.budget_bytes)

    def staged(self, staged_for: int, most: int, prices: Prices | None, least: int = 1) -> tuple[list[Link], list[int]]:
        """Options that copy nothing, or from `least` to `most`, beside a staging area for `staged_for`, and the gaps.

        Without prices, copies are time.
        """
        staging = staging_bytes([staged_for])
        first, *between, last = gap_peaks(self.problem)
        links = []
        for link, copies, forward_s in self.options:
            where = copying(copies, least, most)
            time = self.cost_s(link.time, copies, forward_s, prices)
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

    def cost_s(self, time: Seconds, copies: Bytes, forward_s: Seconds, prices: Prices | None) -> Seconds:
        busy_s = copies / self.bytes_s
        if prices is None:
            return busy_s
        out, back = prices.out * (busy_s - forward_s), prices.back * (busy_s - (time - forward_s))
        return np.maximum(time + out + back + prices.host * busy_s, 0.0)  # below 0 by rounding only
