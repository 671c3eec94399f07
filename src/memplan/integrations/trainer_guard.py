"""A trainer's steps that outlive an out-of-memory error: the step is taken again, by a smaller plan.

The trainer divides the batch before the step begins, so the smaller plans have the same micro-batch. Dropout draws the
same numbers under each of them, and the run ends with the weights that it would have had.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from memplan import optimizers
from memplan.fitting import Fit
from memplan.guard import Guard
from memplan.integrations.trainer_callback import PlanCallback
from memplan.integrations.trainer_loss import account_aside, account_of_success
from memplan.optimizer_step import IN_BACKWARD
from memplan.rewind import steps_in_parts
from memplan.rungs import ladder
from memplan.strategy import Strategy


class GuardedSteps:
    """Stands in for a trainer's `training_step` until `undo`.

    Args:
        fit: its plan becomes the one in force.
        undo_model: gives the model's blocks their own functions back.
        callback: what keeps the trainer to the plan.
        strategy: by which smaller plans are made.
    """

    def __init__(
        self,
        trainer: Any,
        fit: Fit,
        undo_model: Callable[[], None],
        callback: PlanCallback,
        strategy: Strategy,
    ) -> None:
        self._trainer, self._fit, self._callback = trainer, fit, callback
        self._model_fit = Fit(fit.model, fit.plan, undo_model, fit._live)
        self._strategy = strategy
        self._guard: Guard | None = None
        self._has_begun = False
        self._own: Callable[..., Tensor] = trainer.training_step
        self._shadowed = vars(trainer).get("training_step")
        trainer.training_step = self

    def __call__(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        done = False

        def run() -> Tensor:
            nonlocal done
            with account_aside(self._trainer) if done else account_of_success(self._trainer):
                loss = self._own(model, copy.copy(inputs), num_items_in_batch)  # from which a loss may take labels away
            done = True
            return loss

        if not self._has_begun:
            self._guard, self._has_begun = self._begun(), True
        if self._guard is None:
            return self._own(model, inputs, num_items_in_batch)
        try:
            return self._guard.micro_step(run)
        finally:
            self._follow(self._guard)

    def _follow(self, guard: Guard) -> None:
        """The plan in force is the fit's, with what was said of the one before."""
        if guard.fit is self._model_fit:
            return
        self._model_fit = guard.fit
        said = (line for line in (*self._fit.plan.assumptions, *guard.falls) if line not in guard.plan.assumptions)
        self._fit.plan = guard.plan.assuming(*dict.fromkeys(said))
        self._callback.replanned()

    def _begun(self) -> Guard | None:
        """At the first step of a run: its optimizer is there by then."""
        trainer, plan = self._trainer, self._fit.plan
        alone = trainer.args.world_size == 1 and trainer.accelerator.scaler is None  # which has steps of its own
        if not alone or plan.stepping == IN_BACKWARD or not steps_in_parts(optimizers.unwrapped(trainer.optimizer)):
            return None
        self._model_fit.plan = plan
        if self._fit._step is not None:
            # Of the two fits the one that the guard takes back says how the optimizer steps.
            self._model_fit._step, self._model_fit._unstep = self._fit._step, self._fit._unstep
            self._fit._step = self._fit._unstep = None
        smaller = ladder(self._fit.model, plan, self._strategy, plan.micro_batch)
        return Guard(self._model_fit, trainer.optimizer, smaller)

    def end(self) -> None:
        """The run is over."""
        if self._guard is not None:
            self._guard.end()
        self._guard, self._has_begun = None, False

    def undo(self) -> None:
        """The trainer steps by itself again, and the model as it did before any plan."""
        self.end()
        del self._trainer.training_step
        if self._shadowed is not None:
            self._trainer.training_step = self._shadowed
        self._model_fit.undo()
