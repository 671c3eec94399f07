"""The core of the default solver: the fastest chain of options under a budget, by labels over the bytes held.

`memplan.solvers.dp` says what is computed and why it is exact. Here the times of the options are only numbers to add
up, so that `memplan.solvers.offload` can ask the same question with a price on the link.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from memplan.problem import Block, Choice

WIDTHS = (10, 100, 768)  # labels per block in each search
SLACK = 1e-9  # relative; far above the float error of a sum of block times, so that pruning loses nothing

Bytes = NDArray[np.int64]
Seconds = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Link:
    """A block's options as parallel arrays."""

    index: Index  # position in `Block.options`
    hold: Bytes
    load: Bytes
    time: Seconds

    @classmethod
    def of(cls, block: Block, index: Sequence[int]) -> "Link":
        """The options of a block at these positions."""
        options = [block.options[k] for k in index]
        loads = [block.base_bytes + max(option.forward_bytes, option.backward_bytes) for option in options]
        return cls(
            index=np.array(index, dtype=np.intp),
            hold=np.array([option.hold_bytes for option in options], dtype=np.int64),
            load=np.array(loads, dtype=np.int64),
            time=np.array([option.step_s for option in options], dtype=np.float64),
        )

    @classmethod
    def plain(cls, block: Block) -> "Link":
        """The options of a block that copy nothing to the host."""
        return cls.of(block, [k for k, option in enumerate(block.options) if option.link_bytes == 0])

    def taken(self, where: Index) -> "Link":
        return Link(self.index[where], self.hold[where], self.load[where], self.time[where])

    def undominated(self) -> "Link":
        """Without the options that another matches or beats in hold, load and time; from the least hold to the most."""
        link = self.taken(np.lexsort((self.index, self.time, self.load, self.hold)))
        hold, load, time = link.hold[:, None], link.load[:, None], link.time[:, None]
        no_worse = (hold <= link.hold) & (load <= link.load) & (time <= link.time)
        beaten = np.triu(no_worse, 1).any(axis=0)  # in this order only an earlier option can dominate
        return link.taken(np.flatnonzero(~beaten))


@dataclass(frozen=True, slots=True)
class Relaxed:
    """V_i relaxed: the least time of blocks i.. as a convex function of the bytes held before them."""

    held: Seconds  # breakpoints, ascending; float64 holds a byte count exactly up to 2**53
    time: Seconds

    def at(self, held: Bytes) -> Seconds:
        """Flat left of the first breakpoint (more memory is of no use there); nobody asks right of the last."""
        return np.interp(held, self.held, self.time)


@dataclass(frozen=True, slots=True)
class Chain:
    """What a search needs to know of the problem; make it with `chained`."""

    links: tuple[Link, ...]
    needs: list[int]
    relaxed: list[Relaxed]
    budget: int

    @property
    def least_s(self) -> float:
        """No choice that fits is faster."""
        return float(self.relaxed[0].at(np.zeros(1, dtype=np.int64))[0]) * (1 - SLACK)


@dataclass(frozen=True, slots=True)
class Fastest:
    """The answer of `fastest`, in seconds of all blocks."""

    choice: Choice | None  # None: there is none of at most the seconds asked for
    time_s: float  # its own, or else the seconds asked for
    bound_s: float  # no choice is faster than this, unless it is slower than `time_s`


@dataclass(frozen=True, slots=True)
class _Labels:
    """Choices up to one block that no other beats: parallel arrays, bytes ascending and time strictly descending."""

    held: Bytes
    time: Seconds
    parent: Index  # position among the labels of the block before
    option: Index  # position in `Block.options`


@dataclass(frozen=True, slots=True)
class _Found:
    """The end of one search."""

    plan: tuple[Choice, float] | None  # and its blocks' seconds; None: all that could be as fast were dropped
    dropped_s: float | None  # no choice dropped for want of width is faster; None: none was dropped


def chained(links: Iterable[Link], gaps: Sequence[int], budget: int) -> Chain | None:
    """The chain of these options and gap peaks; None if nothing fits the budget."""
    links = tuple(link.undominated() for link in links)
    needs = needs_of(links, gaps)
    return None if needs[0] > budget else Chain(links, needs, relax(links, needs, budget), budget)


def needs_of(links: Sequence[Link], gaps: Sequence[int]) -> list[int]:
    """need_0 .. need_N of `memplan.solvers.dp.smallest_budget`."""
    needs = [gaps[-1]]
    for link, gap in zip(reversed(links), reversed(gaps[:-1]), strict=True):
        needs.append(max(gap, int(np.maximum(link.load, link.hold + needs[-1]).min())))
    return needs[::-1]


def fastest(chain: Chain, at_most_s: float = inf, enough: float = 0.0, widths: Sequence[int] = WIDTHS) -> Fastest:
    """The fastest choice of at most `at_most_s` seconds, with a lower bound on any.

    It may miss the optimum by the share `enough`; `Fastest.choice` can then be None where no more than that is left.
    """
    choice: Choice | None
    choice, known_s = _greedy(chain)
    if known_s > at_most_s:
        choice, known_s = None, at_most_s
    bound_s = 0.0
    for width in widths:
        found = _search(chain, known_s, width)
        if found.plan is not None and found.plan[1] <= known_s:
            choice, known_s = found.plan
        if found.dropped_s is None or found.dropped_s >= known_s:
            return Fastest(choice, known_s, known_s)
        bound_s = max(bound_s, found.dropped_s)
        if known_s - bound_s <= enough * known_s:
            break
    return Fastest(choice, known_s, bound_s * (1 - SLACK))


def some_choice(chain: Chain) -> Choice:
    """A choice that fits, and is quick to be found."""
    return _greedy(chain)[0]


# --- the relaxation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hull:
    """The lower convex hull of a block's (hold, time): from the least hold, steepest first."""

    first: tuple[int, float]
    bytes: Seconds  # length of each segment
    slope: Seconds  # seconds saved per byte held


def _hull(link: Link) -> _Hull:
    points: list[tuple[int, float]] = []
    for point in zip(link.hold.tolist(), link.time.tolist(), strict=True):
        if points and point[1] >= points[-1][1]:
            continue
        if points and point[0] == points[-1][0]:
            points.pop()
        while len(points) > 1 and _on_or_above(points[-2], points[-1], point):
            points.pop()
        points.append(point)
    lengths = [float(b[0] - a[0]) for a, b in pairwise(points)]
    slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    return _Hull(points[0], np.array(lengths), np.array(slopes))


def _on_or_above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (a[1] - b[1]) * (c[0] - b[0]) <= (b[1] - c[1]) * (b[0] - a[0])


def relax(links: Sequence[Link], needs: list[int], budget: int) -> list[Relaxed]:
    """The relaxed V_0 .. V_N, each up to the largest prefix from which the blocks after it fit.

    V_i is kept as its right end (`most` bytes, `time` seconds) and the segments left of it, steepest first. Block i
    puts its least hold at the right end, its hull among the segments; then the right end moves left to budget - need_i.
    """
    most, time = budget - needs[-1], 0.0
    lengths, slopes = np.zeros(0), np.zeros(0)
    relaxed = [Relaxed(np.array([float(most)]), np.array([time]))]
    hulls: dict[tuple[bytes, bytes], _Hull] = {}
    for link, need in zip(reversed(links), reversed(needs[:-1]), strict=True):
        key = (link.hold.tobytes(), link.time.tobytes())
        if key not in hulls:
            hulls[key] = _hull(link)
        hull = hulls[key]
        slopes = np.concatenate((slopes, hull.slope))
        order = np.argsort(-slopes, kind="stable")
        slopes, lengths = slopes[order], np.concatenate((lengths, hull.bytes))[order]
        cut = float(most - hull.first[0] - (budget - need))  # >= 0: from where blocks i.. fit, the least hold fits
        starts = np.concatenate(([0.0], np.cumsum(lengths)))
        saved = np.concatenate(([0.0], np.cumsum(lengths * slopes)))
        most, time = budget - need, time + hull.first[1] - float(np.interp(cut, starts, saved))
        lengths = np.diff(np.maximum(starts, cut))
        slopes, lengths = slopes[lengths > 0], lengths[lengths > 0]
        held = most - np.concatenate(([0.0], np.cumsum(lengths)))
        fallen = time - np.concatenate(([0.0], np.cumsum(lengths * slopes)))
        relaxed.append(Relaxed(held[::-1], fallen[::-1]))
    return relaxed[::-1]


# --- the searches ---------------------------------------------------------------------------------------------------


def _greedy(chain: Chain) -> tuple[Choice, float]:
    """A first plan and its blocks' seconds: at each block the fastest option after which the rest still fits."""
    held, time, choice = 0, 0.0, []
    for link, need in zip(chain.links, chain.needs[1:], strict=True):
        fits = np.flatnonzero(held + np.maximum(link.load, link.hold + need) <= chain.budget)
        k = fits[np.argmin(link.time[fits])]
        held, time = held + int(link.hold[k]), time + float(link.time[k])
        choice.append(int(link.index[k]))
    return tuple(choice), time


def _search(chain: Chain, upper_s: float, width: int) -> _Found:
    """The fastest choice of at most `upper_s` seconds that `width` labels per block lead to."""
    none = np.zeros(0, dtype=np.intp)
    layers = [_Labels(np.zeros(1, dtype=np.int64), np.zeros(1), none, none)]
    dropped: list[float] = []
    for i in range(len(chain.links)):
        layer, dropped_s = _extended(chain, i, layers[-1], upper_s * (1 + SLACK), width)
        layers.append(layer)
        if dropped_s is not None:
            dropped.append(dropped_s)
    least_s = min(dropped, default=None)
    if not len(layers[-1].held):
        return _Found(None, least_s)
    return _Found((_traced(layers), float(layers[-1].time[-1])), least_s)


def _extended(chain: Chain, i: int, last: _Labels, limit_s: float, width: int) -> tuple[_Labels, float | None]:
    """The `width` most promising labels after block i, and the least time that any of the others could lead to."""
    link = chain.links[i]
    room = chain.budget - np.maximum(link.load, link.hold + chain.needs[i + 1])
    held = link.hold[:, None] + last.held  # (options, labels): every row ascends, which suits `interp`
    time = link.time[:, None] + last.time
    total = time + chain.relaxed[i + 1].at(held)
    kept = np.flatnonzero((total <= limit_s) & (last.held <= room[:, None]))
    held, time, total = held.ravel(), time.ravel(), total.ravel()
    kept = kept[np.argsort(held[kept], kind="stable")]  # rows ascend already: a stable sort only merges them
    best = np.minimum.accumulate(time[kept])
    kept = kept[np.append(True, best[1:] < best[:-1])[: len(kept)]]
    kept = kept[np.append(np.diff(held[kept]) > 0, True)[: len(kept)]]  # of equal holds the last is the fastest
    dropped_s = None
    if len(kept) > width:
        edge = np.partition(total[kept], width)[width]
        dropped_s = float(edge)
        better = total[kept] < edge
        ties = np.flatnonzero(total[kept] == edge)[: width - np.count_nonzero(better)]
        better[ties] = True
        kept = kept[better]
    row, parent = np.divmod(kept, max(len(last.held), 1))
    return _Labels(held[kept], time[kept], parent, link.index[row]), dropped_s


def _traced(layers: list[_Labels]) -> Choice:
    """The options along the parents of the fastest label after the last block."""
    at, choice = len(layers[-1].held) - 1, []
    for layer in reversed(layers[1:]):
        choice.append(int(layer.option[at]))
        at = int(layer.parent[at])
    return tuple(reversed(choice))
