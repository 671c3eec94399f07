"""A plan for the batch of somebody's training loop, by the settings in force."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from memplan.device import resolve_gpu, room_of
from memplan.division import Division
from memplan.errors import DoesNotFit, PlanMismatch, UsageError
from memplan.optimizer_step import PLAIN
from memplan.plan_record import Plan, Verdict
from memplan.problem import KEEP, RECOMPUTE, lever_of
from memplan.recipe import Recipe
from memplan.samples import Sample
from memplan.session import Session
from memplan.settings import Settings
from memplan.strategy import Lever, Strategy, load_strategy
from memplan.world import ALONE, Rooms, World, rooms_of_all

_log = logging.getLogger("memplan")

_WHOLE = (
    "its loss is not a mean over samples or tokens, or batch norm couples them, so that parts of a batch have other "
    "gradients than the whole; or the first process reads for all (dispatch_batches), or several workers read parts of "
    "a stream. Leave micro_batch out, or say with normalise=... what the loss is a mean over."
)

_WITH_ALL_WEIGHTS: Final[tuple[Lever, ...]] = ("recompute", "select", "offload")
_WHOLE_BLOCKS: Final[tuple[Lever, ...]] = ("recompute",)  # module by module, each of which DeepSpeed gives its weights
_HOOKED: Final = (
    "DeepSpeed puts hooks on what a model returns, for which the logits would be computed: the loss is not computed in "
    "chunks"
)
_MOVING: Final = (
    "ZeRO-3 takes a module's weights away when the module has run: blocks are recomputed as a whole or not at all, "
    "nothing that they save is copied to the host, and the loss is not computed in chunks"
)


def plan_for(
    model: nn.Module,
    recipe: Recipe,
    sample: Sample,
    settings: Settings,
    device: torch.device,
    *,
    own_rows: int,
    own_batches: int,
    can_split: bool,
    can_join: bool,
    rooms: Rooms = ALONE,
    strategy: str | Path | Strategy | None = None,
    left_out: tuple[str, ...] = (),
) -> Plan:
    """A plan that fits, for steps of `own_batches` of the loop's own batches.

    Args:
        device: what the settings' "auto" stands for.
        own_rows: samples in one of the loop's own batches.
        can_split: whether parts of a batch may be computed by themselves.
        can_join: whether several of the loop's own batches may be computed together.
        rooms: of the memory that is here, how much other ranks have.
        strategy: in the place of the settings'.
        left_out: what it leaves out of that one, for the plan to say.

    Raises:
        DoesNotFit: no plan meets the budget. UsageError, PlanMismatch: the settings ask for what cannot be.
    """
    effective = own_rows * own_batches
    if settings.plan is not None:
        plan = Plan.load(settings.plan)
        _check_batch(plan, effective, own_rows, can_split, can_join)
        _check_world(plan, recipe)
        _check_engine(plan, recipe)
        for line in (said := _for_less(plan, sample)):
            _log.warning("%s", line)
        return plan.assuming(*said)
    micro_batch = settings.micro_batch if can_split else own_rows
    if settings.micro_batch not in (None, micro_batch):
        raise UsageError(f"micro_batch={settings.micro_batch} would split a batch of {own_rows}: {_WHOLE}")
    wanted = load_strategy(settings.strategy if strategy is None else strategy)
    for_engine, said = _for_engine(wanted, recipe)
    asked = replace(
        for_engine,
        budget_share=wanted.budget_share * rooms.share,
        risk=wanted.risk if settings.risk is None else settings.risk,
    )
    card, here = resolve_gpu(place_of(settings, device))
    session = Session(model, sample, recipe, card, here, Division(can_split))
    plan = session.solve(asked, effective, micro_batch)
    if not can_join and plan.accumulation % own_batches:
        plan = session.solve(asked, effective, own_rows)  # which is less, and fits as well
    if plan.verdict is Verdict.DOES_NOT_FIT:
        whole = () if can_split else (f"the batch of {own_rows} is not split: {_WHOLE}",)
        raise DoesNotFit("\n  ".join((plan.describe(), *whole, *left_out, *said)), plan.smallest_bytes)
    return plan.assuming(*rooms.said(), *left_out, *said)


def place_of(settings: Settings, device: torch.device) -> str:
    """What is planned for, in the words of `memplan.plan`."""
    return str(device) if settings.gpu == "auto" else settings.gpu


def rooms_for(settings: Settings, device: torch.device, ranks: int) -> Rooms:
    """The memory that other ranks have, if it matters. To be asked on every rank."""
    if ranks == 1 or settings.plan is not None:
        return ALONE
    place = place_of(settings, device)
    return rooms_of_all(lambda: room_of(*resolve_gpu(place)))


def _for_engine(strategy: Strategy, recipe: Recipe) -> tuple[Strategy, tuple[str, ...]]:
    """What of it DeepSpeed leaves possible, and a word on what is left out but for the optimizer's steps, which are
    the engine's own."""
    if recipe.zero is None:
        return strategy, ()
    possible = _WHOLE_BLOCKS if recipe.zero.weights_move else _WITH_ALL_WEIGHTS
    both = strategy.levers, strategy.levers_first
    levers, first = (tuple(lever for lever in asked if lever in possible) for asked in both)
    left_out = set(strategy.levers) & {*_WITH_ALL_WEIGHTS, "loss-head"} - set(possible)
    said = _MOVING if recipe.zero.weights_move else _HOOKED
    return replace(strategy, levers=levers, levers_first=first), (said,) if left_out else ()


def _check_engine(plan: Plan, recipe: Recipe) -> None:
    """For a plan that was made elsewhere."""
    if recipe.zero is None:
        return
    if plan.stepping != PLAIN:
        raise PlanMismatch(
            f'the plan has the optimizer step "{plan.stepping}", and DeepSpeed steps in a way of its own. Plan for '
            "this run, without a file."
        )
    if chunks := [option for option in plan.decisions.values() if lever_of(option) == "loss-head"]:
        raise PlanMismatch(f"the plan has {chunks[0]}, and {_HOOKED}. Plan for this run, without a file.")
    others = set(plan.decisions.values()) - {KEEP, RECOMPUTE}
    if recipe.zero.weights_move and others:
        words = ", ".join(sorted(others))
        raise PlanMismatch(f"the plan has {words}, and {_MOVING}. Plan for this run, without a file.")


def _for_less(plan: Plan, sample: Sample) -> tuple[str, ...]:
    """What is to be said where the loop's largest batch, as far as it was looked for, has more than the plan's."""
    planned = {field.name: field.shape for field in plan.sample}
    for field in sample.fields():
        made_for = planned.get(field.name)
        if made_for is not None and len(made_for) == len(field.shape) and math.prod(field.shape) > math.prod(made_for):
            return (
                f"the plan was made for samples with {field.name} of {list(made_for)}, and the largest that was found "
                f"in this run has {list(field.shape)}: it needs more memory than planned. Plan for this run, without a "
                "file, or cut the data (max_length, truncation)",
            )
    return ()


def _check_world(plan: Plan, recipe: Recipe) -> None:
    planned, here = World(plan.replicas, plan.shards), World(recipe.replicas, recipe.shards)
    if planned != here:
        raise PlanMismatch(f"the plan is for {planned}, this run is {here}. Plan with world=memplan.{here}.")
    casts = str(recipe.mixed or "")
    if plan.mp_policy != casts:
        raise PlanMismatch(
            f"the plan is for FSDP2 {_casting(plan.mp_policy)}, and this run is {_casting(casts)}. Plan with the "
            "mp_policy of the run in memplan.World, or for this run, without a file."
        )


def _casting(policy: str) -> str:
    return f"with {policy}" if policy else "without mixed precision"


def _check_batch(plan: Plan, effective: int, own_rows: int, can_split: bool, can_join: bool) -> None:
    if plan.effective_batch != effective:
        raise PlanMismatch(
            f"the plan is for {plan.effective_batch} samples per optimizer step, the script has {effective} on each "
            "process. Plan for that batch, or change the script's."
        )
    if not can_join and plan.accumulation % (effective // own_rows):
        raise PlanMismatch(
            f"the plan has micro-batches of {plan.micro_batch}, and the script's own are of {own_rows}, of a stream "
            "with drop_last=True: by larger ones more rows would be left out at its end. Plan for this run, without a "
            "file, or leave drop_last out."
        )
    if not can_split and plan.micro_batch != own_rows:
        raise PlanMismatch(f"the plan splits a batch of {own_rows} into {plan.micro_batch}: {_WHOLE}")
