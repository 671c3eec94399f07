"""bitsandbytes' operators, taken apart into the steps of their kernels, so that a tape sees what each of them holds.

They are custom operators whose kernels are Python for the most part, run below the dispatcher where no mode looks: a
product by a 4-bit matrix dequantises the whole matrix behind one operator. Here are the same steps as operators of
their own. Sources are files of bitsandbytes 0.50.2; older ones dequantise above the dispatcher, and need nothing here.

- 4 bits, forward: ``backends/default/ops.py:_gemm_4bit_default_impl`` on the CPU, and on CUDA
  ``backends/cuda/ops.py:_dequant_linear_fallback``. Backward: ``autograd/_functions.py:MatMul4Bit``, in plain sight.
  CUDA's fused kernel, which holds no matrix, is taken up to 4 rows, where every card takes it; between there and 512
  rows (1536 for small matrices) it depends on the card, and the matrix is counted. The backward dequantises anyway.
- 8 bits: on the CPU ``MatMul8bitFp``, in plain sight. On CUDA ``MatMul8bitLt`` (`routed` sees to that): the input
  in 8 bits, a product in int32, its result in float16 and then in the type asked for. How many columns have outliers
  depends on values; one is taken, which makes all the buffers that more would make.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FUSED_ROWS: Final = 4  # backends/cuda/ops.py, _GEMM_4BIT_CUSTOM_FLOOR_M
_NESTED_BLOCK: Final = 256

_LINEAR_OF_8_BITS: Final = "bitsandbytes.autograd._functions"


@contextmanager
def routed(backend: str) -> Iterator[None]:
    """8-bit layers take the path of a device while the `with` block lasts: they ask where their input is.

    Without bitsandbytes, or for the CPU, nothing.
    """
    functions, package = sys.modules.get(_LINEAR_OF_8_BITS), sys.modules.get("bitsandbytes")
    if backend != "cuda" or functions is None or package is None:
        yield
        return
    product, logger = functions.MatMul8bitLt, logging.getLogger(_LINEAR_OF_8_BITS)
    plain, spoke = package.matmul, not logger.disabled

    def matmul(
        A: Tensor,  # noqa: N803  # bitsandbytes' own names
        B: Tensor,  # noqa: N803  # as above
        out: Tensor | None = None,
        state: Any = None,
        threshold: float = 0.0,
        bias: Tensor | None = None,
    ) -> Any:
        if threshold > 0:
            state.threshold = threshold
        return product.apply(A, B, out, bias, state)

    package.matmul = matmul  # type: ignore[attr-defined]  # what is there
    logger.disabled = True  # it warns at every product that is not in float16
    try:
        yield
    finally:
        package.matmul = plain  # type: ignore[attr-defined]  # as above
        logger.disabled = not spoke


@contextmanager
def watching(mode: TorchDispatchMode) -> Iterator[None]:
    """A mode is on again inside its own dispatch, in which it is off."""
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operator's kernel runs: on which backend, and in an autocast region to which type.

    Autocast is in force inside these kernels, but not where a dispatch mode looks or what it calls.
    """

    backend: str
    cast: torch.dtype | None


def cast_in_force(kind: str = "cpu") -> torch.dtype | None:
    """The type of the autocast region for a kind of device, asked outside of any dispatch."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def called(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], cast: torch.dtype | None
) -> Any:
    """Call an operator from inside a dispatch as it runs outside: with the autocast that was in force there."""
    if cast is None or func.namespace != "bitsandbytes":
        return func(*args, **kwargs)
    with torch.autocast(args[0].device.type, cast):
        return func(*args, **kwargs)


def repeats(func: torch._ops.OpOverload, args: tuple[Any, ...], cast: torch.dtype | None) -> bool:
    """Whether an operator that ran in an autocast region gives the same outside of one, where the backward is."""
    return func.namespace != "bitsandbytes" or cast is None or args[0].dtype == cast


def expansion(func: torch._ops.OpOverload, is_fake: bool) -> Callable[..., Any] | None:
    """The steps of an operator's kernel: called with a `Place` and the operator's arguments. Else None.

    `is_fake`: whether tensors have no values; a few expansions make none.
    """
    if func.namespace != "bitsandbytes":
        return None
    name = func._schema.name
    return _STEPS.get(name) or (_ABSTRACT_STEPS.get(name) if is_fake else None)


def _gemm_4bit(
    place: Place,
    a: Tensor,
    packed: Tensor,
    shape: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    if place.backend == "cuda" and a.numel() // a.shape[-1] <= _FUSED_ROWS and a.shape[-1] % blocksize == 0:
        return a.contiguous().new_empty((*a.shape[:-1], shape[0]))
    operators: Any = torch.ops.bitsandbytes
    scales = None
    if absmax_8bit is not None:
        scales = operators.dequantize_blockwise(absmax_8bit, absmax, absmax_code, _NESTED_BLOCK, torch.float32)
        absmax = scales + absmax_offset
        if place.backend == "cpu":
            scales = None  # on CUDA a name holds them to the end
    matrix = operators.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, a.dtype)
    out = _linear(a, matrix, bias, place.cast)
    del scales
    return out


def _linear(a: Tensor, matrix: Tensor, bias: Tensor | None, cast: torch.dtype | None) -> Tensor:
    """`F.linear` (native/Linear.cpp), with autocast's casts."""
    if cast is not None:
        a, matrix, bias = a.to(cast), matrix.to(cast), None if bias is None else bias.to(cast)
    rows = a.reshape(-1, a.shape[-1])
    if bias is None:
        out = torch.ops.aten.mm(rows, matrix.t())
    elif a.dim() == 2 or a.is_contiguous():
        out = torch.ops.aten.addmm(bias, rows, matrix.t())
    else:
        out = torch.ops.aten.mm(rows, matrix.t()).add_(bias)
    result: Tensor = out.view(*a.shape[:-1], matrix.shape[0])
    return result


def _int8_vectorwise_quant(_: Place, a: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """backends/cuda/ops.py: the mask of outliers lives to the end."""
    scales = a.new_empty(a.numel() // a.shape[-1], dtype=torch.float32)
    out = a.new_empty(a.shape, dtype=torch.int8)
    if threshold <= 0:
        return out, scales, None
    mask = a.abs() >= threshold
    columns = a.new_empty(1, dtype=torch.int64)
    del mask
    return out, scales, columns


def _int8_scaled_mm(
    _: Place,
    a: Tensor,
    b: Tensor,
    row_stats: Tensor,  # noqa: ARG001  # as the operator is called
    col_stats: Tensor,  # noqa: ARG001  # as above
    bias: Tensor | None = None,  # noqa: ARG001  # added in place
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _product_of_8_bits(a, b, dtype or torch.float16)


def _product_of_8_bits(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """backends/default/ops.py, int8_scaled_mm; backends/cuda/ops.py, int8_linear_matmul and int8_mm_dequant."""
    product: Tensor = torch.ops.aten._int_mm(a, b.t())
    out = product.new_empty(product.shape, dtype=torch.float16)
    result = out.to(dtype)
    del product
    return result


def _int8_mixed_scaled_mm(
    _: Place,
    a: Tensor,
    ca: Tensor,
    cb: Tensor,
    sca: Tensor,  # noqa: ARG001  # as the operator is called
    scb: Tensor,  # noqa: ARG001  # as above
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,  # noqa: ARG001  # added in place
) -> tuple[Tensor, Tensor]:
    """backends/default/ops.py: columns with outliers in the input's own type are added on top."""
    of_input = a.new_empty(a.shape[0], 0 if outlier_cols is None else outlier_cols.numel())
    of_weight = a.new_empty(of_input.shape[1], cb.shape[0])
    out = _product_of_8_bits(ca, cb, a.dtype)
    total: Tensor = torch.ops.aten.addmm(out, of_input, of_weight)
    return total, of_input


_STEPS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType({"bitsandbytes::gemm_4bit": _gemm_4bit})
_ABSTRACT_STEPS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "bitsandbytes::int8_vectorwise_quant": _int8_vectorwise_quant,
        "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
        "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    }
)
