"""The lever `recompute`: a block drops its activations after its forward and makes them again in its backward.

Non-reentrant checkpointing, with the random state kept, so that dropout falls the same way twice. transformers' layers
are switched by their own two attributes; any other module gets a `forward` of its own, so that its hooks, its name and
its state-dict keys stay what they are. A planned model can be copied and pickled: the copy runs by the plan too.

A recomputed block of transformers leaves the key/value cache out, which training has no use for: its second forward
would append to it. Where a model fills one in training (`use_cache` is left on), its attention then reads the keys and
values themselves instead of their copies in the cache, and results may differ by rounding; with `use_cache=False`, and
for all other models, loss and gradients are the same to the bit.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from memplan._compat import is_cache, is_checkpointing_layer, keeps_cache
from memplan.levers.undo import StandIn, Undo, plain_forward, set_attributes

_FLAG, _FUNC = "gradient_checkpointing", "_gradient_checkpointing_func"


def install(block: nn.Module, option: str) -> Undo:
    """Run a block by an option, "keep" or "recompute". What is returned restores the very same attributes.

    "keep" also switches off what was on before, by transformers or by memplan: the plan decides.
    """
    if is_checkpointing_layer(block):
        run = partial(_call, _norms(block), not keeps_cache(block))
        return set_attributes(block, {**_without_lever(block), _FLAG: option == "recompute", _FUNC: run})
    if option == "recompute":
        return set_attributes(block, {"forward": _Checkpointed(block, "recompute")})
    return set_attributes(block, _without_lever(block))


def refusal(written: Sequence[str], model: nn.Module) -> str | None:
    """Why blocks that change these buffers in their forward cannot be run again; None if a norm counts its batches."""
    for name in written:
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, _NormBase):
            return f"{name} is changed by every forward of its block, and a second one would change it once more"
    return None


def _without_lever(block: nn.Module) -> dict[str, object]:
    return {"forward": plain_forward(block)} if isinstance(block.forward, StandIn) else {}


class _Checkpointed(StandIn):
    """A forward that is run again in its backward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)
        return _call(_norms(self.block), False, partial(self.__wrapped__, **kwargs), *args)


def _call(norms: Sequence[_NormBase], drop_cache: bool, run: Callable[..., Any], *args: Any) -> Any:
    """Run a forward that is run again in its backward."""
    if drop_cache:  # transformers does so for those passed by name
        args = tuple(None if is_cache(value) else value for value in args)
    return checkpoint(run, *args, use_reentrant=False, context_fn=partial(_contexts, norms))


def _contexts(norms: Sequence[_NormBase]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first forward, and around the second."""
    return nullcontext(), _Uncounted(norms)


def _norms(block: nn.Module) -> tuple[_NormBase, ...]:
    """Those that count the batches they see."""
    return tuple(module for module in block.modules() if isinstance(module, _NormBase) and module.track_running_stats)


class _Uncounted:
    """Count a batch once: at momentum 0 the running statistics stay, and autograd saves the same tensors as before.

    Entered again for each backward through a graph that is retained.
    """

    def __init__(self, norms: Sequence[_NormBase]) -> None:
        self.norms = norms

    def __enter__(self) -> None:
        self.before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.before:
            norm.momentum, norm.num_batches_tracked = momentum, count
