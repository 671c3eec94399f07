"""Whether a loop trains by the loss in the model's output, which is the one that micro-batches are weighted for."""

from typing import Any, Final

import torch
from torch import Tensor, nn

from memplan.errors import UsageError
from memplan.losses import loss_in

_WAYS_OUT: Final = (
    "Pass the function that computes the whole loss to memplan.attach(accelerator, loss=lambda model, batch: ...), or, "
    "if it needs the same memory, say what it is a mean over: normalise='samples', 'tokens' or 'shifted-tokens'."
)


class OutputLoss:
    """The loss in a model's latest output, looked for in what the loop differentiates first.

    Args:
        model: is watched until then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = type(model).__name__
        self._made_by: Any = None  # the node that made it in the graph of autograd
        self._hook = model.register_forward_hook(self._see)

    def _see(self, _model: nn.Module, _inputs: object, output: object) -> None:
        if torch.is_grad_enabled():
            loss = loss_in(output)
            self._made_by = loss.grad_fn if isinstance(loss, Tensor) else None

    def check(self, trained: Tensor) -> None:
        """Look once. A model whose forward was not called as a module's is, is not seen.

        What the loop adds of the parameters alone, a penalty, may be weighted as the rest is.

        Raises:
            UsageError: the loss is not made of the one in the output, or not of that alone.
        """
        made_by = self._made_by
        self.forget()
        if made_by is None:
            return
        beside = _nodes(trained.grad_fn, made_by)
        if made_by not in beside:
            raise UsageError(
                f"accelerator.backward got another loss than the one in the output of {self._model}, by which the plan "
                f"was made and the parts of a split batch are weighted. {_WAYS_OUT}"
            )
        if any(map(_is_unclear, beside)):
            return
        inside = _nodes(made_by)
        if any(node in inside and not _is_leaf(node) for node in beside - {made_by}):
            raise UsageError(
                f"accelerator.backward got a loss that has more of the output of {self._model} in it than that one's "
                f"own, and what the rest is a mean over is not known where a batch is split. {_WAYS_OUT}"
            )

    def forget(self) -> None:
        """Leave the model alone."""
        self._hook.remove()
        self._made_by = None


def share_of(trained: Tensor, loss: Tensor) -> "Tensor | float | None":
    """The derivative of a loss that is made of another one alone, by that one; None if there is more in it.

    Both are scalars. Their graph stays.
    """
    if trained is loss:
        return 1.0
    beside = _nodes(trained.grad_fn, loss.grad_fn)
    if loss.grad_fn not in beside or any(map(_is_leaf, beside)):
        return None
    found: Tensor = torch.autograd.grad(trained.sum(), loss, retain_graph=True)[0]
    return found


def _nodes(last: Any, border: Any = None) -> set[Any]:
    """The nodes of autograd's graph from which one was made, with itself; of those from which a border was made, only
    what something else was made from as well."""
    seen: set[Any] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [] if node is border else [before for before, _ in node.next_functions]
    return seen


def _is_leaf(node: Any) -> bool:
    """Whether it stands for a parameter."""
    return hasattr(node, "variable")


def _is_unclear(node: Any) -> bool:
    """Whether all outputs of a model pass through it together, so that one cannot be told from the others."""
    return "DDPSink" in type(node).__name__ or "DDPSink" in node.name()
