"""What goes along with a planned run: the plan holds when it starts, the measured peak stands beside the predicted one.

The callback changes no batch size: when it is first called, the trainer has counted its steps already.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from torch import nn
from transformers import TrainerCallback

from memplan.errors import PlanMismatch
from memplan.fitting import Fit
from memplan.integrations.trainer_arguments import differences
from memplan.integrations.trainer_loss import metrics_aside
from memplan.integrations.trainer_words import out_of_memory
from memplan.integrations.watching import SecondStep
from memplan.out_of_memory import Where, diagnose

_FLAGS: Final = ("gradient_checkpointing", "_gradient_checkpointing_func")  # of transformers' layers


class PlanCallback(TrainerCallback):
    """Keeps a trainer to its plan, and logs the measured peak of a step next to the predicted one."""

    def __init__(self, trainer: Any, fit: Fit) -> None:
        self.trainer, self.fit = trainer, fit
        self._planned = _switches(fit)
        self._second = SecondStep(fit, self._say)

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
        self._second.begin(self._steps_done(state), self.trainer.model, [self.trainer.optimizer], args.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._second.end()

    def _steps_done(self, state: Any) -> int:
        """Steps since this run began, which may go on from a checkpoint."""
        return int(state.global_step) - int(getattr(self.trainer, "_initial_global_step", 0))

    def _say(self, record: dict[str, float]) -> None:
        due = self.trainer.control.should_log  # the trainer's own record of this step, which logging strikes out
        with metrics_aside(self.trainer):
            self.trainer.log(record)
        self.trainer.control.should_log = due

    def stop(self) -> None:
        """The run is over, or has failed."""
        self._second.stop()


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
