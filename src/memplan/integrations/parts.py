"""The loss of a batch from the losses of its parts: each weighted by how much of the batch it holds."""

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn

from memplan.levers.lazy_logits import LazyLogits
from memplan.means import Count, rows_in, tensors_in


@dataclass(frozen=True, slots=True)
class Split:
    """How a step of somebody's training loop is cut into micro-batches.

    Attributes:
        count: what a batch's loss is a mean over.
        micro_batches: in a whole step.
        own_batches: in a whole step, of the loop's own batches, whose losses it would average.
        own_rows: samples in one of those.
    """

    count: Count
    micro_batches: int
    own_batches: int
    own_rows: int

    @property
    def is_own(self) -> bool:
        """Whether the loop has the batches that it would have without a plan."""
        return self.micro_batches == self.own_batches

    @property
    def inside(self) -> int | None:
        """Micro-batches in one of the loop's own batches; None where they lie across those."""
        return None if self.micro_batches % self.own_batches else self.micro_batches // self.own_batches

    def weights(self, batches: Sequence[Any]) -> list[float]:
        """The part of the step's loss that each of its micro-batches has; together 1 in a whole step.

        The loop by itself takes the mean over its batches of each one's mean loss, and at the end of an epoch, with
        fewer batches than a step has, divides by the same number. Where micro-batches lie within those batches that is
        what comes out here; where they lie across, the mean is over all that the step holds.
        """
        items = [float(self.count(batch)) for batch in batches]
        if self.inside is None:
            present = -(-sum(map(rows_in, batches)) // self.own_rows)
            return _parted(items, present / self.own_batches)
        own = [items[at : at + self.inside] for at in range(0, len(items), self.inside)]
        return [part for group in own for part in _parted(group, 1 / self.own_batches)]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """What is in it changed, in copies of the dicts, lists and tuples that it is in."""
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for name, inner in value.items():
            made[name] = mapped(function, inner)
        return made
    if type(value) in (list, tuple):
        return type(value)(mapped(function, inner) for inner in value)
    return function(value)


def _parted(items: Sequence[float], share: float) -> list[float]:
    """A share, parted in the ratio of these numbers; zeros where all are."""
    whole = sum(items)
    return [share * item / whole if item else 0.0 for item in items]


def nothing_to_learn(models: Iterable[nn.Module]) -> Tensor:
    """A loss whose gradients are zeros: of every parameter, since distributed training waits for all of them."""
    return sum((p.sum() * 0.0 for model in models for p in model.parameters() if p.requires_grad), torch.zeros(()))


class LastOutput:
    """What a model's last forward has returned, where a loss of zeros enters the model."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: list[Tensor] = []
        self._hook = model.register_forward_hook(self._see)

    def _see(self, _model: nn.Module, _inputs: object, output: object) -> None:
        if torch.is_grad_enabled():
            self._tensors = [tensor for tensor in tensors_in(output) if tensor.dim() and tensor.requires_grad]

    def forget(self) -> None:
        """What it holds: a step has come to its backward."""
        self._tensors = []

    def nothing_to_learn(self, loss: Tensor) -> Tensor:
        """A loss whose gradients are zeros, through all that it was made of: ranks wait for each of these gradients.

        A loss written by hand sends back what is no number for a mean over nothing; it ends where the output is.
        """
        for tensor in self._tensors:
            if isinstance(tensor, LazyLogits):
                tensor.deferred.send_back_nothing()
            else:
                tensor.register_hook(torch.zeros_like)
        return loss.nan_to_num() * 0.0

    def undo(self) -> None:
        """Leave the model alone."""
        self.forget()
        self._hook.remove()


@contextmanager
def full_precision_outputs(model: nn.Module) -> Iterator[None]:
    """The model as Accelerate runs it in mixed precision: floating-point outputs are copied to float32."""
    own, forward = model.__dict__.get("forward"), model.forward
    model.__dict__["forward"] = lambda *args, **kwargs: convert_to_fp32(forward(*args, **kwargs))
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own
