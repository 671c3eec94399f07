"""What an Accelerator has for an attachment where memplan is switched off, so that the script runs as it is written."""

from functools import partial, wraps
from typing import Any

from accelerate import Accelerator
from torch import Tensor


class SwitchedOff:
    """`accelerator.memplan` by `MEMPLAN_ENABLED=0` or `enabled=False`: there is no plan, and nothing is done.

    Attributes:
        plan, fit: None.
        loss: of the step under way or, after it, of the step: the mean over its batches.
    """

    plan = fit = None

    def __init__(self, accelerator: Accelerator) -> None:
        self.loss: Tensor | float = 0.0
        self._accelerator, self._own, self._has_ended = accelerator, accelerator.backward, True
        accelerator.backward = wraps(self._own)(partial(self._backward))

    def record(self) -> dict[str, float]:
        """Nothing, for a tracker."""
        return {}

    def undo(self) -> None:
        """Give the accelerator its own method back."""
        self._accelerator.backward = self._own

    def _backward(self, loss: Tensor, **options: Any) -> None:
        before = 0.0 if self._has_ended else self.loss
        self.loss = before + loss.detach() / self._accelerator.gradient_accumulation_steps
        self._has_ended = bool(self._accelerator.sync_gradients)
        self._own(loss, **options)
