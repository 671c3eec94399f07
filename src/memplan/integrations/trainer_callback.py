"""What goes along with a planned run: the plan holds when it starts, the measured peak stands beside the predicted one.

The callback changes no batch size: when it is first called, the trainer has counted its steps already.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import wraps
from typing import Any, Final

import torch
from torch import nn
from transformers import TrainerCallback

from memplan.errors import PlanMismatch
from memplan.fitting import Fit
from memplan.integrations.trainer_arguments import differences
from memplan.integrations.trainer_loss import metrics_aside
from memplan.integrations.trainer_words import out_of_memory
from memplan.meter import Allocations, allocator_record
from memplan.out_of_memory import Where, diagnose
from memplan.units import format_budget, format_bytes

_log = logging.getLogger("memplan")

_FLAGS: Final = ("gradient_checkpointing", "_gradient_checkpointing_func")  # of transformers' layers
_WATCHED: Final = 1  # the second step: the optimizer's state is there by then


class PlanCallback(TrainerCallback):
    """Keeps a trainer to its plan, and logs the measured peak of a step next to the predicted one."""

    def __init__(self, trainer: Any, fit: Fit) -> None:
        self.trainer, self.fit = trainer, fit
        self._planned = _switches(fit)
        self._watch: Watch | None = None

    def replanned(self) -> None:
        """The fit has another plan, by which the blocks run already. A step that is being measured was of neither."""
        self._planned = _switches(self.fit)
        self.stop()

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Before any step: the arguments are the plan's, and so are the blocks of the model that is trained.

        Raises:
            PlanMismatch: they are not, and putting them right now would be too late.
        """
        if found := differences(self.trainer, self.fit.plan):
            raise PlanMismatch(
                f"the plan was written into the trainer, and changed since: {'; '.join(found)}. Set what you want, and "
                "then call memplan.autofit(trainer) just before trainer.train()."
            )
        inside = {id(module) for module in (model or self.trainer.model).modules()}
        if any(id(module) not in inside for module in self._planned):
            raise PlanMismatch(
                "the model that is trained is not the one that was planned: its blocks were made anew. Call "
                "memplan.autofit(trainer) after everything that changes the model, just before trainer.train()."
            )
        for module, values in self._planned.items():
            _set(module, values)

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if self._steps_done(state) == _WATCHED and self._watch is None:
            self._watch = Watch(self.trainer.model, self.trainer.optimizer, args.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._watch is not None and not self._watch.is_over:
            peak_bytes = self._watch.stop()
            if peak_bytes is not None:
                self._say(peak_bytes)

    def _steps_done(self, state: Any) -> int:
        """Steps since this run began, which may go on from a checkpoint."""
        return int(state.global_step) - int(getattr(self.trainer, "_initial_global_step", 0))

    def _say(self, peak_bytes: int) -> None:
        plan = self.fit.plan
        self.fit.remember(peak_bytes)
        due = self.trainer.control.should_log  # the trainer's own record of this step, which logging strikes out
        with metrics_aside(self.trainer):
            self.trainer.log({"memplan/peak_bytes": peak_bytes, **plan.record()})
        self.trainer.control.should_log = due
        text = (
            f"peak of the second step {format_bytes(peak_bytes)}, predicted {format_bytes(plan.peak_bytes)} for the "
            f"worst batch, budget {format_budget(plan.budget_bytes)}"
        )
        if peak_bytes > plan.budget_bytes:
            _log.warning("%s: more than the budget", text)
        else:
            _log.info("%s", text)

    def stop(self) -> None:
        """The run is over, or has failed."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


def attached(trainer: Any, callback: PlanCallback, ended: Callable[[], None]) -> Callable[[], None]:
    """With the callback in a trainer, and what memplan knows on the error of a run that is out of memory.

    What is returned takes both away.

    Args:
        ended: called when a run is over.
    """
    trainer.add_callback(callback)
    train = trainer.train

    @wraps(train)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except Exception as error:  # half of those that say that memory ran out are of other classes
            if (found := diagnose(error)) is not None:
                planned_for = Where.HOST if trainer.args.device.type == "cpu" else Where.DEVICE
                error.add_note(out_of_memory(callback.fit.plan, found, planned_for))
            raise
        finally:
            callback.stop()
            ended()

    before = vars(trainer).get("train")
    trainer.train = guarded

    def undo() -> None:
        if before is None:
            vars(trainer).pop("train", None)
        else:
            trainer.train = before
        trainer.remove_callback(callback)

    return undo


class Watch:
    """The most that tensors need from its making to `stop`, weights and optimizer state included.

    On a card that is the allocator's own figure, for all tensors there. On the CPU it is read from the record of
    torch's allocator, as in `CpuDevice`, beginning with the weights, gradients and states that are there; the buckets
    of DistributedDataParallel, which nothing refers to, are not in it.
    """

    def __init__(self, model: nn.Module, optimizer: Any, device: torch.device) -> None:
        self._device, self._open = device, ExitStack()
        self._record: Allocations = []
        self.is_over = False
        if device.type == "cpu":
            self._begin_bytes = _own_bytes(model, optimizer)
            with suppress(RuntimeError):  # the user's own profiler is running
                self._record = self._open.enter_context(allocator_record())
        elif hasattr(torch.accelerator, "reset_peak_memory_stats"):
            torch.accelerator.reset_peak_memory_stats(device)

    def stop(self) -> int | None:
        """The peak in bytes; None where nothing could be measured, or by a second call."""
        if self.is_over:
            return None
        self.is_over = True
        self._open.close()
        if self._device.type != "cpu":
            measures = hasattr(torch.accelerator, "max_memory_allocated")
            return int(torch.accelerator.max_memory_allocated(self._device)) if measures else None
        now = peak = self._begin_bytes
        for _, change in self._record:
            now += change
            peak = max(peak, now)
        return peak if self._record else None


def _own_bytes(model: nn.Module, optimizer: Any) -> int:
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *states]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _switches(fit: Fit) -> dict[nn.Module, dict[str, object]]:
    """Module -> what of its attributes says how it runs, for each that a plan or transformers may switch."""
    planned = {fit.model.get_submodule(path) for path in fit.plan.decisions}
    found = {}
    for module in fit.model.modules():
        names = ("forward", *_FLAGS) if module in planned else _FLAGS if hasattr(module, _FLAGS[0]) else ()
        if names:
            found[module] = {name: module.__dict__.get(name, _ABSENT) for name in names}
    return found


_ABSENT: Final = object()


def _set(module: nn.Module, values: dict[str, object]) -> None:
    for name, value in values.items():
        if value is _ABSENT:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value
