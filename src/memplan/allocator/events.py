"""`Events`: requests to the allocator and what is given back, in order, as plain columns."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from memplan.errors import BadHistory

FREE: Final = 0  # as a size: the block is given back
REQUEST_FREE: Final = -1  # as a size: given back by its owner, still in use on another stream until its FREE

# What the allocator answers with, and what changes nothing.
_ANSWERS: Final = frozenset({"oom", "snapshot", "user_defined"})


@dataclass(frozen=True, slots=True)
class Events:
    """One row per event, in order, each column of shape [n].

    `sizes[i] > 0` requests that many bytes under `ids[i]`, `FREE` (0) gives them back, after which the id may be used
    again. `REQUEST_FREE` (-1) comes before a FREE where another stream still uses the block (`Tensor.record_stream`):
    it counts as active, no longer as allocated, and nobody may have it yet.

    Raises `BadHistory` if an id is requested while it is in use, or given back while it is not, or a size is none.
    """

    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    streams: NDArray[np.int64] | None = None  # of requests; None: all on one

    def __post_init__(self) -> None:
        shapes = {column.shape for column in (self.ids, self.sizes, self.streams) if column is not None}
        if len(shapes) != 1 or self.ids.ndim != 1:
            raise BadHistory(f"the columns of events have to be of one length, got shapes {sorted(shapes)}")
        odd = np.flatnonzero(self.sizes < REQUEST_FREE)
        if odd.size:
            raise BadHistory(f"event {odd[0]} has the size {self.sizes[odd[0]]}; sizes are bytes, FREE or REQUEST_FREE")
        partners = self._partners()
        requested = self.sizes > 0
        lost = np.flatnonzero(~requested & (partners < 0))
        if lost.size:
            raise BadHistory(f"event {lost[0]} gives back id {self.ids[lost[0]]}, which is not in use then")
        twice = np.flatnonzero(requested & (partners >= 0))
        if twice.size:
            raise BadHistory(f"event {twice[0]} requests memory under id {self.ids[twice[0]]}, which is still in use")

    def _partners(self) -> NDArray[np.int64]:
        """The request under the same id that is open when an event comes, or -1; shape [n].

        A REQUEST_FREE closes nothing, and a second one for the same block has no meaning, so it finds none.
        """
        order = np.argsort(self.ids, kind="stable")
        ids, sizes = self.ids[order], self.sizes[order]
        same = np.zeros(len(order), dtype=np.bool_)
        same[1:] = ids[1:] == ids[:-1]
        before = np.roll(sizes, 1)
        before[: 1 if len(before) else 0] = FREE
        back = np.where(same & (before > 0), 1, 0)  # steps back to the open request
        back = np.where(same & (before == REQUEST_FREE) & (sizes != REQUEST_FREE), 2, back)
        found = np.full(len(order), -1, dtype=np.int64)
        rows = np.flatnonzero(back)
        found[order[rows]] = order[rows - back[rows]]
        return found

    @property
    def peak_requested_bytes(self) -> int:
        """Most bytes asked for and not yet given back, without any rounding; as torch's `requested_bytes` counts."""
        change = np.maximum(self.sizes, 0)
        frees = np.flatnonzero(self.sizes == FREE)
        change[frees] = -self.sizes[self._partners()[frees]]
        return int(np.cumsum(change).max(initial=0))

    @classmethod
    def from_history(cls, history: Iterable[Mapping[str, object]]) -> Self:
        """From one device's entry of `device_traces` in a `torch.cuda.memory._snapshot()`.

        Requests have the size asked for, before rounding, and are given back at `free_completed`. What the allocator
        did by itself (segments) is the answer, not part of the question; a `torch.cuda.empty_cache()` shows only as
        freed segments, so it cannot be told from memory pressure and is not repeated. A request that was refused
        (`oom`) is left out.

        Raises:
            BadHistory: the recording began when memory was in use already, its ring buffer has dropped entries, it has
                entries of private pools (CUDA graphs, `MemPool`), or it has an action that is not known.
        """
        reader = _Reader()
        for entry in history:
            reader.take(entry)
        reader.end()
        return cls(*(np.array(column, dtype=np.int64) for column in (reader.ids, reader.sizes, reader.streams)))


class _Reader:
    """Turns entries into events. An address is in use from its `alloc` to its `free_completed`."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.sizes: list[int] = []
        self.streams: list[int] = []
        self._live: set[int] = set()
        self._requested: tuple[int, int] | None = None  # address and stream of the last entry, if that was a request
        self._segments = _Ranges()
        self._entries = 0

    def take(self, entry: Mapping[str, object]) -> None:
        if _pool(entry) != (0, 0):
            raise BadHistory(
                f"entry {self._entries} is of the private pool {entry['pool_id']}: CUDA graphs and MemPool are not "
                "modelled; record a run without them"
            )
        action = entry.get("action")
        requested, self._requested = self._requested, None
        # A free is completed by the next entry, unless another stream still uses the block.
        if requested and not (action == "free_completed" and _int(entry, "addr") == requested[0]):
            self._append(requested[0], REQUEST_FREE, requested[1])
        if action == "alloc":
            self._alloc(entry)
        elif action == "free_requested":
            self._requested = (self._in_use(entry), _int(entry, "stream"))
        elif action == "free_completed":
            self._append(self._in_use(entry), FREE, _int(entry, "stream"))
            self._live.remove(_int(entry, "addr"))
        elif action in {"segment_alloc", "segment_map"}:
            self._segments.add(_int(entry, "addr"), _int(entry, "size"))
        elif action in {"segment_free", "segment_unmap"}:
            if not self._segments.remove(_int(entry, "addr"), _int(entry, "size")):
                raise self._incomplete(
                    f"gives back a segment at {_int(entry, 'addr'):#x}, which no earlier entry takes"
                )
        elif action not in _ANSWERS:
            raise BadHistory(f"entry {self._entries} has the action {action!r}, which allocation histories do not have")
        self._entries += 1

    def end(self) -> None:
        if self._requested:
            self._append(self._requested[0], REQUEST_FREE, self._requested[1])

    def _alloc(self, entry: Mapping[str, object]) -> None:
        address, size = _int(entry, "addr"), _int(entry, "size")
        if size <= 0:
            raise BadHistory(f"entry {self._entries} allocates {size} bytes; an allocation has at least one")
        if address in self._live:
            raise self._incomplete(f"allocates at {address:#x}, where an earlier allocation was not freed")
        if address not in self._segments:
            raise self._incomplete(f"allocates at {address:#x}, which is in no segment that an earlier entry takes")
        self._live.add(address)
        self._append(address, size, _int(entry, "stream"))

    def _append(self, identity: int, size: int, stream: int) -> None:
        self.ids.append(identity)
        self.sizes.append(size)
        self.streams.append(stream)

    def _in_use(self, entry: Mapping[str, object]) -> int:
        address = _int(entry, "addr")
        if address not in self._live:
            raise self._incomplete(f"frees {address:#x}, which no earlier entry allocates")
        return address

    def _incomplete(self, what: str) -> BadHistory:
        return BadHistory(
            f"the history is not complete: entry {self._entries} {what}. Its ring buffer has dropped entries, or "
            "recording began with memory in use. Call torch.cuda.memory._record_memory_history(max_entries=...) with "
            "more entries, before the first use of the device"
        )


class _Ranges:
    """A set of addresses as disjoint ranges; pages of expandable segments come and go in other portions than taken."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __contains__(self, address: int) -> bool:
        i = bisect_right(self._starts, address) - 1
        return i >= 0 and address < self._stops[i]

    def add(self, start: int, size: int) -> None:
        i = bisect_right(self._starts, start)
        stop = start + size
        if i and self._stops[i - 1] == start:
            i -= 1
            start = self._starts.pop(i)
            del self._stops[i]
        if i < len(self._starts) and self._starts[i] == stop:
            stop = self._stops.pop(i)
            del self._starts[i]
        self._starts.insert(i, start)
        self._stops.insert(i, stop)

    def remove(self, start: int, size: int) -> bool:
        """Whether the whole range was there; only then is it removed."""
        i = bisect_right(self._starts, start) - 1
        stop = start + size
        if i < 0 or stop > self._stops[i]:
            return False
        first, last = self._starts.pop(i), self._stops.pop(i)
        rests = [(a, b) for a, b in ((first, start), (stop, last)) if a < b]
        self._starts[i:i] = [a for a, _ in rests]
        self._stops[i:i] = [b for _, b in rests]
        return True


def _int(entry: Mapping[str, object], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int):
        raise BadHistory(f"an entry {entry.get('action')!r} needs a whole number {key!r}, got {value!r}")
    return value


def _pool(entry: Mapping[str, object]) -> tuple[object, ...]:
    value = entry.get("pool_id", (0, 0))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
