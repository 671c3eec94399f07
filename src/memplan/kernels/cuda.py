"""What a CUDA card does where the CPU does something else, for a step that runs on fake CPU tensors.

A fake tensor that says it is on a card cannot have a gradient where torch is built without CUDA, so the step runs on
the CPU and `CudaKernels` puts in the card's operators: attention by torch's own order and checks, dropout that keeps a
boolean mask, RMS norm in one kernel, autocast by CUDA's lists. A rule names its file in ATen (torch 2.11 to 2.13 as
built for CUDA 13, whose cuDNN is 9.15.1 or newer).

Not covered:
- float32 statistics of a half-precision layer norm (4 bytes a row more than counted), and softmax from float16 into
  float32 in one kernel (a float32 copy of its input less);
- cuDNN's RNNs (an LSTM is taken to keep what oneDNN keeps on the CPU), and the reserve that its batch norm keeps for
  backward;
- deterministic algorithms, nested tensors, and an order of attention kernels set by the user (`set_priority`);
- cuBLAS workspaces set by the user (`CUBLAS_WORKSPACE_CONFIG`, `TORCH_CUBLASLT_UNIFIED_WORKSPACE=0`);
- autocast's weight cache for einsum, bilinear and RNN cells; `binary_cross_entropy`, which CUDA's autocast refuses.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from memplan.kernels import cuda_autocast
from memplan.kernels.cuda_attention import Attention, Capability, attend, attention_kernel
from memplan.kernels.cuda_workspaces import Operation, workspace_bytes

_aten = torch.ops.aten

_BLOCK_BYTES = 512  # kMinBlockSize (c10/core/AllocatorConfig.h)

# One per thread and stream, shared with cuBLASLt: `:4096:2:16:8`, or 32 MiB (parseChosenWorkspaceSize and
# unified_cublas_and_lt_workspaces, cuda/CublasHandlePool.cpp).
_CUBLAS_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
_LARGE_CUBLAS_BYTES = 32 * 2**20
_HOPPER, _BLACKWELL = 9, (10, 12)  # major compute capabilities
_CUBLAS_HANDLES = 2  # a handle belongs to a thread: one works forward, autograd's own backward


class CudaKernels(TorchFunctionMode):
    """Within this context, torch's functions run a card's operators. For fake tensors: values are not always computed.

    A mode is off while it handles a function. Functions that are C++ below are handled as a whole; those written in
    Python (`F.softmax`, `F.multi_head_attention_forward`) are entered with the mode on again, to meet what they call.
    `Tensor.backward` is one of them: a checkpointed block is recomputed inside it, by the same operators as before.
    """

    def __init__(self, capability: Capability, alike: set[Capability] | None = None) -> None:
        super().__init__()
        self.capability = capability
        self.alike = set() if alike is None else alike  # see `CudaBackend`
        self._bodies: dict[FunctionType, FunctionType | None] = {}
        self._entered: FunctionType | None = None
        self._replaced: dict[str, Callable[..., Any]] = {
            "scaled_dot_product_attention": self._attention,
            "dropout": _dropout,
            "rms_norm": _rms_norm,
            "cross_entropy_loss": _cross_entropy,
        }

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if any(map(_decides_itself, types)):
            return func(*args, **kwargs)
        if isinstance(func, FunctionType):
            return self._enter(func, args, kwargs)
        name = getattr(func, "__name__", "")
        run = self._replaced.get(name, func)
        if torch.is_autocast_enabled("cpu"):
            cast = cuda_autocast.cast(name, args, kwargs)
            if cast is not None:
                with cuda_autocast.excluded():
                    return run(*cast[0], **cast[1])
        return run(*args, **kwargs)

    def _enter(self, func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch's that is written in Python, with the mode on inside."""
        body = self._body(func)
        if body is None or func is self._entered:  # `super().split()` comes by as the `Tensor.split` that it is in
            return func(*args, **kwargs)
        outer, self._entered = self._entered, func
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self._entered = outer

    def _body(self, func: FunctionType) -> FunctionType | None:
        """The function without its question whether a mode will handle it; None if it does not ask."""
        if func not in self._bodies:
            asked = _QUESTIONS.intersection(func.__code__.co_names).intersection(func.__globals__)
            self._bodies[func] = _answered(func, asked) if asked else None
        return self._bodies[func]

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        call = Attention.of(*args, **kwargs)
        if any(t.is_nested for t in (call.query, call.key, call.value)):
            return scaled_dot_product_attention(*args, **kwargs)
        _keep(self.alike, self.capability, lambda capability: attention_kernel(call, capability))
        return attend(call, self.capability)


@cache
def _decides_itself(kind: type) -> bool:
    """Whether a kind of tensor handles torch's functions in its own way; what it calls for that comes by again."""
    handler: Any = getattr(kind, "__torch_function__", None)
    plain: Any = Tensor.__torch_function__
    return (
        handler is not torch._C._disabled_torch_function_impl
        and getattr(handler, "__func__", None) is not plain.__func__
    )


_QUESTIONS = frozenset({"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"})


def _answered(func: FunctionType, questions: frozenset[str]) -> FunctionType:
    def no(*_: object) -> bool:
        return False

    names = {**func.__globals__, **dict.fromkeys(questions, no)}
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


# -- operators whose CUDA form keeps something else for backward; their arguments are named as torch's ----------------


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002  # torch's own name
    """native/Dropout.cpp: one kernel that keeps a boolean mask; on the CPU the factors themselves are kept."""
    if train and 0 < p < 1 and input.numel():
        kept: Tensor = _aten.native_dropout(input, p, True)[0]
        return kept
    return torch.dropout(input, p, train)


def _rms_norm(
    input: Tensor,  # noqa: A002  # torch's own name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """native/layer_norm.cpp: one kernel if input and weight have the same type, else as on the CPU."""
    if weight is not None and weight.dtype != input.dtype:
        return torch.rms_norm(input, normalized_shape, weight, eps)
    fused: Callable[..., Tensor] = _FusedRmsNorm.apply
    return fused(input, weight, input.shape[: input.dim() - len(normalized_shape)])


class _FusedRmsNorm(torch.autograd.Function):
    """_fused_rms_norm (native/cuda/layer_norm_kernel.cu) as far as memory goes: the CPU has no kernel of that name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, rows: Sequence[int]) -> Tensor:
        accumulated = torch.float64 if x.dtype is torch.float64 else torch.float32
        ctx.save_for_backward(x, weight, x.new_empty(rows, dtype=accumulated))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors[:2]
        wanted = ctx.needs_input_grad
        return (
            torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None,
            torch.empty_like(weight) if wanted[1] else None,
            None,
        )


def _cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    """native/LossNLL.cpp: on the CPU's list only, so that is passed by here; what it calls is cast as listed.

    On CUDA log_softmax keeps the type of the logits, and nll_loss widens its result.
    """
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
    loss: Tensor = _aten.cross_entropy_loss.default.redispatch(below, *args, **kwargs)
    return loss


# -- backend -------------------------------------------------------------------------------------------------------


def _keep(alike: set[Capability], own: Capability, answer: Callable[[Capability], object]) -> None:
    """Take those out for which the answer is not that for the card's own."""
    if alike:
        wanted = answer(own)
        alike.difference_update([capability for capability in alike if answer(capability) != wanted])


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """A card of some compute capability, as far as the operators of a step depend on it.

    Attributes:
        alike: other capabilities. As steps run, those are taken out under which an operator would have run otherwise or
            asked for another workspace; a trace holds for the rest, but for the size of `fixed_bytes`.
    """

    compute_capability: Capability = (9, 0)
    alike: set[Capability] = field(default_factory=set, compare=False)

    name: ClassVar[str] = "cuda"
    foreach: ClassVar[bool | None] = True  # torch's default for optimizers on CUDA (torch/optim/optimizer.py)

    def kernels(self) -> AbstractContextManager[object]:
        """A context in which functions run the card's operators."""
        return CudaKernels(self.compute_capability, self.alike)

    def workspace_bytes(self, func: torch._ops.OpOverload, args: Sequence[object], outputs: Sequence[Tensor]) -> int:
        """Bytes an operator takes and gives back while it runs, on top of its outputs; `args` are flat."""
        name = func._schema.name

        def size(capability: Capability) -> int:
            return workspace_bytes(name, Operation(args, outputs, capability))

        _keep(self.alike, self.compute_capability, size)
        return size(self.compute_capability)

    def wants_probe(self, func: torch._ops.OpOverload, args: Sequence[object]) -> bool:  # noqa: ARG002
        """No operator is run for its workspace: the card is elsewhere."""
        return False

    def rounded(self, size: int) -> int:
        """Bytes that the caching allocator hands out for a request."""
        return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES

    def fixed_bytes(self) -> tuple[int, ...]:
        """cuBLAS workspaces: taken with the first product forward and backward, and kept.

        Hopper has the large one; Blackwell from torch 2.12 on, while 2.11 gives it the small one.
        """
        major = self.compute_capability[0]
        is_large = major == _HOPPER or (major in _BLACKWELL and torch.__version__ >= "2.12")
        return _CUBLAS_HANDLES * (_LARGE_CUBLAS_BYTES if is_large else _CUBLAS_BYTES,)
