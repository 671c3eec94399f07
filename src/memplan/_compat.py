"""Feature probes of other packages, in one place.

They are not imported for the questions: who has a model of their classes has done that.
"""

import sys

from torch import nn


def is_checkpointing_layer(module: nn.Module) -> bool:
    """Whether a module is transformers' `GradientCheckpointingLayer`, checkpointed by two attributes of its own."""
    return _is_a(module, "transformers.modeling_layers", "GradientCheckpointingLayer")


def keeps_cache(layer: nn.Module) -> bool:
    """Whether such a layer only reads the key/value cache, so that it can be run again with it."""
    return bool(getattr(layer, "_can_checkpoint_with_cache", False))


def is_unit(module: nn.Module) -> bool:
    """Whether a module is sharded by FSDP2 as a unit of its own."""
    return _is_a(module, "torch.distributed.fsdp", "FSDPModule")


def is_cache(value: object) -> bool:
    """Whether an argument is transformers' key/value cache."""
    return _is_a(value, "transformers.cache_utils", "Cache")


def _is_a(value: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
