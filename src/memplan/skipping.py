"""A model without the work of its blocks: what lies around them is left, the embeddings, the loss head and the loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from memplan.levers.undo import StandIn, set_attributes


@contextmanager
def skipped(model: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[None]:
    """Blocks hand on what they get, for as long as the `with` block lasts.

    The first block to be called of each group of alike ones runs once, for the form of what it returns. The first
    tensor in it is replaced by the first argument, where the two could be taken for each other, so that gradients flow
    on to what lies before the blocks; else it is as in that one run.

    Args:
        groups: paths of the blocks, those together that cannot be told apart.
    """
    undos = []
    try:
        for group in groups:
            outputs: list[Any] = []
            for path in group:
                block = model.get_submodule(path)
                undos.append(set_attributes(block, {"forward": _Skipped(block, outputs)}))
        yield
    finally:
        for undo in reversed(undos):
            undo()


class _Skipped(StandIn):
    """A forward that does nothing."""

    def __init__(self, block: nn.Module, outputs: list[Any]) -> None:
        super().__init__(block, "skipped")
        self.outputs = outputs  # of the group: empty until its first call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.outputs:
            with torch.no_grad():
                self.outputs.append(self.__wrapped__(*args, **kwargs))
        leaves, form = tree_flatten(self.outputs[0])
        at = next((n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        if at is not None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            handed = given if given is not None and _alike(given, leaves[at]) else leaves[at]
            if not handed.requires_grad and any(p.requires_grad for p in self.block.parameters()):
                handed = handed.detach().requires_grad_()
            leaves[at] = handed
        return tree_unflatten(leaves, form)


def _alike(given: Tensor, returned: Tensor) -> bool:
    return given.shape == returned.shape and given.dtype == returned.dtype
