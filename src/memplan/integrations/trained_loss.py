"""Whether a loop trains by the loss in the model's output, which is the one that micro-batches are weighted for."""

from collections import deque
from typing import Any

from torch import Tensor, nn

from memplan.errors import UsageError
from memplan.losses import loss_in


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
        loss = loss_in(output)
        self._made_by = loss.grad_fn if isinstance(loss, Tensor) else None

    def check(self, trained: Tensor) -> None:
        """Look once. A model whose forward was not called as a module's is, is not seen.

        Raises:
            UsageError: the loss is not made of the one in the output.
        """
        made_by = self._made_by
        self.forget()
        if made_by is not None and not _reaches(trained.grad_fn, made_by):
            raise UsageError(
                f"accelerator.backward got another loss than the one in the output of {self._model}, by which the plan "
                "was made and the parts of a split batch are weighted. Pass the function that computes it to "
                "memplan.attach(accelerator, loss=lambda model, batch: ...), or, if it needs the same memory, say what "
                "it is a mean over: normalise='samples', 'tokens' or 'shifted-tokens'."
            )

    def forget(self) -> None:
        """Leave the model alone."""
        self._hook.remove()
        self._made_by = None


def _reaches(node: Any, other: Any) -> bool:
    """Whether a node of autograd's graph is another one, or was made from it."""
    seen, waiting = {None}, deque([node])
    while waiting:  # the nearest first: a loss is seldom far from what it is made of
        node = waiting.popleft()
        if node is other:
            return True
        if node not in seen:
            seen.add(node)
            waiting.extend(before for before, _ in node.next_functions)
    return False
