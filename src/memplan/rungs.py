"""Ever smaller plans for one step: `ladder` makes them, `Rungs` is where a run stands on them."""

import bisect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice, pairwise
from typing import Final

from torch import nn

from memplan import fitting
from memplan.device import resolve_gpu
from memplan.errors import AlreadyApplied, DoesNotFit, ModelError, UsageError
from memplan.fitting import Live
from memplan.optimizer_step import IN_BACKWARD
from memplan.out_of_memory import diagnose
from memplan.plan_record import Plan, Verdict
from memplan.ranks import Word, Words
from memplan.session import Session
from memplan.strategy import Strategy, load_strategy
from memplan.units import format_bytes
from memplan.world import World, of_first

_log = logging.getLogger(__name__)

RUNG: Final = 0.6
"""Of what a plan needs beyond the smallest one, the budget of the next: the first to fail is seldom far too large."""

_ANY_LENGTH: Final = 2**62  # tokens

CLOSE: Final = 0.05  # of what a plan needs: so near to the smallest one, that is the next


def ladder(
    model: nn.Module,
    plan: Plan,
    strategy: "str | Strategy" = "balanced",
    micro_batch: int | None = None,
    world: World | None = None,
) -> Iterator[Plan]:
    """The plan, and then ever smaller ones for the same effective batch, each planned when it is asked for.

    Args:
        plan: what `memplan.plan` returned for this model, in this process; of several ranks, the plan of
            `memplan.autofit(..., world=world)`.
        micro_batch: fixes it, so that dropout draws the same numbers under each plan. None: smaller ones are taken too,
            where the loss is known to be made of the losses of parts.
        world: the ranks that run by the same plan. The first one plans then for all, and each plan is to be asked for
            on all of them at once, as a `Guard` does.

    Raises:
        UsageError: the plan was read from a file, which has neither loss nor sample.
        AlreadyApplied: when a plan is asked for: the model runs by a plan, and its trace would be that of the plan. A
            `Guard` takes it out before it asks; by hand, take the list before `apply`.
    """
    smaller = _smaller(model, plan, _live_of(plan), load_strategy(strategy), micro_batch)
    return chain([plan], smaller) if world is None else Together(plan, smaller, world)


def ladders(
    model: nn.Module,
    plan: Plan,
    lengths: Iterable[int],
    strategy: "str | Strategy" = "balanced",
    micro_batch: int | None = None,
    world: World | None = None,
) -> dict[int, Iterator[Plan]]:
    """For a guard of batches of several lengths: the most tokens of a row -> a ladder of plans for such batches.

    What a batch of short rows needs not drop, it keeps; the guard changes from plan to plan between steps, by
    ``guard.step(run, tokens)`` with the tokens of the batch's rows, padding included.

    Args:
        plan: for the longest rows, as for `ladder`; its own tokens are the last class.
        lengths: of the shorter classes. Each takes a plan, so that a few do: most rows should be in the shortest.
        strategy, world: as for `ladder`.
        micro_batch: as for `ladder`; None: each class has its own.

    Raises:
        DoesNotFit: a class has no plan within the budget, as with a strategy that drops less than the plan does.
        UsageError: the plan was read from a file, is not for rows of tokens, or a length is not below its own.
        AlreadyApplied: the model runs by a plan; the classes' first plans are made at once.
    """
    live, wanted, classes = _live_of(plan), load_strategy(strategy), list(lengths)
    assert live.sample is not None
    own = live.sample.tokens or 0
    longest = own if world is None else of_first(own)  # for whose sample the plan was made
    if odd := [length for length in classes if not (type(length) is int and 0 < length < longest)]:
        raise UsageError(
            f"the plan is for rows of {longest} tokens, and {odd[0]!r} is no smaller number of them. Plan for the "
            "longest rows, and name shorter ones here."
        )
    fitting.check_bare(model, "plan for lengths")
    found = {longest: ladder(model, plan, wanted, micro_batch, world)}
    for length in sorted(set(classes), reverse=True):
        shorter = replace(live, sample=live.sample.lengthened(length))
        make = partial(_within_budget_of, plan, model, shorter, wanted, micro_batch)
        first = make() if world is None else world.agreed(make)
        first._live = shorter
        found[length] = ladder(model, first, wanted, micro_batch, world)
    return found


def _within_budget_of(plan: Plan, model: nn.Module, live: Live, wanted: Strategy, micro_batch: int | None) -> Plan:
    """The plan for another sample. Raises DoesNotFit if there is none."""
    session = _session(model, plan, live)
    size = micro_batch or _kept_size(plan, session)
    found = session.plan(wanted, plan.effective_batch, size)
    if found.budget_bytes > plan.budget_bytes:  # a plan for several ranks, or of another strategy
        share = wanted.budget_share * plan.budget_bytes / found.budget_bytes
        found = session.plan(replace(wanted, budget_share=share), plan.effective_batch, size)
    if found.verdict is Verdict.DOES_NOT_FIT:
        raise DoesNotFit(found.describe(), found.smallest_bytes)
    return found


def _kept_size(plan: Plan, session: Session) -> int | None:
    """The plan's micro-batch, where another one might train something else; None: any will do."""
    return plan.micro_batch if session.division.is_doubtful else None


def _session(model: nn.Module, plan: Plan, live: Live) -> Session:
    assert live.sample is not None
    return Session(model, live.sample, live.recipe, *resolve_gpu(plan.budget.gpu), live.division)


def _live_of(plan: Plan) -> Live:
    if not isinstance(plan._live, Live) or plan._live.sample is None:
        raise UsageError("this plan was read from a file, which keeps no loss and no sample: make it in this process")
    return plan._live


class Together(Iterator[Plan]):
    """A plan, and then those that the first rank has, as it has them: to be asked for on all ranks at once.

    Args:
        own: of this rank; it is looked at on the first one only.
    """

    def __init__(self, plan: Plan, own: Iterator[Plan], world: World) -> None:
        self._first: Plan | None = plan
        self._own, self._world, self._live = own, world, plan._live

    def __next__(self) -> Plan:
        if self._first is not None:
            plan, self._first = self._first, None
            return plan
        for plan in self._world.agreed(lambda: list(islice(self._own, 1))):
            plan._live = self._live  # which no plan takes along that is sent
            return plan
        raise StopIteration


def _smaller(model: nn.Module, plan: Plan, live: Live, wanted: Strategy, micro_batch: int | None) -> Iterator[Plan]:
    session = _session(model, plan, live)

    def check_bare() -> None:
        if model in fitting._applied:
            raise AlreadyApplied("undo the plan before a smaller one is made: list(ladder(...)) comes before apply")

    def within(share: float) -> Plan:
        check_bare()
        found = session.solve(replace(wanted, budget_share=min(share, 1.0)), plan.effective_batch, size)
        return found if micro_batch else found.assuming(*session.division.said(found.accumulation))

    check_bare()
    size = micro_batch or _kept_size(plan, session)
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
        self._check(None, first)
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


class Ladders:
    """The rungs of batches of every length.

    Args:
        plans: for batches of any length, or the most tokens of a batch -> those for such batches.
        whole: plans are looked at ahead, since ranks that make them by themselves could come to different ones. Those
            that ranks make together never do.

    Attributes:
        rungs: of each bucket of lengths, the shortest first.
    """

    def __init__(
        self, plans: "Iterable[Plan] | Mapping[int, Iterable[Plan]]", effective_batch: int, *, whole: bool
    ) -> None:
        by_length = plans if isinstance(plans, Mapping) else {_ANY_LENGTH: plans}
        self._limits = sorted(by_length)
        found = (by_length[limit] for limit in self._limits)
        ahead = (list(some) if whole and not isinstance(some, Together) else some for some in found)
        self.rungs = [Rungs(some, effective_batch) for some in ahead]

    @property
    def by_length(self) -> bool:
        """Whether it matters how long a batch is."""
        return self._limits != [_ANY_LENGTH]

    @property
    def foreseen_bytes(self) -> int:
        """The most that a card has to give by any plan in force."""
        return max(max(rungs.plan.budget_bytes, rungs.plan.reserved_bytes or 0) for rungs in self.rungs)

    def text(self) -> str:
        """Of the plans that are made, but for what a rank has to say of its own batches: the same on all ranks."""
        made = (plan for rungs in self.rungs for plan in (rungs.plan, *rungs.all))
        texts = (plan.model_dump_json(exclude={"assumptions"}) for plan in made)
        return "\n".join((str(self._limits), *texts))

    def bucket_of(self, tokens: int | None) -> int:
        """In which a batch of so many tokens is. UsageError if that is not known, or too many."""
        if tokens is None and self.by_length:
            raise UsageError(
                "this guard has plans by length: say how many tokens the batch has, guard.step(run, tokens)"
            )
        bucket = bisect.bisect_left(self._limits, tokens or 0)
        if bucket == len(self._limits):
            raise UsageError(f"the batch has {tokens} tokens, and the plans are for {self._limits[-1]} at most")
        return bucket


def nothing_smaller(plan: Plan, what: str, failure: Exception | None, words: Words) -> Exception:
    """The error to raise where there is no plan below: the original one, or on another rank that one's news.

    Args:
        plan: the last one.
        what: was done by it.
        failure: how it ended here.
        words: what the ranks said of it.
    """
    needs = f"The smallest plan was to need {format_bytes(plan.needs_bytes)}"
    state = "weights, optimizer state, buffers and random states are as before it"
    found = None if failure is None else diagnose(failure)
    if failure is None or found is None:
        odd = words.ranks(Word.RAN_OUT)
        return DoesNotFit(f"rank {odd} ran out of memory in {what}. {needs}; {state}.", plan.smallest_bytes)
    failure.add_note(
        f"memplan: {found.where} ran out ({found.name}) in {what}, and there is no smaller plan. {needs}; {state}. "
        f"Way out: {found.helps}."
    )
    return failure
