"""Results of CPU operators on fake tensors, where torch's shape rules give other types, layouts or storages."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map_only

from memplan.kernels import rnn
from memplan.kernels.probes import Probe

_STATISTICS_BY: Final = MappingProxyType(  # operator -> which of its arguments is the weight
    {"aten::native_layer_norm": 2, "aten::native_batch_norm": 1, "aten::native_group_norm": 1}
)

# Losses that are reduced in place: the scalar keeps the storage of what it was reduced from (Loss.cpp, BinaryOps.cpp).
_REDUCED_IN_PLACE: Final = frozenset(
    {"aten::mse_loss", "aten::smooth_l1_loss", "aten::soft_margin_loss", "aten::binary_cross_entropy"}
)

# Gradients that the kernels write densely, where torch's shape rules follow the strides of an operand.
_DENSE: Final = frozenset(
    {"aten::native_layer_norm_backward", "aten::_softmax_backward_data", "aten::_log_softmax_backward_data"}
)


def on_fakes(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operator's results on fake tensors, within their mode, where torch's shape rules are not those of the CPU."""
    if func._schema.name.startswith("aten::_foreach_") and not func._schema.returns:
        return None  # all it does is to write to many tensors, and torch would look at the shape of each
    return _results(func, args, kwargs)


def _results(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = func._schema.name
    if name in _STATISTICS_BY:
        return _with_statistics(func(*args, **kwargs), args[_STATISTICS_BY[name]])
    if name == "aten::native_group_norm_backward":
        first, *rest = func(*args, **kwargs)
        return (None if first is None else first.to(args[1].dtype), *rest)
    if name in _REDUCED_IN_PLACE and (loss := func(*args, **kwargs)).dim() == 0:
        return loss.new_empty(args[0].numel()).as_strided((), ())
    if name in _DENSE:
        return tree_map_only(Tensor, Tensor.contiguous, func(*args, **kwargs))
    if name == "aten::_grouped_mm":  # refused in other types than bfloat16, which the kernel takes
        narrow = [arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
        return func(*narrow, **kwargs).to(args[0].dtype)
    if name == "aten::_ctc_loss" and not isinstance(args[3], FakeTensor):  # as long as the longest target
        with no_dispatch():
            longest = int(torch.as_tensor(args[3]).max())
        (steps, rows, _), states = args[0].shape, 2 * longest + 1
        return args[0].new_empty(rows), args[0].new_empty(rows, steps, states)
    if name == rnn.FORWARD:  # torch has it keep nothing
        *states, kept = func(*args, **kwargs)
        return (*states, kept.new_empty(Probe.of(func, args, kwargs).kept_bytes()))
    if name == rnn.BACKWARD:  # torch has the gradients of both biases share a tensor (a clone in mkldnn/RNN.cpp)
        out = func(*args, **kwargs)
        return (*out[:4], torch.empty_like(out[4]), *out[5:])
    if name == "aten::_ctc_loss_backward":  # torch has no rule: it would run the kernel on zeros
        return torch.empty_like(args[1])
    return func(*args, **kwargs)


def _with_statistics(out: tuple[Tensor, ...], weight: Tensor | None) -> tuple[Tensor, ...]:
    """Normalisation of a low-precision input by other weights: the statistics have the weights' type.

    torch's shape rules give them that of the input, as some of CUDA's kernels do (cpu/mixed_data_type.h).
    """
    if weight is None or weight.dtype == out[0].dtype:
        return out
    return (out[0], *(statistic.to(weight.dtype) for statistic in out[1:]))
