"""Bounds with the bytes held and the forward's queue followed block by block, for when prices alone prove too little.

A price takes a share of a copy for a copy: where few copies or blocks decide, what it proves is short by about one.
Here a label is a choice for the blocks up to one: the bytes it holds, its seconds, and how far the link is behind, by
the recursion of `memplan.solvers.beam`. Only the backward's queue and the host limit keep their prices. What is still
to come is, for any price p of a second behind, at least

    p * behind + V_i(held)

where V_i is the relaxation of `memplan.solvers.labels` with the link at that price; the highest of a few p counts. So a
label that cannot lead to a choice below what is to be proven is out, and so is one that another matches in bytes even
after waiting until it is no further behind. The least of what is left, or was dropped for want of width, is the bound.

One search serves copies of like sizes: it counts the staging area of the smallest and allows the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Self

import numpy as np

from memplan.link import staging_bytes
from memplan.problem import Choice
from memplan.solvers.bounds import Prices
from memplan.solvers.labels import SLACK, Bytes, Index, Link, Relaxed, Seconds, needs_of, relax
from memplan.solvers.priced import Priced

LABELS = 32 * 500  # of all blocks: a longer chain has fewer at each
CHUNK = 256  # labels that are compared at once
SHARES = (0.8, 1.0, 1.2)  # of the best price of a second behind, beside 0 and 1


@dataclass(frozen=True, slots=True)
class Followed:
    """What a search proves, in seconds of one micro-step's blocks."""

    bound_s: float  # no choice whose largest copy is one of those sizes is faster, or it is what was to be proven
    choice: Choice | None  # the best by the recursion; it may wait for longer, or not fit beside its own staging area


@dataclass(frozen=True, slots=True)
class _Copying:
    """A block's options with the seconds of copies and forward; in `link`, backward and host have their prices."""

    link: Link
    copy_s: Seconds
    forward_s: Seconds

    @classmethod
    def of(cls, link: Link, copy_s: Seconds, forward_s: Seconds) -> Self:
        """Without the options that another matches though it hides less of the copies; from the least hold."""
        order = np.lexsort((link.index, link.time, link.hold))
        link, copy_s, forward_s = link.taken(order), copy_s[order], forward_s[order]
        hold, load, copies = (column[:, None] <= column for column in (link.hold, link.load, copy_s))
        at_worst = link.time[:, None] + np.maximum(forward_s - forward_s[:, None], 0.0)
        beats = hold & load & copies & (at_worst <= link.time)
        earlier = np.triu(np.ones(beats.shape, dtype=np.bool_), 1)
        kept = np.flatnonzero(~(beats & (earlier | (~beats.T & ~np.eye(len(order), dtype=np.bool_)))).any(axis=0))
        return cls(link.taken(kept), copy_s[kept], forward_s[kept])

    def at(self, price: float) -> Link:
        """With a price on each second that the link is busier than the forward."""
        return replace(self.link, time=self.link.time + price * (self.copy_s - self.forward_s))


@dataclass(frozen=True, slots=True)
class _Labels:
    """Choices up to one block: parallel arrays."""

    held: Bytes
    cost: Seconds
    behind: Seconds
    parent: Index  # position among the labels of the block before
    option: Index  # position in `Block.options`

    def taken(self, where: Index) -> Self:
        held, cost, behind = self.held[where], self.cost[where], self.behind[where]
        return type(self)(held, cost, behind, self.parent[where], self.option[where])


@dataclass(frozen=True, slots=True)
class _Search:
    """What does not change from block to block."""

    needs: list[int]
    budget: int
    staging_s: float  # the link is never further behind when a block ends
    relaxed: list[tuple[float, list[Relaxed]]]  # by the price of a second behind
    limit_s: float
    width: int  # labels per block

    def extended(self, i: int, last: _Labels, block: _Copying) -> tuple[_Labels, float]:
        """The labels after block i that may lead below the limit, and the least that any dropped one could lead to."""
        link = block.link
        room = self.budget - np.maximum(link.load, link.hold + self.needs[i + 1])
        option, parent = np.nonzero(last.held <= room[:, None])
        cost = link.time[option] + last.cost[parent]
        behind = block.copy_s[option] + np.maximum(last.behind[parent] - block.forward_s[option], 0.0)
        waited = np.maximum(behind - self.staging_s, 0.0)
        held = link.hold[option] + last.held[parent]
        labels = _Labels(held, cost + waited, behind - waited, parent, link.index[option])
        least = np.full(len(held), -inf)
        for price, relaxed in self.relaxed:
            least = np.maximum(least, labels.cost + price * labels.behind + relaxed[i + 1].at(labels.held))
            kept = np.flatnonzero(least < self.limit_s)
            labels, least = labels.taken(kept), least[kept]
        labels, least, crowded_s = _widest(labels, least, 3 * self.width)
        kept = _undominated(labels)
        labels, _, dropped_s = _widest(labels.taken(kept), least[kept], self.width)
        return labels, min(crowded_s, dropped_s)


def followed(priced: Priced, sizes: tuple[int, int], prices: Prices, known_s: float, limit_s: float) -> Followed:
    """What the search proves for all choices whose largest copy is in this range of sizes, up to `limit_s`.

    It stops as soon as it cannot prove more than `known_s`, which is then the bound.
    """
    smallest, largest = sizes
    staging, budget = staging_bytes([smallest]), priced.problem.budget_bytes
    blocks = _blocks(priced, sizes, prices)
    needs = needs_of([block.link for block in blocks], priced.gaps(staging))
    if needs[0] > budget:
        return Followed(limit_s, None)
    ladder = sorted({0.0, 1.0, *(min(prices.out * share, 1.0) for share in SHARES)}, key=lambda p: abs(p - prices.out))
    host_s = prices.host * (priced.problem.host_bytes or 0) / priced.bytes_s
    slack_s = SLACK * (abs(limit_s) + host_s)
    relaxed = [(price, relax([block.at(price) for block in blocks], needs, budget)) for price in ladder]
    search = _Search(needs, budget, staging_bytes([largest]) / priced.bytes_s, relaxed, limit_s, LABELS // len(blocks))
    none = np.zeros(1, dtype=np.intp)
    layers = [_Labels(np.zeros(1, dtype=np.int64), np.full(1, -host_s), np.zeros(1), none, none)]
    bound_s = limit_s
    for i, block in enumerate(blocks):
        layer, dropped_s = search.extended(i, layers[-1], block)
        layers.append(layer)
        bound_s = min(bound_s, dropped_s)
        if bound_s - slack_s <= known_s:
            return Followed(known_s, None)
    ends = layers[-1].cost + layers[-1].behind
    choice = _traced(layers, int(np.argmin(ends))) if len(ends) else None
    return Followed(max(known_s, min(bound_s, float(ends.min(initial=inf))) - slack_s), choice)


def _blocks(priced: Priced, sizes: tuple[int, int], prices: Prices) -> list[_Copying]:
    smallest, largest = sizes
    staging, blocks = staging_bytes([smallest]), list[_Copying]()
    for i, (link, copies, forward_s) in enumerate(priced.options):
        copy_s = copies / priced.bytes_s
        hidden_s = link.time - forward_s if i else np.zeros(len(copies))  # see `memplan.solvers.bounds`
        time = link.time + prices.back * (copy_s - hidden_s) + prices.host * copy_s
        where = np.flatnonzero(copies <= largest)
        staged = replace(link, load=link.load + staging, time=time).taken(where)
        blocks.append(_Copying.of(staged, copy_s[where], forward_s[where]))
    return blocks


def _widest(labels: _Labels, least: Seconds, width: int) -> tuple[_Labels, Seconds, float]:
    """The most promising of them, and the least that the others could lead to."""
    if len(least) <= width:
        return labels, least, inf
    order = np.argsort(least, kind="stable")
    return labels.taken(order[:width]), least[order[:width]], float(least[order[width]])


def _undominated(labels: _Labels) -> Index:
    """Those that no other matches in bytes, even after it has waited until it is no further behind.

    That one costs no more then is to say that it costs no more with and without what it is behind.
    """
    whole = labels.cost + labels.behind
    order = np.lexsort((whole, labels.cost, labels.held))
    cost, whole = labels.cost[order], whole[order]
    kept = np.zeros(0, dtype=np.intp)
    for start in range(0, len(order), CHUNK):
        at = np.arange(start, min(start + CHUNK, len(order)))
        at = at[~_matched(cost, whole, kept, at).any(axis=0)]
        kept = np.append(kept, at[~np.triu(_matched(cost, whole, at, at), 1).any(axis=0)])
    return order[kept]


def _matched(cost: Seconds, whole: Seconds, by: Index, at: Index) -> np.ndarray:
    return (cost[by, None] <= cost[at]) & (whole[by, None] <= whole[at])


def _traced(layers: Sequence[_Labels], at: int) -> Choice:
    choice = []
    for layer in reversed(layers[1:]):
        choice.append(int(layer.option[at]))
        at = int(layer.parent[at])
    return tuple(reversed(choice))
