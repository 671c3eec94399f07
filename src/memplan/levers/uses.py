"""How lazy logits are used: by a loss in chunks, which is what they are for, or as a whole, which no plan counts."""

import inspect
import traceback
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memplan.errors import PlanNotFollowed
from memplan.units import format_bytes

_INSIDE = ("memplan.", "torch.")


@dataclass(slots=True)
class Uses:
    """How often lazy logits became a loss in chunks, and how often they had to be computed as a whole."""

    losses: int = 0
    reads: int = 0
    _is_told: bool = field(default=False, repr=False, compare=False)

    def tell(self, n_bytes: int) -> None:
        """Warn, the first time, of logits of so many bytes that are computed as a whole in a training step."""
        if self._is_told:
            return
        self._is_told = True
        frames = traceback.walk_stack(inspect.currentframe())
        names = (frame.f_globals.get("__name__", "") for frame, _ in frames)
        warnings.warn(
            "The logits of a training step are read by something else than the loss that was planned. A loss in chunks "
            f"makes none, so the whole of them is computed for the reader: {format_bytes(n_bytes)} more than planned, "
            "in each step that reads them. Read them in evaluation only, or inside the loss that the plan is made for "
            "(loss=...), or plan by a strategy whose levers leave out 'loss-head'.",
            PlanNotFollowed,
            stacklevel=next((level for level, name in enumerate(names, 1) if not name.startswith(_INSIDE)), 1),
        )


@dataclass(slots=True)
class Silence:
    """Whether gradients that come to a call of a head are taken for zeros."""

    is_on: bool = False

    def heard(self, tensor: Tensor) -> Tensor:
        """The same tensor, whose gradient is taken so."""
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: torch.zeros_like(grad) if self.is_on else None)
        return tensor
