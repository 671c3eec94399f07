"""memplan in a Lightning Trainer: one callback.

::

    trainer = Trainer(callbacks=[memplan.integrations.lightning.MemplanCallback(gpu="auto")])

It plans when the fit begins, when module, data and optimizers are there and no batch was drawn yet. Batches of the
training loader come in micro-batches then; as many optimizer steps are taken, with the same gradients up to rounding.
Lightning divides the loss of each micro-batch by their number, so each is multiplied by its part of the step before.
With DistributedDataParallel the first rank plans for all, and each cuts what Lightning has dealt out to it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from memplan.blocks import is_batch_coupled
from memplan.errors import UsageError
from memplan.fitting import Fit, apply
from memplan.integrations.loaders import (
    batch_size_of,
    cut,
    is_cut_by_workers,
    longest_batch,
    may_be_joined,
)
from memplan.integrations.part_log import PartLog
from memplan.integrations.parts import Split, nothing_to_learn
from memplan.integrations.planning import plan_for, rooms_for
from memplan.integrations.scripts import refuse_other_batches
from memplan.integrations.watching import SecondStep
from memplan.means import SAMPLES, counter, divisible_by, rows_in
from memplan.plan_record import Plan
from memplan.recipe import AFTER_FORWARD, Recipe
from memplan.report.banner import announce, banner
from memplan.samples import Sample
from memplan.settings import Settings
from memplan.world import World, largest, of_first, on_all, on_any

_WHOLE_WITHIN: Final = 1e-6  # batches
_PRECISIONS: Final = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class MemplanCallback(Callback):
    """Plans for the module and its training loader, and takes the plan out again when the fit ends.

    Attributes:
        plan: what is applied; None before the fit begins.

    Args:
        settings: names and values of `memplan.settings.Settings`.

    Raises:
        UsageError: an unknown setting or value. When the fit begins: several devices by another strategy than "ddp",
            manual optimization, or a loader whose batches cannot be cut. DoesNotFit if no plan meets the budget.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings.found(settings)
        self.plan: Plan | None = None
        self._undo: list[Callable[[], None]] = []
        self._second: SecondStep | None = None
        self._first_step = 0  # of the fit, which may go on from a checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan, apply, and cut the training loader."""
        if not self.settings.enabled:
            return
        _refuse(trainer, pl_module)
        loader = on_all(partial(_dealt, trainer))
        device = next(pl_module.parameters()).device
        own_rows, own_batches = on_all(partial(batch_size_of, loader)), trainer.accumulate_grad_batches
        refuse_other_batches(own_rows)
        recipe = Recipe(
            _step_loss,
            trainer.optimizers[0] if len(trainer.optimizers) == 1 else "adamw",
            _PRECISIONS.get(trainer.precision),
            drops=AFTER_FORWARD,  # the closure calls zero_grad between forward and backward
            clips=trainer.gradient_clip_val is not None,
            **_replicas(trainer),
        )
        with _not_logging(pl_module):
            sample, told = largest(*on_all(partial(longest_batch, loader)))
            sample = sample.map(trainer.precision_plugin.convert_input)
            is_fixed = on_any(is_batch_coupled(pl_module) or is_cut_by_workers(loader))
            name = None if is_fixed else of_first(on_all(partial(self._count_name, pl_module, recipe, sample)))
            by = None if name is None else counter(name)
            make = partial(
                plan_for,
                pl_module,
                recipe,
                sample,
                self.settings,
                device,
                own_rows=own_rows,
                own_batches=own_batches,
                can_split=by is not None,
                can_join=may_be_joined(loader),
                rooms=rooms_for(self.settings, device, trainer.world_size),
            )
            plan = World(trainer.world_size).agreed(make, pl_module)
        if plan.micro_batch != own_rows:
            on_all(partial(_refuse_divided, trainer, loader))
        told = () if self.settings.plan else told  # it was made for another sample
        self.plan = plan.assuming(*told)
        split = Split(by or counter(SAMPLES), plan.accumulation, own_batches, own_rows)
        fit = on_all(partial(apply, pl_module, plan), Fit.undo)
        self._install(trainer, pl_module, loader, split, fit)
        if trainer.is_global_zero:
            announce(banner(self.plan, (own_rows, own_batches), "MemplanCallback(enabled=False)", said=told))
        _log(trainer, self.plan.record())
        self._second = SecondStep(fit, partial(_log, trainer)) if trainer.world_size == 1 else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002  # Lightning's signature
        """The checkpoint, if the fit goes on from one, is there.

        Raises:
            UsageError: it was saved in the middle of an epoch, by whose batches another plan cannot go on.
        """
        self._first_step = trainer.global_step
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = 0 if progress.is_last_batch else progress.current.ready
        if self.plan is not None and self.plan.accumulation > 1 and done:
            raise UsageError(
                f"the checkpoint was saved after {done} batches of an epoch, which may have been of another size than "
                "the plan's micro-batches. Go on from one that was saved at the end of an epoch, or without a plan: "
                "MemplanCallback(enabled=False)."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure the second step, from its first micro-batch on."""
        if self._second is not None:
            done = trainer.global_step - self._first_step
            self._second.begin(done, pl_module, trainer.optimizers, pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Until the optimizer has stepped."""
        if self._second is not None and trainer.global_step - self._first_step > 1:
            self._second.end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002  # Lightning's signature
        """Everything as it was."""
        if self._second is not None:
            self._second.stop()
            self._second = None
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Everything as it was, also after a run that failed."""
        self.on_fit_end(trainer, pl_module)

    def _count_name(self, module: nn.Module, recipe: Recipe, sample: Sample) -> str | None:
        """What the loss is a mean over; None if its batch must not be split."""
        return divisible_by(module, recipe, sample) if self.settings.normalise == "auto" else self.settings.normalise

    def _install(
        self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any], split: Split, fit: Fit
    ) -> None:
        self._undo.append(fit.undo)
        if fit.plan.micro_batch == split.own_rows:
            return
        source, own = trainer.fit_loop._data_source, module.__dict__.get("training_step")
        weighed = _weighed(loader.sampler, cut(loader, split.own_batches, fit.plan.micro_batch), split)
        instance = source.instance

        def undo() -> None:
            source.instance, trainer.accumulate_grad_batches = instance, split.own_batches
            if own is None:
                del module.training_step
            else:
                module.training_step = own  # type: ignore[method-assign]  # the instance had one of its own

        weighted = _weighted(module, trainer, weighed)
        module.training_step = weighted  # type: ignore[method-assign]  # of this instance, for this fit
        source.instance, trainer.accumulate_grad_batches = weighed, split.micro_batches
        self._undo.append(undo)


class _Weighed(DataLoader[Any]):
    """A loader that fetches the micro-batches of a step together, and knows the weight of each that it has given."""

    split: Split
    weights: list[float]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own iterator
        self.weights.clear()
        step: list[Any] = []
        for batch in super().__iter__():
            step.append(batch)
            if len(step) == self.split.micro_batches:
                yield from self._given(step)
                step = []
        if self.drop_last and isinstance(self.dataset, IterableDataset) and (inside := self.split.inside):
            del step[len(step) - len(step) % inside :]  # what makes no whole batch of the loader's own
        yield from self._given(step)

    def _given(self, step: list[Any]) -> Iterator[Any]:
        self.weights += self.split.weights(step)
        yield from step


def _weighed(sampler: Any, loader: DataLoader[Any], split: Split) -> _Weighed:
    """By the sampler that it was cut from Lightning sees that its rows are dealt out already."""
    loader.__class__ = type("Weighed", (_Weighed, type(loader)), {})
    loader.__dict__.update(split=split, weights=[], sampler=sampler)
    assert isinstance(loader, _Weighed)
    return loader


def _weighted(module: LightningModule, trainer: Trainer, loader: _Weighed) -> Callable[..., Any]:
    """The module's own step, whose loss is its part of the optimizer step, times the number by which it is divided."""
    training_step, log, split = module.training_step, PartLog(module), loader.split

    @wraps(training_step)
    def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        at = trainer.fit_loop.batch_idx
        inside = split.inside or split.micro_batches
        is_last = at % split.micro_batches % inside == inside - 1 or at == len(loader.weights) - 1
        with log.part(loader.weights[at], rows_in(batch), is_last):
            output = training_step(batch, *args, **kwargs)
        factor = loader.weights[at] * split.micro_batches
        if output is None:
            return None
        loss = output["loss"] if isinstance(output, Mapping) else output
        weighted = loss * factor if factor else nothing_to_learn([module])  # a mean over nothing is no number
        return {**output, "loss": weighted} if isinstance(output, Mapping) else weighted

    return step


def _log(trainer: Trainer, record: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(record, step=trainer.global_step)


def _step_loss(module: nn.Module, batch: object) -> Tensor:
    assert isinstance(module, LightningModule)
    signature = inspect.signature(module.training_step)
    try:  # as Lightning, which passes the number of the batch to whatever takes a second argument
        signature.bind(batch, 0)
    except TypeError:
        output = module.training_step(batch)
    else:
        output = module.training_step(batch, 0)
    return output["loss"] if isinstance(output, Mapping) else output  # type: ignore[return-value]  # checked by memplan


@contextmanager
def _not_logging(module: LightningModule) -> Iterator[None]:
    """Lightning has no place yet for what is logged."""
    module.__dict__.update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        del module.log, module.log_dict


def _nothing(*_: object, **__: object) -> None:
    """What becomes of a log record."""


def _dealt(trainer: Trainer) -> DataLoader[Any]:
    """The training loader, with the rows of this rank, as Lightning is going to deal them out."""
    loader = trainer.fit_loop._data_source.dataloader()
    if not isinstance(loader, DataLoader):
        raise UsageError(f"memplan plans for one training DataLoader; this fit has a {type(loader).__name__}")
    dealt = trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)
    assert isinstance(dealt, DataLoader)
    return dealt


def _replicas(trainer: Trainer) -> dict[str, Any]:
    """What DistributedDataParallel makes of a step, as arguments of a `Recipe`."""
    if trainer.world_size == 1:
        return {}
    return {"replicas": trainer.world_size, "bucket_view": bool(getattr(trainer.model, "gradient_as_bucket_view", 0))}


def _refuse(trainer: Trainer, module: LightningModule) -> None:
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise UsageError(
            "memplan's callback plans for one device, or for several by strategy='ddp', and this fit has "
            f"{trainer.world_size} by a {type(trainer.strategy).__name__}. Use memplan.attach with Accelerate, which "
            "has FSDP2 and DeepSpeed too."
        )
    if str(trainer.precision).startswith("transformer-engine"):
        raise UsageError(
            f"precision={trainer.precision!r} runs the layers in 8 bits, which is not planned for. Use 'bf16-mixed', "
            "or MemplanCallback(enabled=False)."
        )
    if not module.automatic_optimization:
        raise UsageError(
            "the module optimizes by hand (automatic_optimization=False), so memplan cannot split its batches. Plan by "
            "hand: memplan.autofit(module, sample=..., loss=...)."
        )


def _refuse_divided(trainer: Trainer, loader: DataLoader[Any]) -> None:
    """What does not go with batches that are divided: other loaders, other steps, numbers of batches."""
    if getattr(trainer, "fast_dev_run", False):
        raise UsageError("fast_dev_run counts batches, which become micro-batches under a plan. Leave one of them out.")
    if getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
        raise UsageError(
            "reload_dataloaders_every_n_epochs makes new loaders during the fit, and the plan is for the first one. "
            "Leave it out, or plan for each stage by a fit of its own."
        )
    schedulers = (one for one in getattr(trainer, "callbacks", ()) if isinstance(one, GradientAccumulationScheduler))
    if any(one.going_to_accumulate_grad_batches() for one in schedulers):
        raise UsageError(
            "a GradientAccumulationScheduler changes the batch of a step during the fit, and the plan is for one "
            "batch. Use accumulate_grad_batches."
        )
    if trainer.fit_loop._combined_loader is not None:
        raise UsageError(
            "the training loader was set up before the callback, as reading trainer.estimated_stepping_batches in "
            "configure_optimizers does, so its batches are fixed. Work the number of steps out of the data: "
            "ceil(len(loader) / accumulate_grad_batches) * max_epochs."
        )
    if any(config.interval == "step" and config.frequency != 1 for config in trainer.lr_scheduler_configs):
        raise UsageError(
            "a learning rate scheduler has interval='step' and a frequency that counts batches, which become "
            "micro-batches under a plan. Use frequency=1, or let the schedule itself wait for so many steps."
        )
    for name in ("limit_train_batches", "val_check_interval", "overfit_batches"):
        value = getattr(trainer, name, None)
        if isinstance(value, int) and value:
            raise UsageError(
                f"{name} = {value} counts batches, which become micro-batches under a plan. Give it as a share of the "
                "epoch, such as 0.25."
            )
        if name == "val_check_interval" or not isinstance(value, float) or isinstance(loader.dataset, IterableDataset):
            continue
        batches = len(loader) * value
        if abs(batches - round(batches)) > _WHOLE_WITHIN:
            raise UsageError(
                f"{name} = {value} of {len(loader)} batches is no whole number of them, and what Lightning makes of it "
                "depends on how a plan divides them. Give a share that is."
            )
