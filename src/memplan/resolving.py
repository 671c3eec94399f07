"""A plan from a file, solved again for a little less and a little more memory."""

from dataclasses import replace
from pathlib import Path
from typing import Final

from torch import nn

from memplan.blocks import signature, statement
from memplan.device import resolve_gpu
from memplan.errors import DoesNotFit, PlanMismatch, UsageError
from memplan.fitting import sample_in
from memplan.plan_record import Plan, Verdict
from memplan.recipe import Recipe, dtype_of
from memplan.report.explain import Again
from memplan.session import Session
from memplan.strategy import Strategy, load_strategy
from memplan.units import format_bytes

_ROUNDS: Final = 6  # of moving the card's size; each leaves a few percent of the difference
_NEAR_BYTES: Final = 2**20
_GIB: Final = 2**30


def solved_again(model: nn.Module, plan: Plan, by_bytes: int, strategy: str | Path | Strategy | None = None) -> Again:
    """Plans for the same card, batch and optimizer with `by_bytes` less, with the same and with so much more memory.

    And one for a GiB more in the budget, which the plan has a price for. None where nothing fits. Times are by one
    measure, so that their differences can be taken; where the plan's own were measured and the model has no weights,
    they are estimates. Other processes' memory is taken off the card's total. A plan's file does not say what was kept
    free of the rest, or why (a risk, a share, what earlier runs needed): the card is taken to be so large that the same
    budget is left.

    Args:
        model: the model that the plan was made for.
        strategy: that of the plan, where it is a file's.

    Raises:
        PlanMismatch: the model is another one.
        UsageError: solving again does not lead to the same needs within the same budget, as without the strategy or the
            cards that train together it will not.
        BadStrategy, UnknownGpu: the plan's own are not known here.
    """
    if signature(model) != plan.signature:
        raise PlanMismatch(
            f"the plan was made for another {plan.model}{plan.trained and f' ({plan.trained})'}, and this one has "
            f"{statement(model, None)}. Give the model, the method, the LoRA rank and the dtype that it was made with."
        )
    gpu, _ = resolve_gpu(plan.budget.gpu)
    total_bytes = plan.budget.total_bytes - plan.budget.others_bytes
    if gpu.kind == "cpu" and gpu.total_bytes is None:  # without a budget all of main memory counts, margin and all
        total_bytes = plan.budget_bytes
    recipe = Recipe(optimizer=plan.optimizer, autocast=dtype_of(plan.autocast))
    session = Session(model, sample_in(plan, model), recipe, gpu, None)
    chosen = _of_its_levers(load_strategy(plan.strategy if strategy is None else strategy), plan)

    def within(budget_bytes: int) -> Plan | None:
        try:
            return session.within(budget_bytes).solve(chosen, plan.effective_batch, plan.micro_batch)
        except DoesNotFit:
            return None

    same = within(total_bytes)
    for _ in range(_ROUNDS):
        if same is None or not (off := plan.solved_bytes - same.budget_bytes):
            break
        total_bytes += off * total_bytes // max(same.budget_bytes, 1)
        same = within(total_bytes)
    if same is None or same.unplanned_bytes != plan.unplanned_bytes:
        needs = "nothing" if same is None else f"{format_bytes(same.unplanned_bytes)} without a plan"
        raise UsageError(
            f"solving again gives {needs}, and the plan has {format_bytes(plan.unplanned_bytes)}: it was made with "
            "another loss, strategy, dtype or number of cards. Leave the model out, and the file alone is explained."
        )
    if abs(same.budget_bytes - plan.solved_bytes) > _NEAR_BYTES:
        raise UsageError(
            f"solving again is done within {format_bytes(same.budget_bytes)}, and the plan was made within "
            f"{format_bytes(plan.solved_bytes)}. Leave the model out, and the file alone is explained."
        )
    total_bytes += (plan.budget_bytes - plan.solved_bytes) * total_bytes // max(same.budget_bytes, 1)  # the whole's
    less, more, one_gib_more = within(total_bytes - by_bytes), within(total_bytes + by_bytes), None
    grown = 0 if more is None else more.budget_bytes - same.budget_bytes
    if grown > 0 and plan.share_bytes is None and chosen.objective != "peak":  # which would leave the GiB unused
        one_gib_more = within(total_bytes + _GIB * by_bytes // grown)
    plans = (less, same, more, one_gib_more)
    return Again(*(None if found is None or found.verdict is Verdict.DOES_NOT_FIT else found for found in plans))


def _of_its_levers(strategy: Strategy, plan: Plan) -> Strategy:
    """As the plan was looked for: by the levers that it says, before the rest of the strategy's."""
    if not plan.levers or set(plan.levers) in (set(strategy.levers), set(strategy.levers_first)):
        return strategy
    first = tuple(lever for lever in strategy.levers if lever in plan.levers)
    return replace(strategy, levers_first=first)
