"""What CPU operators allocate behind an operator, beyond inputs and outputs, in torch's own allocator.

Sizes follow the kernels in ATen/native (file named at each rule) and were compared with the allocator's events. What
has no closed form (oneDNN picks its layouts and scratch by the machine) is read off by `probe`, which runs the operator
once. Left out, a few hundred bytes each: the 0-dim tensors that wrap Python numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from memplan.meter import workspaces_of

# Operators with larger operands are not run for their workspace: it would cost seconds.
_PROBE_LIMIT_BYTES = 64 * 2**20
_PROBE_LIMIT_PRODUCT_BYTES = 16 * 2**20

Rule = Callable[[Sequence[object], Sequence[Tensor]], int]  # (flat arguments, output tensors) -> bytes

# Flash attention splits queries by length and keys by 512 (cpu/FlashAttentionKernel.cpp).
_KV_SPLIT = 512


def _query_split(length: int) -> int:
    split = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(split, length)


def _flash_forward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """cpu_flash_attention: per thread qk[q, kv], max[q], sum[q], dst[q, head]; + a reduced-precision qk."""
    query, key = _tensors(args)[:2]
    q, kv = _query_split(query.shape[2]), min(_KV_SPLIT, key.shape[2])
    threads = torch.get_num_threads()
    size = threads * (q * kv + 2 * q + q * query.shape[3]) * 4
    return size + (threads * q * kv * query.element_size() if query.element_size() < 4 else 0)


def _flash_backward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """cpu_flash_attention_backward: per thread attn[q, kv] and grad_attn[q, kv]; row sums[q]; reduced copies."""
    query, key = _tensors(args)[1:3]
    q, kv = _query_split(query.shape[2]), min(_KV_SPLIT, key.shape[2])
    threads = torch.get_num_threads()
    size = threads * 2 * q * kv * 4 + q * 4
    return size + (threads * 2 * q * kv * query.element_size() if query.element_size() < 4 else 0)


def _safe_softmax(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """_safe_softmax (SoftMax.cpp): a bool mask of -inf scores and one bool per row."""
    (out,) = outputs
    return out.numel() + out.numel() // max(out.shape[-1], 1)


def _batch_norm_backward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """batch_norm_backward_cpu_template (Normalization.cpp): a second buffer of the input's gradient in training."""
    return outputs[0].nbytes if outputs else 0


def _embedding_backward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """embedding_dense_backward_cpu (Embedding.cpp): a contiguous copy of the indices."""
    return _tensors(args)[1].nbytes


def _layer_norm_backward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """LayerNormBackwardKernelImplInternal (cpu/layer_norm_kernel.cpp): per-thread partial sums of dgamma and dbeta."""
    width = max((t.numel() for t in outputs[1:]), default=0)
    return 2 * torch.get_num_threads() * width * 4 if width else 0


RULES: dict[str, Rule] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _flash_forward,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "aten::_safe_softmax": _safe_softmax,
    "aten::native_batch_norm_backward": _batch_norm_backward,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::native_layer_norm_backward": _layer_norm_backward,
}

# oneDNN decides these by shape, dtype and instruction set: convolutions reorder into blocked layouts, low-precision
# products copy a transposed operand.
_CONVOLUTIONS = frozenset({"aten::convolution", "aten::convolution_backward"})
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})


def workspace_bytes(func: torch._ops.OpOverload, args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """Bytes an operator allocates and frees while it runs, on top of its outputs."""
    rule = RULES.get(func._schema.name)
    if rule is not None:
        return rule(args, outputs)
    if torch.Tag.pointwise in func.tags:
        return _promotion_bytes(args, outputs)
    return 0


def wants_probe(func: torch._ops.OpOverload, args: Sequence[object]) -> bool:
    """Whether only running the operator tells its workspace."""
    name = func._schema.name
    return name in _CONVOLUTIONS or (name in _PRODUCTS and _tensors(args)[0].element_size() < 4)


def _promotion_bytes(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """TensorIterator on the CPU casts each operand of another type into a copy of the common type (TensorIterator.cpp)."""
    operands = [t for t in _tensors(args) if t.dim() > 0]
    if len({t.dtype for t in operands}) < 2:
        return 0
    common = operands[0].dtype
    for t in operands[1:]:
        common = torch.promote_types(common, t.dtype)
    return sum(prod(t.shape) * common.itemsize for t in operands if t.dtype != common and t.dtype != torch.bool)


def _tensors(args: Sequence[object]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor argument without its tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype).fill_(1)


class Probe:
    """An operator at given shapes, to be run once for the workspace that it takes; equal probes hash alike."""

    def __init__(self, func: torch._ops.OpOverload, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self._key = (func, *map(str, tree_flatten((args, kwargs))[0]))

    @classmethod
    def of(cls, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Probe":
        shapes = tree_map_only(Tensor, lambda t: _Shape(tuple(t.shape), tuple(t.stride()), t.dtype), (args, dict(kwargs)))
        return cls(func, *shapes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def operand_bytes(self) -> int:
        shapes = [arg for arg in tree_flatten((self.args, self.kwargs))[0] if isinstance(arg, _Shape)]
        return sum(prod(shape.size) * shape.dtype.itemsize for shape in shapes)

    @property
    def limit_bytes(self) -> int:
        convolution = self.func._schema.name in _CONVOLUTIONS
        return _PROBE_LIMIT_BYTES if convolution else _PROBE_LIMIT_PRODUCT_BYTES

    def prepare(self) -> Callable[[], object]:
        """Make the operands; what is returned runs the operator on them."""
        args, kwargs = tree_map_only(_Shape, _Shape.make, (self.args, self.kwargs))

        def run() -> object:
            with torch.no_grad():
                return self.func(*args, **kwargs)

        return run


_probed: dict[Probe, int] = {}  # what was run once in this process is not run again


def probed_bytes(probes: Iterable[Probe]) -> dict[Probe, int]:
    """Workspaces of operators as run on this machine; one too large to be run counts its operands once more."""
    large = {probe: probe.operand_bytes for probe in probes if probe.operand_bytes > probe.limit_bytes}
    fresh = [probe for probe in probes if probe not in large and probe not in _probed]
    if fresh:
        _probed.update(zip(fresh, workspaces_of(probe.prepare for probe in fresh), strict=True))
    return {probe: large[probe] if probe in large else _probed[probe] for probe in probes}


@final
class CpuBackend:
    """The processor at hand: torch's own operators, as they are."""

    name: ClassVar[str] = "cpu"
    foreach: ClassVar[bool | None] = None  # torch looks where the parameters are

    def kernels(self) -> AbstractContextManager[object]:
        """Nothing to put in place."""
        return nullcontext()

    def workspace_bytes(self, func: torch._ops.OpOverload, args: Sequence[object], outputs: Sequence[Tensor]) -> int:
        """Bytes an operator takes and gives back while it runs, on top of its outputs; `args` are flat."""
        return workspace_bytes(func, args, outputs)

    def wants_probe(self, func: torch._ops.OpOverload, args: Sequence[object]) -> bool:
        """Whether only running the operator tells its workspace."""
        return wants_probe(func, args)

    def rounded(self, size: int) -> int:
        """Bytes that the allocator hands out for a request: those asked for."""
        return size

    def fixed_bytes(self) -> int:
        """What stays allocated beside the step's tensors: nothing."""
        return 0
