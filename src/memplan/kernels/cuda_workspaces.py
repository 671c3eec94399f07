"""What CUDA operators take from the caching allocator behind their results, and give back before they end.

Each rule names its source in ATen/native. Not covered, for want of a source or for their size:
- cuDNN convolutions and RNNs, which choose an algorithm and its scratch at run time;
- cuDNN attention beyond what cudnn-frontend asks for (the gradients of grouped keys and values before they are summed);
- CUB's scratch in sorts and scans, staging buffers of reductions, split-KV buffers of flash attention (tiny batches);
- the buffers of deterministic algorithms.
cuBLAS workspaces are not behind an operator: they stay (`CudaBackend.fixed_bytes`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

_INDEX_BYTES = 8
_CHUNK = 65536  # kChunkSize (cuda/MultiTensorApply.cuh): elements of a tensor that one block of threads takes


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator on a card: its arguments, flat and in order, and its results."""

    args: Sequence[object]
    outputs: Sequence[Tensor]
    capability: tuple[int, int]

    @property
    def tensors(self) -> list[Tensor]:
        return [arg for arg in self.args if isinstance(arg, Tensor)]


def workspace_bytes(name: str, operation: Operation) -> int:
    """Bytes that the operator of that schema name takes on top of its outputs."""
    rule = RULES.get(name)
    return rule(operation) if rule is not None else 0


def _round(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _copied(*tensors: Tensor) -> int:
    """`contiguous()` of each: nothing if it is already."""
    return sum(t.numel() * t.element_size() for t in tensors if not t.is_contiguous())


def _contiguous_operands(op: Operation) -> int:
    """cuda/SoftMax.cu, cuda/layer_norm_kernel.cu: every floating operand is made contiguous first."""
    return _copied(*(t for t in op.tensors if t.is_floating_point()))


def _flash_backward(op: Operation) -> int:
    """transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: float32 softmax_d and dq_accum, dk and dv for every head."""
    grad, query, key, _, out = op.tensors[:5]
    batch, heads, rows, head = query.shape
    rows = _round(rows, 128)
    sums = batch * heads * rows * 4
    dq = batch * heads * rows * _round(head, 32 if head <= 128 else 64) * 4
    expanded = 2 * batch * heads * key.shape[2] * head * key.element_size() if key.shape[1] != heads else 0
    return sums + dq + expanded + _copied(grad.transpose(1, 2), out.transpose(1, 2))


def _cudnn_backward(op: Operation) -> int:
    """cudnn-frontend, node/scaled_dot_product_flash_attention.h: float32 softmax_sum and dQ_accum."""
    batch, heads, rows, head = op.tensors[1].shape
    return batch * heads * rows * (head + 1) * 4


def _efficient_forward(op: Operation) -> int:
    """mem_eff_attention/kernel_forward.h: a half-precision output beyond 128 a head is summed in a float32 buffer."""
    out = op.outputs[0]
    wide = max(t.shape[-1] for t in op.tensors[:3]) > 128
    return out.numel() * 4 if wide and out.element_size() < 4 else 0


def _efficient_backward(op: Operation) -> int:
    """attention_backward.cu and mem_eff_attention/kernel_backward.h: delta, and dq (dk, dv) summed in float32 tiles.

    For float32 delta is a product of the size of the output, gone before the tiles are made.
    """
    grad, query, key, value = op.tensors[:4]
    batch, heads, rows, head = query.shape
    keys, half = key.shape[2], query.element_size() < 4
    tile_rows, tile_keys, in_registers = _backward_tile(half, max(head, value.shape[3]), op.capability)
    tiles = -(-rows // tile_rows) * -(-head // tile_keys) * (tile_rows * tile_keys + 4)
    if half and not in_registers:
        tiles += _round(keys, tile_keys) * (_round(head, tile_rows) + _round(value.shape[3], tile_rows))
    delta = batch * heads * rows * 4
    total = delta + batch * heads * _round(tiles, 4) * 4
    return _copied(grad.transpose(1, 2)) + (total if half else max(total, grad.numel() * 4 + 2 * delta))


def _backward_tile(half: bool, head: int, capability: tuple[int, int]) -> tuple[int, int, bool]:
    """Rows and keys of a tile and whether dk and dv stay in registers (mem_eff_attention/kernels/cutlassB.h).

    The first kernel of the list that has room: cards of sm86, sm89 and sm12x have 99 KiB of shared memory, half of it
    too little for the large tiles.
    """
    small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0) or capability < (8, 0)
    if head <= 64:
        return 64, 64, half
    if half and head <= 96 and capability in ((8, 6), (8, 9)):
        return 128, 64, True
    if half and head <= 128 and not small:
        return 128, 128, True
    return (64 if small else 128), 64, False


def _layer_norm_backward(op: Operation) -> int:
    """cuda/layer_norm_kernel.cu, LaunchGammaBetaBackwardCUDAKernel: partial sums of many short rows.

    Rows are short below 32 columns for every second multiprocessor; the count is that of the largest card (188).
    """
    copies = _contiguous_operands(op)
    weights = [t for t in op.outputs[1:] if t.numel()]
    rows = op.tensors[1].numel() // max(weights[0].numel(), 1) if weights else 0
    if rows <= 64 * 1024 or weights[0].numel() // 32 >= 188 // 2:
        return copies
    columns = weights[0].numel()
    blocks = min(32 * 1024 // -(-columns // 32), -(-rows // 32))
    return copies + sum(blocks * columns * t.element_size() for t in weights)


def _embedding_backward(op: Operation) -> int:
    """cuda/Embedding.cu, EmbeddingBackwardKernel.cu: above 3072 indices they are sorted, and summed by tens.

    Those sums are float32. A fused kernel that needs less, for few weights with many indices, is not followed.
    """
    grad, indices = op.tensors[:2]
    copies, count = _copied(grad, indices), indices.numel()
    if count <= 3072:
        return copies
    rows, columns = op.outputs[0].shape
    segments = min(count, rows)
    partial = count // 10 + segments
    return copies + (3 * count + 2 * segments + partial) * _INDEX_BYTES + partial * columns * 4


def _index_put(op: Operation) -> int:
    """cuda/Indexing.cu, index_put_with_sort_kernel, where it accumulates: linear index, range, and both sorted."""
    if not any(arg is True for arg in op.args):
        return 0
    indices = [t.numel() for t in op.tensors[1:] if not t.is_floating_point()]
    return 4 * max(indices, default=0) * _INDEX_BYTES


def _foreach_norm(op: Operation) -> int:
    """cuda/ForeachReduceOp.cu, as in `clip_grad_norm_`: a sum per chunk, for each tensor as many as the largest has."""
    chunks = -(-max(t.numel() for t in op.tensors) // _CHUNK)
    return len(op.tensors) * chunks * max(4, op.tensors[0].element_size())


def _safe_softmax(op: Operation) -> int:
    """SoftMax.cpp: a bool for each score and for each row."""
    (out,) = op.outputs
    return out.numel() + out.numel() // max(out.shape[-1], 1)


RULES: dict[str, Callable[[Operation], int]] = {
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "aten::_scaled_dot_product_efficient_attention": _efficient_forward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_foreach_norm": _foreach_norm,
    "aten::_safe_softmax": _safe_softmax,
    "aten::_softmax": _contiguous_operands,
    "aten::_log_softmax": _contiguous_operands,
    "aten::_softmax_backward_data": _contiguous_operands,
    "aten::_log_softmax_backward_data": _contiguous_operands,
    "aten::native_layer_norm": _contiguous_operands,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::index_put": _index_put,
    "aten::index_put_": _index_put,
    "aten::_index_put_impl_": _index_put,
    "aten::_unsafe_index_put": _index_put,
}
