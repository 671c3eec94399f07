"""The default solver: an exact dynamic programme over the prefix sum of held bytes, with a proven bound.

Let S be the bytes that the blocks before block i hold, and load_i(o) = base_i + max(forward_i(o), backward_i(o)). Then

    V_i(S) = min over o with S + load_i(o) <= B of  t_i(o) + V_{i+1}(S + hold_i(o)),    V_N(S) = 0

with S + gap_i <= B at every i is the whole problem (`memplan.problem` says why one number is the state). The programme
runs forward over *labels*: the pairs (S, time) that no other choice for the same blocks beats in both. S is never
rounded, so a label's bytes are the bytes. Three things keep the labels few without losing the optimum:

* **Need.** need_i, the least budget at which blocks i.. run when nothing is held before them, has a closed recursion
  (`smallest_budget`). A label is kept only if S + need_{i+1} <= B, so every label has a feasible completion.
* **Relaxation.** Let a block take fractions of its options, and forget load_i: V_i becomes convex and piecewise linear
  in S, and the recursion an infimal convolution, which merges slopes in order. This is the linear relaxation of the
  multiple-choice knapsack (Sinha and Zoltners, Operations Research 27, 1979) with a capacity at every position instead
  of one. A label whose time plus relaxed completion exceeds a plan already known cannot lead to a better one.
* **Width.** The search is repeated with more and more labels per block (WIDTHS): a narrow one is quick and finds the
  plan that lets a wide one drop almost everything.

A label that is dropped for want of width takes the bound down to the least time that it could have led to. The answer
is the optimum, with gap 0, as soon as no search dropped a label that could have been faster; benchmarks/solver.py shows
where that is not so (time that falls in exact proportion to the bytes held makes every label equally promising).

A solution with gap 0 is the optimum, so a larger budget never makes it slower; others are within their gap of that.
Of equally fast choices the one that holds fewer bytes at the loss is taken, then options in a fixed order: the answer
is deterministic. Sizes are bytes, times are seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from memplan.problem import Block, Choice, Problem
from memplan.solvers.solution import Solution, peak_bytes

WIDTHS = (10, 100, 2048)  # labels per block in each search
SLACK = 1e-9  # relative; far above the float error of a sum of block times, so that pruning loses nothing

Bytes = NDArray[np.int64]
Seconds = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Link:
    """A block's options as parallel arrays."""

    index: Index  # position in `Block.options`
    hold: Bytes
    load: Bytes
    time: Seconds

    def taken(self, where: Index) -> "_Link":
        return _Link(self.index[where], self.hold[where], self.load[where], self.time[where])


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """V_i relaxed: the least time of blocks i.. as a convex function of the bytes held before them."""

    held: Seconds  # breakpoints, ascending; float64 holds a byte count exactly up to 2**53
    time: Seconds

    def at(self, held: Bytes) -> Seconds:
        """Flat left of the first breakpoint (more memory is of no use there); nobody asks right of the last."""
        return np.interp(held, self.held, self.time)


@dataclass(frozen=True, slots=True)
class _Chain:
    """What a search needs to know of the problem."""

    links: tuple[_Link, ...]
    needs: list[int]
    relaxed: list[_Relaxed]
    budget: int


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


def solve(problem: Problem) -> Solution:
    """The fastest choice within the budget, with a lower bound on the step of any choice."""
    links = tuple(_undominated(_link(block)) for block in problem.blocks)
    needs = _needs(problem, links)
    if max(needs[0], problem.optimizer_bytes) > problem.budget_bytes:
        return Solution.infeasible()
    fastest = tuple(int(link.index[np.argmin(link.time)]) for link in links)
    if peak_bytes(problem, fastest) <= problem.budget_bytes:
        return Solution.of(problem, fastest, bound_s=problem.step_s(fastest))
    chain = _Chain(links, needs, _relax(links, needs, problem.budget_bytes), problem.budget_bytes)
    choice, known_s = _greedy(chain)
    bound_s = 0.0
    for width in WIDTHS:
        found = _search(chain, known_s, width)
        if found.plan is not None and found.plan[1] <= known_s:
            choice, known_s = found.plan
        if found.dropped_s is None or found.dropped_s >= known_s:
            return Solution.of(problem, choice, bound_s=problem.step_s(choice))
        bound_s = max(bound_s, found.dropped_s)
    bound_s = problem.accumulation * (bound_s * (1 - SLACK) + problem.rest_s) + problem.optimizer_s
    return Solution.of(problem, choice, bound_s)


def smallest_budget(problem: Problem) -> int:
    """The least budget in bytes at which some choice fits, exactly.

    Every moment needs the prefix S plus a constant, so blocks i.. fit after S if and only if S + need_i <= budget with

        need_N = gap_N,    need_i = max(gap_i, min over o of max(load_i(o), hold_i(o) + need_{i+1}))

    Proof by induction from the end: option o of block i fits if and only if S + load_i(o) <= budget and, for all that
    follows, S + hold_i(o) + need_{i+1} <= budget; some option fits if and only if the one with the least maximum does.
    Before the first block S is 0, hence max(need_0, optimizer).
    """
    return max(_needs(problem, [_link(block) for block in problem.blocks])[0], problem.optimizer_bytes)


def _needs(problem: Problem, links: Iterable[_Link]) -> list[int]:
    """need_0 .. need_N of `smallest_budget`."""
    gaps = [max(gap.forward_bytes, gap.backward_bytes) for gap in problem.gaps]
    needs = [gaps[-1]]
    for link, gap in zip(reversed(tuple(links)), reversed(gaps[:-1]), strict=True):
        needs.append(max(gap, int(np.maximum(link.load, link.hold + needs[-1]).min())))
    return needs[::-1]


# --- the options ----------------------------------------------------------------------------------------------------


def _link(block: Block) -> _Link:
    options = block.options
    loads = [block.base_bytes + max(option.forward_bytes, option.backward_bytes) for option in options]
    return _Link(
        index=np.arange(len(options)),
        hold=np.array([option.hold_bytes for option in options], dtype=np.int64),
        load=np.array(loads, dtype=np.int64),
        time=np.array([option.step_s for option in options], dtype=np.float64),
    )


def _undominated(link: _Link) -> _Link:
    """Without the options that another one matches or beats in hold, load and time; from the least hold to the most."""
    link = link.taken(np.lexsort((link.index, link.time, link.load, link.hold)))
    hold, load, time = link.hold[:, None], link.load[:, None], link.time[:, None]
    no_worse = (hold <= link.hold) & (load <= link.load) & (time <= link.time)
    beaten = np.triu(no_worse, 1).any(axis=0)  # in this order only an earlier option can dominate
    return link.taken(np.flatnonzero(~beaten))


# --- the relaxation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hull:
    """The lower convex hull of a block's (hold, time): from the least hold, steepest first."""

    first: tuple[int, float]
    bytes: Seconds  # length of each segment
    slope: Seconds  # seconds saved per byte held


def _hull(link: _Link) -> _Hull:
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


def _relax(links: tuple[_Link, ...], needs: list[int], budget: int) -> list[_Relaxed]:
    """The relaxed V_0 .. V_N, each up to the largest prefix from which the blocks after it fit.

    V_i is kept as its right end (`most` bytes, `time` seconds) and the segments left of it, steepest first. Block i
    puts its least hold at the right end, its hull among the segments; then the right end moves left to budget - need_i.
    """
    most, time = budget - needs[-1], 0.0
    lengths, slopes = np.zeros(0), np.zeros(0)
    relaxed = [_Relaxed(np.array([float(most)]), np.array([time]))]
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
        relaxed.append(_Relaxed(held[::-1], fallen[::-1]))
    return relaxed[::-1]


# --- the searches ---------------------------------------------------------------------------------------------------


def _greedy(chain: _Chain) -> tuple[Choice, float]:
    """A first plan and its blocks' seconds: at each block the fastest option after which the rest still fits."""
    held, time, choice = 0, 0.0, []
    for link, need in zip(chain.links, chain.needs[1:], strict=True):
        fits = np.flatnonzero(held + np.maximum(link.load, link.hold + need) <= chain.budget)
        k = fits[np.argmin(link.time[fits])]
        held, time = held + int(link.hold[k]), time + float(link.time[k])
        choice.append(int(link.index[k]))
    return tuple(choice), time


def _search(chain: _Chain, upper_s: float, width: int) -> _Found:
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


def _extended(chain: _Chain, i: int, last: _Labels, limit_s: float, width: int) -> tuple[_Labels, float | None]:
    """The `width` most promising labels after block i, and the least time that any of the others could lead to."""
    link = chain.links[i]
    room = chain.budget - np.maximum(link.load, link.hold + chain.needs[i + 1])
    held = link.hold[:, None] + last.held  # (options, labels): every row ascends, which suits `interp`
    time = link.time[:, None] + last.time
    total = time + chain.relaxed[i + 1].at(held)
    kept = np.flatnonzero((total <= limit_s) & (last.held <= room[:, None]))
    held, time, total = held.ravel(), time.ravel(), total.ravel()
    kept = kept[np.lexsort((time[kept], held[kept]))]
    best = np.minimum.accumulate(time[kept])
    kept = kept[np.append(True, best[1:] < best[:-1])[: len(kept)]]
    dropped_s = None
    if len(kept) > width:
        order = np.argsort(total[kept], kind="stable")
        dropped_s = float(total[kept[order[width]]])
        kept = kept[np.sort(order[:width])]
    row, parent = np.divmod(kept, max(len(last.held), 1))
    return _Labels(held[kept], time[kept], parent, link.index[row]), dropped_s


def _traced(layers: list[_Labels]) -> Choice:
    """The options along the parents of the fastest label after the last block."""
    at, choice = len(layers[-1].held) - 1, []
    for layer in reversed(layers[1:]):
        choice.append(int(layer.option[at]))
        at = int(layer.parent[at])
    return tuple(reversed(choice))
