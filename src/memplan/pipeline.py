"""`predict`, `plan`, `autofit`: the whole library on one screen. `apply` is in `fitting`."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from memplan.device import resolve_gpu
from memplan.errors import BadBatch, DoesNotFit, NoDevice, UsageError
from memplan.fitting import Fit, apply
from memplan.gpus import Gpu
from memplan.plan_record import Plan, Verdict
from memplan.prediction import Prediction
from memplan.recorder import Loss, Recipe
from memplan.samples import Sample, sample_for
from memplan.session import Session
from memplan.strategy import Strategy, load_strategy

__all__ = ["apply", "autofit", "plan", "predict"]

_SHORT_CHECK_S = 30.0  # steps that take longer are not run just to be measured; Fit.measure does it when asked


def predict(
    model: nn.Module,
    sample: object,
    *,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    accumulation: int = 1,
    gpu: str | Gpu = "cpu",
) -> Prediction:
    """The memory that one training step of the model needs, as it stands. Nothing is run and nothing is changed.

    Args:
        model: any module, with weights anywhere, also on `meta`.
        sample: one micro-batch: a dict of keyword arguments, a tuple, or one tensor; the first dimension is the batch.
        loss: `loss(model, batch) -> scalar tensor`; by default the output's `.loss`.
        optimizer: a name ("adamw", "adamw-foreach", "sgd-momentum", "adam8bit", ...) or a live optimizer.
        autocast: a dtype, if the forward runs under `torch.autocast`.
        accumulation: micro-batches per optimizer step.
        gpu: whose kernels the step is predicted with: a card, a size, "cpu" or a live device.

    Returns:
        A `Prediction`; its sizes are bytes in tensors at the peak of a steady-state step.

    Raises:
        BadSample, BadLoss, BadOptimizer, BadBatch, UnknownGpu: an argument cannot be used.
        NothingToTrain, ModelFailed, CannotTrace: the model stands in the way.
    """
    recipe = _recipe(loss, optimizer, autocast, accumulation)
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
    effective_batch: int | None = None,
    micro_batch: int | None = None,
    strategy: str | Path | Strategy = "balanced",
    seq_len: int | None = None,
) -> Plan:
    """What to recompute and which micro-batch to take, so that the step fits the card at the least time.

    The model is not touched. With weights on a live device, blocks are timed there; else times are estimated.

    Args:
        model, loss, optimizer, autocast: as for `predict`.
        gpu: "auto", "cuda:1", a card's name ("rtx-4090"), a size ("24GiB"), "cpu", "cpu:2GiB", or a `Gpu`.
        sample: as for `predict`, of any batch size; transformers models may leave it out.
        effective_batch: samples per optimizer step, micro-batch x accumulation; the planner splits it.
        micro_batch: fixes the micro-batch. With neither, the planner takes the memory that it frees for a larger one.
        strategy: a shipped name ("balanced", "throughput", "largest-batch", ...) or a TOML file.
        seq_len: tokens per sample, where the sample is made from the config.

    Raises:
        DoesNotFit: the budget is below what is always there. A plan that misses by less is returned with the verdict
            "does not fit", the smallest budget that would do, and the ways out.
        BadSample, BadLoss, BadOptimizer, BadBatch, BadBudget, BadStrategy, UnknownGpu, NoDevice,
        NothingToTrain, ModelFailed, CannotTrace: as named.
    """
    chosen = load_strategy(strategy)
    card, device = resolve_gpu(gpu)
    shown = sample_for(model, 2, seq_len) if sample is None else Sample.of(sample)
    session = Session(model, shown, _recipe(loss, optimizer, autocast), card, device)
    return session.plan(chosen, effective_batch, micro_batch)


def autofit(
    model: nn.Module,
    gpu: str | Gpu = "auto",
    *,
    sample: object = None,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    effective_batch: int | None = None,
    micro_batch: int | None = None,
    strategy: str | Path | Strategy = "balanced",
    seq_len: int | None = None,
) -> Fit:
    """Plan and apply; where the model is on the device already, measure one step of it too (`Fit.measured`).

    Takes the arguments of `plan`. Raises what `plan` and `apply` raise; DoesNotFit if no plan meets the budget.
    """
    found = plan(
        model,
        gpu,
        sample=sample,
        loss=loss,
        optimizer=optimizer,
        autocast=autocast,
        effective_batch=effective_batch,
        micro_batch=micro_batch,
        strategy=strategy,
        seq_len=seq_len,
    )
    if found.verdict is Verdict.DOES_NOT_FIT:
        raise DoesNotFit(found.describe(), found.smallest_bytes)
    fit = apply(model, found)
    try:
        if found.step_s <= _SHORT_CHECK_S:
            with suppress(NoDevice):  # planned for a card that is not here
                fit.measured = fit.measure(steps=1)
    except BaseException:
        fit.undo()
        raise
    return fit


def _recipe(
    loss: Loss | None, optimizer: str | torch.optim.Optimizer, autocast: torch.dtype | None, accumulation: int = 1
) -> Recipe:
    """What `torch.autocast` would only warn of, and then not cast, is refused here."""
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise UsageError(f"autocast is {autocast!r}: pass torch.bfloat16, torch.float16, or None for full precision")
    if accumulation < 1:
        raise BadBatch(f"accumulation is {accumulation}; it counts micro-batches per step and is at least 1")
    return Recipe(loss, optimizer, autocast, accumulation)
