"""`predict`, `plan`, `autofit`: the whole library on one screen. `apply` is in `fitting`."""

import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from memplan.data import Data
from memplan.device import resolve_gpu, room_of
from memplan.errors import BadBatch, BadLoss, BadStrategy, DoesNotFit, MemoryTaken, NoDevice, UsageError
from memplan.fitting import Fit, apply, check_bare
from memplan.gpus import Gpu
from memplan.losses import Loss
from memplan.mixed_precision import MixedPrecision
from memplan.plan_record import Plan, Verdict
from memplan.prediction import Prediction
from memplan.recipe import Recipe
from memplan.samples import Sample, sample_for
from memplan.session import Session
from memplan.strategy import Strategy, load_strategy
from memplan.world import World, largest, on_all, on_any, rooms_of_all

__all__ = ["apply", "autofit", "plan", "predict"]

_TRIES = 3  # at a plan for a card whose memory other processes take meanwhile
_SHORT_CHECK_S = 30.0  # steps that take longer are not run just to be measured; Fit.measure does it when asked


def predict(
    model: nn.Module,
    sample: object,
    *,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    accumulation: int = 1,
    clip_grad_norm: bool = False,
    gpu: str | Gpu = "cpu",
    world: World | None = None,
) -> Prediction:
    """The memory that one training step of the model needs, as it stands. Nothing is run and nothing is changed.

    Args:
        model: any module, with weights anywhere, also on `meta`. Of a compiled one the module inside is taken.
        sample: one micro-batch: a dict of keyword arguments, a tuple, or one tensor; the first dimension is the batch.
        loss: `loss(model, batch) -> scalar tensor`; by default the output's `.loss`, the output itself, or of a tuple
            the one differentiable scalar in it, else its first.
        optimizer: a name ("adamw", "adamw-foreach", "sgd-momentum", "adam8bit", ...) or a live optimizer.
        autocast: a dtype, if the forward runs under `torch.autocast`.
        accumulation: micro-batches per optimizer step.
        clip_grad_norm: whether the loop calls `clip_grad_norm_` between backward and step; to what norm is no matter.
        gpu: whose kernels the step is predicted with: a card, a size, "cpu" or a live device.
        world: the cards that train together; what one of them needs is predicted.

    Returns:
        A `Prediction`; its sizes are bytes in tensors at the peak of a steady-state step.

    Raises:
        BadSample, BadLoss, BadOptimizer, BadBatch, UnknownGpu: an argument cannot be used.
        NothingToTrain, ModelFailed, CannotTrace: the model stands in the way.
    """
    model = module_of(model)
    recipe = _on_one_of(world, recipe_of(loss, optimizer, autocast, clip_grad_norm, accumulation), model)
    card, device = resolve_gpu(gpu)
    return Session(model, Sample.of(sample), recipe, card, device).predict()


def plan(
    model: nn.Module,
    gpu: str | Gpu,
    *,
    sample: object = None,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    clip_grad_norm: bool = False,
    effective_batch: int | None = None,
    micro_batch: int | None = None,
    strategy: str | Path | Strategy = "balanced",
    seq_len: int | None = None,
    data: Data | None = None,
    risk: float | None = None,
    world: World | None = None,
) -> Plan:
    """What to recompute and which micro-batch to take, so that the step fits the card at the least time.

    The model is not touched. With weights on a live device, blocks are timed there; else times are estimated.

    Args:
        model: as for `predict`.
        loss: as for `predict`.
        optimizer: as for `predict`.
        autocast: as for `predict`.
        clip_grad_norm: as for `predict`; a plan for a loop that clips never steps inside the backward.
        gpu: "auto", "cuda:1", a card's name ("rtx-4090"), a size ("24GiB"), "cpu", "cpu:2GiB", or a `Gpu`.
        sample: as for `predict`, of any batch size; transformers models may leave it out.
        effective_batch: samples per optimizer step, micro-batch x accumulation; the planner splits it.
        micro_batch: fixes the micro-batch. With neither, the planner takes the memory that it frees for a larger one.
        strategy: a shipped name ("balanced", "throughput", "largest-batch", ...) or a TOML file.
        seq_len: tokens per sample, where the sample is made from the config.
        data: the lengths of the whole data set; the plan is then for the worst batch that can come of it.
        risk: on a card, the probability with which a plan that "fits" may still run out of memory; by default that of
            the strategy, 0.01.
        world: the cards that train together, `gpu` each; the plan is the same for all. Batch sizes are those of one.

    Raises:
        DoesNotFit: the budget is below what is always there. A plan that misses by less is returned with the verdict
            "does not fit", the smallest budget that would do, and the ways out.
        UsageError: an argument cannot be used: BadSample, BadLoss, BadOptimizer, BadBatch, BadBudget, BadStrategy,
            UnknownGpu.
        NoDevice: the device asked for is not on this machine.
        AlreadyApplied: the model runs by a plan.
        ModelError: the model stands in the way: NothingToTrain, ModelFailed, CannotTrace.
    """
    recipe = _on_one_of(world, recipe_of(loss, optimizer, autocast, clip_grad_norm), model)
    return _planner(model, gpu, sample, recipe, effective_batch, micro_batch, strategy, seq_len, data, risk)()


def autofit(
    model: nn.Module,
    gpu: str | Gpu = "auto",
    *,
    sample: object = None,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    clip_grad_norm: bool = False,
    effective_batch: int | None = None,
    micro_batch: int | None = None,
    strategy: str | Path | Strategy = "balanced",
    seq_len: int | None = None,
    data: Data | None = None,
    risk: float | None = None,
    world: World | None = None,
) -> Fit:
    """Plan and apply; where the model is on the device already, measure one step of it too (`Fit.measured`).

    Takes the arguments of `plan`. Raises what `plan` and `apply` raise; DoesNotFit if no plan meets the budget. If
    other processes take memory of the card meanwhile, it plans again for what is left.

    With a `world` of several cards it is called on every rank, the process group being up and the model not yet
    wrapped or sharded. There is one plan for all, for the least memory and the largest sample that a rank has, and no
    step is measured.

    In the place of the model it takes a transformers `Trainer`, also TRL's `SFTTrainer`, just before its `train()`,
    with gpu, strategy, micro_batch and risk; the rest is the trainer's own (docs/trainer.md).
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is not None and isinstance(model, trainer):
        own = {"sample": sample, "loss": loss, "autocast": autocast, "effective_batch": effective_batch}
        own |= {"clip_grad_norm": clip_grad_norm or None, "seq_len": seq_len, "data": data, "world": world}
        own["optimizer"] = None if optimizer == "adamw" else optimizer
        if given := [name for name, value in own.items() if value is not None]:
            raise UsageError(f"{', '.join(given)}: the trainer decides that. Set it there, and leave it out here")
        integration = import_module("memplan.integrations.transformers")  # it stands above this room
        planned_trainer: Fit = integration.autofit_trainer(model, gpu, strategy, micro_batch, risk)
        return planned_trainer

    def planner() -> _Planner:
        recipe = _on_one_of(world, recipe_of(loss, optimizer, autocast, clip_grad_norm), model)
        return _planner(model, gpu, sample, recipe, effective_batch, micro_batch, strategy, seq_len, data, risk)

    if world is not None and world.cards > 1:
        return _fit_of_all(world, on_all(planner))
    planned = planner()
    for tries_left in reversed(range(_TRIES)):
        found = _fitting(planned())
        try:
            fit = apply(model, found)
            break
        except MemoryTaken:
            if not tries_left:
                raise
    try:
        if found.step_s <= _SHORT_CHECK_S:
            with suppress(NoDevice):  # planned for a card that is not here
                fit.measured = fit.measure(steps=1)
    except BaseException:
        fit.undo()
        raise
    return fit


def _fit_of_all(world: World, planner: "_Planner") -> Fit:
    """One plan, applied on every rank; another one for what is left, if memory was taken on the card of any."""
    for tries_left in reversed(range(_TRIES)):
        planned = planner.of_all()
        session = planned.session
        found = _fitting(world.agreed(planned, session.model))
        found._live = session.live
        make = partial(apply, session.model, found)
        if not tries_left:
            break
        fit = on_all(partial(_unless_taken, make), _undone)
        if not on_any(fit is None):
            assert fit is not None
            return fit
        _undone(fit)
    return on_all(make, Fit.undo)


def _unless_taken(make: Callable[[], Fit]) -> Fit | None:
    with suppress(MemoryTaken):
        return make()
    return None


def _undone(fit: Fit | None) -> None:
    if fit is not None:
        fit.undo()


def _fitting(plan: Plan) -> Plan:
    if plan.verdict is Verdict.DOES_NOT_FIT:
        raise DoesNotFit(plan.describe(), plan.smallest_bytes)
    return plan


@dataclass(frozen=True, slots=True)
class _Planner:
    """Makes the plan, and makes it again for the memory that is free then, from what was traced already."""

    session: Session
    strategy: Strategy
    effective_batch: int | None
    micro_batch: int | None
    data: Data | None  # None also if the sample is not of it
    said: tuple[str, ...] = ()

    def __call__(self) -> Plan:
        found = self.session.plan(self.strategy, self.effective_batch, self.micro_batch).assuming(*self.said)
        return found if self.data is None else found.assuming(self.data.describe(found.micro_batch))

    def of_all(self) -> "_Planner":
        """For the least memory and the largest sample that a rank has. To be called on every rank."""
        own, strategy = self.session, self.strategy
        rooms = rooms_of_all(lambda: room_of(own.gpu, own.device))
        sample, said = largest(own.sample)
        return replace(
            self,
            session=replace(own, sample=sample),
            strategy=replace(strategy, budget_share=strategy.budget_share * rooms.share),
            data=self.data if sample is own.sample else None,
            said=(*rooms.said(), *said),
        )


def _planner(
    model: nn.Module,
    gpu: str | Gpu,
    sample: object,
    recipe: Recipe,
    effective_batch: int | None,
    micro_batch: int | None,
    strategy: str | Path | Strategy,
    seq_len: int | None,
    data: Data | None,
    risk: float | None,
) -> _Planner:
    model = module_of(model)
    if not isinstance(strategy, str | Path | Strategy):
        raise BadStrategy(
            f"a strategy is a name such as 'balanced', the path of a TOML file or a Strategy: {strategy!r}"
        )
    chosen = load_strategy(strategy)
    chosen = chosen if risk is None else replace(chosen, risk=risk)
    check_bare(model, "plan")
    session = Session(model, sample_of(model, sample, seq_len, data), recipe, *resolve_gpu(gpu))
    return _Planner(session, chosen, effective_batch, micro_batch, data)


def sample_of(model: nn.Module, sample: object, seq_len: int | None, data: Data | None) -> Sample:
    """The sample to plan for: the user's own or one made from the config, as long as the worst of the data."""
    if data is not None and not isinstance(data, Data):
        raise UsageError(f"data is a memplan.Data of the lengths of all samples, not a {type(data).__name__}")
    if sample is not None and seq_len is not None:
        raise UsageError(f"a sample and seq_len={seq_len} were given, and the sample has its own: pass one of them")
    if data is not None and seq_len is not None:
        raise UsageError(
            f"seq_len={seq_len} and data were given, whose rows have {data.tokens} tokens: pass one of them"
        )
    tokens = data.tokens if data is not None else seq_len
    if sample is None:
        return sample_for(model, 2, tokens)
    shown = Sample.of(sample)
    return shown if data is None else shown.lengthened(data.tokens)


def recipe_of(
    loss: Loss | None,
    optimizer: str | torch.optim.Optimizer,
    autocast: torch.dtype | None,
    clip_grad_norm: bool,
    accumulation: int = 1,
) -> Recipe:
    """What `torch.autocast` would only warn of, and then not cast, is refused here."""
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise UsageError(f"autocast is {autocast!r}: pass torch.bfloat16, torch.float16, or None for full precision")
    if type(accumulation) is not int or accumulation < 1:
        raise BadBatch(f"accumulation is {accumulation!r}; it counts micro-batches per step and is at least 1")
    if type(clip_grad_norm) is not bool:
        raise UsageError(f"clip_grad_norm is {clip_grad_norm!r}: pass True if the loop clips, to whatever norm")
    if loss is not None:
        _check_loss(loss)
    return Recipe(loss, optimizer, autocast, accumulation, clips=clip_grad_norm)


def _on_one_of(world: World | None, recipe: Recipe, model: nn.Module) -> Recipe:
    if world is None:
        return recipe
    mixed = None if world.mp_policy is None else MixedPrecision.of(module_of(model), world.mp_policy)
    return replace(recipe, replicas=world.replicas, shards=world.shards, mixed=mixed)


def module_of(model: object) -> nn.Module:
    """The module to plan for: of a compiled one what is inside, whose forward is the same and can be followed."""
    inside = getattr(model, "_orig_mod", model)
    if isinstance(inside, nn.Module):
        return inside
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise UsageError(f"the model is the class {model.__name__}: pass a module, such as {model.__name__}(...)")
    raise UsageError(
        f"the model is a {type(model).__name__}: pass a torch.nn.Module. From a config or a hub id the command line "
        "makes one: memplan plan --config ..."
    )


def _check_loss(loss: object) -> None:
    """That a loss can be called as `loss(model, batch)`; what takes outputs and targets is the usual mistake."""
    way_out = (
        "It is called as loss(model, batch) and returns one differentiable scalar, for example "
        "loss=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])"
    )
    if not callable(loss):
        raise BadLoss(f"loss is {loss!r}, which cannot be called. {way_out}")
    made = loss if hasattr(loss, "__name__") else type(loss)
    if str(getattr(made, "__module__", "")).startswith("torch.nn."):
        raise BadLoss(f"loss is torch's {made.__name__}, which takes outputs and targets. {way_out}")
    try:
        signature = inspect.signature(loss)
    except ValueError:  # a function of another language, which does not say
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise BadLoss(f"loss does not take two arguments ({error}). {way_out}") from error
