"""An Accelerate loop's steps that outlive an out-of-memory error: the step is taken again, by a smaller plan.

The loop calls the model, then `accelerator.backward`: the two parts of a micro-step, of which is noted what it takes to
run them again. Where memory runs out in one, the loop's own output is cut off from its graph, the step's parts so far
run again by the next plan, and the loop goes on with what it has.

The loader has divided the batch by then, so the smaller plans have the same micro-batch. Dropout draws the same numbers
under each of them, and the run ends with the weights that it would have had.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from types import MethodType
from typing import Any, Final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from memplan import optimizers
from memplan.device import Device
from memplan.fitting import Fit
from memplan.guard import Guard
from memplan.integrations.deepspeed import is_deepspeed
from memplan.integrations.fsdp import is_sharded
from memplan.integrations.grouping import Group, changes_of
from memplan.integrations.repeatable import Repeatable, weighted
from memplan.levers.undo import set_attributes
from memplan.losses import Loss
from memplan.optimizer_step import IN_BACKWARD
from memplan.rewind import cards_of, device_of, steps_in_parts
from memplan.rungs import ladder
from memplan.settings import Settings
from memplan.strategy import load_strategy

_log = logging.getLogger("memplan")

_UNGUARDED: Final = "running out of memory ends this run, since %s"
_OTHER_LOSS: Final = (
    "it trains by another loss than the one in the model's output; memplan.attach(accelerator, loss=...) says which"
)


class AttachedGuard:
    """Stands in for the forward of a loop's model, and takes its backwards, until `end`.

    Args:
        fit: the model as prepared, with the plan that was applied.
        group: the step under way, as the loader hands it out.
        loss: the script's own function of the model and a batch; None: the loss is in the model's output.
        settings: by which smaller plans are made.
        replanned: is given the model by a smaller plan, and what has happened, a sentence each.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        fit: Fit,
        group: Group,
        loss: Loss | None,
        settings: Settings,
        replanned: Callable[[Fit, Sequence[str]], None],
    ) -> None:
        self._accelerator, self._fit, self._group = accelerator, fit, group
        self._loss, self._settings, self._replanned = loss, settings, replanned
        self._guard: Guard | None = None
        self._has_begun = self._is_at_work = False
        self._open: Repeatable | None = None  # the one whose backward is to come
        self._device: Device | None = None
        self._parameters = list(fit.model.parameters())  # to look for them takes time
        self._cards: list[torch.device] = []
        self._gradients = 0, 0  # as they were behind the last part
        self._take_out = set_attributes(fit.model, {"forward": self._standing_in(fit.model)})
        group.end_guard = self._give_up

    def end(self) -> None:
        """The model and the optimizer run by themselves again, by the plan in force."""
        self._open = None
        self._take_out()
        if self._guard is not None:
            self._guard.end()
            self._guard = None

    # -- the two parts of a micro-step ---------------------------------------------------------------------------

    def _standing_in(self, model: nn.Module) -> Callable[..., Any]:
        """A method, so that a copy of the model has its own forward; the copy is not guarded."""
        own = model.forward
        plain = getattr(own, "__func__", None) or (lambda _, *args, **kwargs: own(*args, **kwargs))

        @wraps(plain)
        def forward(called: nn.Module, *args: Any, **kwargs: Any) -> Any:
            run = partial(plain, called)
            return self._forward(run, args, kwargs) if called is model else run(*args, **kwargs)

        return MethodType(forward, model)

    def _forward(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the loop's. What is no part of a step, and what the guard does itself, passes."""
        group = self._group
        passes = self._is_at_work or not torch.is_grad_enabled() or group.weight is None or group.stepped
        guard = None if passes else self._begun()
        if guard is None or self._device is None:
            return run(*args, **kwargs)
        if self._open is not None or self._is_changed():  # a forward without a backward: its output may be trained yet
            self._leave_step(guard)
            return run(*args, **kwargs)
        step = Repeatable(self._fit.model, run, (args, kwargs), group.batch, self._loss, self._device, self._cards)
        output = self._part(guard, step.forward, None)
        self._open = step
        return output

    def backward(self, trained: Tensor, factor: float, own: Callable[[Tensor], object]) -> None:
        """A backward of the loop's.

        Args:
            trained: what the loop differentiates.
            factor: by which that is multiplied; 0: its gradients are zeros, whatever it is.
            own: Accelerate's backward.
        """
        step, self._open, guard = self._open, None, self._guard
        if guard is not None and (step is None or self._is_changed()):
            self._leave_step(guard)
        elif guard is not None and step is not None:
            if step.trains(trained, factor, own):
                self._part(guard, step.backward, False)
                return
            self._give_up(_OTHER_LOSS)
        own(weighted(self._group.learned(trained), factor))

    def _part(self, guard: Guard, run: Callable[[], Any], begins: bool | None) -> Any:
        self._is_at_work = True
        try:
            return guard.micro_step(run, begins=begins)
        finally:
            self._is_at_work = False
            self._follow(guard)
            self._gradients = changes_of(self._parameters)

    def _is_changed(self) -> bool:
        """Whether somebody else has written to the gradients of the step, which could not be made again then."""
        now = changes_of(self._parameters)
        return now != self._gradients and now[0] > 0

    def _leave_step(self, guard: Guard) -> None:
        self._open = None
        guard.leave_step()

    def _follow(self, guard: Guard) -> None:
        """The plan in force is the attachment's, and gradients that were made again are no change of the loop's."""
        if guard.fit is self._fit:
            return
        self._fit = guard.fit
        self._replanned(guard.fit, guard.falls)
        if self._group.changes is not None:
            self._group.changes = self._group.gradient_changes()

    def _give_up(self, why: str) -> None:
        if self._guard is not None:
            _log.info(_UNGUARDED, why)
            self._guard.end()
            self._guard = None

    # -- the guard -----------------------------------------------------------------------------------------------

    def _begun(self) -> Guard | None:
        """Made in the first step: the optimizer may be prepared after the model."""
        if not self._has_begun:
            self._has_begun = True
            if why := self._why_not():
                _log.info(_UNGUARDED, why)
                return None
            plan, strategy = self._fit.plan, load_strategy(self._settings.strategy)
            if self._settings.risk is not None:
                strategy = replace(strategy, risk=self._settings.risk)
            smaller = ladder(self._fit.model, plan, strategy, plan.micro_batch)
            self._device, self._cards = device_of(self._fit.model), cards_of(self._fit.model)
            self._guard = Guard(self._fit, self._group.optimizers[0], smaller)
        return self._guard

    def _why_not(self) -> str | None:
        """Why the steps of this run cannot be guarded; None if they can."""
        plan, found = self._fit.plan, self._group.optimizers
        place = next(self._fit.model.parameters()).device
        if place.type not in ("cpu", "cuda"):
            return f"the weights are on {place}, where nothing tells that memory nearly ran out"
        if self._accelerator.scaler is not None:
            return "a gradient scaler has steps of its own"
        if plan._live is None:
            return "its plan was read from a file, which keeps no loss and no sample to make a smaller one with"
        if plan.stepping == IN_BACKWARD:
            return "the optimizer steps inside the backward, which cannot be taken back"
        if len(found) != 1:
            return f"{len(found)} optimizers are prepared, and one can be guarded"
        if not steps_in_parts(optimizers.unwrapped(found[0])):
            return "the optimizer looks at all parameters at once"
        return None


def may_be_guarded(accelerator: Accelerator) -> bool:
    """Whether a run is of one process, which has the model to itself. Of others the log says that they are not."""
    why = "several processes train" if accelerator.num_processes > 1 else None
    if is_deepspeed(accelerator) or is_sharded(accelerator):
        why = "DeepSpeed and FSDP2 do in a step what cannot be taken back"
    if why is not None:
        _log.info(_UNGUARDED, why)
    return why is None
