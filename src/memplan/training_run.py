"""A whole training run as the caching allocator meets it: a traced steady step, led up to and repeated.

A card's allocator remembers. What a step reserves depends on what the steps before it left behind, so a steady step is
not enough: the weights come first, in the order in which they are moved to the card; the first step has no optimizer
state yet, which is made when the optimizer steps, behind the segments of a whole forward and backward; the libraries'
workspaces come where they are first needed; the gradient buckets of replicas are a single one at first, and made anew
with the second step; and only then is every step like the last.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memplan.allocator import FREE, CachingAllocator, Events, Settings, Usage, replayed, usage_after
from memplan.trace import CATEGORIES, Trace

_QUIET_STEPS: Final = 2  # that have to reserve nothing more before a run is taken to have settled
_MOST_STEPS: Final = 16
_OWN_WAY: Final = 2  # the first steps, which differ from all others; see `_Run.parts`

_LIBRARIES: Final = CATEGORIES.index("libraries")
_GRADS: Final = CATEGORIES.index("grads")
_OPTIMIZER: Final = CATEGORIES.index("optimizer")

_Part = tuple[NDArray[np.int64], NDArray[np.int64]]  # ids, and sizes or FREE, of some events in order


def usage_of(trace: Trace, settings: Settings, *, completes: bool = False) -> Usage:
    """What a run of the step needs of a card's allocator, of as many steps as it takes until no more is reserved.

    Free blocks fit a step less well than the one that left them, so reserved memory can grow for some steps. A run has
    settled when two in a row reserve nothing new, or after 16; also when one reserves nothing new and leaves the free
    blocks as it found them, since the next would do the same. Only with `completes`, and not by that short way, it is
    searched for the least cap under which it comes to its end.
    """
    allocator, parts, quiet = CachingAllocator(settings), list[_Part](), 0
    for part in islice(_Run(trace).parts(), _MOST_STEPS):
        reserved, free = allocator.peak_reserved, None if completes else allocator.free_blocks()
        _play(part, allocator)
        parts.append(part)
        quiet = quiet + 1 if allocator.peak_reserved == reserved else 0
        if quiet == _QUIET_STEPS or (quiet and len(parts) > _OWN_WAY and allocator.free_blocks() == free):
            break
    events = Events(*_joined(parts))
    return replayed(events, settings) if completes else usage_after(allocator, events)


@lru_cache(maxsize=1)  # a search for a plan asks for the same again and again
def excess_of(trace: Trace, settings: Settings) -> int:
    """Bytes that a run of the step needs of a card beyond the step's peak."""
    return usage_of(trace, settings).fits_bytes - trace.peak_bytes


def events_of(trace: Trace, steps: int) -> Events:
    """Requests and frees of a run of that many steps, from an empty card on.

    Each step makes its own storages: row `i` of the trace has the id ``i + step * rows``.
    """
    return Events(*_joined(islice(_Run(trace).parts(), steps)))


def _play(part: _Part, allocator: CachingAllocator) -> None:
    for identity, size in zip(part[0].tolist(), part[1].tolist(), strict=True):
        if size == FREE:
            allocator.free(identity)
        else:
            allocator.allocate(identity, size)


def _joined(parts: Iterable[_Part]) -> _Part:
    ids, sizes = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(sizes)


class _Run:
    """A trace's rows in the roles that they have in a run."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        real, outlives, is_grad = trace.storage_bytes > 0, trace.died == trace.ticks, trace.storage_category == _GRADS
        self.static = real & (trace.born == 0) & outlives
        self.own = real & (trace.born > 0)  # made by each step
        left = real & (trace.born == 0) & ~outlives  # by the step before
        self.until = int(trace.died[left].max(initial=0))  # when this step drops them
        passed_on = (is_grad & (left & is_grad).any()) | (~is_grad & (left & ~is_grad).any())
        self.passed_on = np.flatnonzero(self.own & outlives & passed_on)
        self.dropped = np.flatnonzero(self.own & outlives & ~passed_on)  # at the end

    def parts(self) -> Iterator[_Part]:
        """The events of the first step, with what comes before it, then of each further one. Without end."""
        step, first, state = self.trace.steps[0], self._static(_LIBRARIES), self._static(_OPTIMIZER)
        early, buckets = self.trace.early_state, self._static(_GRADS)
        extra = [
            (step.forward.start, self._requests(first[:1])),
            (step.backward.start, self._requests(first[1:])),
            (self.trace.optimizer.start, self._requests(state[early:])),
        ]
        there = np.isin(self.trace.storage_category, [_LIBRARIES, _OPTIMIZER, _GRADS])
        resident = np.concatenate([np.flatnonzero(self.static & ~there), state[:early]])
        single = buckets[:1], self.trace.storage_bytes[buckets].sum(keepdims=True)[: len(buckets)]
        yield _joined([self._requests(resident), single, *self._step(0, extra)])
        anew = [self._frees(buckets[:1], 0), self._requests(buckets)]  # torch's _rebuild_buckets, before the forward
        rows, base = len(self.trace.born), 0
        while True:
            extra = [(self.until, self._frees(self.passed_on, base))]
            base += rows
            yield _joined([*anew, *self._step(base, extra)])
            anew = []

    def _step(self, base: int, extra: list[tuple[int, _Part]]) -> Iterator[_Part]:
        """A step whose ids begin at `base`, with events of other storages put in before the given ticks."""
        (rows, sizes), ticks = self._order
        at = 0
        for tick, part in extra:
            stop = int(np.searchsorted(ticks, tick))
            yield rows[at:stop] + base, sizes[at:stop]
            yield part
            at = stop
        yield rows[at:] + base, sizes[at:]
        yield self._frees(self.dropped, base)

    @cached_property
    def _order(self) -> tuple[_Part, NDArray[np.int64]]:
        """Row, size or FREE, and tick of what a step does to its own storages."""
        trace = self.trace
        made, freed = np.flatnonzero(self.own), np.flatnonzero(self.own & (trace.died < trace.ticks))
        ticks = np.concatenate([trace.born[made], trace.died[freed]])
        order = np.argsort(ticks, kind="stable")
        rows, sizes = _joined([self._requests(made), self._frees(freed, 0)])
        return (rows[order], sizes[order]), ticks[order]

    def _static(self, code: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.static & (self.trace.storage_category == code))

    def _requests(self, rows: NDArray[np.int64]) -> _Part:
        return rows, self.trace.storage_bytes[rows]

    @staticmethod
    def _frees(rows: NDArray[np.int64], base: int) -> _Part:
        return rows + base, np.full(len(rows), FREE, dtype=np.int64)
