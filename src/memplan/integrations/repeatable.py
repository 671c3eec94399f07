"""A micro-step of somebody's loop that can be run again: a forward and, later, its backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from memplan.device import Device
from memplan.errors import ModelFailed
from memplan.integrations.letting_go import Handed, unviewed
from memplan.integrations.parts import mapped, nothing_to_learn
from memplan.integrations.trained_loss import share_of
from memplan.losses import Loss, loss_in
from memplan.means import tensors_in
from memplan.rewind import Chance, ran_out

_SAME: Final = {"rtol": 1e-2, "atol": 1e-4}
"""How near a loss has to come to the one that it was. Chosen by hand: sums in another order differ by less."""


class Repeatable:
    """What it takes to run a micro-step again, with the same random numbers. Neither output nor graph is kept alive.

    Args:
        model: that is called.
        forward: what the loop's call of it does.
        inputs: positional and named arguments of that call.
        batch: the micro-batch that they are made of, as the loader made it and as the loop got it: what the loop hands
            on as it is, is kept where it came from, which spares a card the whole step's batch.
        loss: the script's own function of model and batch; None: the loss is in the output.
        device: where memory may run out.
        cards: that have random numbers of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        batch: tuple[Any, Any],
        loss: Loss | None,
        device: Device,
        cards: Sequence[torch.device],
    ) -> None:
        self._model, self._forward, self._loss_of, self._device = model, forward, loss, device
        self._cards = cards
        self._first: tuple[tuple[Any, ...], dict[str, Any]] | None = inputs
        self._batch, at_home = batch[0], _at_home(*batch)
        self._inputs = mapped(lambda tensor: at_home.get(id(tensor), tensor), inputs)
        self._has_run = False
        self._handed: Handed | None = None
        self._loss: Any = None  # of the output, until it is trained
        self._trained: Tensor | None = None  # until its backward has begun
        self._chance = [Chance(cards)]  # before the forward, and before the backward
        self._value: Tensor | None = None
        self._share: Tensor | float = 1.0
        self._factor = 1.0
        self._backward: Callable[[Tensor], object] | None = None  # Accelerate's

    def forward(self) -> Any:
        """The output, for the loop; nothing where it has that already, since then the backward runs it again."""
        if self._has_run:
            return None
        self._chance[0].put_back()
        (args, kwargs), self._first = self._first or self._inputs_again(), None
        output = unviewed(self._forward(*args, **kwargs))
        self._handed, self._has_run = Handed(output), True
        self._loss = None if self._loss_of else loss_in(output)
        return output

    def trains(self, trained: Tensor, factor: float, backward: Callable[[Tensor], object]) -> bool:
        """Whether the loop is about to differentiate what could be made again.

        Args:
            trained: what it differentiates.
            factor: by which that is multiplied; 0: gradients are zeros, whatever the loss is.
            backward: Accelerate's.
        """
        loss, self._loss = trained if self._loss_of else self._loss, None
        share = share_of(trained, loss) if isinstance(loss, Tensor) and loss.requires_grad else None
        if share is None:
            return False
        self._share, self._value = share, loss.detach()
        self._trained, self._factor, self._backward = trained, factor, backward
        self._chance.append(Chance(self._cards))
        return True

    def backward(self) -> None:
        """That of the loop's own loss; again, of one that is made for it.

        Raises:
            ModelFailed: made again the loss is another one.
        """
        (trained, self._trained), run = (self._trained, None), self._backward
        assert run is not None
        if trained is None:
            self._chance[0].put_back()
            loss = self._loss_again()
            self._chance[1].put_back()
            run(weighted(self._learned(loss * self._share), self._factor))
            return
        try:
            run(weighted(self._learned(trained), self._factor))
        except Exception as error:  # half of those that say that memory ran out are of other classes
            if self._handed is not None and ran_out(error, self._device):
                self._handed.let_go(trained)
            raise

    def _learned(self, loss: Tensor) -> Tensor:
        return loss if self._factor else nothing_to_learn([self._model])

    def _inputs_again(self) -> Any:
        return mapped(lambda kept: kept.back() if isinstance(kept, _AtHome) else kept, self._inputs)

    def _loss_again(self) -> Tensor:
        """Of the output only that is kept: the loop has its own still."""
        if self._loss_of is not None:
            batch = send_to_device(mapped(lambda tensor: tensor, self._batch), self._device.torch_device)
            found: object = self._loss_of(self._model, batch)
        else:
            args, kwargs = self._inputs_again()
            found = loss_in(self._forward(*args, **kwargs))
        assert isinstance(found, Tensor)
        assert self._value is not None
        if not torch.allclose(found.detach().float(), self._value.float(), **_SAME, equal_nan=True):
            raise ModelFailed(
                "memory ran out, and the step could not be run again: a micro-batch had the loss "
                f"{self._value.item():g} and has {found.item():g} now. The loop changes a batch after the model was "
                "called with it, or the model draws from a generator of its own; or, with loss=, the loop trains by "
                "another loss than that."
            )
        return found


def weighted(loss: Tensor, factor: float) -> Tensor:
    """A loss times a factor, unless that is nothing to do: of a loss that gives zeros it is 0."""
    return loss if factor in (0, 1) else loss * factor


@dataclass(frozen=True, slots=True, eq=False)
class _AtHome:
    """A tensor as the loader made it, in place of that on a card."""

    tensor: Tensor
    device: torch.device

    def back(self) -> Tensor:
        return self.tensor.to(self.device)


def _at_home(made: Any, handed: Any) -> dict[int, _AtHome]:
    """By the ids of tensors that a loop got: those that they were copied from."""
    before, after = list(tensors_in(made)), list(tensors_in(handed))
    if len(before) != len(after):  # a batch with a `to` of its own
        return {}
    pairs = zip(before, after, strict=True)
    return {id(copied): _AtHome(own, copied.device) for own, copied in pairs if own.device != copied.device}
