"""A step under FSDP2: the trace of one rank, from that of the whole model.

`fully_shard` on every block and on the model leaves a rank its part of weights, gradients and optimizer state, and
gathers a block's weights when it runs. What that adds to a step follows torch/distributed/fsdp/_fully_shard
(`_fsdp_param_group.py`, `_fsdp_collectives.py`), in its default settings:

- forward: a block's weights are gathered into a flat buffer and copied out of it; the buffer stays until the next block
  has gathered (implicit prefetch), the copies until the block has returned. Those outside of blocks stay to the end.
- backward: while a block runs, the one to come is gathered already. Behind it, its gradients are copied into a flat
  buffer, which stays until the next block's are, and scattered: a rank keeps its part.
- mixed precision (`memplan.mixed_precision`): what a rank has of a unit's weights is cast into a flat buffer, which
  stays while the others' are gathered. Gradients are scattered in the type in which they are reduced, and cast to that
  in which they are kept; what was scattered stays to the end of the backward where replicas add it up.

A parameter is cut along its first dimension into equal parts, the last ones padded; sizes here are the first rank's.
Collective libraries take memory of a card beside all that; it is not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from memplan.trace import CATEGORIES, BlockRun, MicroStep, Span, Trace

_CODE = {name: number for number, name in enumerate(CATEGORIES)}

# Where, beside the event of a tick, others are put: before it up to 15, behind it from 17 on.
_STRIDE = 32
_EVENT = 16
_CAST, _GATHER, _FREE_CAST, _FREE_LAST_GATHERED, _COPY_OUT, _FREE_GATHERED = 1, 2, 3, 4, 5, 6
_CAST_AHEAD, _PREFETCH, _FREE_CAST_AHEAD = 7, 8, 9
_RESHARD, _FREE_LAST_SCATTERED, _SCATTER, _FREE_GRADS, _REDUCE, _KEEP, _FREE_REDUCED, _FREE_SCATTERED = range(17, 25)

_SCALARS = 8  # bytes: an optimizer's step counter is not cut


@dataclass(frozen=True, slots=True)
class Unit:
    """What is gathered together: the parameters of a block, or (path "") all others. Sizes in bytes, padded."""

    path: str
    whole_bytes: tuple[int, ...]  # of each parameter, as gathered
    part_bytes: tuple[int, ...]  # of each one's part on a rank, as kept
    cast_bytes: int  # of all parts that are cast to be gathered, as cast
    grad_bytes: int  # of the gradients of all that are trained, as scattered
    kept_grad_bytes: int  # of a rank's part of them, as kept
    reduced_bytes: int  # of that part before it is cast to be kept; 0 if it is not

    @property
    def gathered_bytes(self) -> int:
        return sum(self.whole_bytes)


def padded_bytes(shape: Sequence[int], itemsize: int, shards: int) -> int:
    """Bytes of a parameter whose first dimension is padded to a multiple of the ranks."""
    if not shape:
        return itemsize * shards
    rows = -(-shape[0] // shards) * shards
    return rows * int(np.prod(shape[1:], dtype=np.int64)) * itemsize


def sharded(
    trace: Trace, units: Sequence[Unit], shards: int, replicas: int = 1, rounded: Callable[[int], int] = int
) -> Trace:
    """The step on one of so many ranks.

    Args:
        trace: of the whole model on one device, with its optimizer, no gradients left from the step before.
        units: the blocks' and, with path "", that of all other parameters. Blocks that the trace does not have run
            with the model's.
        replicas: of the model, each on so many ranks.
        rounded: what the device's allocator makes of a size.
    """
    events = _Events(trace, rounded)
    by_path = {unit.path: unit for unit in units}
    rest = by_path[""]
    for unit in units:
        for size in unit.part_bytes:
            events.always("params", size)
    for number, step in enumerate(trace.steps):
        runs = [run for run in step.blocks if run.path in by_path]
        _forward(events, step, runs, by_path, rest)
        _backward(events, step, runs, by_path, rest, keep=number == 0, adds_up=replicas > 1)
    return events.trace(shards)


def _forward(events: "_Events", step: MicroStep, runs: Sequence[BlockRun], units: dict[str, Unit], rest: Unit) -> None:
    begins = [run.forward.start for run in runs]
    ends = [(tick, _FREE_LAST_GATHERED) for tick in begins] + [(step.backward.start, 0)]
    events.gather(rest, (step.forward.start, _GATHER), ends[0])
    for size in rest.whole_bytes:
        events.add("params", size, (step.forward.start, _COPY_OUT), (step.backward.stop - 1, _RESHARD))
    for run, end in zip(runs, ends[1:], strict=True):
        unit, start = units[run.path], run.forward.start
        events.gather(unit, (start, _GATHER), end)
        for size in unit.whole_bytes:
            events.add("params", size, (start, _COPY_OUT), (run.forward.stop - 1, _RESHARD))


def _backward(
    events: "_Events",
    step: MicroStep,
    runs: Sequence[BlockRun],
    units: dict[str, Unit],
    rest: Unit,
    *,
    keep: bool,
    adds_up: bool,
) -> None:
    """With `keep` the gradients are the first of the step, which stay; others are added to those.

    With `adds_up` replicas do that with theirs, and what is reduced stays meanwhile
    (`FSDPParamGroup._all_reduce_state`).
    """
    back = sorted((r for r in runs if r.backward.stop > r.backward.start), key=lambda r: r.backward.start)
    fetched = (step.backward.start, _GATHER)
    last = step.backward.stop - 1
    summed = (last, _FREE_SCATTERED) if adds_up else None
    ends = [*(run.backward.stop - 1 for run in back), last]
    for run, stop, following in zip(back, ends, ends[1:], strict=False):
        unit, start = units[run.path], run.backward.start
        events.gather(unit, fetched, (start, _FREE_GATHERED))
        for size in unit.whole_bytes:
            events.add("params", size, (start, _COPY_OUT), (stop, _RESHARD))
        events.scatter(unit, (run.backward,), (following, _FREE_LAST_SCATTERED), summed, keep=keep)
        fetched = (start, _PREFETCH)
    before = Span(step.forward.start, step.backward.start)  # where a loss in chunks makes its gradients
    events.scatter(rest, (step.backward, before), (last, _FREE_SCATTERED), summed, keep=keep)


Moment = tuple[int, int]  # a tick, and a place beside its event


class _Events:
    """A trace's rows, and others among them."""

    def __init__(self, trace: Trace, rounded: Callable[[int], int]) -> None:
        self._trace, self._rounded = trace, rounded
        self._end = trace.ticks * _STRIDE
        self.born = np.where(trace.born == 0, -1, trace.born * _STRIDE + _EVENT)
        self.died = np.where(trace.died >= trace.ticks, self._end, trace.died * _STRIDE + _EVENT)
        self._added: list[tuple[int, int, int, int]] = []  # category, bytes, born, died
        # Of a unit and the number of a span: that span in the first micro-step, and the rows of its gradients.
        self._firsts: dict[tuple[str, int], tuple[Span, NDArray[np.int64]]] = {}
        self._is_grad = (trace.storage_category == _CODE["grads"]) & (trace.died >= trace.ticks) & (trace.born > 0)

    def always(self, category: str, size: int) -> None:
        self._added.append((_CODE[category], self._rounded(size), -1, self._end))

    def add(self, category: str, size: int, born: Moment, died: Moment | None) -> None:
        if size:
            begin = born[0] * _STRIDE + born[1]
            until = self._end if died is None else died[0] * _STRIDE + died[1]
            self._added.append((_CODE[category], self._rounded(size), begin, max(until, begin)))

    def gather(self, unit: Unit, begin: Moment, freed: Moment) -> None:
        """A flat buffer of the unit's weights and, while it is filled, what the rank casts for it."""
        tick, place = begin
        self.add("temporaries", unit.cast_bytes, (tick, place - 1), (tick, place + 1))
        self.add("temporaries", unit.gathered_bytes, begin, freed)

    def scatter(self, unit: Unit, spans: Sequence[Span], freed: Moment, summed: Moment | None, *, keep: bool) -> None:
        """Gradients that were born in these spans, the first a backward, are whole until they are scattered behind it.

        What is reduced in another type than it is kept in stays until it is cast, or `summed`.
        """
        if not unit.grad_bytes:
            return
        last = spans[0].stop - 1
        mine = np.concatenate([self._grads((unit.path, n), span, keep=keep) for n, span in enumerate(spans)])
        self.died[mine] = last * _STRIDE + _FREE_GRADS
        self.add("temporaries", unit.grad_bytes, (last, _SCATTER), freed)
        self.add("temporaries", unit.reduced_bytes, (last, _REDUCE), summed or (last, _FREE_REDUCED))
        added = (last, _FREE_SCATTERED) if unit.reduced_bytes or summed is None else summed  # into the first ones
        self.add("grads", unit.kept_grad_bytes, (last, _KEEP), None if keep else added)

    def _grads(self, key: tuple[str, int], span: Span, *, keep: bool) -> NDArray[np.int64]:
        if not keep:
            return self._like_the_first(key, span)
        born = self._trace.born
        mine = np.flatnonzero(self._is_grad & (born >= span.start) & (born < span.stop))
        self._is_grad[mine] = False
        self._firsts[key] = (span, mine)
        return mine

    def _like_the_first(self, key: tuple[str, int], backward: Span) -> NDArray[np.int64]:
        """What the trace has added to the first gradients as it came: of each one's size, born in its turn or near.

        Ticks would not do: an addition lets go of what was added, which is an event more.
        """
        span, firsts = self._firsts[key]
        old, found = self._trace, []
        inside = self._born_in(backward)
        turns = np.searchsorted(old.born[self._born_in(span)], old.born[firsts])
        for first, turn in zip(firsts, turns, strict=True):
            alike = (old.storage_bytes[inside] == old.storage_bytes[first]) & (old.died[inside] < old.ticks)
            like = [at for at in np.flatnonzero(alike) if at not in found]
            if like:
                found.append(min(like, key=lambda at: abs(int(at) - int(turn))))
        return inside[np.array(found, dtype=np.int64)]

    def _born_in(self, span: Span) -> NDArray[np.int64]:
        """Rows, in the order of their birth."""
        born = self._trace.born
        rows = np.flatnonzero((born >= span.start) & (born < span.stop))
        return rows[np.argsort(born[rows])]

    def trace(self, shards: int) -> Trace:
        """All rows in order, every event a tick of its own."""
        old = self._trace
        part = -(-old.storage_bytes // shards)
        is_state = (old.storage_category == _CODE["optimizer"]) & (old.storage_bytes > _SCALARS)
        is_scratch = old.born >= old.optimizer.start
        sizes = np.where(is_state | (is_scratch & (old.born > 0)), part, old.storage_bytes)
        stays = old.storage_category != _CODE["params"]
        new = np.array(self._added, dtype=np.int64).reshape(-1, 4)
        born = np.concatenate([self.born[stays], new[:, 2]])
        died = np.concatenate([self.died[stays], new[:, 3]])
        keys, born, died = _numbered(born, died, self._end)

        def moved(span: Span) -> Span:
            start, stop = np.searchsorted(keys, [span.start * _STRIDE, span.stop * _STRIDE])
            return Span(int(start), int(stop))

        steps = tuple(
            replace(
                step,
                forward=moved(step.forward),
                loss=moved(step.loss),
                backward=moved(step.backward),
                blocks=tuple(replace(b, forward=moved(b.forward), backward=moved(b.backward)) for b in step.blocks),
            )
            for step in old.steps
        )
        return replace(
            old,
            storage_bytes=np.concatenate([sizes[stays], new[:, 1]]),
            storage_category=np.concatenate([old.storage_category[stays], new[:, 0].astype(np.int8)]),
            storage_module=np.concatenate([old.storage_module[stays], np.zeros(len(new), dtype=np.int32)]),
            born=born,
            died=died,
            ticks=len(keys),
            steps=steps,
            optimizer=moved(old.optimizer),
            assumptions=(*old.assumptions, f"FSDP2 over {shards} ranks, each block gathered by itself"),
        )


def _numbered(
    born: NDArray[np.int64], died: NDArray[np.int64], end: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The keys of all events in order, and for each row the places of its own two in that order."""
    begins, ends = born >= 0, died < end
    keys = np.concatenate([born[begins], died[ends]])
    order = np.argsort(keys, kind="stable")
    place = np.empty(len(keys), dtype=np.int64)
    place[order] = np.arange(len(keys))
    first = np.zeros(len(born), dtype=np.int64)
    last = np.full(len(died), len(keys), dtype=np.int64)
    first[begins], last[ends] = place[: int(begins.sum())], place[int(begins.sum()) :]
    return keys[order], first, last
