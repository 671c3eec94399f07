"""A chain whose blocks may copy to the host, as the chain of `memplan.solvers.labels` beside one staging area.

`memplan.solvers.bounds` finds the price of a second that the link is busier than the forward allows; the backward,
which takes twice as long, hides what the forward hides.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from memplan.link import staging_bytes
from memplan.problem import Problem
from memplan.solvers.bounds import Prices
from memplan.solvers.labels import WIDTHS, Bytes, Fastest, Link, Seconds, chained, fastest
from memplan.solvers.solution import gap_peaks

CLOSE = 1e-4  # share of the blocks' time by which what is completed may miss the fastest
GROUPS = 4  # sizes of the staging area that are told apart


def sizes_of(problem: Problem) -> list[int]:
    """The sizes of copies that may be chosen, at most GROUPS of them and the largest too, in bytes; [] if none may."""
    if problem.link_bytes_s is None or problem.host_bytes is None:
        return []
    every = {option.link_bytes for block in problem.blocks for option in block.options if problem.allows(option)}
    sizes = sorted(every - {0})
    count = min(GROUPS, len(sizes))
    edges = [len(sizes) * k // count for k in range(count + 1)] if count else []
    return [sizes[edge - 1] for edge in edges[1:]]


class Priced:
    """A problem in which something may be copied; all seconds are those of one micro-step's blocks."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    # -- questions -------------------------------------------------------------------------------------------------

    def sparest(self, most: int, budget: int) -> Fastest | None:
        """The choice that keeps the link busy for the fewest seconds, which are its time; None if nothing fits."""
        chain = chained(*self.staged(most), budget)
        return None if chain is None else fastest(chain)

    def least_budgets(self, sizes: Sequence[int]) -> list[int]:
        """At which the blocks and gaps of some choice fit beside the staging area of each of these largest copies.

        Of 0 it is what the choices need that copy nothing.
        """
        most = np.array(sizes, dtype=np.int64)
        staged = np.array([staging_bytes([size]) for size in sizes], dtype=np.int64)
        *gaps, last = gap_peaks(self.problem)
        needs = np.full(len(sizes), last, dtype=np.int64)  # of `memplan.solvers.dp`, by size
        for i, (link, copies, _) in reversed(list(enumerate(self.options))):
            peaks = np.maximum(link.load[:, None] + staged, link.hold[:, None] + needs)
            allowed = np.where(copies[:, None] <= most, peaks, np.iinfo(np.int64).max)
            needs = np.maximum(gaps[i] + (staged if i else 0), allowed.min(axis=0))
        return [int(need) for need in needs]

    # -- seconds ---------------------------------------------------------------------------------------------------

    @cached_property
    def bytes_s(self) -> float:
        assert self.problem.link_bytes_s is not None  # or nothing may be copied, and nobody asks
        return self.problem.link_bytes_s

    # -- the chain -------------------------------------------------------------------------------------------------

    def completed(self, pattern: Sequence[int], prices: Prices, at_most_s: float) -> Fastest | None:
        """The fastest choice that copies what these options do (-1: nothing) or less, with waiting only at its price.

        None if nothing fits.
        """
        if self.problem.optimizer_bytes > self.problem.budget_bytes:
            return None
        pairs = zip(self.problem.blocks, pattern, strict=True)
        staging = staging_bytes([block.options[k].link_bytes for block, k in pairs if k >= 0])
        links = []
        for (link, copies, forward_s), k in zip(self.options, pattern, strict=True):
            where = np.flatnonzero((copies == 0) | (link.index == k))
            time = link.time + prices.out * (copies / self.bytes_s - forward_s)
            links.append(replace(link, load=link.load + staging, time=np.maximum(time, 0.0)).taken(where))
        chain = chained(links, self.gaps(staging), self.problem.budget_bytes)
        return None if chain is None else fastest(chain, at_most_s, CLOSE, WIDTHS[:-1])

    def staged(self, most: int) -> tuple[list[Link], list[int]]:
        """Options that copy up to `most` beside the staging area for that, and the gaps; copies are all the time."""
        staging = staging_bytes([most])
        links = []
        for link, copies, _ in self.options:
            staged = replace(link, load=link.load + staging, time=copies / self.bytes_s)
            links.append(staged.taken(np.flatnonzero(copies <= most)))
        return links, self.gaps(staging)

    def gaps(self, staging: int) -> list[int]:
        """The larger peak of each, with what is in flight."""
        first, *between, last = gap_peaks(self.problem)
        return [first, *(gap + staging for gap in between), last]

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
