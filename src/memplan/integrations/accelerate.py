"""memplan inside an Accelerate script: one line before `prepare`, and the mathematics of the run stays what it was.

::

    accelerator = Accelerator(mixed_precision="bf16")
    memplan.attach(accelerator, gpu="auto")                     # the one line
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

`prepare` then plans for the model and the training loader that it is given, makes the model run by the plan, and hands
out the loader's batches in micro-batches. The script's batch stays its batch: as many optimizer steps, the same
learning rates, the same gradients up to rounding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from memplan.errors import AlreadyApplied, UsageError
from memplan.integrations.attachment import Attachment, Wishes
from memplan.integrations.scripts import refuse_unknown_runs
from memplan.integrations.switched_off import SwitchedOff
from memplan.losses import Loss
from memplan.means import Count, counter
from memplan.settings import Settings

__all__ = ["Attachment", "MemplanAccelerator", "MemplanPlugin", "attach", "prepare"]


@dataclass
class MemplanPlugin:
    """How to plan, in the manner of Accelerate's own plugins: what is left out is taken from `memplan.settings`.

    Args:
        gpu: as for `memplan.plan`; "auto" is the accelerator's device.
        strategy: a shipped name or the path of a TOML file.
        plan: the file of a plan to use, instead of making one.
        micro_batch: fixes the micro-batch.
        risk: on a card, the probability with which a plan that fits may still run out of memory.
        normalise: "auto": by what the model's loss is found to be a mean over. Else "samples", "tokens",
            "shifted-tokens" (those but for the first of each row), or a function that counts it in a batch.
        enabled: False: the run stays as it is written.
        loss: `loss(model, batch) -> scalar`, where the model's output has none.
        sample: a batch to plan for, where the loader's longest is not to be taken.
    """

    gpu: str | None = None
    strategy: str | None = None
    plan: "str | Path | None" = None
    micro_batch: int | None = None
    risk: float | None = None
    normalise: "str | Count | None" = None
    enabled: bool | None = None
    loss: Loss | None = None
    sample: Any = None

    def __post_init__(self) -> None:
        counts = self.normalise if callable(self.normalise) else None
        said = {
            "gpu": self.gpu,
            "strategy": self.strategy,
            "plan": None if self.plan is None else str(self.plan),
            "micro_batch": self.micro_batch,
            "risk": self.risk,
            "normalise": None if counts else self.normalise,
            "enabled": self.enabled,
        }
        settings = Settings.found(said)
        if counts is None and settings.normalise != "auto":
            counts = counter(settings.normalise)
        self.wishes = Wishes(settings, counts, self.loss, self.sample)

    def attach(self, accelerator: Accelerator) -> Accelerator:
        """Have the accelerator plan in its next `prepare`.

        Raises:
            UsageError: it is none, it has prepared something already, or memplan cannot plan for its kind of run.
            AlreadyApplied: it has memplan attached.
        """
        if not isinstance(accelerator, Accelerator):
            raise UsageError(f"memplan.attach takes an accelerate.Accelerator, not a {type(accelerator).__name__}")
        if isinstance(getattr(accelerator, "memplan", None), Attachment):
            raise AlreadyApplied("this Accelerator has memplan attached already")
        if not self.wishes.settings.enabled:
            accelerator.memplan = SwitchedOff(accelerator)
            return accelerator
        if accelerator._models or accelerator._dataloaders:
            raise UsageError(
                "this Accelerator has prepared a model or a loader already, which cannot be planned for any more. Call "
                "memplan.attach(accelerator) right after Accelerator(...)."
            )
        refuse_unknown_runs(accelerator)
        accelerator.memplan = Attachment(accelerator, self.wishes)
        return accelerator


def attach(accelerator: Accelerator, plugin: MemplanPlugin | None = None, **settings: Any) -> Accelerator:
    """Have the accelerator plan in its next `prepare`. Takes a plugin or its arguments, raises as `attach` there."""
    if plugin is not None and settings:
        raise UsageError(f"a plugin and {', '.join(settings)} were given: pass one of the two")
    return (plugin or MemplanPlugin(**settings)).attach(accelerator)


def prepare(accelerator: Accelerator, *objects: Any, **settings: Any) -> Any:
    """`attach` and the accelerator's `prepare` in one call, for a model with its training loader.

    Raises what `attach` and `memplan.plan` raise; DoesNotFit if no plan meets the budget. Where no plan could be made
    the accelerator is as it was, so that it can be called again.
    """
    attach(accelerator, **settings)
    try:
        return accelerator.prepare(*objects)
    except BaseException:
        if isinstance(attachment := getattr(accelerator, "memplan", None), Attachment):
            attachment.undo()
            del accelerator.memplan
        raise


class MemplanAccelerator(Accelerator):  # type: ignore[misc]  # Accelerate ships no types
    """An Accelerator with memplan attached."""

    def __init__(self, *args: Any, memplan_plugin: MemplanPlugin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        attach(self, memplan_plugin or MemplanPlugin())
