"""What has to be known of single operators before they are run again, beyond what their schemas say."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

_DATA_DEPENDENT = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)

# Among equals they may choose differently the next time on a device.
_FUNCTIONS_OF_ORDER = {"aten::topk", "aten::sort", "aten::argmax", "aten::argmin", "aten::multinomial"}

# Operators that update running statistics which are passed as arguments, with no word of it in their schema; run again
# without these arguments, in training, they give the same results. Outside of training they only read them.
_STATISTICS = {"aten::native_batch_norm": (3, 4), "aten::cudnn_batch_norm": (3, 4)}
_IN_TRAINING = 5  # the argument of these that says so


def is_function(func: torch._ops.OpOverload) -> bool:
    """Whether the same inputs give the same results, at the same shapes, every time."""
    return func._schema.name not in _FUNCTIONS_OF_ORDER and not any(tag in func.tags for tag in _DATA_DEPENDENT)


def tells_data(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether Python gets to know what a tensor holds, so that what runs afterwards may depend on it.

    Also by the shape of a result, as of `nonzero`, by which an expert gets its tokens.
    """
    if func == torch.ops.aten.index.Tensor:  # of which but masks make results of any size
        masks = (index for index in args[1] if isinstance(index, Tensor))
        return any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)


def written_by(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to, by its schema."""
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_iter(value) if isinstance(t, Tensor)]
    return found


def is_random(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether it draws from the generator; attention does only with dropout, whatever its tag says."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            probability = args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(probability)
    return True


def without_statistics(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments that can be passed again."""
    positions = _STATISTICS.get(func._schema.name, ())
    if not positions or not args[_IN_TRAINING]:
        return args
    return tuple(None if i in positions else argument for i, argument in enumerate(args))
