"""What CPU operators allocate behind an operator, beyond inputs and outputs, in torch's own allocator.

Sizes follow the kernels in ATen/native (file named at each rule) and were compared with the allocator's events. What
has no closed form (oneDNN picks its layouts and scratch by the machine) is left to `memplan.kernels.probes`. Left out:
the 0-dim tensors that wrap Python numbers, a few hundred bytes in all.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from memplan.kernels.probes import wants_probe

Rule = Callable[[Sequence[object], Sequence[Tensor]], int]  # (flat arguments, output tensors) -> bytes

# Flash attention splits queries by length and keys by 512 (cpu/FlashAttentionKernel.cpp).
_KV_SPLIT: Final = 512

_NONE, _MEAN = 0, 1  # Reduction.h


def workspace_bytes(func: torch._ops.OpOverload, args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """Bytes an operator allocates and frees while it runs, on top of its outputs."""
    rule = RULES.get(func._schema.name)
    if rule is not None:
        return rule(args, outputs)
    return _promotion(args, outputs, in_place=func._schema.is_mutable) if torch.Tag.pointwise in func.tags else 0


_PACKS: Final[dict[torch.dtype, Callable[[], bool]]] = {
    torch.bfloat16: lambda: bool(torch.cpu._is_amx_tile_supported()),
    torch.float16: lambda: bool(getattr(torch.cpu, "_is_amx_fp16_supported", bool)()),
}


# -- attention -------------------------------------------------------------------------------------------------------


def _flash_forward(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """cpu_flash_attention: per thread qk[q, kv], max[q], sum[q], dst[q, head]; + a reduced-precision qk."""
    query, key = _tensors(args)[:2]
    q, kv = _query_split(query.shape[2]), min(_KV_SPLIT, key.shape[2])
    threads = torch.get_num_threads()
    size = threads * (q * kv + 2 * q + q * query.shape[3]) * 4
    if query.element_size() >= 4:
        return size
    return size + threads * q * kv * query.element_size() + _packed(query, key, q, any(a is True for a in args))


def _packed(query: Tensor, key: Tensor, q_split: int, is_causal: bool) -> int:
    """Keys and values in the layout of AMX, where the processor has it and there is enough to multiply with them.

    cpu_flash_attention (FlashAttentionKernel.cpp), `need_pack`; what packs is told by cpublas::could_pack.
    """
    if query.dtype not in _PACKS or not _PACKS[query.dtype]():
        return 0
    (batch, heads, rows, width), (kv_heads, columns) = query.shape, key.shape[1:3]
    least, ratio = (64, 4) if query.dtype == torch.bfloat16 else (16, 1)
    threads = torch.get_num_threads()
    splits = -(-rows // q_split)
    multiplied = (
        (batch * heads * splits + threads - 1) // threads * q_split * (min(rows, columns) if is_causal else columns)
    )
    if min(rows, columns) < least or multiplied < ratio * batch * kv_heads * columns:
        return 0
    even = width + width % 2
    kv = min(_KV_SPLIT, columns)
    tail = (columns - 1) % kv + 1
    padded = (columns - 1) // kv * (kv + kv % 2) + tail + tail % 2
    own = kv * width + (q_split * even if width % 2 else 0)  # of a thread: a block to turn round, padded queries
    packed = batch * kv_heads * (even * columns + padded * width) + threads * own
    return packed * query.element_size()


def _flash_backward(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """cpu_flash_attention_backward: per thread attn[q, kv] and grad_attn[q, kv]; row sums[q]; grad_out.contiguous()."""
    grad, query, key = _tensors(args)[:3]
    q, kv = _query_split(query.shape[2]), min(_KV_SPLIT, key.shape[2])
    return torch.get_num_threads() * 2 * q * kv * 4 + q * 4 + _copies(grad.transpose(1, 2))


def _query_split(length: int) -> int:
    split = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(split, length)


def _safe_softmax(_: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """_safe_softmax (SoftMax.cpp): a bool mask of -inf scores and one bool per row."""
    (out,) = outputs
    return out.numel() + out.numel() // max(out.shape[-1], 1)


# -- normalisation ---------------------------------------------------------------------------------------------------


def _batch_norm(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """batch_norm_cpu (cpu/batch_norm_kernel.cpp): scale and shift of channels; with channels last, sums per thread."""
    source = _tensors(args)[0]
    channel = source.shape[1] * max(source.element_size(), 4)
    if source.dim() > 2 and source.is_contiguous():
        return 2 * channel
    return (2 + torch.get_num_threads()) * channel if _is_channels_last(source) else 0


def _batch_norm_backward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """batch_norm_backward_cpu_template (Normalization.cpp): a second buffer of the input's gradient."""
    grad, source = _tensors(args)[:2]
    packed = grad.is_contiguous() and source.is_contiguous()
    if not packed and not (_is_channels_last(grad) and _is_channels_last(source)):
        return 0
    return outputs[0].nbytes if outputs else 0


def _layer_norm_backward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """LayerNormBackwardKernelImplInternal (cpu/layer_norm_kernel.cpp): per-thread partial sums of dgamma and dbeta."""
    grad, source = _tensors(args)[:2]
    width = max((t.numel() for t in outputs[1:]), default=0)
    return 2 * torch.get_num_threads() * width * source.element_size() + _copies(grad, source)


def _group_norm_backward(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """GroupNormBackwardKernelImplInternal (cpu/group_norm_kernel.cpp): two sums for each sample and channel."""
    source = _tensors(args)[1]
    return 2 * source.shape[0] * source.shape[1] * 4


# -- reductions, losses, indexing ------------------------------------------------------------------------------------


def _reduction(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """sum, prod, cumsum (ReduceOps.cpp): a copy of the operand in another type.

    Booleans and integers are counted in int64. In low precision sums over dimensions that do not merge into one go
    through float32, in and out (should_use_acc_buffer).
    """
    source, out = _tensors(args)[0], outputs[0]
    if source.dtype != out.dtype:
        return source.numel() * out.element_size()
    if _is_low(source) and not _merges(source, kept=out.numel(), dims=_dims(args)):
        return (source.numel() + out.numel()) * 4
    return 0


def _mean(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """mean (ReduceOps.cpp): in low precision by way of float32, in and out."""
    source, out = _tensors(args)[0], outputs[0]
    return (source.numel() + out.numel()) * 4 if _is_low(source) else 0


def _dims(args: Sequence[object]) -> set[int]:
    source = _tensors(args)[0]
    named = {int(dim) % source.dim() for dim in args[1:] if type(dim) is int and source.dim()}
    return named or set(range(source.dim()))


def _merges(source: Tensor, kept: int, dims: set[int]) -> bool:
    """Whether the reduced dimensions are one run of memory for TensorIterator."""
    if kept == source.numel():
        return True
    rows = sorted((source.stride(dim), source.shape[dim]) for dim in dims if source.shape[dim] > 1)
    return all(inner * size == outer for (inner, size), (outer, _) in pairwise(rows))


def _accumulated(_: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """cpu_scatter_gather_base_kernel (cpu/ScatterGatherKernel.cpp): low precision is gathered in a float32 buffer."""
    return outputs[0].numel() * 4 if _is_low(outputs[0]) else 0


def _ctc_backward(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """ctc_loss_backward_cpu_template (LossCTC.cpp): log_beta, as large as the log_alpha that it is given."""
    return _tensors(args)[-1].nbytes


def _loss(terms: int) -> Rule:
    """A loss that is reduced (Loss.cpp, BinaryOps.cpp): so many tensors like the input, one less if it is not.

    The mean of low precision goes through float32.
    """

    def rule(args: Sequence[object], _: Sequence[Tensor]) -> int:
        source, reduction = _tensors(args)[0], _reduction_of(args)
        averaged = source.numel() * 4 if reduction == _MEAN and _is_low(source) else 0
        return (terms if reduction != _NONE else max(0, terms - 1)) * source.nbytes + averaged

    return rule


def _reduction_of(args: Sequence[object]) -> int:
    """`Reduction.h`: 0 none, 1 mean, 2 sum; it comes last, and may be left out."""
    last = args[-1]
    return last if type(last) is int else _MEAN


def _soft_margin_backward(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """soft_margin_loss_backward_out (Loss.cpp): exp(-target * input), and that plus one."""
    return 2 * _tensors(args)[1].nbytes


def _embedding_bag(_: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """_embedding_bag_cpu_impl_out (EmbeddingBag.cpp): the cumulative sum that gives each index its bag, or sizes."""
    bag_of, sizes, most = outputs[1:]
    if bag_of.numel() == 0:
        return 0
    return sizes.nbytes if most.dim() > 1 else max(0, (bag_of.numel() + 1) * 8 - sizes.nbytes - most.nbytes)


def _embedding_bag_backward(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """_embedding_bag_backward (EmbeddingBag.cpp): indices sorted, their order, their bags; for sums, these bags first.

    The maximum adds up gradients by the indices of all that won, of which each bag has one per column.
    """
    grad, indices, _offsets, bag_of, sizes, most = _tensors(args)[:6]
    if most.dim() > 1:
        return most.nbytes + grad.nbytes + sizes.nbytes
    return 3 * indices.numel() * 8 + ((indices.numel() + 1) * 8 if bag_of.numel() == 0 else 0)


def _log_sum_exp(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """logsumexp_out_impl (ReduceOps.cpp): exp of the shifted input, and the maxima."""
    return _tensors(args)[0].nbytes + outputs[0].nbytes


def _roll(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """roll_common (TensorTransformations.h): one dimension after the other, each time into a new tensor."""
    shifts = (len(args) - 1) // 2
    return outputs[0].nbytes if shifts > 1 else 0


def _gelu_backward(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """gelu_backward by oneDNN (Activation.cpp): gradients of another layout than the input's are reordered."""
    grad, source = _tensors(args)[:2]
    return _copies(grad, outputs[0]) if source.is_contiguous() and "tanh" not in args else 0


def _copies_of(*positions: int) -> Rule:
    """Kernels that call contiguous() on some of their operands."""
    return lambda args, _: _copies(*(tensor for i, tensor in enumerate(_tensors(args)) if i in positions))


def _product(args: Sequence[object], _: Sequence[Tensor]) -> int:
    """addmm_impl_cpu_ (LinearAlgebra.cpp): copies of operands that BLAS cannot read in place; one by one in a batch."""
    unfit = [t for t in _tensors(args)[-2:] if not _fits_blas(t.shape[-2:], t.stride()[-2:])]
    return sum(prod(t.shape[-2:]) * t.element_size() for t in unfit)


def _fits_blas(shape: Sequence[int], stride: Sequence[int]) -> bool:
    (rows, columns), (down, right) = shape, stride
    return (right == 1 and down >= max(1, columns)) or (down == 1 and right >= max(1, rows))


# -- elementwise -----------------------------------------------------------------------------------------------------


def _promotion(args: Sequence[object], outputs: Sequence[Tensor], *, in_place: bool) -> int:
    """TensorIterator on the CPU casts each operand of another type into a copy of the common type (TensorIterator.cpp).

    So it does with an output that it writes in place.
    """
    operands = [t for t in _tensors(args) if t.dim() > 0]
    common = _common_type(operands, args)
    if common is None:
        return 0
    if outputs and outputs[0].is_floating_point() and not common.is_floating_point:  # the square root of an integer
        common = outputs[0].dtype
    size = sum(prod(t.shape) * common.itemsize for t in operands if t.dtype != common)
    written = in_place and outputs and outputs[0].dtype != common
    return size + (outputs[0].numel() * common.itemsize if written else 0)


def _common_type(operands: Sequence[Tensor], args: Sequence[object]) -> torch.dtype | None:
    """Numbers and 0-dim tensors only count if they are of a higher kind: integer above boolean, floating above both."""
    if not operands:
        return None
    common = reduce(torch.promote_types, (t.dtype for t in operands))
    for arg in args:
        dtype = _TYPES.get(type(arg)) if not isinstance(arg, Tensor) else arg.dtype
        if dtype is not None and _kind(dtype) > _kind(common):
            common = dtype if isinstance(arg, Tensor) or dtype is torch.int64 else torch.get_default_dtype()
    return common


_TYPES: Final = MappingProxyType({int: torch.int64, float: torch.float32})


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1 if dtype != torch.bool else 0


def _chosen(args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """where, masked_fill: the condition stays boolean."""
    chosen = [arg for arg in args if not (isinstance(arg, Tensor) and arg.dtype == torch.bool)]
    return _promotion(chosen, outputs, in_place=False)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _tensors(args: Sequence[object]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def _copies(*tensors: Tensor) -> int:
    """Bytes of the copies that contiguous() makes."""
    return sum(prod(t.shape) * t.element_size() for t in tensors if not t.is_contiguous())


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() == 2:
        return tensor.is_contiguous()
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _is_low(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu": _flash_forward,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
        "aten::_safe_softmax": _safe_softmax,
        "aten::_softmax": _copies_of(0),
        "aten::_softmax_backward_data": _copies_of(0, 1),
        "aten::_log_softmax": _copies_of(0),
        "aten::_log_softmax_backward_data": _copies_of(0, 1),
        "aten::native_batch_norm": _batch_norm,
        "aten::native_batch_norm_backward": _batch_norm_backward,
        "aten::native_layer_norm": _copies_of(0),
        "aten::native_layer_norm_backward": _layer_norm_backward,
        "aten::native_group_norm_backward": _group_norm_backward,
        "aten::embedding": _copies_of(1),
        "aten::embedding_dense_backward": _copies_of(0, 1),
        "aten::sum": _reduction,
        "aten::prod": _reduction,
        "aten::cumsum": _reduction,
        "aten::mean": _mean,
        "aten::gather": _accumulated,
        "aten::scatter": _accumulated,
        "aten::scatter_": _accumulated,
        "aten::scatter_add": _accumulated,
        "aten::scatter_add_": _accumulated,
        "aten::_ctc_loss_backward": _ctc_backward,
        "aten::mse_loss": _loss(1),
        "aten::smooth_l1_loss": _loss(1),
        "aten::huber_loss": _loss(1),
        "aten::binary_cross_entropy": _loss(0),
        "aten::binary_cross_entropy_with_logits": _loss(2),
        "aten::soft_margin_loss": _loss(0),
        "aten::soft_margin_loss_backward": _soft_margin_backward,
        "aten::_embedding_bag": _embedding_bag,
        "aten::_embedding_bag_backward": _embedding_bag_backward,
        "aten::logsumexp": _log_sum_exp,
        "aten::roll": _roll,
        "aten::gelu_backward": _gelu_backward,
        "aten::mm": _product,
        "aten::addmm": _product,
        "aten::bmm": _product,
        "aten::baddbmm": _product,
        "aten::where": _chosen,
        "aten::masked_fill": _chosen,
        "aten::masked_fill_": _chosen,
    }
)


@final
@dataclass(frozen=True, slots=True)
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

    def fixed_bytes(self) -> tuple[int, ...]:
        """What stays allocated beside the step's tensors: nothing."""
        return ()
