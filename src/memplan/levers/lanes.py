"""How tensors get to the host and back: one lane per direction beside the device's own queue, or copied on the spot.

`Streams` is for devices that queue their work. Nothing waits on the host: a wait is put in the device's queue, so what
is let go after it may be used again by whatever is queued later. `Direct` is for the CPU, and for traces.
"""

from collections.abc import Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(target, source), of the same shape and type."""


class Lanes(Protocol):
    """What copies for one device. A ticket stands for copies that were begun together."""

    @property
    def is_queued(self) -> bool:
        """Whether copies run beside the computation, so that some are in flight and others are fetched early."""

    def send(self, pairs: Pairs) -> object:
        """Begin to copy to the host what the device's queue has computed so far. Returns the ticket."""

    def fetch(self, pairs: Pairs) -> object:
        """Begin to copy from the host, to targets that the device's queue is done with. Returns the ticket."""

    def wait(self, ticket: object) -> None:
        """Whatever the device is given to do from now on comes after these copies."""

    def host_buffer(self, size: int) -> Tensor:
        """New host memory, uint8 [size]. RuntimeError or MemoryError if there is none."""

    def trim(self) -> None:
        """Give host memory that was let go back to the system."""


@final
class Direct:
    """Copies on the spot.

    Args:
        is_queued: keep as many copies in flight and fetch as early as `Streams` would, so that a trace takes the memory
            on a CPU that the step will take on such a device.
    """

    def __init__(self, is_queued: bool = False) -> None:
        self.is_queued = is_queued

    def send(self, pairs: Pairs) -> object:
        return _copied(pairs)

    def fetch(self, pairs: Pairs) -> object:
        return _copied(pairs)

    def wait(self, ticket: object) -> None:
        """Nothing to wait for."""

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def trim(self) -> None:
        """Nothing is kept."""


@final
class Streams:
    """Copies on two streams of a device's own, from and to pinned memory."""

    is_queued = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver: Any = torch.get_device_module(device)
        self._out, self._back = self._driver.Stream(device=device), self._driver.Stream(device=device)

    def send(self, pairs: Pairs) -> object:
        return self._copied(self._out, pairs)

    def fetch(self, pairs: Pairs) -> object:
        return self._copied(self._back, pairs)

    def _copied(self, stream: Any, pairs: Pairs) -> object:
        stream.wait_stream(self._driver.current_stream(self._device))
        with self._driver.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            done = self._driver.Event()
            done.record(stream)
        return done

    def wait(self, ticket: object) -> None:
        self._driver.current_stream(self._device).wait_event(ticket)

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def trim(self) -> None:
        empty = getattr(torch.accelerator, "empty_host_cache", None)  # not in older versions, which keep what is pinned
        if empty is not None:
            empty()


def lanes_for(device: torch.device) -> Lanes:
    """Streams, but for the CPU."""
    return Direct() if device.type == "cpu" else Streams(device)


def queued_on_paper(_device: torch.device) -> Lanes:
    """For the trace of a step that is to run on a device with streams: `HostPool(..., lanes=queued_on_paper)`."""
    return Direct(is_queued=True)


def _copied(pairs: Pairs) -> object:
    for target, source in pairs:
        target.copy_(source)
    return None
