"""A card that is not there: functions run its operators on fake tensors, and what happened is noted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memplan.kernels.cuda import CudaBackend

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
AMPERE, ADA, HOPPER, BLACKWELL, TURING = (8, 0), (8, 9), (9, 0), (12, 0), (7, 5)

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class Operators(TorchDispatchMode):
    """Runs operators abstractly and notes them, what they gave, and what they took behind it on a card."""

    def __init__(self, capability: tuple[int, int] = AMPERE) -> None:
        super().__init__()
        self.backend = CudaBackend(capability)
        self.names: list[str] = []
        self.outputs: dict[str, list[Tensor]] = {}
        self.workspaces: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with FAKE:
            out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith("prim::"):
            self.names.append(name)
            self.outputs[name] = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.workspaces[name] = self.backend.workspace_bytes(func, tree_leaves((args, kwargs)), self.outputs[name])
        return out


@contextmanager
def on_card(capability: tuple[int, int] = AMPERE) -> Iterator[Operators]:
    with Operators(capability) as operators, operators.backend.kernels():
        yield operators


def fake(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    with FAKE:
        return torch.empty(shape, dtype=dtype, requires_grad=grad)


def backward(out: Tensor) -> None:
    """With a gradient that has the output's own layout, as in a model."""
    out.backward(torch.empty_like(out))


def kept(run: Callable[[], Tensor]) -> list[Tensor]:
    """The distinct tensors that autograd saves."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return list(saved.values())
