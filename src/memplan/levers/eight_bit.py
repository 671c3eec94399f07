"""Frozen 8-bit layers hold nothing for their backward.

bitsandbytes keeps the input of such a layer as an attribute of its node in autograd's graph (``MatMul8bitLt``,
``MatMul8bitFp`` in ``autograd/_functions.py``), past the hooks on saved tensors: no checkpoint that is not reentrant,
and no selection, gets it back. The gradient of the input is made of the weight and its scales, the input itself is read
for the gradient of the weight only, which a frozen layer has none of. So it is let go as soon as the layer has run.
Nothing else changes, loss and gradients neither. Layers of 4 bits hold their packed weight only.
"""

from typing import Any

from torch import Tensor, nn

from memplan import packed
from memplan.levers.undo import StandIn, Undo, set_attributes


def install(block: nn.Module) -> Undo:
    """For all frozen 8-bit layers in a block. What is returned restores the very same attributes."""
    layers = [module for module in block.modules() if _is_frozen(module)]
    undos = [set_attributes(layer, {"forward": _LettingGo(layer, "letting go")}) for layer in layers]

    def undo() -> None:
        for each in undos:
            each()

    return undo


def _is_frozen(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and packed.bits_of(weight) == 8 and not weight.requires_grad and hasattr(module, "state")


class _LettingGo(StandIn):
    """A forward whose node in the graph forgets what its backward does not read."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.__wrapped__(*args, **kwargs)
        node: Any = out.grad_fn if isinstance(out, Tensor) else None
        if type(node).__name__ == "MatMul8bitFpBackward":
            node.A = None
        elif type(node).__name__ == "MatMul8bitLtBackward" and not node.is_empty:
            node.tensors = (None, None, None)
        return out
