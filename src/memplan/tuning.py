"""`tune`: the plan that is fastest by measurement, out of those that the planner has for several settings.

A prediction of time is good to a few percent, and plans are often closer to each other than that. So the best by
prediction are run. What has been measured says how far predictions are off here, and with that the rest is let go as
soon as it cannot win.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final

import optuna
import torch
from optuna.storages import BaseStorage
from torch import nn

from memplan import __version__, optimizers, pipeline
from memplan.bench import Bench, Failure, at_home
from memplan.blocks import signature
from memplan.device import Device, resolve_gpu
from memplan.errors import DoesNotFit, ModelFailed, NoDevice, UsageError
from memplan.fitting import Fit, Live, apply, check_bare, key_of
from memplan.gpus import Gpu
from memplan.laps import by_turns
from memplan.losses import Loss
from memplan.optimizer_step import IN_BACKWARD, PLAIN, SINGLE
from memplan.plan_record import Measured, Plan, SampleField, Verdict
from memplan.problem import levers_of
from memplan.progress import part, shown
from memplan.records import Telling
from memplan.session import Session
from memplan.storages import storage_of
from memplan.strategy import SAFE_LEVERS, Lever, Strategy, load_strategy
from memplan.summary import reason_for
from memplan.trials import Candidate, Scale, Trial, Trials
from memplan.units import format_bytes, format_rate, format_seconds

STRATEGIES: Final = ("balanced", "recompute-only")
BUDGET_SHARES: Final = (1.0, 0.85, 0.7)
"""A smaller share costs time by prediction; a card that is nearly full may lose more to its allocator."""

_PART: Final = 3  # one of so many candidates is run, if the caller does not say how many are
_LEAST: Final = 2

_NOISE: Final = 0.1  # share of a step: so near to the best, a plan is run again beside it

ANY, AS_IT_IS = "any", "as it is"  # what a plan may do about the loss head
_STEPPING: Final[dict[str, Lever]] = {SINGLE: "optimizer", IN_BACKWARD: "step-in-backward"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, repr=False)
class Tuned(Telling):
    """What `tune` found.

    Attributes:
        plan: the fastest of those that were measured within the budget, for the device that `tune` ran on. Its budget
            is the whole one.
        measured: what it took. Its seconds are of one scale with the other trials'.
        number: of its trial.
        trials: every candidate, also those that were not run.
        gap: share of the step's time that another plan could save at most, if predictions are no further off than
            `trials.OFF`. The planner's bound is proven of predictions; what they are off by is measured, not proven.
            Plans that failed or broke the budget when they were run are not counted among the others. 1: too few were
            run to say how far predictions are off.
    """

    plan: Plan
    measured: Measured
    number: int
    trials: tuple[Trial, ...]
    gap: float

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Fit:
        """Make the model run by the plan, as `memplan.apply` does."""
        fit = apply(model, self.plan, optimizer)
        fit.measured = self.measured
        return fit

    def describe(self) -> str:
        """What was tried and what was found, in a few lines of plain text."""
        ran = sum(trial.measured is not None for trial in self.trials)
        bound = f"no other could be more than {self.gap:.1%} faster, as far as predictions hold"
        if self.gap >= 1:
            bound = "too few to say how much faster another could be"
        lines = [f"measured {ran} of {len(self.trials)} plans; {bound}"]
        for trial in sorted(self.trials, key=_order):
            told = trial.why or ("not run" if trial.state == "waiting" else trial.state)
            if trial.measured is not None:
                told = f"{format_seconds(trial.measured.step_s)} per step{trial.why and f', but {trial.why}'}"
            lines.append(
                f"  {trial.number:3}: {trial.plan.micro_batch:4} x {trial.plan.accumulation:<4}"
                f" share {trial.budget_share:<5} {trial.strategy}, loss head {trial.loss_head}: {told}"
                f" (predicted {format_seconds(trial.plan.step_s)})"
            )
        rate = format_rate(self.plan.effective_batch / self.measured.step_s, "samples")
        lines += [
            f"taken: {self.number}, {format_seconds(self.measured.step_s)} per step, {rate}, as measured",
            "",
            "As it was planned, with the seconds that were predicted:",
        ]
        return "\n".join([*lines, self.plan.describe()])


def tune(
    model: nn.Module,
    gpu: str | Gpu = "auto",
    *,
    effective_batch: int,
    sample: object = None,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    clip_grad_norm: bool = False,
    seq_len: int | None = None,
    strategies: Sequence[str | Path | Strategy] = STRATEGIES,
    budget_shares: Sequence[float] = BUDGET_SHARES,
    n_trials: int | None = None,
    storage: str | Path | BaseStorage | None = None,
    study: str = "memplan",
    patience_s: float = 300.0,
) -> Tuned:
    """Run the most promising plans for real steps on the device, and take the fastest that keeps the budget.

    There is a plan for every micro-batch that divides the effective batch (only the whole one, where the loss or batch
    norm sets its rows against each other), every share of the budget, every strategy, with and without the loss head's
    lever; equal ones count once. They are run in the order of what they promise, until none could be more than 1 %
    faster than the best, or `n_trials` were run. The steps train nothing, and the model is afterwards what it was. On a
    card each is run in a process of its own (not yet measured on one).

    Processes that are given the same storage and study share the work, on one machine or many, each on a device of the
    same kind; one that ends is replaced by calling `tune` again, which also goes on with an earlier study.

    Args:
        model, gpu, sample, loss, optimizer, autocast, clip_grad_norm, seq_len: as for `memplan.plan`; the weights have
            to be on the device. For a card, model and loss are handed to another process: no lambda, and a script
            that calls this under ``if __name__ == "__main__":``.
        effective_batch: samples per optimizer step.
        strategies: names, files or records, as for `memplan.plan`.
        budget_shares: of the usable memory, each above 0 and at most 1.
        n_trials: plans that are run at most; by default a third of them, at least 2, and as many more as it takes until
            one has kept the budget.
        storage: where the study is kept: None for memory, a file ending in .log or .journal, a database's URL, or
            "grpc://host:port".
        study: its name there.
        patience_s: a process of which nothing is heard for so long, beyond the time of its steps, counts as ended, and
            its trial is run again, once.

    Raises:
        DoesNotFit: no plan fits the budget.
        NoDevice: the device is not here, or the weights are not on it.
        AlreadyApplied: the model runs by a plan.
        PlanMismatch: the study was made for another model, or by other arguments.
        UsageError: the storage cannot be used; and what `memplan.plan` raises.
        ModelFailed: no trial could be measured.
    """
    model = pipeline.module_of(model)
    recipe = pipeline.recipe_of(loss, optimizer, autocast, clip_grad_norm)
    card, device = resolve_gpu(gpu)
    live_device = _checked(model, card, device)
    if not strategies or not budget_shares or (n_trials is not None and n_trials < 1):
        raise UsageError("tuning needs at least one strategy, one share of the budget and one trial")
    chosen = [load_strategy(one) for one in strategies]
    shares = sorted({replace(chosen[0], budget_share=share).budget_share for share in budget_shares}, reverse=True)
    session = Session(model, pipeline.sample_of(model, sample, seq_len, None), recipe, card, device)
    made_for = {
        "model": type(model).__name__,
        "signature": signature(model),
        "memplan": __version__,
        "torch": torch.__version__,
        "device": card.name,
        "runs on": key_of(model, session.sample, recipe, live_device).card,  # on a CPU its threads too
        "budget_bytes": card.total_bytes,
        "effective_batch": effective_batch,
        "loss": None if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__),
        "optimizer": optimizers.name_of(recipe.optimizer),
        "autocast": str(autocast),
        "clip_grad_norm": clip_grad_norm,
        "strategies": list(map(str, chosen)),
        "budget_shares": shares,
        "sample": ", ".join(map(_said, session.sample.fields())),
    }
    with _quiet(), shown("tuning"):
        trials = Trials(
            storage_of(storage),
            study,
            made_for,
            lambda: _candidates(session, chosen, shares, effective_batch),
            patience_s,
        )
        most = n_trials or max(_LEAST, len(trials.all) // _PART)
        with Bench(model, recipe, session.sample, live_device) as bench:
            while (trial := trials.claim(most, until_found=n_trials is None)) is not None:
                begun = sum(one.began for one in trials.all)
                part(begun, max(begun, most), "trial")
                try:
                    _try(trial, trials, bench)
                except BaseException:
                    trials.give_back(trial)
                    raise
        return _tuned(trials, session.live, live_device)


def _said(tensor: SampleField) -> str:
    """Not its values: another batch of the same shapes belongs to the same study."""
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"


def _checked(model: nn.Module, card: Gpu, device: Device | None) -> Device:
    if device is None:
        raise NoDevice(
            f"tuning runs the model, and {card.name} is not here: name a device of this machine (cuda, cpu:2GiB), or "
            "plan without measuring (memplan.plan)"
        )
    here = {str(parameter.device) for parameter in model.parameters()}
    if here != {str(device.torch_device)}:
        raise NoDevice(
            f"tuning runs the model on {card.name}, but its weights are on {', '.join(sorted(here))}: move it to a "
            "device of this machine and name that one, or plan without measuring (memplan.plan)"
        )
    check_bare(model, "tune")
    return device


# --- the candidates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Way:
    """A micro-batch, a strategy, and whether the loss head's lever may be pulled. What is left to say is the budget."""

    micro_batch: int
    strategy: Strategy
    head: str

    @property
    def levers(self) -> tuple[Lever, ...]:
        return tuple(one for one in self.strategy.levers if self.head == ANY or one != "loss-head")

    @property
    def adds_nothing(self) -> bool:
        return self.head == ANY and "loss-head" not in self.levers

    def within(self, share: float) -> Strategy:
        """As levers to be tried before all others, so that one set of traces and times serves every way."""
        if self.strategy.levers_first or not self.levers:
            return replace(self.strategy, levers=self.levers, budget_share=share)
        every = tuple(dict.fromkeys((*SAFE_LEVERS, *self.levers)))
        return replace(self.strategy, levers=every, levers_first=self.levers, budget_share=share)


def _candidates(
    session: Session, strategies: Sequence[Strategy], shares: Sequence[float], effective_batch: int
) -> list[Candidate]:
    """The distinct plans that fit. Raises DoesNotFit if there is none."""
    sizes = session.micro_batches(effective_batch)
    found: dict[object, Candidate] = {}
    misfits: list[DoesNotFit] = []
    for way in (_Way(*one) for one in product(sizes, strategies, (ANY, AS_IT_IS))):
        if way.adds_nothing:
            continue
        try:
            for one in _shrinking(session, way, shares, effective_batch):
                found.setdefault(_content(one.plan), one)
        except DoesNotFit as error:
            misfits.append(error)
    if not found:
        raise min(misfits, key=lambda one: one.smallest_bytes)
    return list(found.values())


def _shrinking(session: Session, way: _Way, shares: Sequence[float], effective_batch: int) -> Iterator[Candidate]:
    """Plans for ever smaller shares of the budget, as far as there are any and they differ. DoesNotFit if none is."""
    before: Candidate | None = None
    for share in shares:
        if before is not None and before.plan.needs_bytes <= before.whole_bytes * share:
            continue  # the best of more plans is among these
        try:
            plan = session.solve(way.within(share), effective_batch, way.micro_batch)
            plan = plan.assuming(*session.division.said(plan.accumulation))
            if plan.verdict is Verdict.DOES_NOT_FIT:
                raise DoesNotFit(plan.describe(), plan.smallest_bytes)
            if others := _levers_of(plan) - set(way.levers):
                raise DoesNotFit(
                    f"no plan by the levers of {way.strategy.name} fits {format_bytes(plan.budget_bytes)} with a "
                    f"micro-batch of {way.micro_batch}; it would take {', '.join(sorted(others))} too",
                    plan.budget_bytes,
                )
        except DoesNotFit:
            if before is None:
                raise
            return
        before = Candidate(way.micro_batch, share, way.strategy.name, way.head, plan)
        yield before


def _levers_of(plan: Plan) -> set[Lever]:
    pulled = {lever for option in plan.decisions.values() for lever in levers_of(option)}
    return pulled if plan.stepping == PLAIN else pulled | {_STEPPING[plan.stepping]}


def _content(plan: Plan) -> tuple[object, ...]:
    """What a plan does."""
    done = tuple((path, plan.selections.get(option, option)) for path, option in plan.decisions.items())
    return plan.micro_batch, plan.accumulation, plan.stepping, done


# --- a trial --------------------------------------------------------------------------------------------------------


def _try(trial: Trial, trials: Trials, bench: Bench) -> None:
    """Run it, and once more beside the best so far where the two are close."""
    found = bench.run(trial.plan)
    if isinstance(found, Failure):
        (trials.ran_out if found.memory else trials.failed)(trial, found.why)
        _log.info("trial %d: %s", trial.number, found.why)
        return
    best = trials.best(trials.all)
    if best is not None and best.measured is not None and found.step_s < best.measured.step_s * (1 + _NOISE):
        with suppress(_Fails):
            found = found.model_copy(update={"step_s": best.measured.step_s * _pace(trial, best, trials, bench)})
    trials.measured(trial, found)
    _log.info("trial %d: %s", trial.number, found.describe())


def _pace(trial: Trial, best: Trial, trials: Trials, bench: Bench) -> float:
    """The seconds of a trial by those of the best, run in turn: what else the machine does slows both."""

    def lap(plan: Plan) -> float:
        trials.alive(trial)
        found = bench.run(plan, remembered=False)
        if isinstance(found, Failure):
            raise _Fails
        return found.step_s

    laps = by_turns({"trial": lambda: lap(trial.plan), "best": lambda: lap(best.plan)})
    return laps.seconds["trial"] / laps.seconds["best"]


class _Fails(Exception):
    """A plan that ran a moment ago."""


# --- the result -----------------------------------------------------------------------------------------------------


def _tuned(trials: Trials, live: Live, device: Device) -> Tuned:
    every = trials.all
    best = trials.best(every)
    if best is None or best.measured is None:
        why = next((trial.why for trial in every if trial.why), "none was run")
        raise ModelFailed(f"none of {len(every)} plans could be measured within the budget: {why}")
    plan = _of_the_whole(at_home(best.plan, device), best.whole_bytes)
    plan._live = live
    scale = Scale(every)
    possible_s = min(scale.possible_s(trial) * (1 - trial.plan.gap) for trial in trials.possible(every))
    measured = best.measured.model_copy(update={"budget_bytes": plan.budget_bytes})
    return Tuned(plan, measured, best.number, every, max(0.0, 1 - possible_s / measured.step_s))


def _of_the_whole(plan: Plan, whole_bytes: int) -> Plan:
    """With the whole budget, of which the plan was made for a share: what it leaves is spare."""
    if (unused_bytes := whole_bytes - plan.budget_bytes) <= 0:
        return plan
    budget = plan.budget.model_copy(update={"margin_bytes": plan.budget.margin_bytes - unused_bytes})
    changes = {
        "budget": budget,
        "share_bytes": plan.budget_bytes,
        "reason": reason_for(plan.decisions, plan.needs_bytes, budget),
        "verdict": Verdict.FITS if plan.needs_bytes <= whole_bytes else plan.verdict,
        "shadow_price": 0.0,  # that of the share's last bytes, of which the whole has more
    }
    return plan.model_copy(update=changes)


def _order(trial: Trial) -> tuple[bool, float]:
    """What was measured first, then the rest, the fastest of each first."""
    return (True, trial.plan.step_s) if trial.measured is None else (False, trial.measured.step_s)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's word on each trial: memplan has its own."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
