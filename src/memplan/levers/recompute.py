"""The lever `recompute`: a block drops its activations after its forward and makes them again in its backward.

Non-reentrant checkpointing, with the random state kept, so that dropout falls the same way twice. transformers' layers
are switched by their own two attributes; any other module gets a `forward` of its own, so that its hooks, its name and
its state-dict keys stay what they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memplan._compat import is_checkpointing_layer

Undo = Callable[[], None]

_FLAG, _FUNC = "gradient_checkpointing", "_gradient_checkpointing_func"


def install(block: nn.Module, option: str) -> Undo:
    """Run a block by an option, "keep" or "recompute". What is returned restores the very same attributes.

    "keep" also switches off a checkpointing layer that was on: the plan decides, not what was set before.
    """
    if is_checkpointing_layer(block):
        func = partial(checkpoint, use_reentrant=False, **_contexts(block))
        return _set(block, {_FLAG: option == "recompute", _FUNC: func})
    return _set(block, {"forward": _checkpointed(block)}) if option == "recompute" else _nothing


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **_contexts(block), **kwargs)

    return run


def _set(block: nn.Module, values: dict[str, object]) -> Undo:
    """Set instance attributes. The class's own (or an older instance attribute) comes back on undo."""
    before = {name: block.__dict__[name] for name in values if name in block.__dict__}
    block.__dict__.update(values)

    def undo() -> None:
        for name in values:
            block.__dict__.pop(name, None)
        block.__dict__.update(before)

    return undo


def _nothing() -> None:
    """Nothing was installed."""


def _contexts(block: nn.Module) -> dict[str, Any]:
    """`context_fn` where the second forward would leave a trace: batch norms must count each batch once."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    if not norms:
        return {}
    return {"context_fn": lambda: (nullcontext(), _uncounted(norms))}


@contextmanager
def _uncounted(norms: list[nn.modules.batchnorm._NormBase]) -> Iterator[None]:
    """Normalise by the batch, but leave the running statistics alone."""
    training = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in training:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in training:
            norm.track_running_stats = True


