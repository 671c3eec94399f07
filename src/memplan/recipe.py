"""`Recipe`: how a training step is made, beside its model and its sample."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from memplan.blocks import find_blocks
from memplan.losses import Loss
from memplan.mixed_precision import MixedPrecision
from memplan.optimizer_step import PLAIN
from memplan.zero import Zero
from memplan.zero3 import Zero3

# When the loop drops the gradients of a step: behind it (or before the next forward, which is the same), or only when
# the next forward has returned, where `zero_grad` stands between forward and backward.
AFTER_STEP: Final = "after-step"
AFTER_FORWARD: Final = "after-forward"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one step is made, beside the model and its sample.

    `predict` and `plan` take what they have no argument for as it is here by default. To ask for another, as for a loop
    that holds the logits: ``Session(model, Sample.of(batch), Recipe(keeps_output=True), card, None).predict()``, with a
    card of ``find_gpu``.
    """

    loss: Loss | None = None  # loss(model, batch) -> scalar; None: the output's `.loss`
    optimizer: "str | torch.optim.Optimizer" = "adamw"
    autocast: torch.dtype | None = None
    accumulation: int = 1
    stepping: str = PLAIN  # when and how the optimizer steps: a word of `optimizer_step.STEPPINGS`
    drops: str = AFTER_STEP  # the gradients; or AFTER_FORWARD
    keeps_output: bool = False  # until the next forward has returned, as a loop with `output = model(**batch)` does
    clips: bool = False  # the gradients by their norm (`clip_grad_norm_`), between backward and step
    replicas: int = 1  # that add up their gradients, where there are several by DistributedDataParallel
    bucket_view: bool = False  # its gradient_as_bucket_view
    shards: int = 1  # over which FSDP2 spreads the weights; then replicas have no buckets
    mixed: MixedPrecision | None = None  # what FSDP2 casts
    zero: Zero | Zero3 | None = None  # what DeepSpeed makes of it, in place of replicas and shards

    def casting(self, kind: str) -> AbstractContextManager[object]:
        """Around a forward on this kind of device."""
        return nullcontext() if self.autocast is None else torch.autocast(kind, self.autocast)

    @property
    def kept(self) -> Mapping[int, torch.dtype]:
        """Of parameters, by their ``id``, the type in which the optimizer has them; of others it is their own."""
        return {} if self.mixed is None else self.mixed.kept

    def computing(self, model: nn.Module) -> AbstractContextManager[None]:
        """The model as it computes in the run: before it is sharded, what FSDP2 casts is cast by hooks."""
        return nullcontext() if self.mixed is None else self.mixed.on(model, find_blocks(model))

    def not_in_backward(self, accumulation: int) -> str | None:
        """Why a step of so many micro-steps leaves no room for one inside the backward, in a sentence; None if it does.

        What the optimizer itself has against it, `stepping.refusal` says.
        """
        if accumulation > 1:
            return (
                f"a step inside the backward drops its gradients, and {accumulation} micro-steps are to add theirs up. "
                "Use one micro-step, or step plainly."
            )
        if self.clips:
            return (
                "gradients are clipped by the norm of all of them, which is known only after the backward, and a step "
                "inside it would have used and dropped them by then. Step plainly, or do without clipping."
            )
        if self.autocast is torch.float16:
            return (
                "gradients of float16 are scaled, and a GradScaler scales them back only after the backward, when a "
                "step inside it would have used them. Cast to bfloat16, which needs no scaler, or step plainly."
            )
        if self.shards > 1:
            return (
                f"FSDP2 over {self.shards} ranks puts other parameters in the place of the model's, and those would "
                "not be stepped inside the backward. Step plainly."
            )
        if self.replicas > 1:
            return (
                f"{self.replicas} replicas add up their gradients bucket by bucket, and a step inside the backward "
                "would use those of one alone. Step plainly."
            )
        return None


def dtype_of(name: str | None) -> torch.dtype | None:
    """A type by the name that a plan's file has for it."""
    return None if name is None else getattr(torch, name)
