"""Host memory that is allocated once and used again from step to step, up to a limit.

All of it is in pieces of a power of two, because torch rounds pinned memory up to one (CachingHostAllocator): so what
is counted is what is taken. A size is made up of at most four pieces and wastes at most an eighth. Few sizes of pieces
also means that batches of other lengths find what earlier ones left.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memplan.errors import MemplanError, UsageError
from memplan.levers.lanes import Lanes, Pairs
from memplan.tape import on_host
from memplan.units import format_bytes

_SMALLEST_BYTES: Final = 4096
_DIGITS: Final = 4  # of a size in binary; the rest is rounded up


class NoRoom(MemplanError, RuntimeError):
    """There is no host memory to be had; the message says why."""


def pieces_of(size: int) -> list[int]:
    """The sizes of the pieces that hold `size` bytes, largest first."""
    step = max(_SMALLEST_BYTES, 1 << max(size.bit_length() - _DIGITS, 0))
    rounded = -(-size // step) * step
    return [1 << k for k in reversed(range(rounded.bit_length())) if rounded >> k & 1]


def usable_bytes(limit_bytes: int) -> int:
    """What a plan may put on the host under a limit, so that rounding up stays within it."""
    return limit_bytes * 8 // 9


def pooled_bytes(planned_bytes: int) -> int:
    """What a pool may take for so many planned bytes; the inverse of `usable_bytes`."""
    return planned_bytes * 9 // 8 + 1


class Lease:
    """Pieces of host memory that are given back when nobody holds this any more."""

    __slots__ = ("_memory", "pieces")

    def __init__(self, memory: "HostMemory | None", pieces: list[Tensor]) -> None:
        self._memory = memory
        self.pieces = pieces

    def __del__(self) -> None:
        if self._memory is not None:
            self._memory._give_back(self.pieces)

    def beside(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece, as far as it is used and in the type of a flat tensor, beside its part of that tensor."""
        begin = 0
        for piece in self.pieces:
            end = min(flat.numel(), begin + piece.nbytes // flat.itemsize)
            if end > begin:
                yield piece[: (end - begin) * flat.itemsize].view(flat.dtype), flat[begin:end]
            begin = end

    def to_host(self, flat: Tensor) -> Pairs:
        return [(piece, part) for piece, part in self.beside(flat)]

    def to_device(self, flat: Tensor) -> Pairs:
        return [(part, piece) for piece, part in self.beside(flat)]


class HostMemory:
    """Pieces in use and pieces at hand.

    Attributes:
        limit_bytes: what may be allocated at once.
        bytes: what is.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise UsageError(f"a host pool of {limit_bytes} bytes can hold nothing: give it a limit of some GiB")
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    @property
    def idle_bytes(self) -> int:
        """The part that is at hand."""
        return sum(size * len(pieces) for size, pieces in self._free.items())

    def lease(self, size: int, source: Tensor, lanes: Lanes) -> Lease:
        """Room for `size` bytes of what `source` holds.

        Memory of an abstract run is only a shape: it is neither pooled nor counted.

        Raises:
            NoRoom: the limit is reached, or the system has no more.
        """
        with on_host():
            if isinstance(source, FakeTensor):
                return Lease(None, [source.new_empty(piece, dtype=torch.uint8) for piece in pieces_of(size)])
            lease = Lease(self, [])
            for piece in pieces_of(size):
                if sum(have.nbytes for have in lease.pieces) < size:  # a piece may be larger than was asked for
                    lease.pieces.append(self._piece(piece, lanes))  # if there is none, the others go back
            return lease

    def _piece(self, size: int, lanes: Lanes) -> Tensor:
        if self._free[size]:
            return self._free[size].pop()
        if self.bytes + size > self.limit_bytes:
            larger = min((have for have, pieces in self._free.items() if have > size and pieces), default=None)
            if larger is not None:
                return self._free[larger].pop()
            self._let_go(size, lanes)
        try:
            fresh = lanes.host_buffer(size)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NoRoom(
                f"the system gave no {format_bytes(size)} of host memory beside the {format_bytes(self.bytes)} that "
                f"the pool has ({reason})"
            ) from error
        self.bytes += size
        return fresh

    def _let_go(self, size: int, lanes: Lanes) -> None:
        """Free smaller pieces at hand until there is room for another one."""
        idle = self.idle_bytes
        if self.bytes - idle + size > self.limit_bytes:
            raise NoRoom(
                f"{format_bytes(size)} more would pass the host limit of {format_bytes(self.limit_bytes)}, of which "
                f"{format_bytes(self.bytes - idle)} are in use"
            )
        for have in sorted(self._free, reverse=True):
            while self._free[have] and self.bytes + size > self.limit_bytes:
                self._free[have].pop()
                self.bytes -= have
        lanes.trim()

    def _give_back(self, pieces: list[Tensor]) -> None:
        for piece in pieces:
            self._free[piece.nbytes].append(piece)

    def __reduce__(self) -> tuple[type["HostMemory"], tuple[int]]:
        return HostMemory, (self.limit_bytes,)  # a copy starts empty


def flat_of(tensor: Tensor) -> Tensor | None:
    """All of a tensor's storage as one flat tensor of its type; None if it is not a whole number of elements."""
    size = tensor.untyped_storage().nbytes()
    if size % tensor.itemsize:
        return None
    return tensor.detach().as_strided((size // tensor.itemsize,), (1,), 0)


def empty_for(lease: Lease, flat_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor on the device, to be filled from the host; abstract where the lease is."""
    return lease.pieces[0].new_empty(flat_size, dtype=dtype, device=device, pin_memory=False)
