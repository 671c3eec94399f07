"""memplan in an Accelerator: it plans in `prepare`, and drives the accumulation of what it has split."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from memplan.blocks import is_batch_coupled
from memplan.errors import UsageError
from memplan.fitting import Fit, apply
from memplan.integrations.attached_guard import AttachedGuard, may_be_guarded
from memplan.integrations.counting import length_of, said_of
from memplan.integrations.deepspeed import as_the_engine_runs, is_deepspeed, settle, shares_weights, write
from memplan.integrations.driving import asking, drive
from memplan.integrations.fsdp import is_sharded, sharded
from memplan.integrations.grouping import Group, grouped
from memplan.integrations.loaders import cut, is_cut_by_workers, longest_batch, may_be_joined
from memplan.integrations.parts import LastOutput, Split, full_precision_outputs
from memplan.integrations.planning import plan_for, rooms_for
from memplan.integrations.repeatable import weighted
from memplan.integrations.replicas import for_replicas, ranks_in, refuse_copied
from memplan.integrations.saved_run import SavedRun
from memplan.integrations.scripts import (
    PRECISIONS,
    is_dealt_out,
    model_and_loader,
    own_batch_size,
    refuse_other_batches,
)
from memplan.integrations.trained_loss import OutputLoss
from memplan.integrations.watching import SecondStep
from memplan.losses import Loss
from memplan.means import SAMPLES, Count, averages_routes, by_name, can_try, counter, divisible_by
from memplan.plan_record import Plan
from memplan.recipe import Recipe
from memplan.report.banner import announce, banner
from memplan.samples import Sample
from memplan.settings import Settings
from memplan.strategy import Strategy
from memplan.world import World, largest, of_first, on_all, on_any


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the script says: the settings, and what no file can hold."""

    settings: Settings
    count: Count | None  # what the loss is a mean over; None: to be found out
    loss: Loss | None
    sample: object  # a batch to plan for; None: the longest of the loader

    @property
    def trusts_output(self) -> bool:
        """Whether the loss in the model's output is taken to be the one that is trained."""
        return self.loss is None and self.count is None


class Attachment:
    """memplan in an Accelerator, as `accelerator.memplan`.

    Attributes:
        plan: what was applied; None before `prepare`.
        fit: the model that runs by it.
    """

    def __init__(self, accelerator: Accelerator, wishes: Wishes) -> None:
        self.plan: Plan | None = None
        self.fit: Fit | None = None
        self._accelerator = accelerator
        self._wishes = wishes
        self._group: Group | None = None
        self._guard: AttachedGuard | None = None
        self._own = {name: getattr(accelerator, name) for name in _WRAPPED}
        for name, wrapper in _WRAPPED.items():
            setattr(accelerator, name, wraps(self._own[name])(partial(wrapper, self)))
        self._saved = SavedRun(accelerator, lambda: self.plan, lambda: self._group)

    @property
    def loss(self) -> "Tensor | float":
        """Of the step under way or, after it, of the step: as the script would have seen it without a plan."""
        return 0.0 if self._group is None else self._group.loss

    def record(self) -> dict[str, float]:
        """The plan as flat numbers, for a tracker."""
        return self._planned.record()

    def undo(self) -> None:
        """Give the model its own functions back, and the accelerator its own methods.

        The prepared loader goes on handing out micro-batches: prepare the plain one anew.
        """
        if self._guard is not None:
            self._guard.end()
        if self.fit is not None:
            self.fit.undo()
        if self._group is not None:
            self._group.let_go()
            self._accelerator.gradient_accumulation_steps = self._group.split.micro_batches  # which still come
        for name, own in self._own.items():
            setattr(self._accelerator, name, own)
        self._accelerator.gradient_state = GradientState()
        self._saved.let_go()

    @property
    def _planned(self) -> Plan:
        if self.plan is None:
            raise UsageError("there is no plan before accelerator.prepare(model, optimizer, loader) was called")
        return self.plan

    # -- what takes the place of the accelerator's own methods ---------------------------------------------------

    def _prepare(self, *objects: Any, **options: Any) -> Any:
        if self.plan is not None:
            return self._joined(objects, options)
        accelerator = self._accelerator
        model, at, batch_size = on_all(partial(_model_and_batch, accelerator, objects))
        refuse_other_batches(batch_size)
        loader = objects[at]
        optimizers = [o for o in objects if isinstance(o, torch.optim.Optimizer)]
        recipe = on_all(partial(self._settled, model, optimizers, batch_size))
        own_batches = accelerator.gradient_accumulation_steps
        with nullcontext() if recipe.autocast is None else full_precision_outputs(model):
            sample, said = largest(*on_all(partial(self._shown, loader)))
            is_fixed = on_any(is_dealt_out(accelerator, loader) or is_cut_by_workers(loader))
            count = None if is_fixed else self._counted(model, recipe, sample)
            strategy, left_out = on_all(partial(self._strategy, model))
            make = partial(
                plan_for,
                model,
                recipe,
                sample,
                self._wishes.settings,
                accelerator.device,
                own_rows=batch_size,
                own_batches=own_batches,
                can_split=count is not None,
                can_join=may_be_joined(loader),
                rooms=rooms_for(self._wishes.settings, accelerator.device, accelerator.num_processes),
                strategy=strategy,
                left_out=left_out,
            )
            plan = World(accelerator.num_processes).agreed(make, model)
        if self._wishes.settings.plan is not None:
            refuse_copied(plan, accelerator)
            said = ()  # it was made for another sample
        if not (is_fixed or self._wishes.count or is_batch_coupled(model) or self._can_try(model, sample)):
            said += (_UNTRIED if count is None else _BY_NAME,)
        plan = plan.assuming(*said)
        live = optimizers[0] if len(optimizers) == 1 else None
        self.fit = on_all(partial(apply, model, plan, live), Fit.undo)
        try:
            split = Split(count or counter(SAMPLES), plan.accumulation, own_batches, batch_size)
            with sharded(accelerator, model, optimizers) if is_sharded(accelerator) else nullcontext():
                prepared = self._driven(objects, at, plan, split, options)
        except BaseException:
            self.fit.undo()
            accelerator.gradient_accumulation_steps = own_batches
            raise
        self.plan = plan
        if accelerator.is_main_process:
            off = "memplan.attach(accelerator, enabled=False)"
            announce(banner(plan, (batch_size, own_batches), off, said=(*left_out, *said, *said_of(plan, split))))
        self._tell_trackers()
        return prepared

    def _init_trackers(self, *args: Any, **options: Any) -> None:
        self._own["init_trackers"](*args, **options)
        self._tell_trackers()

    def _tell_trackers(self) -> None:
        """Once there are both a plan and trackers, whichever comes first."""
        if self.plan is not None:
            self._log(self.record(), step=0)

    def _log(self, record: dict[str, float], step: int | None = None) -> None:
        if self._accelerator.trackers:
            self._accelerator.log(record, step=step)

    def _driven(self, objects: tuple[Any, ...], at: int, plan: Plan, split: Split, options: dict[str, Any]) -> Any:
        """The objects, prepared by Accelerate, with the loader in micro-batches and the optimizers in step with it."""
        accelerator, loader = self._accelerator, objects[at]
        accelerator.gradient_accumulation_steps = plan.accumulation
        if is_deepspeed(accelerator):
            write(accelerator, plan)
        prepared = self._own["prepare"](*objects, **options)
        accelerator.gradient_accumulation_steps = split.own_batches  # by which the script makes numbers of steps
        self._group = group = Group(
            split,
            drop_last=bool(loader.drop_last) and isinstance(loader.dataset, IterableDataset),
            models=[o for o in prepared if isinstance(o, nn.Module)],
            optimizers=[o for o in prepared if isinstance(o, AcceleratedOptimizer)],
            device=accelerator.device,
            by_engine=is_deepspeed(accelerator),
        )
        if self.fit is not None and accelerator.num_processes == 1 and not group.by_engine:
            group.second = SecondStep(self.fit, self._log)
        if self.fit is not None and split.micro_batches > split.own_batches and self._wishes.trusts_output:
            group.output_loss = OutputLoss(self.fit.model)
        if self.fit is not None and (is_sharded(accelerator) or group.by_engine):
            group.last_output = LastOutput(self.fit.model)  # whose blocks are gathered in every rank's backward
        if self.fit is not None and may_be_guarded(accelerator):
            wishes = self._wishes
            self._guard = AttachedGuard(accelerator, self.fit, group, wishes.loss, wishes.settings, self._replanned)
        for optimizer in group.optimizers:
            drive(optimizer, group)
        accelerator.gradient_state = asking(accelerator.gradient_state, group)
        own_length = length_of(prepared[at])
        if plan.micro_batch != split.own_rows:
            prepared[at].base_dataloader = cut(prepared[at].base_dataloader, split.own_batches, plan.micro_batch)
        grouped(prepared[at], group, own_length)
        return prepared

    def _replanned(self, fit: Fit, happened: Sequence[str]) -> None:
        """The model runs by a smaller plan. A step that is being measured was of neither."""
        said = (line for line in (*self._planned.assumptions, *happened) if line not in fit.plan.assumptions)
        self.fit, self.plan = fit, fit.plan.assuming(*dict.fromkeys(said))
        if self._group is not None:
            self._group.replanned(SecondStep(fit, self._log))

    def _joined(self, objects: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What is prepared after the plan was made. Optimizers among it keep in step with the rest."""
        accelerator, plan = self._accelerator, self._planned
        own_batches = accelerator.gradient_accumulation_steps
        try:
            accelerator.gradient_accumulation_steps = plan.accumulation  # as DeepSpeed's config says, which is compared
            prepared = self._own["prepare"](*objects, **options)
        finally:
            accelerator.gradient_accumulation_steps = own_batches
        for optimizer in prepared if isinstance(prepared, tuple) else (prepared,):
            if self._group is not None and isinstance(optimizer, AcceleratedOptimizer):
                self._group.optimizers.append(optimizer)
                drive(optimizer, self._group)
        return prepared

    def _backward(self, loss: Tensor, **options: Any) -> None:
        group = self._group
        if group is not None and group.weight is None and group.split.is_own and group.split.own_batches == 1:
            self._own["backward"](loss, **options)  # of a batch that the loop kept back: all have the same weight
            return
        if group is None or group.weight is None:
            raise UsageError(
                "accelerator.backward(loss) was called outside of the training loader's batches, so the loss has no "
                "weight. Iterate the loader that prepare returned; to skip batches, use "
                "accelerator.skip_first_batches(loader, n), not the function of that name."
            )
        watches = not (group.split.is_own or is_sharded(self._accelerator) or group.by_engine)
        if watches:
            group.check_gradients()
        group.note_backward(loss)
        group.stepped |= group.is_last and group.by_engine  # which steps in its backward
        group.loss = group.loss + loss.detach() * group.weight if group.weight else group.loss
        # The engine divides by its own number, Accelerate by the one that it has now.
        divisor = group.split.micro_batches if group.by_engine else self._accelerator.gradient_accumulation_steps
        own = partial(self._own["backward"], **options)
        if self._guard is not None:
            self._guard.backward(loss, group.weight * divisor, own)
        else:
            own(weighted(group.learned(loss), group.weight * divisor))
        if watches:
            group.note_gradients()

    def _clip_grad_norm_(self, *args: Any, **options: Any) -> Any:
        return self._clipped("clip_grad_norm_", *args, **options)

    def _clip_grad_value_(self, *args: Any, **options: Any) -> Any:
        return self._clipped("clip_grad_value_", *args, **options)

    def _clipped(self, name: str, *args: Any, **options: Any) -> Any:
        """Only what the optimizer is about to take: a part of a gradient has another norm."""
        group = self._group
        if group is not None and group.weight is not None and not group.is_last:
            return torch.zeros((), device=self._accelerator.device)
        return self._own[name](*args, **options)

    def _sync(self) -> None:
        """`accumulate` asks whether this batch is the last of its step: the loader has said so."""
        if self._group is None or self._group.weight is None:
            self._own["_do_sync"]()
        else:
            self._group.asks = True

    def _skip_first_batches(self, loader: DataLoader[Any], num_batches: int = 0) -> Any:
        """As many as are in the steps that a run had taken."""
        plan, group = self._planned, getattr(loader, "group", None)
        if not isinstance(group, Group) or group is not self._group:  # another loader, such as evaluation's
            return self._own["skip_first_batches"](loader, num_batches)
        group.skipped = self._saved.steps_in(num_batches, plan, group.split.own_rows)
        skipped = self._own["skip_first_batches"](loader, group.skipped * plan.accumulation)
        own_length: int | None = getattr(loader, "own_length", None)
        left = None if own_length is None else max(0, own_length - group.skipped * group.split.own_batches)
        return grouped(skipped, group, left)

    # -- planning ------------------------------------------------------------------------------------------------

    def _settled(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], batch_size: int) -> Recipe:
        """What a step is, with model and accelerator as they are going to be in the run."""
        accelerator = self._accelerator
        if is_deepspeed(accelerator):
            settle(accelerator, model, batch_size)
        if accelerator.device_placement and not (is_sharded(accelerator) or shares_weights(accelerator)):
            model.to(accelerator.device)  # where blocks can be timed; `prepare` would move it next
        recipe = Recipe(
            self._wishes.loss,
            optimizers[0] if len(optimizers) == 1 else "adamw",
            PRECISIONS[accelerator.mixed_precision],
            keeps_output=True,
            clips=True,
            **ranks_in(accelerator, model),
        )
        return as_the_engine_runs(recipe, accelerator, model) if is_deepspeed(accelerator) else recipe

    def _strategy(self, model: nn.Module) -> tuple[str | Path | Strategy, tuple[str, ...]]:
        """By which to plan, and what it leaves out of the one that was asked for."""
        settings = self._wishes.settings
        return (settings.strategy, ()) if settings.plan else for_replicas(settings.strategy, model, self._accelerator)

    def _shown(self, loader: DataLoader[Any]) -> tuple[Sample, *tuple[str, ...]]:
        """The batch to plan for on this rank, and what has to be said of it."""
        return longest_batch(loader) if self._wishes.sample is None else (Sample.of(self._wishes.sample),)

    def _counted(self, model: nn.Module, recipe: Recipe, sample: Sample) -> Count | None:
        """What the model's loss is a mean over; None if the batch must not be split. The first rank decides."""
        if self._wishes.count is not None:
            return None if is_batch_coupled(model) else self._wishes.count
        name = of_first(on_all(partial(self._count_name, model, recipe, sample)))
        return None if name is None else counter(name)

    def _count_name(self, model: nn.Module, recipe: Recipe, sample: Sample) -> str | None:
        if is_batch_coupled(model):
            return None
        if not self._can_try(model, sample):  # the plan says that it was not tried
            return by_name(model) if recipe.loss is None and not averages_routes(model) else None
        return divisible_by(model, recipe, sample)

    def _can_try(self, model: nn.Module, sample: Sample) -> bool:
        return can_try(model, sample, self._accelerator.device)


_WRAPPED: Final[dict[str, Callable[..., Any]]] = {
    "prepare": Attachment._prepare,
    "init_trackers": Attachment._init_trackers,
    "backward": Attachment._backward,
    "clip_grad_norm_": Attachment._clip_grad_norm_,
    "clip_grad_value_": Attachment._clip_grad_value_,
    "_do_sync": Attachment._sync,
    "skip_first_batches": Attachment._skip_first_batches,
}


_TOO_LONG: Final = "trying it would take too long where the weights are"
_BY_NAME: Final = (
    f"the loss is taken to be the mean that its name in transformers says: {_TOO_LONG}. Where it is another, pass "
    "normalise=, or micro_batch= with the script's own batch"
)
_UNTRIED: Final = (
    f"the batch is not divided, since nothing says what its loss is a mean over, and {_TOO_LONG}. If it is one, say "
    "over what: normalise='samples', 'tokens' or 'shifted-tokens'"
)


def _model_and_batch(accelerator: Accelerator, objects: tuple[Any, ...]) -> tuple[nn.Module, int, int]:
    """The model, the place of its training loader, and the samples in one of that one's batches."""
    model, at = model_and_loader(objects)
    return model, at, own_batch_size(accelerator, objects[at])
