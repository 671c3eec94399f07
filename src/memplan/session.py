"""One question about one model: the traces it takes, the plan they lead to, and the check of that plan by a trace."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Final

import numpy as np
import torch
from torch import nn

from memplan import cache, main_memory, optimizers
from memplan.advice import ways_out
from memplan.allocator import Settings
from memplan.assumptions import assumptions_of
from memplan.batches import POINTS, profiled, splits
from memplan.blocks import check_plannable, is_batch_coupled, signature
from memplan.checking import Found, Tried, best
from memplan.corrections import Corrections, seconds_by_lever
from memplan.device import CudaDevice, Device
from memplan.division import Division, division_of
from memplan.errors import DoesNotFit
from memplan.fitting import Live, key_of
from memplan.gpus import Gpu
from memplan.kernels import backend_for
from memplan.laps import doubted
from memplan.levers.host_memory import usable_bytes as usable_host_bytes
from memplan.levers.offload import BOUNDARY, measured_link
from memplan.levers.stepping import ASSUMPTION
from memplan.optimizer_step import IN_BACKWARD
from memplan.plan_record import Budget, Plan, Verdict
from memplan.planner import NoPlan, Outcome, search
from memplan.prediction import Prediction
from memplan.problem import KEEP, RECOMPUTE
from memplan.profile import Profile
from memplan.progress import shown
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.roofline import StepTimes, origin_of
from memplan.room import Room
from memplan.samples import Sample
from memplan.strategy import Strategy
from memplan.study import Planned, Study
from memplan.summary import frontier_of, layers_of, module_at, peak_of, reason_for, saved_of, timeline_of
from memplan.trace import Trace
from memplan.training_run import usage_of
from memplan.units import format_budget, format_bytes

_UNTRIED: Final = (
    "what the plan does leaves loss and gradients as they are: that was not tried on this model, which is not on the "
    "device, or takes too long there"
)

# Share of the datasheet's rate that pinned copies reach: 53.1 of 64 GB/s in torchtitan's pool. Not measured by memplan.
LINK_EFFICIENCY = 0.8


_PLENTY = 2**60


@dataclass(frozen=True)
class Session:
    """A model with everything that is asked about it.

    A plan for another budget on the same device (`within`) starts from what this session has traced and measured.
    """

    model: nn.Module
    sample: Sample
    recipe: Recipe
    gpu: Gpu
    device: Device | None
    known_division: Division | None = None
    _studies: dict[object, Study] = field(default_factory=dict, repr=False, compare=False)
    _leanest: dict[object, int] = field(default_factory=dict, repr=False, compare=False)  # bytes

    def within(self, total_bytes: int) -> "Session":
        """The same questions about a device with so much memory."""
        prefix = {"cpu": "cpu:", "size": ""}.get(self.gpu.kind)
        name = self.gpu.name if prefix is None else f"{prefix}{total_bytes}B"
        return replace(self, gpu=replace(self.gpu, name=name, total_bytes=total_bytes))

    @cached_property
    def recorder(self) -> Recorder:
        return Recorder(self.model, self.recipe, backend_for(self.gpu))

    @cached_property
    def division(self) -> Division:
        """Whether the batch may be divided: what is known of it, or what trying the loss tells."""
        place = None if self.device is None else self.device.torch_device
        return self.known_division or division_of(self.model, self.recipe, self.sample, place)

    @property
    def live(self) -> Live:
        """What a plan of this session was made with, and what is known by now of dividing the batch."""
        return Live(self.recipe, self.sample, vars(self).get("division", self.known_division))

    def micro_batches(self, effective_batch: int) -> list[int]:
        """Those by which a step trains what the whole batch would, the smallest first."""
        sizes = [micro_batch for micro_batch, _ in splits(effective_batch, None, self._can_split)]
        return sizes if len(sizes) == 1 or self.division.is_sound else [effective_batch]

    # -- predict -------------------------------------------------------------------------------------------------

    def predict(self) -> Prediction:
        """What the model needs as it stands."""
        with self.recipe.computing(self.model):
            trace = self.recorder.record(self.sample)
        tick = trace.peak_tick
        usage = None if self.gpu.kind == "cpu" else usage_of(trace, self._allocator, completes=True)
        peak_bytes, breakdown = peak_of(trace, usage)
        return Prediction(
            peak_bytes=peak_bytes,
            reserved_bytes=None if usage is None else usage.peak_reserved_bytes,
            completes_bytes=None if usage is None else usage.completes_bytes,
            fits_bytes=None if usage is None else usage.fits_bytes,
            phase=trace.phase_of(tick),
            module=module_at(trace, tick),
            breakdown=breakdown,
            saved=saved_of(trace),
            timeline=timeline_of(trace),
            how=trace.how,
            micro_batch=trace.micro_batch,
            accumulation=trace.accumulation,
            optimizer=optimizers.name_of(self.recipe.optimizer),
            autocast=_name(self.recipe.autocast),
            assumptions=self._assumptions(trace),
        )

    # -- plan ----------------------------------------------------------------------------------------------------

    def plan(self, strategy: Strategy, effective_batch: int | None, micro_batch: int | None) -> Plan:
        """As `solve`, but the batch stays whole where its parts would train something else.

        With lines on what a loop that divides it has to know. A micro-batch that is asked for stays.
        """
        found = self.solve(strategy, effective_batch, micro_batch)
        if found.accumulation == 1:
            return found
        if not self.division.is_sound and micro_batch is None:
            found = self.solve(strategy, effective_batch, effective_batch)
        found = found.assuming(*self.division.said(found.accumulation))
        found._live = self.live
        return found

    @shown("planning")
    def solve(self, strategy: Strategy, effective_batch: int | None, micro_batch: int | None) -> Plan:
        """The best plan, checked by a trace of the model as planned.

        "uncertain" is a plan that takes more than the budget, but not so much that it surely fails (see `risk`).
        """
        with self.recipe.computing(self.model):
            return self._solved(strategy, effective_batch, micro_batch)

    def _solved(self, strategy: Strategy, effective_batch: int | None, micro_batch: int | None) -> Plan:
        check_plannable(self.model)
        pairs = splits(effective_batch, micro_batch, self._can_split)
        points = self._clearest_first(profiled(pairs) if effective_batch or micro_batch else POINTS)
        study = self._study(points, 2 if pairs[0][1] > 1 else 1, strategy)
        budget = self._room.budget(strategy, study.plain)
        self._refuse_below_static(study.plain, budget)
        profile = self._corrected(study.profile)

        def asked(usable: int, strategy: Strategy) -> Outcome | NoPlan:
            return search(
                profile,
                usable,
                strategy,
                effective_batch=effective_batch,
                micro_batch=micro_batch,
                link_bytes_s=self._link_bytes_s if study.host_bytes else None,  # on a live card it takes measuring
                host_bytes=study.host_bytes,
            )

        @lru_cache
        def ask(usable: int) -> Outcome | NoPlan:
            return asked(usable, strategy)

        def learn(micro_batch: int) -> None:
            nonlocal profile
            profile = profile.with_levels(micro_batch, study.levels(micro_batch))
            ask.cache_clear()

        def leanest(strategy: Strategy = strategy) -> Outcome:
            found = asked(_PLENTY, replace(strategy, objective="peak", levers_first=()))
            if isinstance(found, NoPlan):
                raise DoesNotFit(found.reason, found.smallest_bytes or 0)
            return found

        tried, possible = Tried(study), self._room.most(strategy, study.plain)[1]
        found, verdict = best(tried, ask, learn, leanest, budget.usable_bytes, possible)
        least, reason = tried.leanest[1].needs_bytes, ""
        if verdict is Verdict.DOES_NOT_FIT:
            refusal = ask(budget.usable_bytes)
            reason = refusal.reason if isinstance(refusal, NoPlan) else "the plan's own trace exceeds the budget"
        elif verdict is Verdict.FITS and self.gpu.kind == "cpu":  # where a profile knows
            least = found[0].smallest_bytes
        elif verdict is Verdict.FITS and strategy.objective != "peak":
            key = (id(study), strategy.levers, effective_batch, micro_batch)
            if key not in self._leanest:
                self._leanest[key] = study.traced(leanest(replace(strategy, max_slowdown=None))).needs_bytes
            least = min(least, self._leanest[key])
        return self._record(study, profile, found, least, budget, strategy, verdict, reason)

    def _clearest_first(self, points: Sequence[int]) -> Sequence[int]:
        """First the point where sizes can be told apart, at which most is traced and from which it is scaled: not one
        with as many tokens as a weight is wide. Where blocks are run, the smallest is first."""
        if self.device is not None:
            return points
        widths = {size for parameter in self.model.parameters() for size in parameter.shape}
        return sorted(points, key=lambda point: point * (self.sample.tokens or 1) in widths)

    def _study(self, points: Sequence[int], accumulation: int, strategy: Strategy) -> Study:
        asked = (self.model, self.sample, self.recipe, self.recorder, self.gpu, self.device)
        settings = (tuple(points), accumulation, strategy.levers, self._host_bytes(strategy), self._allocator)
        return self._studies.setdefault(settings, Study(*asked, *settings))

    @cached_property
    def _link_bytes_s(self) -> float | None:
        """Of the link to the host; None where there is none: a CPU's tensors are on the host already."""
        if self.gpu.kind == "cpu":
            return None
        if self.device is not None:
            return measured_link(self.device.torch_device)
        return None if self.gpu.host_link_bytes_s is None else self.gpu.host_link_bytes_s * LINK_EFFICIENCY

    def _host_bytes(self, strategy: Strategy) -> int:
        """What a plan may copy to the host, if the strategy lets it; a share of a host that is not here is nothing."""
        if "offload" not in strategy.levers or self._link_bytes_s is None:
            return 0
        total = None if self.device is None else main_memory.share_bytes()
        return usable_host_bytes(strategy.host_bytes(total))

    @cached_property
    def _learned(self) -> Corrections:
        """What earlier runs of this model on this machine teach."""
        if self.device is None:
            return Corrections()
        return Corrections(cache.runs_of(key_of(self.model, self.sample, self.recipe, self.device)))

    def _corrected(self, profile: Profile) -> Profile:
        assert isinstance(profile.times, StepTimes)
        return replace(profile, times=self._learned.applied(profile.times))

    @cached_property
    def _can_split(self) -> bool:
        return not is_batch_coupled(self.model)

    # -- the record ----------------------------------------------------------------------------------------------

    @property
    def _room(self) -> Room:
        return Room(self.model, self.gpu, self.device, self._learned.excess_bytes)

    @cached_property
    def _allocator(self) -> Settings:
        """Of the card, as it is set in this process; torch's own where it is not here."""
        return self.device.allocator_settings() if isinstance(self.device, CudaDevice) else Settings()

    def _refuse_below_static(self, trace: Trace, budget: Budget) -> None:
        static = trace.breakdown(0)
        needed = sum(static[name] for name in ("params", "buffers", "optimizer"))
        if needed <= budget.usable_bytes:
            return
        smallest, span = trace.peak_in(trace.optimizer), trace.optimizer
        tick = (
            span.start + int(np.argmax(trace.live[span.start : span.stop]))
            if span.stop > span.start
            else trace.peak_tick
        )
        raise DoesNotFit(
            f"the budget of {format_budget(budget.usable_bytes)} on {budget.gpu} is below what is always there: "
            f"{format_bytes(needed)} ({format_bytes(static['params'])} weights, {format_bytes(static['optimizer'])} "
            f"optimizer state). No plan can help; the optimizer's step alone needs {format_bytes(smallest)}. "
            + " ".join(
                ways_out(
                    trace.breakdown(tick), trace.phase_of(tick), smallest, budget, 1, self._can_split, is_bound=True
                )
            ),
            smallest,
        )

    def _record(
        self,
        study: Study,
        profile: Profile,
        found: Found,
        smallest_bytes: int,
        budget: Budget,
        strategy: Strategy,
        verdict: Verdict,
        reason: str = "",
    ) -> Plan:
        outcome, planned = found
        whole = profile.problem(outcome.micro_batch, outcome.accumulation, budget.usable_bytes)
        decisions, trace = planned.decisions, planned.trace
        kept = set(decisions.values()) <= {KEEP} and planned.stepping == self.recipe.stepping
        unplanned = trace if kept else study.unplanned(outcome)
        usage, phase = planned.usage, trace.phase_of(trace.peak_tick)
        peak_bytes, breakdown = peak_of(trace, usage)
        fits = verdict is not Verdict.DOES_NOT_FIT
        can_split = self._can_split and (fits or outcome.micro_batch == 1 or self.division.is_sound)
        times = profile.times
        assert isinstance(times, StepTimes)
        frontier = frontier_of(outcome, study.stepping_of, planned.needs_bytes - outcome.timeline.peak_bytes)
        plan = Plan(
            verdict=verdict,
            reason=reason or reason_for(decisions, planned.needs_bytes, budget),
            budget=budget,
            strategy=strategy.name,
            objective=strategy.objective,
            micro_batch=outcome.micro_batch,
            accumulation=outcome.accumulation,
            effective_batch=outcome.micro_batch * outcome.accumulation,
            decisions=dict(decisions),
            selections=dict(planned.dropped),
            stepping=planned.stepping,
            host_bytes=outcome.timeline.host_bytes,
            layers=layers_of(whole, decisions, frontier),
            peak_bytes=peak_bytes,
            reserved_bytes=None if usage is None else usage.peak_reserved_bytes,
            fits_bytes=None if usage is None else usage.fits_bytes,
            peak_phase=phase,
            peak_module=module_at(trace, trace.peak_tick),
            breakdown=breakdown,
            unplanned_bytes=max(unplanned.peak_bytes, peak_bytes),
            step_s=outcome.timeline.step_s,
            seconds=seconds_by_lever(
                study.profile.times,
                {block.path: decisions[block.path] for block in whole.blocks},
                outcome.variant,
                outcome.micro_batch,
                outcome.accumulation,
            ),
            samples_per_s=outcome.samples_per_s,
            slowdown=outcome.slowdown,
            gap=outcome.gap,
            levers=outcome.levers,
            shadow_price=outcome.shadow_price_s_per_gib,
            times=origin_of(self.gpu, times),
            smallest_bytes=smallest_bytes,
            frontier=frontier,
            timeline=timeline_of(trace),
            unplanned_timeline=timeline_of(unplanned),
            ways_out=() if fits else ways_out(breakdown, phase, smallest_bytes, budget, outcome.micro_batch, can_split),
            optimizer=optimizers.name_of(self.recipe.optimizer),
            autocast=_name(self.recipe.autocast),
            how=trace.how,
            model=type(self.model).__name__,
            signature=signature(self.model, self.recipe.kept),
            replicas=self.recipe.replicas,
            shards=self.recipe.shards,
            mp_policy=str(self.recipe.mixed or ""),
            sample=self.sample.fields(),
            assumptions=(
                *self._assumptions(trace),
                *self._refusals(study, strategy),
                *_said_of(planned, study),
                *self._learned.describe(times.how),
                *doubted(times.doubt),
            ),
        )
        plan._live = self.live
        return plan

    def _assumptions(self, trace: Trace) -> tuple[str, ...]:
        return assumptions_of(self.model, self.sample, self.recipe, self.gpu, self.device, trace)

    def _refusals(self, study: Study, strategy: Strategy) -> tuple[str, ...]:
        """The levers that are not offered, each with the reason. On a CPU copies to the host could not have helped, so
        that they are told only where they were to come first."""
        could_help = self.gpu.kind != "cpu" or strategy.levers_first == ("offload",)
        if study.host_bytes or "offload" not in strategy.levers or not could_help:
            return study.refusals
        if self.gpu.kind == "cpu":
            why = "the tensors of a CPU are there already"
        elif self._link_bytes_s is None:
            why = (
                f"the speed of the link between {self.gpu.name} and its host is unknown. Name a card of the catalogue."
            )
        elif self.device is None and not isinstance(strategy.host_memory, str):
            why = (
                f"a plan may use {strategy.host_memory:.0%} of its memory, unknown of a host that is not here. "
                "Give the strategy's host_memory a size, such as '64GiB'."
            )
        else:
            why = f"host_memory = {strategy.host_memory!r} leaves no room there"
        return (*study.refusals, f"nothing is copied to the host: {why}")


def _said_of(planned: Planned, study: Study) -> tuple[str, ...]:
    """What a plan rests on for what it does."""
    tried = {RECOMPUTE, BOUNDARY, *study.head.values()}  # the other levers prove themselves when they run
    untried = not study.can_time and not tried.isdisjoint(planned.decisions.values())
    return (*((ASSUMPTION,) if planned.stepping == IN_BACKWARD else ()), *((_UNTRIED,) if untried else ()))


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
