"""Which attention kernel a CUDA card runs, and that kernel's operators on fake CPU tensors.

`scaled_dot_product_attention` keeps for backward what its kernel wants: fused ones the output and one number per row,
the plain one every probability. The choice and the preparation of masks follow torch's own; each check names its
function or file in ATen/native/transformers (torch 2.11 to 2.13).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import pad

Capability = tuple[int, int]

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Attention:
    """One call of `scaled_dot_product_attention`; heads are the third dimension from the end."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Attention":
        """From the arguments of torch's function."""
        return cls(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    @property
    def trains(self) -> bool:
        """input_requires_grad (sdp_utils_cpp.h)."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        return self.query.shape[-1], self.key.shape[-1], self.value.shape[-1]


def attention_kernel(call: Attention, capability: Capability) -> SDPBackend:
    """The kernel that `select_sdp_backend` (cuda/sdp_utils.cpp) picks from those that the user left enabled.

    cuDNN comes first on Hopper and data-centre Blackwell (check_prefer_cudnn_attention), else last. Torch asks for
    cuDNN 9.15.1 there, which its wheels have from 2.11 on.

    Raises RuntimeError, as torch does, if no enabled kernel takes the call.
    """
    cudnn_first = capability[0] in (9, 10) and torch.__version__ >= "2.11"
    for kernel in _ORDER if cudnn_first else (*_ORDER[1:], _ORDER[0]):
        enabled, takes = _KERNELS[kernel]
        if enabled() and takes(call, capability):
            return kernel
    raise RuntimeError("No available kernel. Aborting execution.")


def _flash_takes(call: Attention, capability: Capability) -> bool:
    """can_use_flash_attention: sm80 to sm121; a head size above 192 cannot be trained on every card."""
    head = call.query.shape[-1]
    small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    untrainable = call.trains and small and (192 < head <= 224 or (head > 224 and call.dropout > 0))
    return (
        (8, 0) <= capability <= (12, 1)
        and call.mask is None
        and call.query.dtype in _HALF
        and head <= 256
        and len(set(call.head_sizes)) == 1
        and not untrainable
        and not (call.causal and call.query.shape[-2] != call.key.shape[-2])
        and _is_dense(call, grouped=True)
        and (head == 1 or _is_unit_strided(call))
    )


def _efficient_takes(call: Attention, capability: Capability) -> bool:
    """can_use_mem_efficient_attention: any mask, no grouped heads; head sizes as minimum_gemm_alignment wants them."""
    dtype = call.query.dtype
    by_tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and dtype in _HALF)
    alignment = 16 // dtype.itemsize if by_tensor_cores else 1
    query, key, value = call.head_sizes
    return (
        (5, 0) <= capability <= (12, 1)
        and dtype in ((*_HALF, torch.float32) if capability >= (8, 0) else (torch.float16, torch.float32))
        and query == key
        and query % alignment == value % alignment == 0
        and query * value > 0
        and _is_dense(call, grouped=False)
        and _is_unit_strided(call)
    )


def _cudnn_takes(call: Attention, capability: Capability) -> bool:
    """can_use_cudnn_attention: dropout in sixteenths, head sizes in eighths up to 128 (on sm90 and sm10x also 192)."""
    query, key, value = call.head_sizes
    large = (query, value) == (192, 128) and (capability == (9, 0) or capability[0] == 10)
    return (
        (8, 0) <= capability <= (12, 1)
        and call.query.dtype in _HALF
        and query == key
        and query % 8 == value % 8 == 0
        and (large or max(query, value) <= 128)
        and (call.dropout * 16).is_integer()
        and _is_dense(call, grouped=True)
        and _is_unit_strided(call)
        and max(call.query.shape[:2]) <= 65535
        and call.key.shape[2] != 1
        and not (call.dropout > 0 and call.query.shape[2] == 1)
        and _mask_broadcasts(call)
        and not torch.are_deterministic_algorithms_enabled()
    )


def _is_dense(call: Attention, grouped: bool) -> bool:
    """Four dimensions, one batch size, no empty sequence, heads that match or divide (sdp_utils_cpp.h)."""
    query, key, value = call.query.shape, call.key.shape, call.value.shape
    if not len(query) == len(key) == len(value) == 4 or not query[0] == key[0] == value[0] or not query[2] * key[2]:
        return False
    if call.grouped and grouped:
        return key[1] == value[1] and query[1] % key[1] == 0
    return query[1] == key[1] == value[1]


def _is_unit_strided(call: Attention) -> bool:
    """check_last_dim_stride_equals_1_dense (sdp_utils_cpp.h)."""
    tensors = (call.query, call.key, call.value, call.mask)
    return all(t.stride(-1) == 1 for t in tensors if t is not None)


def _mask_broadcasts(call: Attention) -> bool:
    """check_attn_mask_shape (sdp_utils_cpp.h): two or four dimensions that broadcast; no gradient."""
    if call.mask is None:
        return True
    scores = (*call.query.shape[:3], call.key.shape[2])
    shape = tuple(call.mask.shape)
    fits = all(size in (1, wanted) for size, wanted in zip(shape[::-1], scores[::-1], strict=False))
    return len(shape) in (2, 4) and fits and not call.mask.requires_grad


def _math_takes(_: Attention, __: Capability) -> bool:
    return True


_ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_KERNELS: dict[SDPBackend, tuple[Callable[[], bool], Callable[[Attention, Capability], bool]]] = {
    SDPBackend.CUDNN_ATTENTION: (torch.backends.cuda.cudnn_sdp_enabled, _cudnn_takes),
    SDPBackend.FLASH_ATTENTION: (torch.backends.cuda.flash_sdp_enabled, _flash_takes),
    SDPBackend.EFFICIENT_ATTENTION: (torch.backends.cuda.mem_efficient_sdp_enabled, _efficient_takes),
    SDPBackend.MATH: (torch.backends.cuda.math_sdp_enabled, _math_takes),
}

# -- running it ----------------------------------------------------------------------------------------------------


def attend(call: Attention, capability: Capability) -> Tensor:
    """`scaled_dot_product_attention` (attention.cpp) by the kernel that CUDA picks."""
    kernel = attention_kernel(call, capability)
    if kernel is SDPBackend.MATH:
        return _math_attention(call)
    return _FUSED[kernel](call)


def _flash_attention(call: Attention) -> Tensor:
    """Head sizes are padded to a multiple of 8."""
    size = call.query.shape[-1]
    tensors = [pad(t, (0, -size % 8)) if size % 8 else t for t in (call.query, call.key, call.value)]
    scale = size**-0.5 if call.scale is None else call.scale
    out: Tensor = _aten._scaled_dot_product_flash_attention(*tensors, call.dropout, call.causal, False, scale=scale)[0]
    return out[..., :size] if size % 8 else out


def _cudnn_attention(call: Attention) -> Tensor:
    out: Tensor = _aten._scaled_dot_product_cudnn_attention(
        *(call.query, call.key, call.value, _bias(call, -65504.0), call.trains),
        *(call.dropout, call.causal, False),
        scale=call.scale,
    )[0]
    return out


def _efficient_attention(call: Attention) -> Tensor:
    out: Tensor = _aten._scaled_dot_product_efficient_attention(
        *(call.query, call.key, call.value, _expanded_bias(call), call.trains),
        *(call.dropout, call.causal),
        scale=call.scale,
    )[0]
    return out


_FUSED: dict[SDPBackend, Callable[[Attention], Tensor]] = {
    SDPBackend.FLASH_ATTENTION: _flash_attention,
    SDPBackend.CUDNN_ATTENTION: _cudnn_attention,
    SDPBackend.EFFICIENT_ATTENTION: _efficient_attention,
}


def _bias(call: Attention, masked: float) -> Tensor | None:
    """convert_boolean_attn_mask: what is added to the scores."""
    mask = call.mask
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.where(mask.logical_not(), masked, torch.zeros((), dtype=call.query.dtype, device=mask.device))


def _expanded_bias(call: Attention) -> Tensor | None:
    """preprocess_mask: rows padded to a multiple of 8, then every head and sample a view of them."""
    bias = _bias(call, -inf)
    if bias is None:
        return None
    size = bias.shape[-1]
    if any(stride % 8 for stride in bias.stride()[:-1]):
        bias = pad(bias, (0, 8 - size % 8))[..., :size]
    return bias.expand(*call.query.shape[:3], call.key.shape[2])


def _math_attention(call: Attention) -> Tensor:
    """_scaled_dot_product_attention_math, with scores masked in place and CUDA's dropout; halves are widened."""
    dtype = call.query.dtype
    widen = dtype in _HALF and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    query, key, value = (t.float() if widen else t for t in (call.query, call.key, call.value))
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    root = abs(scale) ** 0.5
    query = query * (root if scale >= 0 else -root)
    if call.causal:
        square = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        call = Attention(query, key, value, square, call.dropout, grouped=call.grouped)
    bias = _bias(call, -inf)
    if call.grouped:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ (key.transpose(-2, -1) * root)
    if bias is not None:
        scores.add_(bias)
    weights = _aten._safe_softmax(scores, -1)
    if call.dropout > 0:
        weights = _aten.native_dropout(weights, call.dropout, True)[0]
    out: Tensor = (weights @ value).to(dtype)
    return out
