"""What autograd would have written in place, had no dispatch mode been watching.

Under a mode the engine and the formulas of derivatives leave their operands alone and make new tensors. A tape has to
know which of them are not there in a real run.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

_ADD: Final = torch.ops.aten.add.Tensor
_ENGINE: Final = _engine_run_backward.__code__

# Formulas of derivatives write in place into what they just made, unless a mode is watching: areAnyTensorSubclassLike
# (FunctionsManual.cpp), and `index_put` in generated code, which holds one more reference.
_WRITES: Final = {
    torch.ops.aten.scatter_add.default: 0,
    torch.ops.aten.scatter.src: 0,
    torch.ops.aten.index_add.default: 0,
    torch.ops.aten.index_put.default: 1,
}


def would_write(func: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """Whether autograd, with no mode watching, would have written in place into the first operand.

    The engine adds gradients in place if nobody else holds the one it has: one owner of the tensor, one of the
    storage, dense (InputBuffer, input_buffer.cpp). Under a dispatch mode it always adds out of place, and formulas of
    derivatives do likewise (`_WRITES`), so the tape has to see the difference. What Python asks for inside a backward,
    such as a hook or a Function's own formula, is as it is written. To be called by the mode's `__torch_dispatch__`.
    """
    if torch.is_grad_enabled() or (func is not _ADD and func not in _WRITES):
        return False
    held, more = args[0], args[1]
    if func is _ADD and not (isinstance(more, Tensor) and held.shape == more.shape and _is_dense(held)):
        return False
    if not _asked_by_engine():
        return False
    owners, storage_owners = sole_owner_counts()
    uses: int = held._use_count()
    return uses <= owners + _WRITES.get(func, 0) and _storage_owners(held) <= storage_owners


def _is_dense(tensor: Tensor) -> bool:
    """Not expanded: such a gradient is not written to."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return extent == tensor.numel()


def _storage_owners(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _asked_by_engine() -> bool:
    """Whether it is the engine that runs the operator at hand, and nobody's Python."""
    frame = sys._getframe(2).f_back  # beyond this function, `would_write` and the mode
    while frame is not None and _is_wrapper(frame.f_code):
        frame = frame.f_back
    return frame is None or frame.f_code is _ENGINE  # None: a thread of the engine's own


@cache
def _is_wrapper(code: CodeType) -> bool:
    """Of the functions by which torch keeps its compiler out of modes."""
    path = Path(code.co_filename)
    return path.match("torch/_compile.py") or path.match("torch/_dynamo/*.py")


@cache
def sole_owner_counts() -> tuple[int, int]:
    """The two counts as a mode sees them when the engine alone holds the gradient, read off a toy graph."""
    seen: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _ADD:
                seen.append((args[0]._use_count(), _storage_owners(args[0])))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True) * 2
        total = (leaf.sin() * leaf.cos()).sum()  # two fresh gradients meet at `leaf`
        with Watch():  # type: ignore[no-untyped-call]  # torch's
            total.backward()
    return seen[-1]
