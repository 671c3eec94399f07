"""The lever `offload`: what a block keeps for its backward lies in host memory until then.

"offload-saved" sends all that autograd saves in the block and that lives for the block alone: what it made, and the
first floating-point tensor that it was called with, its boundary. Nothing is computed twice. "offload-boundary"
recomputes the block (`recompute.py`) and sends the one tensor that checkpointing holds, the boundary. Not sent:
parameters and buffers, other inputs (masks, rotary tables, an encoder's states: others hold them too), outputs, and
tensors below `HostPool.least_bytes`.

Copies are bits: loss and gradients stay what they were. Dispatch and random state are left alone. What the previous
block itself saves of its output stays on the device with it; a trace shows what an option frees (`HostPool.copied` says
what it copies).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_iter

from memplan._compat import is_checkpointing_layer
from memplan.errors import PlanMismatch
from memplan.levers import recompute
from memplan.levers.host_memory import HostMemory, empty_for
from memplan.levers.host_pool import Entry, HostPool
from memplan.levers.lanes import lanes_for
from memplan.levers.undo import StandIn, Undo, set_attributes
from memplan.problem import KEEP, RECOMPUTE

BOUNDARY, SAVED = "offload-boundary", "offload-saved"
OPTIONS: Final = (BOUNDARY, SAVED)

_FUNC = "_gradient_checkpointing_func"  # of transformers' layers
_TIMED_BYTES = 32 * 2**20
_TIMED_ROUNDS = 5
_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor)  # not tensors that stand for several, or for other devices'


def is_option(name: str) -> bool:
    return name in OPTIONS


def install(block: nn.Module, path: str, option: str, pool: HostPool) -> Undo:
    """Run a block by one of `OPTIONS`. What is returned restores the very same attributes.

    Args:
        pool: the same one for all blocks of a model.

    Raises:
        PlanMismatch: another option.
    """
    if not is_option(option):
        raise PlanMismatch(f"{path} is to {option!r}, but the options are {', '.join(OPTIONS)}: plan again.")
    below = recompute.install(block, RECOMPUTE if option == BOUNDARY else KEEP)
    if option == SAVED:
        above = set_attributes(block, {"forward": _Saving(block, path, pool)})
    elif is_checkpointing_layer(block):
        above = set_attributes(block, {_FUNC: _Checkpointing(block, path, pool, getattr(block, _FUNC))})
    else:
        above = set_attributes(block, {"forward": _Recomputing(block, path, pool)})

    def undo() -> None:
        above()
        below()

    return undo


def install_end(block: nn.Module, pool: HostPool) -> Undo:
    """Tell the pool when the last block of a model ends, whatever option it runs by: the head begins with no copy in
    flight, and the block's backward with the first fetch. To be installed after that option, and undone before it.

    Without it results are the same, but copies may still be in flight while the head runs.
    """
    return set_attributes(block, {"forward": _Ending(block, pool)})


class _Saving(StandIn):
    """A forward that sends what autograd saves."""

    def __init__(self, block: nn.Module, path: str, pool: HostPool) -> None:
        super().__init__(block, SAVED)
        self.path, self.pool = path, pool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)
        return _sent(self.block, self.path, self.pool, False, self.__wrapped__, args, kwargs)


class _Recomputing(StandIn):
    """A forward that is run again in its backward, from an input that was sent."""

    def __init__(self, block: nn.Module, path: str, pool: HostPool) -> None:
        super().__init__(block, BOUNDARY)
        self.path, self.pool, self.run = path, pool, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)
        return _sent(self.block, self.path, self.pool, True, self.run, args, kwargs)


class _Ending(StandIn):
    """The forward of the last block."""

    def __init__(self, block: nn.Module, pool: HostPool) -> None:
        self.run = block.forward
        super().__init__(block, f"end {getattr(self.run, '__qualname__', '')}")
        self.pool = pool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, pool = self.run(*args, **kwargs), self.pool
        if torch.is_grad_enabled() and self.block.training:
            forward = pool.end_of_blocks()
            node = next((t.grad_fn for t in tree_iter(out) if isinstance(t, Tensor) and t.grad_fn is not None), None)
            if node is not None and pool.fetches_early:
                node.register_prehook(lambda _gradients: pool.start_of_backward(forward))
        return out


class _Checkpointing:
    """The same for transformers' layers, whose own code calls this with their forward in training."""

    def __init__(self, block: nn.Module, path: str, pool: HostPool, run: Callable[..., Any]) -> None:
        self.block, self.path, self.pool, self.run = block, path, pool, run
        self.__qualname__ = BOUNDARY  # blocks are told apart by it

    def __call__(self, *args: Any) -> Any:
        return _sent(self.block, self.path, self.pool, True, self.run, args, {})


def _sent(
    block: nn.Module,
    path: str,
    pool: HostPool,
    only_boundary: bool,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a forward and send to the host what it may do without."""
    entries: list[Entry] = []

    def pack(tensor: Tensor) -> Entry:
        entries.append(Entry(tensor))
        return entries[-1]

    with saved_tensors_hooks(pack, Entry.give):
        out = run(*args, **kwargs)
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    returned = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
    pool.send(path, _sendable(entries, block, given, returned, only_boundary, pool.least_bytes))
    return out


def _sendable(
    entries: Sequence[Entry],
    block: nn.Module,
    given: Sequence[Tensor],
    returned: Sequence[Tensor],
    only_boundary: bool,
    least_bytes: int,
) -> list[list[Entry]]:
    """What autograd saved of each storage that may be sent: of ordinary tensors on the boundary's own device."""
    boundary = next((tensor for tensor in given if tensor.is_floating_point()), None)
    if boundary is None:
        return []
    others = (*(tensor for tensor in given if _key(tensor) != _key(boundary)), *returned)
    shared = set(map(_key, (*others, *block.parameters(), *block.buffers())))
    found: dict[int, list[Entry]] = {}
    for entry in entries:
        assert entry.held is not None
        tensor = entry.held.tensor
        key = _key(tensor)
        if key is None or key in shared or tensor.device != boundary.device:
            continue
        if only_boundary and key != _key(boundary):
            continue
        if tensor.untyped_storage().nbytes() >= least_bytes:
            found.setdefault(key, []).append(entry)
    return list(found.values())


def _key(tensor: Tensor) -> int | None:
    """Its storage, by which tensors are told apart; None if it is not an ordinary one."""
    if type(tensor) not in _PLAIN_TYPES or tensor.layout != torch.strided:
        return None
    return int(tensor.untyped_storage()._cdata)


def measured_link(device: torch.device) -> float:
    """Bytes per second of copies between a device and pooled host memory, in the slower direction. Takes 64 MiB."""
    lanes, memory = lanes_for(device), HostMemory(2 * _TIMED_BYTES)
    source = torch.zeros(_TIMED_BYTES, dtype=torch.uint8, device=device)
    lease = memory.lease(source.nbytes, source, lanes)
    target = empty_for(lease, source.numel(), source.dtype, device)
    there, back = lease.to_host(source), lease.to_device(target)

    def wait() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    def seconds(copy: Callable[[], object]) -> float:
        found = []
        for _ in range(_TIMED_ROUNDS):
            wait()
            begin = time.perf_counter()
            lanes.wait(copy())
            wait()
            found.append(time.perf_counter() - begin)
        return sorted(found)[_TIMED_ROUNDS // 2]

    return _TIMED_BYTES / max(seconds(lambda: lanes.send(there)), seconds(lambda: lanes.fetch(back)))
