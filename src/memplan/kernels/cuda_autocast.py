"""CUDA's autocast on CPU tensors: where its lists differ from the CPU's (ATen/autocast_mode.h and .cpp).

A region of `torch.autocast("cpu")` casts by the CPU's own lists, in C++. What both devices cast alike is left to it:
matrix products and convolutions (with the cache of cast weights) and most losses. The differences, met here:
- CUDA computes in float32 what the CPU does as it comes: softmax, norms, exponentials, powers, sums, interpolation;
- CUDA brings the operands of `addcmul`, `scatter_add` ... to one type, and lowers `einsum`, `mv` and recurrent cells;
- the CPU has more on its lists (3d pooling, padding, Fourier transforms, linear algebra, `cat`, `cross_entropy`), which
  CUDA runs as they come.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By the names that the functions have in Python, which are those of the operators. Older releases of torch have fewer:
# `rms_norm` came after 2.11.
FLOAT32 = _names("""
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm
    native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm cosine_similarity dist pdist renorm logsumexp
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
    upsample_bicubic2d _upsample_bicubic2d_aa
""")
FLOAT32_RESULT = _names("""
    prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum norm
""")  # a dtype is asked for unless the call gives one
WIDEST = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add")
LOWER = _names("""
    scaled_dot_product_attention addmv addr mv einsum chain_matmul linalg_multi_dot convolution _convolution lstm_cell
    gru_cell rnn_tanh_cell rnn_relu_cell
""")

# Not on a list, but made of what is on one, out of sight of Python.
_REACH_FLOAT32 = _names("square pairwise_distance special_expm1 special_log1p special_logsumexp")
_REACH_FLOAT32_RESULT = _names("linalg_norm special_softmax special_log_softmax")
_REACH_CPU_ONLY = _names("pad")
_REACH_BOTH = _names("cross_entropy_loss")  # is on the CPU's list, reaches what is on both


def cast(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """The arguments that CUDA's autocast hands on to a function, or None where the CPU's own autocast does as much.

    What gets arguments here is to be run under `excluded()`, as inside CUDA's autocast kernels. Call it in an autocast
    region only.
    """
    policy = _policies().get(name)
    return None if policy is None or "out" in kwargs else policy(args, kwargs)


def excluded() -> AbstractContextManager[object]:
    """No autocast for a while, without leaving the region: its cached weights stay."""
    guard: AbstractContextManager[object] = torch._C._ExcludeDispatchKeyGuard(_autocast_key())
    return guard


@cache
def _autocast_key() -> torch._C.DispatchKeySet:
    return torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@cache
def _policies() -> Mapping[str, Callable[[tuple[Any, ...], dict[str, Any]], Arguments]]:
    cuda = _on_list("AutocastCUDA")
    cpu_only = _on_list("AutocastCPU") - cuda - _REACH_BOTH
    return {
        **dict.fromkeys(cpu_only | _REACH_CPU_ONLY, lambda args, kwargs: (args, kwargs)),
        **dict.fromkeys(LOWER, lambda args, kwargs: _to(torch.get_autocast_dtype("cpu"), args, kwargs)),
        **dict.fromkeys(WIDEST, lambda args, kwargs: _to(_widest(args, kwargs), args, kwargs)),
        **dict.fromkeys((FLOAT32 & cuda) | _REACH_FLOAT32, lambda args, kwargs: _to(torch.float32, args, kwargs)),
        **dict.fromkeys(FLOAT32_RESULT | _REACH_FLOAT32_RESULT, _with_float32_result),
    }


def _on_list(key: str) -> frozenset[str]:
    """Operators, without their overloads, that a device's autocast has a kernel for."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix("aten::").partition(".")[0] for name in registered)


def _eligible(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _to(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    cast_args: Arguments = tree_map_only(Tensor, lambda t: t.to(dtype) if _eligible(t) else t, (args, kwargs))
    return cast_args


def _widest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and _eligible(t)]
    return torch.float32 if any(t.dtype is torch.float32 for t in tensors) else torch.get_autocast_dtype("cpu")


def _with_float32_result(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    first = next((t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)), None)
    given = kwargs.get("dtype") is not None or any(isinstance(arg, torch.dtype) for arg in args)
    if given or first is None or not _eligible(first):
        return args, kwargs
    return args, {**kwargs, "dtype": torch.float32}
