"""A trainer's steps that outlive an out-of-memory error: the step is taken again, by a smaller plan.

The trainer divides the batch before the step begins, so the smaller plans have the same micro-batch. Dropout draws the
same numbers under each of them, and the run ends with the weights that it would have had.

Replicas exchange their gradients after the last backward then, and not inside of it. Where that takes more than `WORTH`
of a step, they are left to themselves.
"""

import copy
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from memplan import optimizers
from memplan.fitting import Fit
from memplan.guard import Guard
from memplan.integrations.trainer_callback import PlanCallback
from memplan.integrations.trainer_loss import account_aside, account_of_success
from memplan.optimizer_step import IN_BACKWARD
from memplan.ranks import refusal
from memplan.rewind import steps_in_parts
from memplan.rungs import ladder
from memplan.strategy import Strategy
from memplan.world import World

_log = logging.getLogger(__name__)

WORTH: Final = 0.03  # of a step: what being guarded may cost. Chosen by hand: less than most plans' recomputation

_WARM: Final = 1  # steps in which connections and buffers are made


class GuardedSteps:
    """Stands in for a trainer's `training_step` and `evaluate` until `undo`.

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
        self._has_begun, self._steps, self._is_worth = False, 0, False
        self._since: float | None = None  # when the step under way began
        self._fallen = 0  # by then
        self._own: Callable[..., Tensor] = trainer.training_step
        self._own_evaluate: Callable[..., Any] = trainer.evaluate
        self._taken_out = [_put_in(trainer, "training_step", self._step), _put_in(trainer, "evaluate", self._evaluate)]

    def _step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        done = False

        def run() -> Tensor:
            nonlocal done
            with account_aside(self._trainer) if done else account_of_success(self._trainer):
                loss = self._own(model, copy.copy(inputs), num_items_in_batch)  # from which a loss may take labels away
            done = True
            return loss

        if not self._has_begun:
            self._guard, self._has_begun = self._begun(model), True
        if self._guard is None:
            return self._own(model, inputs, num_items_in_batch)
        is_last = bool(self._trainer.accelerator.sync_gradients)
        if self._since is None:
            self._since, self._fallen = time.perf_counter(), len(self._guard.falls)
            self._guard.timed = self._steps >= _WARM and not self._is_worth
        try:
            loss = self._guard.micro_step(run, is_last)
        finally:
            self._follow(self._guard)
        if is_last:
            self._end_step(self._guard)
        return loss

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """In smaller batches from where memory runs out. Ranks wait for each other around each batch's loss."""
        trainer, guard = self._trainer, self._guard
        keeps_loaders = bool(trainer.args.dataloader_persistent_workers)
        asked = args[0] if args else kwargs.get("eval_dataset")
        several = isinstance(trainer.eval_dataset if asked is None else asked, dict)  # each comes by here again
        waits = type(trainer).prediction_step is not Trainer.prediction_step and trainer.args.world_size > 1
        if guard is None or keeps_loaders or several or waits:
            return self._own_evaluate(*args, **kwargs)
        compute_loss = trainer.compute_loss

        def together(*args: Any, **kwargs: Any) -> Any:
            return guard.evaluate_part(partial(compute_loss, *args, **kwargs))

        def run(rows: int) -> Any:
            trainer.args.per_device_eval_batch_size = rows
            with account_of_success(trainer):
                return self._own_evaluate(*args, **kwargs)

        own_rows = trainer.args.per_device_eval_batch_size
        take_out = _put_in(trainer, "compute_loss", together)
        try:
            return guard.evaluate(run, own_rows)
        finally:
            take_out()
            trainer.args.per_device_eval_batch_size = own_rows

    def _follow(self, guard: Guard) -> None:
        """The plan in force is the fit's, with what was said of the one before."""
        if guard.fit is self._model_fit:
            return
        self._model_fit = guard.fit
        said = (line for line in (*self._fit.plan.assumptions, *guard.falls) if line not in guard.plan.assumptions)
        self._fit.plan = guard.plan.assuming(*dict.fromkeys(said))
        self._callback.replanned()

    def _end_step(self, guard: Guard) -> None:
        """Leave replicas to themselves if their exchange takes too long; a step that was taken again does not tell."""
        step_s, self._since = time.perf_counter() - (self._since or 0.0), None
        self._steps += 1
        if not guard.timed or len(guard.falls) > self._fallen:
            return
        self._is_worth = (share := guard.exchange_share(step_s)) <= WORTH
        if not self._is_worth:
            _log.warning(
                "memplan: running out of memory ends this run from here on: to guard its steps, gradients are "
                "exchanged after the backward, and that takes %.0f %% of a step",
                100 * share,
            )
            guard.end()
            self._guard = None

    def _begun(self, model: nn.Module) -> Guard | None:
        """At the first step of a run: its optimizer and its replicas are there by then."""
        trainer, plan = self._trainer, self._fit.plan
        if why := self._why_not(model):
            _log.info("memplan: running out of memory ends this run, since %s", why)
            return None
        self._model_fit.plan = plan
        if self._fit._step is not None:
            # Of the two fits the one that the guard takes back says how the optimizer steps.
            self._model_fit._step, self._model_fit._unstep = self._fit._step, self._fit._unstep
            self._fit._step = self._fit._unstep = None
        replica = model if isinstance(model, DistributedDataParallel) else None
        world = None if replica is None else World(replicas=trainer.args.world_size)
        smaller = ladder(self._fit.model, plan, self._strategy, plan.micro_batch, world)
        patience_s = float(trainer.args.ddp_timeout)
        return Guard(self._model_fit, trainer.optimizer, smaller, replica=replica, patience_s=patience_s)

    def _why_not(self, model: nn.Module) -> str | None:
        """Why the steps of this run cannot be guarded; None if they can."""
        if self._trainer.accelerator.scaler is not None:
            return "a gradient scaler has steps of its own"
        if self._fit.plan.stepping == IN_BACKWARD:
            return "the optimizer steps inside the backward, which cannot be taken back"
        if not steps_in_parts(optimizers.unwrapped(self._trainer.optimizer)):
            return "the optimizer looks at all parameters at once"
        if isinstance(model, DistributedDataParallel):
            return _waits_for_others(self._trainer) or refusal(model)
        return "its ranks are no replicas of DistributedDataParallel" if self._trainer.args.world_size > 1 else None

    def end(self) -> None:
        """The run is over."""
        if self._guard is not None:
            self._guard.end()
        self._guard, self._since = None, None
        self._has_begun, self._steps, self._is_worth = False, 0, False

    def undo(self) -> None:
        """The trainer steps by itself again, and the model as it did before any plan."""
        self.end()
        for take_out in self._taken_out:
            take_out()
        self._model_fit.undo()


def _waits_for_others(trainer: Any) -> str | None:
    """What of a trainer's step waits for all ranks, also for one that has run out of memory; None if nothing does."""
    for name in ("training_step", "compute_loss"):
        if getattr(type(trainer), name) is not getattr(Trainer, name):  # TRL's gathers what it logs
            return f"{type(trainer).__name__} has a {name} of its own, which may wait for other ranks"
    if trainer.args.include_num_input_tokens_seen != "no":
        return "tokens are counted over all ranks after each micro-batch (include_num_input_tokens_seen)"
    return None


def _put_in(trainer: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """In the place of a trainer's method. What is returned takes it out again."""
    shadowed = vars(trainer).get(name)
    setattr(trainer, name, method)

    def take_out() -> None:
        delattr(trainer, name)
        if shadowed is not None:
            setattr(trainer, name, shadowed)

    return take_out
