"""Lower bounds on a chain whose blocks may copy to the host, at prices on memory and on the link at once.

Of one micro-step let t be the blocks' seconds, F and B the parts of t in the forward and in the backward, those of the
first block left out, and L the seconds that the link is busy in each direction. No copy is begun before the first
block's forward ends, and all are back when its backward begins. So whatever the queues do, the step takes at least
t + max(0, L - F) + max(0, L - B), and the host limit says L <= H. The bytes held before block i are at most
budget - need_i, as `memplan.solvers.dp` has it. So for all prices p, q in [0, 1] and r, m, n >= 0, and any block i,

    step >= t + p (L - F) + q (L - B) + r (L - H) + m (held_i + need_i - budget) + n (held_N + need_N - budget)

whose right side adds up over the blocks: its least is what is least for each block by itself (Lagrangian relaxation;
Everett, Operations Research 11, 1963). It is concave in the prices, and the ellipsoid method finds where it is highest
(Shor, Cybernetics 13, 1977; Groetschel, Lovasz and Schrijver, Geometric Algorithms, 1988, chapter 3).

The staging area is as large as the largest copy chosen, and the needs grow with it. So there is one bound for each size
of the largest copy, and the least of them bounds every choice that copies. At the same prices all of them take hardly
longer than one: they differ in what may be chosen, which is a running minimum, and in the room.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from math import inf, sqrt
from typing import Self

import numpy as np

from memplan.link import staging_bytes
from memplan.problem import Block, Problem
from memplan.solvers.labels import SLACK, Bytes, Index, Seconds
from memplan.solvers.solution import gap_peaks

NEAR = 5e-5  # relative: prices whose bound misses the highest by no more are good enough
CUTS = 600  # of the ellipsoid; 100 to 300 do on the chains of benchmarks/solver.py
WIDE = np.array([1.0, 1.0, 16.0, 16.0, 16.0])  # half axes of the first ellipsoid; in the order of `Prices`
CENTRE = np.array([0.25, 0.25, 0.0, 0.5, 0.5])
LIMITS = np.array([1.0, 1.0, inf, inf, inf])


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds per second that the link is busier than the forward, the backward or the host limit allow, and per byte.

    The bound holds at these prices only: beyond 1 a second of waiting would count for more than it takes.
    """

    out: float = 0.0
    back: float = 0.0
    host: float = 0.0
    inside: float = 0.0  # per byte that is held before the block that presses
    loss: float = 0.0  # and per byte that is held at the loss

    def __post_init__(self) -> None:
        if not (0 <= self.out <= 1 and 0 <= self.back <= 1 and min(self.host, self.inside, self.loss) >= 0):
            raise ValueError(f"{self} bounds nothing: out and back have to be from 0 to 1, the others at least 0")


@dataclass(frozen=True, slots=True)
class _Options:
    """Those that may be chosen, by [block, option], from the smallest copy to the largest; rows are filled in front."""

    hold: Bytes
    load: Bytes
    copy: Bytes
    time: Seconds
    forward_s: Seconds
    index: Index  # position in `Block.options` of what copies, else -1

    @property
    def backward_s(self) -> Seconds:
        return self.time - self.forward_s

    @classmethod
    def of(cls, problem: Problem) -> Self:
        places = [(block, _by_copy(problem, block)) for block in problem.blocks]
        most = max(len(row) for _, row in places)
        places = [(block, row[:1] * (most - len(row)) + row) for block, row in places]  # the first copies nothing
        rows = [[block.options[at] for at in row] for block, row in places]
        bases = [block.base_bytes for block in problem.blocks]
        loads = [[b + max(o.forward_bytes, o.backward_bytes) for o in row] for b, row in zip(bases, rows, strict=True)]
        return cls(
            hold=np.array([[o.hold_bytes for o in row] for row in rows], dtype=np.int64),
            load=np.array(loads, dtype=np.int64),
            copy=np.array([[o.link_bytes for o in row] for row in rows], dtype=np.int64),
            time=np.array([[o.step_s for o in row] for row in rows]),
            forward_s=np.array([[o.forward_s for o in row] for row in rows]),
            index=np.array([[at if block.options[at].link_bytes else -1 for at in row] for block, row in places]),
        )

    def needs(self, gaps: list[int], last: Index, staged: Bytes) -> list[Bytes]:
        """need_0 .. need_N of `memplan.solvers.dp`, each by size; `last` [block, size] is the last option up to it."""
        needs = [np.full(len(staged), gaps[-1], dtype=np.int64)]
        sizes = np.arange(len(staged))
        for i in reversed(range(len(self.hold))):
            peaks = np.maximum(self.load[i][:, None] + staged, self.hold[i][:, None] + needs[-1])
            least = np.minimum.accumulate(peaks, axis=0)[last[i], sizes]
            needs.append(np.maximum(least, gaps[i] + (staged if i else 0)))
        return needs[::-1]


def _by_copy(problem: Problem, block: Block) -> list[int]:
    """The positions of the options that may be chosen, from the smallest copy to the largest."""
    allowed = (at for at, option in enumerate(block.options) if problem.allows(option))
    return sorted(allowed, key=lambda at: block.options[at].link_bytes)


class Bounds:
    """One bound for each size of the largest copy; all seconds are those of one micro-step's blocks.

    Attributes:
        sizes: bytes of the largest copy, ascending: those beside whose staging area something fits the budget.
        least_s: for each size, no choice is faster whose largest copy it is.
        prices: for each size, at which that was found.
        host_s: seconds that the link takes to copy as much as the host limit.
        is_limited: whether so much could be copied that the limit matters.
    """

    def __init__(self, problem: Problem, pressing: int) -> None:
        """`pressing` is the block before which bytes have a price of their own."""
        self._options = options = _Options.of(problem)
        bytes_s = problem.link_bytes_s or inf
        sizes = np.unique(options.copy[options.copy > 0])
        staged = np.array([staging_bytes([size]) for size in sizes.tolist()], dtype=np.int64)
        last = np.stack([np.searchsorted(row, sizes, side="right") - 1 for row in options.copy])
        needs = options.needs(gap_peaks(problem), last, staged)
        fits = np.flatnonzero(needs[0] <= problem.budget_bytes)
        self.sizes, self._last = sizes[fits], last[:, fits]
        self.least_s, self.prices = np.full(len(fits), -inf), [Prices()] * len(fits)
        hold, copy_s = options.hold.astype(np.float64), options.copy / bytes_s
        place = np.arange(len(hold))[:, None]
        hides, early = place > 0, place < pressing
        beyond = (copy_s - hides * options.forward_s, copy_s - hides * options.backward_s)
        parts = (*beyond, copy_s, hold * early, hold)
        self._bytes_s, self._copy_s, self.host_s = bytes_s, copy_s, (problem.host_bytes or 0) / bytes_s
        self._parts = np.stack(parts)  # what each option adds to what has a price
        self.is_limited = float(copy_s.max(axis=1).sum()) > self.host_s
        host_s, nothing = np.full(len(fits), self.host_s), np.zeros(len(fits))
        rooms = (problem.budget_bytes - needs[at][fits] for at in (pressing, -1))
        self._rooms = np.stack([nothing, nothing, host_s, *rooms])  # by size, and how much of it is free

    @property
    def lowest(self) -> int:
        """The number of the size whose bound is the least."""
        return int(np.argmin(self.least_s))

    def promising(self, count: int, apart: float) -> list[int]:
        """The numbers of some sizes, those of the least bounds first, each so far apart from those before it."""
        found: list[int] = []
        for at in np.argsort(self.least_s, kind="stable").tolist():
            size = self.sizes[at]
            if len(found) < count and all(abs(self.sizes[other] - size) >= apart * size for other in found):
                found.append(at)
        return found

    def ask(self, at: int, enough_s: float = inf) -> None:
        """Better the bounds, by the prices at which that of size number `at` is highest, or is `enough_s`."""
        allowed = np.arange(self._options.time.shape[1]) <= self._last[:, at, None]
        time, room, rows = np.where(allowed, self._options.time, inf), self._rooms[:, at], np.arange(len(allowed))
        # In these units a byte is worth 1 where the most that the blocks can hold is worth the most that they can win.
        even_s, held = (float(np.ptp(column, axis=1).sum()) for column in (self._options.time, self._options.hold))
        units = np.array([1.0, 1.0, 1.0, *[even_s / held if held else 0.0] * 2])

        def bound_s(point: Seconds) -> tuple[float, Seconds]:
            prices = point * units
            cost = time + np.tensordot(prices, self._parts, 1)
            choice = cost.argmin(axis=1)
            excess = self._parts[:, rows, choice].sum(axis=1) - room
            return float(cost[rows, choice].sum() - prices @ room), excess * units

        self.take(Prices(*(_highest(bound_s, enough_s * (1 + 3 * SLACK)) * units).tolist()))

    def take(self, prices: Prices) -> None:
        """Better the bounds of all sizes by what they are at these prices."""
        costs = self._costs(prices)[np.arange(len(self._last))[:, None], self._last].sum(axis=0)
        spent = np.array(astuple(prices)) @ self._rooms
        found = costs - spent - SLACK * (np.abs(costs) + spent)
        better = found > self.least_s
        self.least_s = np.where(better, found, self.least_s)
        self.prices = [prices if is_better else old for is_better, old in zip(better, self.prices, strict=True)]

    def after(self, at: int, prices: Prices) -> Seconds:
        """What blocks i.. cost at least at these prices, with copies up to size number `at`; shape [blocks + 1]."""
        allowed = self._last[:, at]
        least = self._costs(prices)[np.arange(len(allowed)), allowed]
        return np.append(np.cumsum(least[::-1])[::-1], 0.0)

    def staging_s(self, at: int) -> float:
        """Seconds that the link takes to copy the staging area of size number `at`."""
        return float(staging_bytes([int(self.sizes[at])]) / self._bytes_s)

    def worthwhile(self, at: int, prices: Prices) -> Iterator[tuple[Seconds, Seconds, Seconds, Seconds, Index]]:
        """Per block its options up to a size, but for those that one which copies no more matches in any case.

        Columns of shape [options, 1]: seconds with the bytes held at their prices, those of the forward, of the
        backward and of the copy; and, of shape [options], the position in `Block.options` of what copies, else -1.
        """
        options, held = self._options, replace(prices, out=0.0, back=0.0, host=0.0)
        cost = options.time + np.tensordot(np.array(astuple(held)), self._parts, 1)
        for i, stop in enumerate(self._last[:, at] + 1):
            columns = [c[i, :stop] for c in (cost, options.forward_s, options.backward_s, self._copy_s)]
            dear, forward_s, backward_s, copy_s = (column[:, None] for column in columns)
            # A second less of forward or backward waits for one at most.
            at_worst = dear + np.maximum(forward_s.T - forward_s, 0.0) + np.maximum(backward_s.T - backward_s, 0.0)
            beats = (copy_s <= copy_s.T) & (at_worst <= dear.T)
            earlier = np.tri(stop, k=-1, dtype=np.bool_).T
            kept = np.flatnonzero(~(beats & ~np.eye(stop, dtype=np.bool_) & (earlier | ~beats.T)).any(axis=0))
            yield (*(column[kept] for column in (dear, forward_s, backward_s, copy_s)), options.index[i, kept])

    def _costs(self, prices: Prices) -> Seconds:
        """Per block, of the cheapest of each option and those that copy less."""
        cost = self._options.time + np.tensordot(np.array(astuple(prices)), self._parts, 1)
        return np.minimum.accumulate(cost, axis=1)


def _highest(value: Callable[[Seconds], tuple[float, Seconds]], enough: float) -> Seconds:
    """Where a concave function is nearly highest, or `enough`; it gives its value and a supergradient: by deep cuts."""
    count = len(CENTRE)
    centre, shape = CENTRE, np.diag(WIDE**2)
    best: Seconds = np.clip(CENTRE, 0.0, LIMITS)
    best_value = -inf
    for _ in range(CUTS):
        outside = np.maximum(-centre, centre - LIMITS)
        worst = int(np.argmax(outside))
        is_inside = outside[worst] <= 0
        if not is_inside:
            slope = np.zeros(count)
            slope[worst], short = (1.0 if centre[worst] < 0 else -1.0), float(outside[worst])
        else:
            found, slope = value(centre)
            if found > best_value:
                best, best_value = centre, found
            if found >= enough:
                break
            short = best_value - found
        reach = sqrt(max(0.0, float(slope @ shape @ slope)))  # by so much the value can rise inside the ellipsoid
        if short >= reach or (is_inside and reach - short <= NEAR * abs(best_value)):
            break
        depth, step = short / reach, shape @ slope / reach
        centre = centre + (1 + count * depth) / (count + 1) * step
        shrunk = shape - 2 * (1 + count * depth) / ((count + 1) * (1 + depth)) * np.outer(step, step)
        shape = count**2 * (1 - depth**2) / (count**2 - 1) * shrunk
    return best
