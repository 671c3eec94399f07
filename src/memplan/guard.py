"""`Guard`: training steps that outlive an out-of-memory error, by falling to a plan that needs less.

::

    plans = list(ladder(model, plan))            # before the plan is applied
    guard = Guard(memplan.apply(model, plan), optimizer, plans)
    for batch in loader:
        def run():                               # one whole step; may be run again
            for micro in split(batch, guard.plan.micro_batch):
                (loss_of(model, micro) / guard.plan.accumulation).backward()
            guard.exchange()                     # with several ranks; otherwise nothing
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        guard.step(run)
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from memplan import optimizers
from memplan.device import Device
from memplan.errors import MemoryTaken, UsageError
from memplan.fitting import Fit, apply, reapply
from memplan.out_of_memory import diagnose
from memplan.plan_record import Plan
from memplan.ranks import OthersRanOut, Replicas, Word, Words, check_whole
from memplan.rewind import Before, CarefulStep, device_of, forget, outcome, ran_out
from memplan.rungs import Ladders, nothing_smaller
from memplan.units import format_bytes

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Guard:
    """Runs steps by a plan, and by a smaller one from where memory runs out or nearly did. On every rank at once.

    Args:
        fit: the model that runs by the first plan.
        optimizer: the one in use; its `step` is watched until `undo`.
        plans: the first is the fit's own; each needs less than the one before. An iterator is asked when it is needed.
            For batches of different lengths a mapping: the most tokens of a batch -> the plans for such batches, the
            fit's own among the first ones.
        replica: the model in DistributedDataParallel, if it is.
        generators: sources of chance that the step draws from, beside the global ones.
        patience_s: seconds that a rank waits for another one; longer than a step and the planning of a smaller one.

    Attributes:
        fit: the model by the plan in force.
        falls: what happened, a sentence each.
        timed: whether exchanges are timed, for `exchange_share`. The device is waited for then, before and after.

    Raises:
        UsageError: no plans, plans that do not get smaller, that split another batch, or that step in the backward;
            parameters that are sharded.
        PlanMismatch: ranks have different plans, or those for another number of replicas.
    """

    def __init__(
        self,
        fit: Fit,
        optimizer: object,
        plans: "Iterable[Plan] | Mapping[int, Iterable[Plan]]",
        *,
        replica: DistributedDataParallel | None = None,
        generators: Sequence[torch.Generator] = (),
        patience_s: float = 300.0,
    ) -> None:
        self._ladders = Ladders(plans, fit.plan.effective_batch, whole=replica is not None)
        if not any(rungs.plan is fit.plan for rungs in self._ladders.rungs):
            raise UsageError(
                "the fit runs by another plan than the first: pass the plan that was applied, and the rest"
            )
        check_whole(fit.model, replica, fit.plan.replicas)
        self.fit, self.falls, self.timed = fit, list[str](), False
        self._optimizer = optimizers.unwrapped(optimizer)
        self._device: Device = device_of(fit.model)
        self._generators, self._before = generators, Before(fit.model, generators)
        self._replicas = None if replica is None else Replicas(replica, patience_s)
        if self._replicas is not None:
            self._replicas.check_same(self._ladders.text())
        self._careful = CarefulStep(
            fit.model, self._optimizer, self._device, self._check_exchanged, lambda: self.plan.peak_bytes
        )
        self._device.release()  # the peak so far is of what was before
        self._retries, self._reserved, self._strained = self._device.pressure()[0], 0, False
        self._bucket, self._exchanged, self._exchange_s = 0, False, 0.0
        self._words = Words(self._replicas)
        self._last: tuple[Word, int] = (Word.WELL, 0)  # how the step before went, in which bucket
        self._since: list[Callable[[], object]] = []  # the micro-steps since the optimizer's last step
        self._rows: int | None = None  # what an evaluation has come down to
        self._cut_short, self._parts = False, 0  # the evaluation under way, in one of the parts so far
        if self._replicas is not None:
            self._replicas.keep_apart()

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self.fit.plan

    def end(self) -> None:
        """The optimizer steps by itself again, and a replica exchanges; the model stays by the plan in force."""
        self._careful.undo()
        if self._replicas is not None:
            self._replicas.undo()
            self._replicas = None

    def undo(self) -> None:
        """The model, the optimizer and the replica as they were before any plan."""
        self.end()
        self.fit.undo()

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self, run: Callable[[], _Result], tokens: int | None = None) -> _Result:
        """One step of training, and what `run` returns.

        `run` does all forwards and backwards by `self.plan`, calls `exchange` if there are several ranks, steps the
        optimizer and drops the gradients. Where memory runs out before the optimizer's step, all is put back as it was
        before (see `rewind`), and `run` is called again by the next plan: what it reads has to be there again, so fetch
        the batch outside. Where it runs out inside the optimizer's step, that is finished with less memory.

        Args:
            tokens: of the batch, counted as the keys of the plans are, if the guard has plans by length.

        Raises:
            UsageError: gradients are there already, the batch is longer than any plan's, or `run` calls no `exchange`.
            DoesNotFit: another rank has run out, and there is no smaller plan.
            ModelFailed: another rank has failed.
            Any other: what `run` raised. An out-of-memory error that no plan helps has a note with the diagnosis.
        """
        bucket = self._ladders.bucket_of(tokens)
        self._follow(self._ladders.rungs[bucket].plan)
        self._begin(self._before.gradients())
        self._bucket = bucket
        while True:
            self._exchanged = False
            self._careful.reset()
            result, failure = outcome(run)
            if failure is None:
                if self._replicas is not None and not self._exchanged:
                    raise UsageError("call guard.exchange() in the step, after its last backward")
                self._watch(self._is_close())
                assert result is not None
                return result[0]
            self._recover(failure)
            del failure

    def micro_step(self, run: Callable[[], _Result], is_last: bool = True, begins: bool | None = None) -> _Result:
        """One micro-step of a step that another's loop takes, and what `run` returns. Raises as `step` does.

        `run` does a forward and a backward. Where memory runs out in it, the gradients so far are dropped, and the
        micro-steps since the optimizer's last step run again by the next plan: what they read is held until then. For
        plans with one micro-batch, since the loop divides the batch. On one rank a step that begins with gradients of
        an earlier one is not guarded: they could not be put back.

        Args:
            is_last: of its step; with several ranks, which have to be as far, their gradients are exchanged behind it.
            begins: whether a step begins with it; None: where no gradients are there, or the optimizer has stepped.
                So `run` can be a forward or a backward alone: say False for the backward.
        """
        if self._ladders.by_length:
            raise UsageError("micro-steps are guarded with plans for any length: call guard.step(run)")
        held = self._before.gradients()
        if self._careful.begun or not (self._since and held) if begins is None else begins:
            self._watch(self._strained)
            self._careful.reset()
            self._since.clear()
            if held and self._replicas is None:
                return run()
            self._begin(held)
            self._strained, (self._retries, self._reserved) = False, self._device.pressure()
        elif not self._since:
            return run()
        self._since.append(run)
        try:
            result, failure = self._micro_outcome(run, is_last)
            while failure is not None:
                self._recover(failure)
                self._exchanged = False
                failure = next((error for each in self._since[:-1] if (error := outcome(each)[1]) is not None), None)
                if failure is None:
                    result, failure = self._micro_outcome(run, is_last)
        except BaseException:
            self._since.clear()
            raise
        self._strained |= self._is_close()
        assert result is not None
        return result[0]

    def leave_step(self) -> None:
        """Micro-steps since the optimizer's last step cannot be run again; nothing is guarded until the next begins."""
        self._since.clear()

    def _micro_outcome(
        self, run: Callable[[], _Result], is_last: bool
    ) -> tuple[tuple[_Result] | None, Exception | None]:
        self._exchanged = False

        def whole() -> _Result:
            if self._replicas is not None:
                self._replicas.keep_apart()
            result = run()
            if is_last:
                self.exchange()
            return result

        return outcome(whole)

    def _begin(self, held: int) -> None:
        """Note what is before a step, which holds no gradients."""
        if held:
            self._words.give_up(self._bucket)
            raise UsageError(
                f"{held} parameters hold gradients before the step, and a copy of them would take memory. Call "
                "optimizer.zero_grad(set_to_none=True) at the end of each step."
            )
        self._before.note()

    def exchange(self) -> None:
        """After a step's last backward: gradients become their mean over the ranks. With one rank, nothing.

        No rank comes past here if another one has run out of memory.
        """
        if self._replicas is None:
            return
        if self._exchanged:
            raise UsageError("guard.exchange() was called twice in a step: once, after its last backward")
        self._exchanged = True
        self._words.tell(*self._last)
        if self._words.ranks(Word.RAN_OUT):
            raise OthersRanOut
        if self.timed:
            self._exchange_s = self._device.seconds_of(self._replicas.exchange, 1)[0]
        else:
            self._replicas.exchange()

    def exchange_share(self, step_s: float) -> float:
        """Of a step of so many seconds, what its exchange took when it was timed: nothing hides it.

        To be asked on all ranks at once. The least of what they say, which is the same on all: others waited for it.
        """
        return 0.0 if self._replicas is None else self._replicas.least(self._exchange_s / step_s)

    def evaluate(self, run: Callable[[int], _Result], rows: int) -> _Result:
        """What `run(rows)` returns, which evaluates all there is in batches of that size, without gradients.

        Where memory runs out it is called anew, with half the rows; later evaluations start from there. The plan and
        the batch of the training stay as they are. With several ranks, what `run` does before it waits for the others
        has to be in `evaluate_part`.

        Raises as `step` does; the out-of-memory error, with a note, if one row is too much.
        """
        before = Before(self.fit.model, self._generators)  # a step may be under way, with a note of its own
        before.note()
        while True:
            now, self._cut_short, self._parts = min(rows, self._rows or rows), False, 0
            result, failure = outcome(partial(run, now))
            if failure is not None and self._replicas is not None and self._parts and not self._cut_short:
                raise failure  # others may be waiting for this rank where no word reaches them
            if not self._cut_short:
                self._tell_of(failure)
            if not self._words.ranks(Word.RAN_OUT):
                assert result is not None
                return result[0]
            self._free(failure, before)
            if now == 1:
                raise nothing_smaller(self.plan, "an evaluation in batches of one row", failure, self._words)
            self._rows = now // 2
            self._note(f"an evaluation ran out of memory in batches of {now}; it goes on with {self._rows}")
            del failure

    def evaluate_part(self, run: Callable[[], _Result]) -> _Result:
        """What `run` returns, which is a part of the `run` of `evaluate`, behind which ranks wait for each other.

        Each has to have as many. Where memory runs out on one of them, none comes past here: all begin anew. What goes
        wrong outside of the parts is raised on that rank alone.
        """
        self._parts += 1
        result, failure = outcome(run)
        self._tell_of(failure)
        if self._words.ranks(Word.RAN_OUT):
            self._cut_short = True
            raise failure or OthersRanOut("another rank ran out of memory in its part of the evaluation")
        assert result is not None
        return result[0]

    # -- what goes wrong -----------------------------------------------------------------------------------------

    def _recover(self, failure: Exception) -> None:
        """Back to before the step, and to a smaller plan. Raises if there is no way on."""
        told = isinstance(failure, OthersRanOut)
        found = None if told else ran_out(failure, self._device)
        late = self._careful.begun or (self._replicas is not None and self._exchanged and not told)
        if not told and (found is None or late):
            self._words.give_up(self._bucket)
            if found is not None:
                self._before.drop_gradients()
                self._free(failure, self._before)
                kept = "weights had changed" if self._careful.taken else "gradients had been exchanged or used"
                failure.add_note(f"memplan: {found.where} ran out when {kept}, so the step is not run again.")
            elif diagnosed := diagnose(failure):
                failure.add_note(f"memplan: {diagnosed.where} ran out, which no plan helps: {diagnosed.helps}.")
            raise failure
        if not told:
            try:
                self._words.tell(Word.RAN_OUT, self._bucket)
            except RuntimeError as error:  # another has failed, or says nothing
                raise error from failure
        self._before.drop_gradients()
        self._free(failure, self._before)
        for bucket in self._words.buckets(Word.RAN_OUT):
            if not self._fall(bucket, "ran out of memory"):
                what = f"a step of {self.plan.micro_batch} samples at a time"
                raise nothing_smaller(self.plan, what, failure, self._words)

    def _tell_of(self, failure: Exception | None) -> None:
        """Say how an evaluation, or a part of it, went. Raises what went wrong if it was not memory."""
        if failure is not None and ran_out(failure, self._device) is None:
            self._words.give_up(self._bucket)
            raise failure
        self._words.tell(Word.WELL if failure is None else Word.RAN_OUT, self._bucket)

    def _free(self, failure: Exception | None, before: Before) -> None:
        before.put_back()
        if failure is not None:
            forget(failure)
        self._device.release()

    # -- falling -------------------------------------------------------------------------------------------------

    def _is_close(self) -> bool:
        """Whether memory nearly ran out since this was asked."""
        retries, reserved = self._device.pressure()
        close = retries > self._retries or reserved > max(self._ladders.foreseen_bytes, self._reserved)
        self._retries = retries
        return close

    def _watch(self, close: bool) -> None:
        """After a step that went well. If it was close, fall; with several ranks, when all have said so."""
        if self._replicas is None:
            self._words.tell(Word.NEARLY if close else Word.WELL, self._bucket)
        nearly, self._words.said = self._words.buckets(Word.NEARLY), []  # which is heard once
        fallen = [self._fall(bucket, "nearly ran out of memory") for bucket in nearly]
        self._last = (Word.NEARLY if close and not any(fallen) else Word.WELL, self._bucket)

    def _fall(self, bucket: int, why: str) -> bool:
        """To the next plan of a bucket, if there is one."""
        rungs, in_force = self._ladders.rungs[bucket], self.plan
        if rungs.ended:
            return False
        before = rungs.plan
        self.fit.undo()  # a smaller plan is made for the model as it is
        fallen = False
        try:
            while not fallen and rungs.fall():
                fallen = self._applied(rungs.plan if in_force is before else in_force)
        finally:
            if not fallen:
                rungs.plan = before
                self.fit = reapply(self.fit.model, in_force, self._optimizer)
        if fallen:
            self._device.release()
            self._retries = self._device.pressure()[0]
            needs = f"{format_bytes(before.needs_bytes)} to {format_bytes(rungs.plan.needs_bytes)}"
            self._note(f"a step {why}; its plan falls from {needs}, {rungs.plan.micro_batch} samples at a time")
        return fallen

    def _applied(self, plan: Plan) -> bool:
        """Whether the model runs by it. Not so if other processes hold the memory, here or on another rank's card."""
        fit: Fit | None = None
        with suppress(MemoryTaken):
            fit = apply(self.fit.model, plan, self._optimizer)
        if self._replicas is not None and not self._replicas.all_well(fit is not None):
            if fit is not None:
                fit.undo()
            return False
        self.fit = fit or self.fit
        return fit is not None

    def _follow(self, plan: Plan) -> None:
        if self.plan is not plan:
            self.fit.undo()
            self.fit = reapply(self.fit.model, plan, self._optimizer)

    def _check_exchanged(self) -> None:
        if self._replicas is not None and not self._exchanged:
            raise UsageError("call guard.exchange() before optimizer.step(): gradients are those of one rank alone")

    def _note(self, text: str) -> None:
        self.falls.append(text)
        _log.warning("memplan: %s", text)
