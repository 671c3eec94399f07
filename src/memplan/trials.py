"""`Trials`: plans that wait to be measured, in an Optuna study that any number of processes work on together.

Each trial is one plan, queued once by whoever made the study. A worker claims a trial by its state, which every storage
changes for one worker only; so none is lost and none is run twice. Which process works on it, and its last sign of
life, lie in the trial itself, since Optuna's heartbeats are known to databases alone.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, fields
from typing import Any, Final

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from memplan.errors import PlanMismatch, UsageError
from memplan.plan_record import Measured, Plan, Verdict
from memplan.queued import MADE_FOR, PLAN, QUEUED, WHOLE, fill, queued, unpacked
from memplan.storages import reached
from memplan.units import format_bytes, format_seconds
from memplan.workers import has_ended, this_worker

NEAR: Final = 0.01  # share of a step's time: what could be faster by no more than this is not tried

OFF: Final = 0.03
"""Share by which a plan may be faster than predicted, beside one of its micro-batch that was measured.

Beside plans of other micro-batches it is `OFF_ELSEWHERE`. With predictions off by 2 % (standard deviation), and by up
to 20 % for a micro-batch as a whole, 0.9 % of 3000 simulated studies of 20 plans ended with one that is more than 2 %
slower than the best; 4.4 plans were run in each.
"""

OFF_ELSEWHERE: Final = 0.2

_SEEN: Final = 2  # trials without which nothing is let go: one alone may have met a busy moment
_PACE: Final = 30  # times the predicted step: longer than any worker is silent while it measures
_POLL_S: Final = 0.2
_FILLING_S: Final = 60.0  # for which a study may be there and its queue not yet
_SILENT_S: Final = 15.0  # of waiting for others, after which that is said

_MEASURED, _WHY, _HEARD, _WORKER = "measured", "why", "heard", "worker"  # attributes of a trial
_AGAIN, _LOST = "again", "lost"  # the number of the trial that this one stands for, and whether its worker was gone

_FORMAT: Final = 2  # of what a study keeps

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan to be measured, and what it was made with."""

    micro_batch: int
    budget_share: float
    strategy: str
    loss_head: str
    plan: Plan

    @property
    def whole_bytes(self) -> int:
        """The budget of which the plan may use its share."""
        return int(self.plan.budget_bytes / self.budget_share)

    @property
    def settings(self) -> dict[str, Any]:
        """All but the plan: the parameters of an Optuna trial."""
        names = [field.name for field in fields(Candidate) if field.name != "plan"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Trial(Candidate):
    """A candidate and what became of it.

    Attributes:
        number: in the study; in the order of the predicted times.
        state: "waiting", "running", "complete", "pruned" (memory ran out, or it cannot win) or "fail".
        measured: None unless it is complete.
        why: it was pruned, failed or broke the budget, a sentence; else empty.
        began: whether a worker has begun to run it.
    """

    number: int
    state: str
    measured: Measured | None
    why: str
    began: bool


class Trials:
    """The trials of one study.

    Args:
        name: of the study in the storage.
        made_for: what has to be the same for all who work on it, by name; numbers, texts and lists of them.
        candidates: makes them where the study is new.
        patience_s: silence of a worker, beyond the time that its steps should take, after which its trial is taken up
            again, once.

    Raises:
        PlanMismatch: the study was made for something else.
        UsageError: the storage cannot be written to or reached.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        made_for: Mapping[str, object],
        candidates: Callable[[], Iterable[Candidate]],
        patience_s: float,
    ) -> None:
        self._storage, self._name, self._patience_s = storage, name, patience_s
        self._plans: dict[int, Plan] = {}
        self._seen_s: dict[int, float] = {}  # number -> since when a trial runs of which nothing was heard
        made_for = {**made_for, "format": _FORMAT}
        self._study = self._found() or self._made(made_for, candidates)
        self._check(made_for)
        self._id = storage.get_study_id_from_name(name)
        self.budget_bytes: int = self._attributes()[WHOLE]

    # -- the study -----------------------------------------------------------------------------------------------

    def _found(self) -> optuna.Study | None:
        with self._reached(), suppress(KeyError):
            return optuna.load_study(study_name=self._name, storage=self._storage)
        return None

    def _made(self, made_for: Mapping[str, object], candidates: Callable[[], Iterable[Candidate]]) -> optuna.Study:
        """The study with its queue. Of several who make it at once one succeeds, and the others take what it made."""
        queue = sorted(candidates(), key=lambda one: one.plan.step_s)
        with self._reached():
            try:
                study = optuna.create_study(study_name=self._name, storage=self._storage, direction="maximize")
            except DuplicatedStudyError:
                return optuna.load_study(study_name=self._name, storage=self._storage)
            try:
                fill(study, made_for, queue)
            except BaseException:  # nobody could go on with a part of the queue
                with suppress(Exception):  # what ended this may end that too
                    optuna.delete_study(study_name=self._name, storage=self._storage)
                raise
        return study

    def _check(self, made_for: Mapping[str, object]) -> None:
        end = time.monotonic() + _FILLING_S
        while QUEUED not in (known := self._attributes()):
            if time.monotonic() > end:
                raise UsageError(
                    f"the study {self._name!r} was begun and has no queue: whoever made it was ended just then, or it "
                    "is not memplan's. Delete it (optuna.delete_study), or name another one"
                )
            time.sleep(_POLL_S)
        then = known[MADE_FOR]
        other = [name for name, value in made_for.items() if then.get(name) != value]
        if other:
            said = ", ".join(f"{name} {then.get(name)!r}, not {made_for[name]!r}" for name in other)
            raise PlanMismatch(
                f"the study {self._name!r} was made for {said}: its plans and times are not this one's. Name another "
                "study, or another file"
            )

    def _attributes(self) -> dict[str, Any]:
        with self._reached():
            try:
                return self._study.user_attrs
            except KeyError as error:
                raise UsageError(
                    f"the study {self._name!r} is gone: whoever made it was interrupted before it had its plans. Start "
                    "again"
                ) from error

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def all(self) -> tuple[Trial, ...]:
        """Every candidate's trial, the latest of those that were taken up again."""
        with self._reached():
            trials = self._study.get_trials(deepcopy=False)
        stands_for: dict[int, int] = {}  # of two workers that took a trial up at once the first one's copy counts
        for trial in trials:
            if _AGAIN in trial.user_attrs:
                stands_for.setdefault(trial.user_attrs[_AGAIN], trial.number)
        counted = (t for t in trials if stands_for.get(t.user_attrs.get(_AGAIN, -1), t.number) == t.number)
        return tuple(self._read(trial) for trial in counted if trial.number not in stands_for)

    def _read(self, trial: FrozenTrial) -> Trial:
        number, attributes = trial.number, trial.user_attrs
        if number not in self._plans:
            self._plans[number] = unpacked(attributes[PLAN])
        measured = Measured.model_validate_json(attributes[_MEASURED]) if trial.state is TrialState.COMPLETE else None
        state, why = trial.state.name.lower(), attributes.get(_WHY, "")
        return Trial(
            **trial.params,
            plan=self._plans[number],
            number=number,
            state=state,
            measured=measured,
            why=why,
            began=_HEARD in attributes,
        )

    def best(self, trials: Iterable[Trial]) -> Trial | None:
        """The fastest that was measured and kept the budget; Optuna's `best_trial`."""
        return min((one for one in trials if self._keeps_budget(one)), key=_step_s, default=None)

    def possible(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those that can be run, as far as is known: not what failed, ran out of memory or broke the budget."""
        return [one for one in trials if not one.began or one.state == "running" or self._keeps_budget(one)]

    def _keeps_budget(self, trial: Trial) -> bool:
        return trial.measured is not None and trial.measured.needs_bytes <= self.budget_bytes

    # -- one worker ----------------------------------------------------------------------------------------------

    def claim(self, most: int, *, until_found: bool = False) -> Trial | None:
        """The most promising of those that wait, for this worker alone; None when all is done.

        Those that cannot win are let go. Where none waits but others are at work, their end is awaited. Plans that may
        need more than the budget come last.

        Args:
            most: trials that are run at all, those of other workers counted. Workers that begin their last one at the
                same moment may each run one beyond.
            until_found: more are run for as long as none has kept the budget.
        """
        begun, is_said = time.monotonic(), False
        while True:
            self._take_up()
            trials = self.all
            best, waiting = self.best(trials), [one for one in trials if one.state == "waiting"]
            scale = Scale(trials)
            for one in list(waiting):
                if best is not None and scale.possible_s(one) * (1 + NEAR) >= _step_s(best) and self._claimed(one):
                    self._end(one, TrialState.PRUNED, _slower(scale.expected_s(one), best))
                    waiting.remove(one)
            none_runs = all(one.state != "running" for one in trials)
            if sum(one.began for one in trials) < most or (until_found and best is None and none_runs):
                order = sorted(waiting, key=lambda one: (one.plan.verdict is Verdict.UNCERTAIN, scale.expected_s(one)))
                claimed = next((one for one in order if self._claimed(one)), None)
                if claimed is not None:
                    self._note(claimed, _WORKER, this_worker())
                    self.alive(claimed)
                    return claimed
            running = [one for one in self.all if one.state == "running"]
            if not running:
                return None
            if not is_said and time.monotonic() - begun > _SILENT_S:
                is_said = True
                self._say_awaited(running)
            time.sleep(_POLL_S)

    def _say_awaited(self, running: Sequence[Trial]) -> None:
        numbers = ", ".join(str(one.number) for one in running)
        longest_s = max(self._may_be_silent_s(one.plan) for one in running)
        _log.warning(
            "memplan: waiting for trial %s, which another process is running; if it says nothing for %s it is taken "
            "to be gone, and the trial is run here",
            numbers,
            format_seconds(longest_s),
        )

    def _may_be_silent_s(self, plan: Plan) -> float:
        """How long a worker that is well may say nothing."""
        return self._patience_s + _PACE * plan.step_s

    def alive(self, trial: Trial) -> None:
        """Say that the trial is being worked on."""
        self._note(trial, _HEARD, time.time())

    def measured(self, trial: Trial, found: Measured) -> None:
        """It ran: samples per second are the study's objective, the peak beyond the budget its constraint."""
        over_bytes, rate = found.needs_bytes - self.budget_bytes, trial.plan.effective_batch / found.step_s
        self._note(trial, _MEASURED, found.model_dump_json())
        if over_bytes > 0:
            self._note(trial, _WHY, f"its peak is {format_bytes(over_bytes)} above the budget")
        with self._reached(), suppress(UpdateFinishedTrialError):  # taken up again by others, who thought it lost
            optuna.Trial(self._study, self._trial_id(trial)).set_constraint("peak", float(over_bytes))
            self._study.tell(trial.number, rate, TrialState.COMPLETE, skip_if_finished=True)

    def ran_out(self, trial: Trial, why: str) -> None:
        self._end(trial, TrialState.PRUNED, why)

    def failed(self, trial: Trial, why: str) -> None:
        self._end(trial, TrialState.FAIL, why)

    def give_back(self, trial: Trial) -> None:
        """It was interrupted: it waits again."""
        with self._reached():
            frozen = self._storage.get_trial(self._trial_id(trial))
        self._again(frozen, "interrupted", lost=False)

    # -- its state in the storage --------------------------------------------------------------------------------

    def _claimed(self, trial: Trial) -> bool:
        with self._reached(), suppress(UpdateFinishedTrialError):
            return self._storage.set_trial_state_values(self._trial_id(trial), TrialState.RUNNING)
        return False

    def _end(self, trial: Trial, state: TrialState, why: str) -> None:
        self._note(trial, _WHY, why)
        with self._reached():
            self._study.tell(trial.number, state=state, skip_if_finished=True)

    def _note(self, trial: Trial, key: str, value: object) -> None:
        with self._reached(), suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._trial_id(trial), key, value)

    def _take_up(self) -> None:
        """Trials of workers that are gone wait again, each once."""
        with self._reached():
            running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in running:
            if has_ended(trial.user_attrs.get(_WORKER)):
                self._again(trial, "its process has ended", lost=True)
                continue
            now = time.monotonic()  # of this process: others' clocks are in other time zones, or wrong
            unheard_s = now - self._seen_s.setdefault(trial.number, now)
            silent_s = time.time() - trial.user_attrs[_HEARD] if _HEARD in trial.user_attrs else unheard_s
            if silent_s > self._may_be_silent_s(self._read(trial).plan):
                self._again(trial, f"nothing was heard of its worker for {silent_s:.0f} s", lost=True)

    def _again(self, trial: FrozenTrial, why: str, *, lost: bool) -> None:
        """Let a copy of a trial wait, and end it; but what has cost two workers is left alone.

        In this order: whatever ends this process between the two, there is a trial to go on with.
        """
        one, was_lost = self._read(trial), trial.user_attrs.get(_LOST, False)
        self._note(one, _WHY, why)
        with self._reached():
            if not (lost and was_lost) and any(each.number == one.number for each in self.all):
                attributes = {PLAN: trial.user_attrs[PLAN], _AGAIN: one.number, _LOST: lost or was_lost}
                self._study.add_trial(queued(trial.params, trial.distributions, attributes))
            with suppress(UpdateFinishedTrialError):  # by another worker, which has seen to it
                self._storage.set_trial_state_values(self._trial_id(one), TrialState.FAIL)

    def _trial_id(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)

    def _reached(self) -> AbstractContextManager[None]:
        return reached(f"the storage of the study {self._name!r}")


class Scale:
    """What the clock makes of predictions here: measured by predicted seconds, for each micro-batch."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._least: dict[int, float] = {}
        self._seen = 0
        for one in trials:
            if one.measured is not None:
                self._seen += 1
                ratio = one.measured.step_s / one.plan.step_s
                self._least[one.micro_batch] = min(ratio, self._least.get(one.micro_batch, ratio))
        self._any = min(self._least.values(), default=1.0)  # what is not known is taken for good, and tried

    def expected_s(self, trial: Trial) -> float:
        return trial.plan.step_s * self._least.get(trial.micro_batch, self._any)

    def possible_s(self, trial: Trial) -> float:
        """What the trial takes, or takes at least if predictions are no further off than `OFF`; 0: not known yet."""
        if trial.measured is not None:
            return trial.measured.step_s
        off = OFF if trial.micro_batch in self._least else OFF_ELSEWHERE
        return self.expected_s(trial) * (1 - off) if self._seen >= _SEEN else 0.0


def _slower(expected_s: float, best: Trial) -> str:
    taken = format_seconds(_step_s(best))
    return (
        f"{format_seconds(expected_s)} are to be expected by those that were run, and trial {best.number} took {taken}"
    )


def _step_s(trial: Trial) -> float:
    assert trial.measured is not None
    return trial.measured.step_s
