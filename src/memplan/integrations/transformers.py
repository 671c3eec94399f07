"""`memplan.autofit(trainer)`: a plan for transformers' `Trainer` and TRL's `SFTTrainer`, one line before `train()`.

The effective batch, the number of steps, the learning rates and the order of the rows stay what they are. The
micro-batch, the accumulation and what is recomputed become the plan's. Rows are divided otherwise only where the loss
is divided by the items of the whole step, as transformers' and TRL's losses are, and that is tried out on two rows. So
the weights after training are those of the unplanned run but for rounding.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from memplan.blocks import is_batch_coupled
from memplan.errors import BadBatch, DoesNotFit, UsageError
from memplan.fitting import Fit
from memplan.gpus import Gpu
from memplan.integrations.replicas import for_replicas
from memplan.integrations.trainer_arguments import autocast_of, check, optimizer_of, set_arguments
from memplan.integrations.trainer_callback import PlanCallback, attached
from memplan.integrations.trainer_data import Rows, rows_of
from memplan.integrations.trainer_guard import GuardedSteps
from memplan.integrations.trainer_loss import TrainerLoss, coupling
from memplan.integrations.trainer_words import evaluation, fetched, filled_up
from memplan.pipeline import autofit
from memplan.recipe import Recipe
from memplan.report.banner import announce, banner
from memplan.report.settings import stride_of
from memplan.strategy import Strategy, load_strategy
from memplan.world import World, on_all


def autofit_trainer(
    trainer: Any,
    gpu: str | Gpu,
    strategy: str | Path | Strategy,
    micro_batch: int | None,
    risk: float | None,
) -> Fit:
    """Plan the step that a trainer runs, and write the plan into the trainer. Nothing of its run is used up.

    Of several ranks all have to call it: the first one plans, for the one with the least memory and the longest rows.

    Args:
        gpu: as for `memplan.plan`; "auto" is the trainer's own device.
        strategy: as for `memplan.plan`.
        micro_batch: as for `memplan.plan`.
        risk: as for `memplan.plan`.

    Returns:
        A `Fit` whose `undo` also gives the trainer its own arguments back.

    Raises:
        UsageError: arguments of the trainer contradict a plan.
        BadBatch: micro_batch would divide a batch that has to stay as it is.
        MemplanError: as `memplan.autofit` for a model.
    """
    rows = on_all(partial(_rows_of, trainer)).of_all()
    args, had = trainer.args, trainer.optimizer
    before = args.per_device_train_batch_size, args.gradient_accumulation_steps
    recipe = Recipe(autocast=autocast_of(args))
    fixed, why = on_all(partial(_division, trainer, rows, recipe, micro_batch))
    strategy, left_out = on_all(partial(for_replicas, strategy, trainer.model, trainer.accelerator, args))
    try:
        fit = autofit(
            trainer.model,
            str(args.device) if gpu == "auto" else gpu,
            sample=rows.sample,
            loss=TrainerLoss(trainer, rows),
            optimizer=optimizer_of(trainer),
            autocast=recipe.autocast,
            clip_grad_norm=True,  # the trainer takes the norm for its log where it does not clip too
            effective_batch=before[0] * before[1],
            micro_batch=fixed,
            strategy=strategy,
            data=rows.data,
            risk=risk,
            world=World(replicas=args.world_size),
        )
    except BaseException as error:
        trainer.optimizer = had
        if isinstance(error, DoesNotFit) and (why or left_out):
            raise DoesNotFit("\n  ".join((str(error), *why, *left_out)), error.smallest_bytes) from None
        raise
    chosen = load_strategy(strategy)
    fit._undo = _written(trainer, fit, had, chosen if risk is None else replace(chosen, risk=risk))
    said = (*why, *left_out, *rows.said, *fetched(fit.plan, rows.sample), *evaluation(trainer, fit.plan))
    said += filled_up(trainer, before[0], fit.plan)
    fit.plan = fit.plan.assuming(*said)
    if trainer.is_world_process_zero():
        data = () if rows.data is None else (rows.data.describe(fit.plan.micro_batch),)
        off = "fit.undo(), or leave out the line memplan.autofit(trainer)"
        native = 'print(fit.plan.settings("trainer")) has the arguments that do this without memplan'
        alone = "" if stride_of(fit.plan) is None else native
        beside = " (the trainer's own checkpointing is off)"
        announce(banner(fit.plan, before, off, beside=beside, said=(*data, *said), alone=alone))
    return fit


def _rows_of(trainer: Any) -> Rows:
    check(trainer)
    return rows_of(trainer)


def _division(trainer: Any, rows: Rows, recipe: Recipe, wanted: int | None) -> tuple[int | None, tuple[str, ...]]:
    """The micro-batch where only one gives the same run, with the reason; else what is wanted."""
    own, accumulation = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    why = _why_whole(trainer, rows, recipe, own * accumulation)
    if why is None:
        return wanted, ()
    if is_batch_coupled(trainer.model) and accumulation > 1:
        raise UsageError(
            f"the model has batch norms, and gradient_accumulation_steps={accumulation}: memplan plans such models for "
            f"whole batches only. Set it to 1, with per_device_train_batch_size={own * accumulation} or {own}."
        )
    if wanted not in (None, own):
        raise BadBatch(
            f"micro_batch={wanted} would change the result of the {own} x {accumulation} rows per step: {why}"
        )
    return own, (f"the batch stays divided as it is, {own} x {accumulation}: {why}",)


def _why_whole(trainer: Any, rows: Rows, recipe: Recipe, effective: int) -> str | None:
    """Why other micro-batches than the trainer's own would give another result; None if they would not."""
    if effective == 1:
        return None
    if is_batch_coupled(trainer.model):
        return "batch norm takes its statistics over the rows of a micro-batch"
    if isinstance(trainer.train_dataset, IterableDataset):
        return "the data is a stream, and what is left at its end depends on the micro-batch"
    if trainer.args.dataloader_drop_last and len(trainer.train_dataset) % (effective * trainer.args.world_size):
        return "dataloader_drop_last leaves out rows by the micro-batch, and the data is no multiple of the whole batch"
    if not type(trainer).training_step.__module__.startswith(("transformers.", "trl.")):
        return (
            f"{type(trainer).__name__} has a training_step of its own, which may divide and add up losses otherwise "
            "than Trainer's"
        )
    if trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices:
        return (
            "average_tokens_across_devices=False has each rank divide by the items of its own rows, and which rows "
            "are its own depends on the micro-batch"
        )
    return coupling(trainer, rows, recipe)


def _written(trainer: Any, fit: Fit, had: "torch.optim.Optimizer | None", strategy: Strategy) -> Callable[[], None]:
    """The plan in the trainer: arguments, callback and guard. What is returned takes all out again."""
    undo_model = fit._undo
    assert undo_model is not None
    undo_arguments = set_arguments(trainer, fit.plan)
    callback = PlanCallback(trainer, fit)
    steps = GuardedSteps(trainer, fit, undo_model, callback, strategy)
    detach = attached(trainer, callback, steps.end)

    def undo() -> None:
        detach()
        steps.undo()
        undo_arguments()
        trainer.optimizer = had

    return undo
