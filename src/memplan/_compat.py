"""Feature probes of other packages, in one place."""

import sys

from torch import nn


def is_checkpointing_layer(module: nn.Module) -> bool:
    """Whether a module is transformers' `GradientCheckpointingLayer`: two attributes of its own switch checkpointing.

    transformers is not imported for the question: a model of its classes has done that.
    """
    layers = sys.modules.get("transformers.modeling_layers")
    kind = getattr(layers, "GradientCheckpointingLayer", None)
    return kind is not None and isinstance(module, kind)


def is_cache(value: object) -> bool:
    """Whether a value is one of transformers' key/value caches, which a forward writes to."""
    kind = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return kind is not None and isinstance(value, kind)
