"""`HostPool`: what blocks have sent to the host, in which order, and when it comes back.

The order is that of `memplan.link`, which prices it. Forward: a block's copies begin when it ends, and their sources
are held until they are done; no more than `DEPTH` times the largest block's copies are in flight when it returns, and
none when the last block has ended. Backward: a block's tensors are fetched together, when the first of them is asked
for or earlier, while the tensors that are fetched and not yet asked for have room in `DEPTH` times the largest.

Which memory that takes follows from the order of calls alone, never from how fast anything was.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final
from weakref import ref

import torch
from torch import Tensor

from memplan.errors import PlanNotFollowed
from memplan.levers.host_memory import HostMemory, Lease, NoRoom, empty_for, flat_of
from memplan.levers.lanes import Lanes, lanes_for
from memplan.levers.replay import Held
from memplan.link import DEPTH
from memplan.tape import on_host
from memplan.units import format_bytes

MIN_BYTES: Final = 256 * 2**10
"""Tensors below it stay on the device: at 25 GB/s their copy takes 10 us, about what it takes to launch it."""


class Entry:
    """One tensor that autograd has saved: on the device, or a view of what was sent to the host."""

    __slots__ = ("_item", "_offset", "_parcel", "_size", "_stride", "held")

    def __init__(self, tensor: Tensor) -> None:
        self.held: Held | None = Held(tensor)

    def leave(self, parcel: "Parcel", item: int) -> None:
        """Let go of the tensor, whose storage is an item of the parcel."""
        assert self.held is not None
        tensor = self.held.tensor
        self._size, self._stride, self._offset = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        self._parcel, self._item, self.held = parcel, item, None

    def give(self) -> Tensor:
        """What autograd asks for in the backward."""
        if self.held is not None:
            return self.held.give()
        with torch.no_grad():
            return self._parcel.give(self._item).as_strided(self._size, self._stride, self._offset)


class Item:
    """One storage of a parcel."""

    __slots__ = ("device", "dtype", "fetched", "flat_size", "lease", "left", "source", "uses")

    def __init__(self, source: Tensor, lease: Lease, uses: int) -> None:
        self.source: Held | None = Held(source)  # while it is copied
        self.flat_size, self.dtype, self.device = source.numel(), source.dtype, source.device
        self.lease = lease
        self.uses = self.left = uses  # how often it is asked for in one backward
        self.fetched: Tensor | None = None

    @property
    def bytes(self) -> int:
        return self.flat_size * self.dtype.itemsize


class Parcel:
    """What one forward of a block has sent. It lives as long as anything that autograd saved through it."""

    def __init__(self, pool: "HostPool", lanes: Lanes, items: Sequence[Item], forward: int) -> None:
        self.pool, self.lanes, self.items, self.forward = pool, lanes, items, forward
        self.bytes = sum(item.bytes for item in items)
        self.sent: object = None
        self.back: object = None
        self.is_sent = self.is_fetched = self.is_taken = False
        self.spoilt: BaseException | None = None

    def send(self) -> None:
        pairs = [pair for item in self.items if item.source for pair in item.lease.to_host(item.source.tensor)]
        with on_host():
            self.sent = self.lanes.send(pairs)

    def settle(self) -> None:
        """Let go of the sources, once they are copied."""
        if self.is_sent:
            return
        self.lanes.wait(self.sent)
        self.is_sent, self.sent = True, None
        for item in self.items:
            assert item.source is not None
            try:
                item.source.give()
            except RuntimeError as error:  # written to while it was copied
                self.spoilt = error
            item.source = None

    def fetch(self, items: Sequence[Item]) -> None:
        self.settle()
        targets = [empty_for(item.lease, item.flat_size, item.dtype, item.device) for item in items]
        pairs = [p for item, target in zip(items, targets, strict=True) for p in item.lease.to_device(target)]
        with on_host():
            self.back = self.lanes.fetch(pairs)
        self.is_fetched, self.is_taken = True, False  # and not where the device had no memory for it
        for item, target in zip(items, targets, strict=True):
            item.fetched, item.left = target, item.uses

    def give(self, index: int) -> Tensor:
        """The storage of an item as a flat tensor, one use of it done."""
        item = self.items[index]
        if not self.is_fetched:
            self.fetch(self.items)
        elif item.fetched is None:  # in another backward, or once more than it was saved
            self.fetch([item])
        if not self.is_taken:
            self.lanes.wait(self.back)
            self.is_taken, self.back = True, None
            self.pool.fetch_before(self)
        if self.spoilt is not None:
            raise self.spoilt
        tensor = item.fetched
        assert tensor is not None
        item.left -= 1
        if item.left <= 0:
            item.fetched = None
        return tensor

    def __del__(self) -> None:
        if not self.is_sent and self.sent is not None:
            self.lanes.wait(self.sent)
        if self.is_fetched and not self.is_taken:
            self.lanes.wait(self.back)


class HostPool:
    """The host memory of one planned model, and the copies to it and from it.

    Args:
        limit_bytes: of host memory. What does not fit stays on the device, and a `PlanNotFollowed` says so.
        least_bytes: smaller tensors stay on the device.
        lanes: what copies for a device.

    Attributes:
        copied: block path -> bytes that it copied in its last forward; the same come back in its backward.
    """

    def __init__(
        self, limit_bytes: int, *, least_bytes: int = MIN_BYTES, lanes: Callable[[torch.device], Lanes] = lanes_for
    ) -> None:
        self._memory = HostMemory(limit_bytes)
        self.least_bytes = least_bytes
        self._lanes_for = lanes
        self._forget()

    def _forget(self) -> None:
        self.copied: dict[str, int] = {}
        self._lanes: dict[torch.device, Lanes] = {}
        self._parcels: list[ref[Parcel]] = []  # oldest first
        self._seen: set[str] = set()  # blocks of the forward that is under way
        self._forward = 0

    @property
    def bytes(self) -> int:
        """Host memory that is allocated, in use or at hand."""
        return self._memory.bytes

    @property
    def used_bytes(self) -> int:
        """The part of it that is in use."""
        return self._memory.bytes - self._memory.idle_bytes

    @property
    def limit_bytes(self) -> int:
        return self._memory.limit_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_memory", "least_bytes", "_lanes_for")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    # -- forward -------------------------------------------------------------------------------------------------

    def send(self, path: str, storages: Sequence[Sequence[Entry]]) -> None:
        """Send storages to the host: for each, the tensors in it that autograd has saved. All are held as yet."""
        if path in self._seen:  # a new forward has begun
            self._seen.clear()
            self._forward += 1
        self._seen.add(path)
        items, moved, missing = self._leased(storages)
        self.copied[path] = sum(item.bytes for item in items)
        if items:
            parcel = Parcel(self, self._lanes_of(items[0].device), items, self._forward)
            self._settle(self._room - parcel.bytes)
            parcel.send()
            for index, entries in enumerate(moved):
                for entry in entries:
                    entry.leave(parcel, index)
            self._parcels = [known for known in self._parcels if known() is not None]
            self._parcels.append(ref(parcel))
            if not parcel.lanes.is_queued:
                parcel.settle()
        if missing:
            self._warn(path, missing)

    def _leased(self, storages: Sequence[Sequence[Entry]]) -> tuple[list[Item], list[Sequence[Entry]], str]:
        """What there is room for, the entries of each, and what is missing, in words."""
        items: list[Item] = []
        moved: list[Sequence[Entry]] = []
        missing, reason = 0, ""
        for entries in storages:
            flat = _flat(entries)
            if flat is None:
                continue
            try:
                lease = self._memory.lease(flat.nbytes, flat, self._lanes_of(flat.device))
            except NoRoom as error:
                missing, reason = missing + flat.nbytes, reason or str(error)
                continue
            items.append(Item(flat, lease, len(entries)))
            moved.append(entries)
        return items, moved, f"{format_bytes(missing)}: {reason}" if missing else ""

    def _lanes_of(self, device: torch.device) -> Lanes:
        if device not in self._lanes:
            self._lanes[device] = self._lanes_for(device)
        return self._lanes[device]

    @property
    def fetches_early(self) -> bool:
        return any(lanes.is_queued for lanes in self._lanes.values())

    @property
    def _room(self) -> int:
        """Bytes that may be in flight, in each direction."""
        return DEPTH * max(self.copied.values(), default=0)

    def _alive(self) -> list[Parcel]:
        return [parcel for known in self._parcels if (parcel := known()) is not None]

    def _settle(self, room: int) -> None:
        """Wait for the oldest copies until what is still in flight has room."""
        in_flight = [parcel for parcel in self._alive() if not parcel.is_sent]
        total = sum(parcel.bytes for parcel in in_flight)
        for parcel in in_flight:
            if total <= room:
                break
            parcel.settle()
            total -= parcel.bytes

    def _warn(self, path: str, missing: str) -> None:
        warnings.warn(
            f"{path} keeps on the device what it was to send to the host, {missing}. The step is right but takes more "
            "device memory than planned. Raise the host limit, or plan again for the batch and the lengths in use.",
            PlanNotFollowed,
            stacklevel=4,
        )

    # -- between forward and backward ----------------------------------------------------------------------------

    def end_of_blocks(self) -> int:
        """The last block has ended: wait for all copies. Returns the number of this forward."""
        self._settle(0)
        return self._forward

    def start_of_backward(self, forward: int) -> None:
        """The last block's backward begins: fetch the first tensors."""
        self._fetch_ahead([parcel for parcel in self._alive() if parcel.forward == forward])

    # -- backward ------------------------------------------------------------------------------------------------

    def fetch_before(self, parcel: Parcel) -> None:
        """A parcel has been taken over, so there is room for those before it."""
        alive = self._alive()
        if parcel in alive:
            before = alive[: alive.index(parcel)]
            self._fetch_ahead([other for other in before if other.forward == parcel.forward])

    def _fetch_ahead(self, parcels: Sequence[Parcel]) -> None:
        """Fetch the newest of these while there is room."""
        early = sum(parcel.bytes for parcel in self._alive() if parcel.is_fetched and not parcel.is_taken)
        for parcel in reversed(parcels):
            if parcel.is_fetched or not parcel.lanes.is_queued:
                continue
            if early + parcel.bytes > self._room:
                break
            parcel.fetch(parcel.items)
            early += parcel.bytes


def _flat(entries: Sequence[Entry]) -> Tensor | None:
    """The storage of some saved tensors; None where it cannot be sent: read as two types, or written to since."""
    tensors = [entry.held.tensor for entry in entries if entry.held is not None]
    first = tensors[0]
    written = any(entry.held is not None and entry.held.tensor._version != entry.held.version for entry in entries)
    if written or any(tensor.dtype != first.dtype for tensor in tensors):
        return None
    return flat_of(first)
