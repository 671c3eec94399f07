"""What torch's CPU allocator did, to the byte: its own record of every allocation and free, read through the profiler.

What passes by that allocator is not seen: scratch memory inside oneDNN and BLAS, and the Python heap.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.profiler import profile

Allocations = list[tuple[int, int]]
"""(address, bytes) in time order, bytes negative for a free."""


@contextmanager
def allocator_record() -> Iterator[Allocations]:
    """A list that is filled, when the block ends, with what torch's CPU allocator did on this thread."""
    record: Allocations = []
    with _quiet_profiler(), profile(profile_memory=True) as profiler:
        yield record
    timed = []
    pending = list(profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            timed.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    record.extend((address, change) for _, address, change in sorted(timed))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler library from writing to stderr at each start and stop, unless the user set its log level."""
    key = "KINETO_LOG_LEVEL"
    if key in os.environ:
        yield
        return
    os.environ[key] = "6"  # above its highest level
    try:
        yield
    finally:
        os.environ.pop(key, None)


def survivors(record: Allocations) -> dict[int, int]:
    """Bytes by address of what was allocated and not freed, also what only C++ holds: saved tensors of a kept graph."""
    alive: dict[int, int] = {}
    for address, change in record:
        if change > 0:
            alive[address] = change
        else:
            alive.pop(address, None)
    return alive


def reachable_storages() -> dict[int, int]:
    """Bytes by address of all distinct CPU storages that Python objects reach, gradients included."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):  # not isinstance: on proxies that runs their code
            continue
        try:
            found |= _storages_of(thing)
        except (RuntimeError, ValueError):  # functional, batched and not yet initialised tensors have no address
            continue
    return found


def _storages_of(tensor: torch.Tensor) -> dict[int, int]:
    """Bytes by address of the storage of a tensor and of its gradient, where they are plain CPU memory."""
    tensors = [tensor]
    if (tensor.is_leaf or tensor.retains_grad) and tensor.grad is not None:
        tensors.append(tensor.grad)  # has no Python object of its own until it is asked for
    storages = [one.untyped_storage() for one in tensors if one.layout == torch.strided]
    plain = [storage for storage in storages if storage.device.type == "cpu"]  # a fake tensor only says it is
    return {storage.data_ptr(): storage.nbytes() for storage in plain if storage.nbytes()}


def workspaces_of(operations: Iterable[Callable[[], Callable[[], object]]]) -> list[int]:
    """Bytes that each operation on the CPU allocates and frees again while it runs, beyond what it returns.

    Each is given as a function that makes the operands and returns the operation on them, so that only one operation's
    operands are alive at a time.
    """
    borders: list[tuple[torch.Tensor, torch.Tensor]] = []  # one-element tensors: their addresses cut the record
    with allocator_record() as record:
        for prepare in operations:
            operation = prepare()
            before = torch.empty(1)
            result = operation()
            borders.append((before, torch.empty(1)))
            del operation, result
    place = {address: at for at, (address, change) in enumerate(record) if change > 0}
    sizes = []
    for before, after in borders:
        now = peak = 0
        for _, change in record[place[before.data_ptr()] + 1 : place[after.data_ptr()]]:
            now += change
            peak = max(peak, now)
        sizes.append(peak - max(now, 0))
    return sizes
