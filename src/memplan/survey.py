"""`survey`: one model planned for many cards at once, without any of them.

Planning takes its time for traces, and in those cards hardly differ: by the attention kernel that they run, by what a
few kernels take behind their results, and by what cuBLAS keeps. So the cards under which every operator would have run
alike share the traces of the first of them (`CudaBackend.alike`); what cuBLAS keeps is put in for each. With its own
memory and its own rates each card is then planned in pure arithmetic.

Two levers are offered here, to recompute whole blocks and to compute the loss in chunks: their traces do not depend on
how fast a card is. `plan` has more of them, so it finds the same or better.

Whether a card has enough memory is checked: the leanest plan is traced as planned and its run played on the card's
allocator. How a card with more than that would be used is read off the profile, less the largest share that the
allocator took beyond the tensors in traces without the loss in chunks; `plan` for that card has the last word on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Final

import numpy as np
import torch
from torch import nn

from memplan import optimizers, packed
from memplan.allocator import Settings
from memplan.batches import profiled, splits
from memplan.blocks import is_batch_coupled, statement
from memplan.device import memory_parts
from memplan.gpus import Gpu
from memplan.kernels import capability_of
from memplan.kernels.cuda import CudaBackend
from memplan.offer import Offer
from memplan.pipeline import sample_of
from memplan.plan_record import Verdict
from memplan.planner import Outcome, search
from memplan.problem import KEEP, RECOMPUTE
from memplan.profile import Level, Profile
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.risk import usable_bytes
from memplan.roofline import BAND, Rates, estimated, is_nominal
from memplan.samples import Sample
from memplan.strategy import Strategy
from memplan.study import LARGEST_MICRO_BATCH, Study
from memplan.summary import decisions_of
from memplan.trace import CATEGORIES, Trace
from memplan.training_run import usage_of

STRATEGY: Final = Strategy("survey", levers=("recompute", "loss-head"), host_memory=0.0)
_LEANEST: Final = replace(STRATEGY, objective="peak")
_PLENTY: Final = 2**60

_LIBRARIES: Final = CATEGORIES.index("libraries")
_ALWAYS_THERE: Final = ("params", "buffers", "optimizer")

Levels = Mapping[int, Mapping[str, Sequence[Level]]]  # micro-batch -> variant -> traces


def survey(
    model: nn.Module,
    cards: Sequence[Gpu],
    samples: int,
    *,
    method: str = "",
    sample: object = None,
    seq_len: int | None = None,
    optimizer: "str | torch.optim.Optimizer" = "adamw",
    autocast: torch.dtype | None = None,
    clip_grad_norm: bool = False,
) -> tuple[Offer, ...]:
    """What each card would do for a training step of so many samples, in the order of the cards.

    Args:
        model: any module, with weights anywhere, also on `meta`; it is not touched.
        cards: of the catalogue, each named once; none has to be here.
        samples: per optimizer step; micro-batches are planned.
        method: a word for how the model is trained, which comes back in the offers.
        sample, seq_len, optimizer, autocast, clip_grad_norm: as for `plan`.

    Raises:
        BadSample, BadOptimizer, BadBatch, NothingToTrain, ModelFailed, CannotTrace: as `plan` does.
    """
    shown = sample_of(model, sample, seq_len, None)
    recipe = Recipe(optimizer=optimizer, autocast=autocast, clips=clip_grad_norm)
    said = statement(model, shown.tokens), *packed.statements(model)[:1], optimizers.name_of(optimizer)
    assumed = "; ".join(said)
    assumed += f", autocast to {str(autocast).removeprefix('torch.')}" if autocast is not None else ""
    offers: dict[str, Offer] = {}
    recorder = Recorder(model, recipe)
    while waiting := [card for card in cards if card.name not in offers]:
        group = _Group(recorder, shown, waiting, samples)
        recorder = group.study.recorder
        made = [(card, group.offer(card, method)) for card in waiting if group.speaks_for(card)]
        offers.update((card.name, offer) for card, offer in made if group.speaks_for(card))  # after all its traces
    return tuple(offers[card.name].model_copy(update={"assumed": assumed}) for card in cards)


class _Group:
    """Cards that share traces: the first of some, and those which turn out to run all operators as it does."""

    def __init__(self, recorder: Recorder, sample: Sample, cards: Sequence[Gpu], samples: int) -> None:
        model, recipe = recorder.model, recorder.recipe
        self.samples = samples
        self.can_split = not is_batch_coupled(model)
        self.backend = CudaBackend(capability_of(cards[0]), {capability_of(card) for card in cards})
        pairs = splits(samples, None, self.can_split)
        self.points, accumulation = profiled(pairs), 2 if pairs[0][1] > 1 else 1
        recorder = recorder.on(self.backend)
        self.study = Study(model, sample, recipe, recorder, cards[0], None, self.points, accumulation, STRATEGY.levers)
        self._by_libraries: dict[tuple[int, ...], _Sized] = {}  # what they keep -> the profile with it

    def speaks_for(self, card: Gpu) -> bool:
        """Whether all that was traced so far would have been the same on a card."""
        return capability_of(card) in {self.backend.compute_capability, *self.backend.alike}

    def offer(self, card: Gpu, method: str) -> Offer:
        total, others, context = memory_parts(card, None)
        fits, possible = usable_bytes(total - others - context, STRATEGY.risk)
        there = self.study.plain.breakdown(0)
        always = sum(there[name] for name in _ALWAYS_THERE)
        sized = self._sized(CudaBackend(capability_of(card)).fixed_bytes())
        least = always if always > possible else sized.least_bytes
        verdict = Verdict.FITS if least <= fits else Verdict.UNCERTAIN if least <= possible else Verdict.DOES_NOT_FIT
        offer = Offer(
            method=method,
            gpu=card.name,
            total_bytes=total,
            verdict=verdict,
            least_bytes=least,
            is_bound=always > possible,
            samples=self.samples,
        )
        if not offer.fits:
            return offer
        taken = sized.taken(card, fits if verdict is Verdict.FITS else 0)
        decisions = decisions_of(taken)
        rate = None if is_nominal(card) else taken.samples_per_s
        how = {
            "micro_batch": taken.micro_batch,
            "blocks": len(decisions),
            "recomputed": sum(option == RECOMPUTE for option in decisions.values()),
            "chunked": not self.study.head.keys().isdisjoint(self.study.decisions(taken)),
            "samples_per_s": rate,
            "band": None if rate is None else tuple(rate / share for share in reversed(BAND)),
        }
        return offer.model_copy(update=how)

    def _sized(self, libraries: tuple[int, ...]) -> "_Sized":
        return self._by_libraries.setdefault(libraries, _Sized(self, libraries))

    @cached_property
    def levels(self) -> Levels:
        return {point: self.study.levels(point) for point in self.points}

    @cached_property
    def excess(self) -> float:
        """What an allocator takes beyond the tensors, as a share of them: the most that it did in a trace of the first
        card with the loss as it is. Of the others, and with the loss in chunks, it may be another."""
        traces = [level.trace for variants in self.levels.values() for level in variants[KEEP]]
        return max(_needs(trace) / trace.peak_bytes - 1 for trace in traces)

    @cached_property
    def leanest_trace(self) -> Trace:
        """What libraries keep, and how fast a card is, make no difference to which plan is the leanest."""
        return self.study.traced(self._sized(self.backend.fixed_bytes()).leanest).trace


class _Sized:
    """The profile of a group, for cards whose libraries keep the same."""

    def __init__(self, group: _Group, libraries: Sequence[int]) -> None:
        self.group, self.libraries = group, libraries

    @cached_property
    def levels(self) -> Levels:
        return {
            point: {variant: [self._level(level) for level in found] for variant, found in by_variant.items()}
            for point, by_variant in self.group.levels.items()
        }

    def _level(self, level: Level) -> Level:
        return replace(level, trace=_with_libraries(level.trace, self.libraries))

    @cached_property
    def profile(self) -> Profile:
        study = self.group.study
        return Profile.of(
            self.levels,
            study.blocks,
            estimated(self.levels, study.rates),
            can_split=self.group.can_split,
            largest_micro_batch=LARGEST_MICRO_BATCH if len(self.group.points) > 1 else self.group.points[0],
        )

    @cached_property
    def leanest(self) -> Outcome:
        """The plan of the smallest peak."""
        return _found(self.profile, _PLENTY, _LEANEST, self.group.samples)

    @cached_property
    def least_bytes(self) -> int:
        """Of the card's memory, for the leanest plan."""
        return _needs(_with_libraries(self.group.leanest_trace, self.libraries))

    def taken(self, card: Gpu, room_bytes: int) -> Outcome:
        """The fastest plan for so much room; the leanest, where that is less than it takes."""
        asked = max(int(room_bytes / (1 + self.group.excess)), self.leanest.timeline.peak_bytes)
        profile = replace(self.profile, times=estimated(self.levels, Rates.of(card)))
        return _found(profile, asked, STRATEGY, self.group.samples)


def _found(profile: Profile, budget_bytes: int, strategy: Strategy, samples: int) -> Outcome:
    found = search(profile, budget_bytes, strategy, effective_batch=samples)
    if not isinstance(found, Outcome):
        raise RuntimeError(f"internal error: {found.reason}, though the leanest plan was to be within it")
    return found


def _needs(trace: Trace) -> int:
    return usage_of(trace, Settings()).fits_bytes


def _with_libraries(trace: Trace, sizes: Sequence[int]) -> Trace:
    """The trace on a card whose libraries keep these bytes, each handle's in its place."""
    stored = trace.storage_bytes.copy()
    stored[np.flatnonzero(trace.storage_category == _LIBRARIES)] = sizes
    return replace(trace, storage_bytes=stored)
