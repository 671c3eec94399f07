"""Ever smaller plans for one step: `ladder` makes them, `Rungs` is where a run stands on them."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from torch import nn

from memplan import fitting
from memplan.device import resolve_gpu
from memplan.errors import AlreadyApplied, DoesNotFit, ModelError, UsageError
from memplan.fitting import Live
from memplan.optimizer_step import IN_BACKWARD
from memplan.plan_record import Plan, Verdict
from memplan.session import Session
from memplan.strategy import Strategy, load_strategy
from memplan.units import format_bytes

_log = logging.getLogger(__name__)

RUNG: Final = 0.6
"""Of what a plan needs beyond the smallest one, the budget of the next: the first to fail is seldom far too large."""

CLOSE: Final = 0.05  # of what a plan needs: so near to the smallest one, that is the next


def ladder(
    model: nn.Module, plan: Plan, strategy: "str | Strategy" = "balanced", micro_batch: int | None = None
) -> Iterator[Plan]:
    """The plan, and then ever smaller ones for the same effective batch, each planned when it is asked for.

    Args:
        plan: what `memplan.plan` returned for this model, in this process.
        micro_batch: fixes it, so that dropout draws the same numbers under each plan.

    Raises:
        UsageError: the plan was read from a file, which has neither loss nor sample.
        AlreadyApplied: the model runs by a plan, and its trace would be that of the plan. A `Guard` takes it out before
            it asks; by hand, take the list before `apply`.
    """
    live = plan._live
    if not isinstance(live, Live) or live.sample is None:
        raise UsageError("this plan was read from a file, which keeps no loss and no sample: make it in this process")
    wanted, session = load_strategy(strategy), Session(model, live.sample, live.recipe, *resolve_gpu(plan.budget.gpu))
    yield plan

    def within(share: float) -> Plan:
        if model in fitting._applied:
            raise AlreadyApplied("undo the plan before a smaller one is made: list(ladder(...)) comes before apply")
        return session.plan(replace(wanted, budget_share=min(share, 1.0)), plan.effective_batch, micro_batch)

    most = within(wanted.budget_share)
    whole, least = most.budget_bytes / wanted.budget_share, most.smallest_bytes
    while (beyond := plan.needs_bytes - least) > 0:
        targets = [least] if beyond < CLOSE * plan.needs_bytes else [least + int(RUNG * beyond), least]
        for target in targets:
            try:
                smaller = within((target + 1) / whole)  # rounded down by what uses it
            except DoesNotFit:
                continue
            if smaller.verdict is not Verdict.DOES_NOT_FIT and smaller.needs_bytes < plan.needs_bytes:
                plan = smaller
                yield plan
                break
        else:
            return


class Rungs:
    """Plans for batches of some length, from the first one down.

    Attributes:
        all: of them, if they were made before; an iterator's are not looked at ahead.
        plan: where it is now.
        ended: whether there is none below.
    """

    def __init__(self, plans: Iterable[Plan], effective_batch: int) -> None:
        self.all = list(plans) if isinstance(plans, Sequence) else []
        self._coming, self._effective = iter(self.all or plans), effective_batch
        for before, after in pairwise((None, *self.all)):
            self._check(before, after)
        first = next(self._coming, None)
        if first is None:
            raise UsageError("a guard needs plans: the one in force, and smaller ones to fall to")
        self.plan, self.ended = first, False

    def fall(self) -> bool:
        """To the next plan, if there is one. One that is made now, and cannot be, is none."""
        try:
            after = next(self._coming, None)
        except (ModelError, DoesNotFit) as error:
            _log.warning("memplan: no smaller plan could be made: %s", error)
            after = None
        if after is None:
            self.ended = True
            return False
        self._check(self.plan, after)
        self.plan = after
        return True

    def _check(self, before: Plan | None, after: "Plan | None") -> None:
        assert after is not None
        if after.stepping == IN_BACKWARD:
            raise UsageError("a plan that steps inside the backward changes weights there, which cannot be taken back")
        if after.effective_batch != self._effective:
            raise UsageError(f"a plan for {after.effective_batch} samples a step among plans for {self._effective}")
        if before is not None and after.needs_bytes >= before.needs_bytes:
            raise UsageError(
                f"a plan that needs {format_bytes(after.needs_bytes)} follows one that needs "
                f"{format_bytes(before.needs_bytes)}: each has to need less than the one before"
            )
