"""`Study`: what could be done with a model, and what each of it costs, from a handful of traces.

First the menu: the graph of each distinct block, captured in the plain trace or timed on the device, gives the
selections worth having. Then the levels: traces in which every block shows each of its options in turn, at the one or
two micro-batches that the profile is made of.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from memplan import levers
from memplan.allocator import Settings, Usage
from memplan.blocks import alike, check_uncheckpointed, find_blocks, is_batch_coupled, one_of_each
from memplan.device import Device
from memplan.errors import CannotTrace, ModelFailed
from memplan.fresh_memory import relieved, seconds_per_byte
from memplan.gpus import Gpu
from memplan.graph import BlockGraph
from memplan.levers import loss_head, offload, recompute, select, stepping
from memplan.levers.capture import Captured
from memplan.levers.host_pool import HostPool
from memplan.levers.lanes import queued_on_paper
from memplan.levers.select import found_in, watched
from memplan.levers.uses import Uses
from memplan.menu import Menu
from memplan.optimizer_step import IN_BACKWARD, SINGLE
from memplan.planner import Outcome
from memplan.problem import KEEP, RECOMPUTE, lever_of
from memplan.profile import Level, Profile
from memplan.progress import stage
from memplan.proof import difference_without
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.rescale import levels_at
from memplan.roofline import Rates, StepTimes, estimated, node_seconds
from memplan.samples import Sample
from memplan.strategy import LEVERS, Lever
from memplan.summary import decisions_of
from memplan.timing import captured, cpu_rates, measured
from memplan.trace import Trace
from memplan.training_run import excess_of, usage_of

LARGEST_MICRO_BATCH = 4096
_LONGEST_S = 120.0  # a step that would take longer, by the roofline, is not timed block by block before it is planned
_ANY_BYTES = 2**60  # the limit on host memory is the planner's business, not the traces'
_VARIANTS = {SINGLE: "optimizer-single", IN_BACKWARD: "in-backward"}


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, traced."""

    decisions: Mapping[str, str]  # module path -> option, the loss head's last
    dropped: Mapping[str, tuple[str, ...]]  # selection -> what it drops at this micro-batch
    stepping: str  # when and how the optimizer steps
    trace: Trace
    usage: Usage | None  # what a run of it takes of a card's allocator; None on a CPU, which has none

    @property
    def needs_bytes(self) -> int:
        """The memory without which it does not run, or only by giving back and asking again."""
        return self.trace.peak_bytes if self.usage is None else self.usage.fits_bytes


@dataclass(frozen=True)
class Study:
    """A model under study.

    Attributes:
        points: micro-batches at which the model is traced.
        accumulation: micro-steps per step in these traces, 1 or 2; the second stands for all that follow.
        levers: what a plan may use; nothing else is traced.
        host_bytes: what may lie on the host at once.
        allocator: settings of the card's allocator.
    """

    model: nn.Module
    sample: Sample
    recipe: Recipe
    recorder: Recorder
    gpu: Gpu
    device: Device | None
    points: Sequence[int]
    accumulation: int
    levers: Sequence[Lever] = LEVERS
    host_bytes: int = 0  # with 0, offloading is not on the menu
    allocator: Settings = field(default_factory=Settings)

    # -- traces --------------------------------------------------------------------------------------------------

    def trace(self, micro_batch: int, decisions: Mapping[str, str], recorder: Recorder | None = None) -> Trace:
        """The step with the model as decided."""
        return self._level(micro_batch, decisions, recorder).trace

    def _level(self, micro_batch: int, decisions: Mapping[str, str], recorder: Recorder | None = None) -> Level:
        dropped, every = self.menu.of_decisions(decisions), {**self._as_it_is(self.blocks), **decisions}
        pool = HostPool(_ANY_BYTES)
        trace = self._recorded(micro_batch, lambda: levers.decided(self.model, every, dropped, pool), recorder=recorder)
        copied = {path: pool.copied[group[0]] for group in self._groups for path in group if group[0] in pool.copied}
        return Level(decisions, trace, copied)

    @cached_property
    def _groups(self) -> list[tuple[str, ...]]:
        return alike(self.model, self.blocks)

    def _recorded(
        self,
        micro_batch: int,
        installed: Callable[[], AbstractContextManager[object]],
        accumulation: int | None = None,
        recorder: Recorder | None = None,
    ) -> Trace:
        stage("tracing")
        sample = self.sample.resized(micro_batch)
        return (recorder or self.recorder).record(sample, installed, accumulation or self.accumulation)

    @property
    def plain(self) -> Trace:
        """At the first point, everything kept."""
        return self._first[0]

    @cached_property
    def _first(self) -> tuple[Trace, dict[str, Captured]]:
        """The plain trace, and what was captured in it of the first of each group of alike blocks, to drop parts."""
        found: dict[str, Captured] = {}
        blocks = find_blocks(self.model)

        @contextmanager
        def installed() -> Iterator[None]:
            heads = [group[0] for group in alike(self.model, blocks)] if "select" in self.levers else []
            with levers.decided(self.model, self._as_it_is(blocks)), watched(self.model, heads, found):
                yield

        return self._recorded(self.points[0], installed), found

    def _as_it_is(self, blocks: Sequence[str]) -> dict[str, str]:
        """Every block and the loss head without a lever; the model may run by a plan already."""
        path = loss_head.find_head(self.model)
        return dict.fromkeys(blocks if path is None else (*blocks, path), KEEP)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """What is decided on, in forward order: modules that run once in a forward."""
        runs = [block.path for block in self.plain.steps[0].blocks]
        record = partial(self._recorded, self.points[0], nullcontext)
        check_uncheckpointed(self.model, runs if "recompute" in self.levers else (), self.plain, record)
        return tuple(path for path in runs if runs.count(path) == 1)

    @cached_property
    def _recomputed(self) -> Trace | str:
        """At the first point, every block recomputed; or why that cannot be, with no word if it was not asked for."""
        every = {**self._as_it_is(()), **dict.fromkeys(self.blocks, RECOMPUTE)}
        if "recompute" not in self.levers:
            return ""
        written: list[str] = []
        try:
            trace = self._recorded(self.points[0], lambda: levers.noting_writes(self.model, every, written))
            why = recompute.refusal(written, self.model)
            if why is None and self.blocks:
                some = one_of_each(self.model, self.blocks)
                why = self._disproof(dict.fromkeys(some, RECOMPUTE), some, asks=False)
        except (ModelFailed, CannotTrace, CheckpointError) as error:
            return str(error).splitlines()[0]
        return why or trace

    @property
    def refusals(self) -> tuple[str, ...]:
        """The levers that are not offered though they could have helped, each with the reason."""
        lines = []
        if self.blocks and isinstance(self._recomputed, str) and self._recomputed:
            lines.append(f"blocks cannot be recomputed: {self._recomputed}")
        if "select" in self.levers:
            graphs = {path: graph for path, (graph, _) in self._graphs.items()}
            traced = [found.graph for path, found in self._first[1].items() if path in self.blocks]
            lines += select.refusals(graphs, traced, bool(self.menu.selections))
        if isinstance(self._chunked, str):
            lines.append(f"the loss cannot be computed in chunks: {self._chunked}")
        if "step-in-backward" in self.levers and _VARIANTS[IN_BACKWARD] not in self.steppings:
            why = stepping.refusal_of(self.recipe, self.accumulation)
            lines.append(f"the optimizer cannot step inside the backward: {why}")
        return tuple(lines)

    def traced(self, outcome: Outcome) -> Planned:
        """The model as planned, which has the last word."""
        decisions = self.decisions(outcome)
        dropped: dict[str, tuple[str, ...]] = {}
        pool = HostPool(_ANY_BYTES, lanes=queued_on_paper)  # with the copies in flight

        @contextmanager
        def installed() -> Iterator[None]:
            every = {**self._as_it_is(self.blocks), **decisions}
            with levers.decided(self.model, every, self.menu.of_decisions(decisions), pool):
                yield
                dropped.update(found_in(self.model, decisions))

        recorder = self._recorder_of(outcome.variant)
        trace = self._recorded(outcome.micro_batch, installed, outcome.accumulation, recorder)
        usage = None if self.gpu.kind == "cpu" else usage_of(trace, self.allocator)
        return Planned(decisions, dropped, recorder.recipe.stepping, trace, usage)

    def unplanned(self, outcome: Outcome) -> Trace:
        """The model with nothing done, in the batch of the plan."""
        micro_batch, accumulation = outcome.micro_batch, outcome.accumulation
        if (micro_batch, min(accumulation, 2)) == (self.points[0], self.accumulation):
            return self.plain  # a trace has two micro-steps at most
        kept = partial(levers.decided, self.model, self._as_it_is(self.blocks))
        return self._recorded(micro_batch, kept, accumulation)

    def stepping_of(self, variant: str) -> str:
        """How the optimizer steps in a variant."""
        return self._recorder_of(variant).recipe.stepping

    def _recorder_of(self, variant: str) -> Recorder:
        return next((r for name, r in self.steppings.items() if name in variant.split("+")), self.recorder)

    def decisions(self, outcome: Outcome) -> dict[str, str]:
        """Module path -> option, the loss head's last."""
        head = {path: option for path, option in self.head.items() if option in outcome.variant.split("+")}
        return {**decisions_of(outcome), **head}

    # -- the menu ------------------------------------------------------------------------------------------------

    @cached_property
    def menu(self) -> Menu:
        if not self.blocks:
            return Menu({}, {})
        is_repeatable = isinstance(self._recomputed, Trace)
        copies = offload.OPTIONS if is_repeatable else (offload.SAVED,)  # beside the boundary a block is recomputed
        graphs = self._graphs if "select" in self.levers else {}
        return Menu.of(self._groups, graphs, is_repeatable, copies if self.host_bytes > 0 else ())

    @cached_property
    def _graphs(self) -> dict[str, tuple[BlockGraph, Sequence[float]]]:
        """With seconds from the device itself where the model is there, else from the card's figures."""
        if self.can_time:
            assert self.device is not None
            try:
                sample = self.sample.resized(self.points[0])
                return dict(captured(self.model, self.recipe, sample, self.device, self.blocks))
            except torch.OutOfMemoryError:  # the very reason for a plan
                pass
        graphs = {path: found.graph for path, found in self._first[1].items()}
        return {path: (graph, node_seconds(graph, self.rates)) for path, graph in graphs.items()}

    # -- the loss head -------------------------------------------------------------------------------------------

    @property
    def head(self) -> dict[str, str]:
        """The loss head's path -> the option to compute the loss in chunks; empty where that cannot be."""
        found = self._chunked
        return {} if found is None or isinstance(found, str) else found[0]

    @cached_property
    def _chunked(self) -> tuple[dict[str, str], Trace] | str | None:
        """The head's option and the trace at the first point with it; or why not; None if there is nothing to gain."""
        path = loss_head.find_head(self.model)
        if path is None or "loss-head" not in self.levers:
            return loss_head.refusal_of(self.model) if "loss-head" in self.levers else None
        head = self.model.get_submodule(path)
        vocabulary = int(head.out_features)  # type: ignore[arg-type]  # of a Linear
        option = {path: loss_head.options(vocabulary, self.gpu.kind)[1]}
        used = Uses()

        @contextmanager
        def installed() -> Iterator[None]:
            nonlocal used
            with levers.decided(self.model, {**self._as_it_is(self.blocks), **option}):
                yield
                used = loss_head.uses(head)

        try:
            trace = self._recorded(self.points[0], installed)
        except (ModelFailed, CannotTrace) as error:
            return str(error).splitlines()[0]
        if used.reads or not used.losses:
            return loss_head.misuse_of(self.model, path, used)
        return self._disproof(option, self.blocks[-1:]) or (option, trace)

    def _disproof(self, option: Mapping[str, str], working: Sequence[str], *, asks: bool = True) -> str | None:
        """What differs in a real step on two samples, where the model can run one, in which only some blocks work."""
        if not self.can_time:
            return None
        assert self.device is not None
        sample = self.sample.resized(2).to(self.device.torch_device)  # of one sample, batch norm makes nothing
        idle = [[path for path in group if path not in working] for group in self._groups]
        tried = partial(levers.tried, self.model, option)
        return difference_without(self.model, idle, self.recipe, sample, tried, asks=asks)

    # -- the optimizer -------------------------------------------------------------------------------------------

    @cached_property
    def steppings(self) -> dict[str, Recorder]:
        """Variant -> what records it: other ways to step an optimizer that is there, so that it can be made to."""
        if isinstance(self.recipe.optimizer, str):
            return {}
        others = stepping.alternatives(self.recipe, self.accumulation, self.recorder.backend.foreach)[1:]
        named = ((_VARIANTS[other.name], other.recipe) for other in others)
        allowed = ((name, recipe) for name, recipe in named if lever_of(name) in self.levers)
        return {name: Recorder(self.model, recipe, self.recorder.backend) for name, recipe in allowed}

    # -- the profile ---------------------------------------------------------------------------------------------

    @cached_property
    def _profiled(self) -> dict[int, dict[str, list[Level]]]:
        return {point: self.levels(point) for point in self.points}

    @cached_property
    def profile(self) -> Profile:
        return Profile.of(
            self._profiled,
            self.blocks,
            self._times(self._profiled),
            can_split=not is_batch_coupled(self.model),
            largest_micro_batch=LARGEST_MICRO_BATCH if len(self.points) > 1 else self.points[0],
        )

    def levels(self, micro_batch: int) -> dict[str, list[Level]]:
        """Variant -> levels, as `Profile` wants them."""
        found = self._plain_levels(micro_batch)
        chunked, kept = self._head_level(micro_batch), dict.fromkeys(self.blocks, KEEP)
        variants = {KEEP: found, **chunked}
        for name, recorder in self.steppings.items():
            in_backward = recorder.recipe.stepping == IN_BACKWARD  # else only the optimizer's own peak is another
            every = (self.menu.levels or [{}]) if in_backward else [kept]
            variants[name] = [self._level(micro_batch, d, recorder) for d in every]
            for head in chunked:
                both = self.trace(micro_batch, {**kept, **self.head}, recorder)
                variants[f"{head}+{name}"] = [Level(kept, both)]
        return variants

    def _plain_levels(self, micro_batch: int) -> list[Level]:
        """Every block under each of its options in turn."""
        firsts = self._first_levels
        if micro_batch == self.points[0]:
            return firsts
        teachers = [first for first in firsts if self._known(first.decisions) is not None]
        return levels_at(firsts, teachers, lambda first: self._level(micro_batch, first.decisions))

    def expected_excess(self, peak_bytes: int) -> int:
        """What a card's allocator may take beyond a peak, going by the profiled trace whose peak is the nearest."""
        if self.gpu.kind == "cpu":
            return 0
        traces = [level.trace for levels in self._profiled.values() for level in levels[KEEP]]
        return excess_of(min(traces, key=lambda trace: abs(trace.peak_bytes - peak_bytes)), self.allocator)

    @cached_property
    def _first_levels(self) -> list[Level]:
        known = [(decisions, self._known(decisions)) for decisions in self.menu.levels or [{}]]
        return [self._level(self.points[0], d) if trace is None else Level(d, trace) for d, trace in known]

    def _known(self, decisions: Mapping[str, str]) -> Trace | None:
        """The trace at the first point, if it was taken already."""
        options = set(decisions.values())
        if options <= {KEEP}:
            return self.plain
        return self._recomputed if options == {RECOMPUTE} and isinstance(self._recomputed, Trace) else None

    def _head_level(self, micro_batch: int) -> dict[str, list[Level]]:
        """With the loss in chunks, all blocks kept."""
        if not self.head:
            return {}
        (option,) = self.head.values()
        kept = dict.fromkeys(self.blocks, KEEP)
        if micro_batch == self.points[0] and isinstance(self._chunked, tuple):
            return {option: [Level(kept, self._chunked[1])]}
        return {option: [Level(kept, self.trace(micro_batch, {**kept, **self.head}))]}

    def _times(self, levels: Mapping[int, Mapping[str, Sequence[Level]]]) -> StepTimes:
        estimate = estimated(levels, self.rates)
        if not self.blocks or not self.can_time:
            return estimate
        assert self.device is not None
        stage("timing")
        samples = [self.sample.resized(b) for b in levels]
        try:
            found = measured(self.model, self.recipe, samples, self.device, self.menu, self.head, estimate)
        except torch.OutOfMemoryError:  # the very reason for a plan
            return estimate
        return relieved(found, levels, self.blocks, seconds_per_byte(self.device))

    @cached_property
    def rates(self) -> Rates:
        return cpu_rates() if self.gpu.kind == "cpu" else Rates.of(self.gpu)

    @cached_property
    def can_time(self) -> bool:
        """Whether the weights are on the device that is planned for, and a step there does not take for ever."""
        places = {p.device.type for p in self.model.parameters()}
        if self.device is None or places != {self.device.torch_device.type}:
            return False
        step = estimated({self.points[0]: {KEEP: [Level({}, self.plain)]}}, self.rates)
        seconds = step.rest_s(self.points[0], KEEP) + sum(sum(points.values()) for points in step.blocks.values())
        return seconds <= _LONGEST_S
