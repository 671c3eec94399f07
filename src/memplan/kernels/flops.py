"""Floating-point operations of an operator, for the time estimate. Multiply and add count as two."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_ATTENTION_FORWARD = 2  # matrix products of scores and values
_ATTENTION_BACKWARD = 5  # scores again, and the gradients of values, probabilities, queries and keys


def flops_of(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Matrix products, convolutions and attention; everything else is bound by memory and counts 0."""
    name = func._schema.name
    if "scaled_dot_product" in name and "attention" in name:
        return _attention_flops(name, args, kwargs)
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _attention_flops(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """2 x batch x heads x queries x keys x head size per product; half of it where a causal kernel skips the rest."""
    backward = name.endswith("_backward")
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    product: int = 2 * query.numel() * key.shape[-2]
    causal = kwargs.get("is_causal", any(arg is True for arg in args))
    return product * (_ATTENTION_BACKWARD if backward else _ATTENTION_FORWARD) // (2 if causal else 1)
