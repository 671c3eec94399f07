"""`Profile`: what each block costs under each option, read off traces, for any micro-batch.

A trace with every block kept and one with every block recomputed give all sizes of the chain (`problem.Block`). Between
two micro-batches every size is affine in the number of samples (allocations are products of shapes); the profile takes
that from two of them. The last word on a plan is a trace of the plan itself, so what the affine picture misses costs
time to plan, never a wrong promise.
"""

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from memplan.problem import Block, Gap, Option, Problem
from memplan.trace import BlockRun, MicroStep, Span, Trace


class Times(Protocol):
    """Seconds, measured or estimated."""

    def block_s(self, path: str, option: str, micro_batch: int) -> float:
        """Forward and backward of one block in one micro-step, with any recomputation."""

    def rest_s(self, micro_batch: int) -> float:
        """Everything of a micro-step that lies outside the blocks."""

    @property
    def optimizer_s(self) -> float:
        """One optimizer step."""


@dataclass(frozen=True)
class ChainSizes:
    """The sizes of one micro-step at one micro-batch, in bytes.

    Attributes:
        base: alive when the first block's forward starts, every block's holds taken off.
        options: option name -> per block (hold, forward peak, backward peak), the peaks above base + earlier holds.
        gaps: per gap (forward, backward), absolute but for earlier holds.
        optimizer: peak of the optimizer step.
    """

    paths: tuple[str, ...]
    base: int
    options: Mapping[str, tuple[tuple[int, int, int], ...]]
    gaps: tuple[tuple[int, int], ...]
    optimizer: int

    @classmethod
    def of(cls, traces: Mapping[str, Trace], step: int, paths: Collection[str]) -> "ChainSizes":
        """From one trace per option, each with that option in every block of `paths`; `step` picks the micro-step."""
        measured = {name: _Chain(trace, trace.steps[step], paths) for name, trace in traces.items()}
        chains = list(measured.values())
        gaps = zip(*(chain.gaps for chain in chains), strict=True)
        return cls(
            paths=tuple(block.path for block in chains[0].blocks),
            base=max(chain.base for chain in chains),
            options={name: chain.options for name, chain in measured.items()},
            gaps=tuple((max(g[0] for g in gap), max(g[1] for g in gap)) for gap in gaps),
            optimizer=max(trace.peak_in(trace.optimizer) for trace in traces.values()),
        )


class _Chain:
    """One micro-step of one trace, cut at its blocks."""

    def __init__(self, trace: Trace, step: MicroStep, paths: Collection[str]) -> None:
        self.trace, self.step = trace, step
        self.blocks: Sequence[BlockRun] = [block for block in step.blocks if block.path in paths]
        starts = [trace.live_at(block.forward.start) for block in self.blocks]
        end = trace.live_at(step.loss.start)
        self.base = starts[0] if starts else end
        self.before = [size - self.base for size in [*starts, end]]  # holds of the blocks before each position

    @cached_property
    def options(self) -> tuple[tuple[int, int, int], ...]:
        rows = []
        for i, block in enumerate(self.blocks):
            level = self.base + self.before[i]
            forward = self.trace.peak_in(block.forward) - level
            backward = self.trace.peak_in(Span(block.backward.start, self._backward_stop(i))) - level
            rows.append((self.before[i + 1] - self.before[i], forward, max(backward, 0)))
        return tuple(rows)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Forward: from a block's exit to the next one's entry. Backward: the head's and the embeddings' share."""
        step, blocks, rows = self.step, self.blocks, []
        borders = [step.forward.start, *(block.forward.stop for block in blocks)]
        entries = [*(block.forward.start for block in blocks), step.loss.stop]
        for i, (start, stop) in enumerate(zip(borders, entries, strict=True)):
            forward = self.trace.peak_in(Span(start, stop)) - self.before[i]
            rows.append((forward, self._gap_backward(i, forward)))
        return tuple(rows)

    def _gap_backward(self, i: int, forward: int) -> int:
        step, blocks = self.step, self.blocks
        if i == len(blocks):
            stop = blocks[-1].backward.start if blocks else step.backward.stop
            return self.trace.peak_in(Span(step.backward.start, stop)) - self.before[i]
        if i == 0:
            return self.trace.peak_in(Span(self._backward_stop(0), step.backward.stop)) - self.before[0]
        return forward  # what runs between two blocks' backwards is in the later block's span

    def _backward_stop(self, i: int) -> int:
        return self.blocks[i - 1].backward.start if i else max(self.blocks[0].backward.stop, self.step.backward.start)


@dataclass(frozen=True)
class Profile:
    """Block costs at any micro-batch up to `largest_micro_batch`; implements `planner.Profile`.

    Sizes are taken along straight lines from one profiled micro-batch to the next. A peak is the largest of many such
    lines, so between two micro-batches it is never above the line, and beyond them it may be: see `with_traces`.

    Attributes:
        first, other: micro-batch -> chain sizes of the first micro-step, and of one with gradients resident. With one
            micro-batch, nothing else may be asked.
    """

    first: Mapping[int, ChainSizes]
    other: Mapping[int, ChainSizes]
    times: Times
    can_split: bool
    largest_micro_batch: int

    def problem(self, micro_batch: int, accumulation: int, budget_bytes: int) -> Problem:
        """The planning problem of one optimizer step. With accumulation, every micro-step is priced as the dearest."""
        sizes = self._sizes(micro_batch, accumulation > 1)
        blocks = []
        for i, path in enumerate(sizes.paths):
            options = tuple(
                Option(name, *rows[i], self.times.block_s(path, name, micro_batch))
                for name, rows in sizes.options.items()
            )
            blocks.append(Block(path, sizes.base, options))
        return Problem(
            budget_bytes=budget_bytes,
            blocks=tuple(blocks),
            gaps=tuple(Gap(*gap) for gap in sizes.gaps),
            optimizer_bytes=sizes.optimizer,
            rest_s=self.times.rest_s(micro_batch),
            optimizer_s=self.times.optimizer_s,
            accumulation=accumulation,
        )

    def with_traces(self, micro_batch: int, traces: Mapping[str, Trace]) -> "Profile":
        """The profile with the sizes of one more micro-batch, from one trace per option."""
        paths = next(iter(self.first.values())).paths
        first, other = (ChainSizes.of(traces, step, paths) for step in (0, -1))
        return replace(self, first={**self.first, micro_batch: first}, other={**self.other, micro_batch: other})

    def _sizes(self, micro_batch: int, accumulates: bool) -> ChainSizes:
        points = self.other if accumulates else self.first
        if micro_batch in points:
            return points[micro_batch]
        if len(points) < 2:
            raise ValueError(f"profiled at micro-batch {next(iter(points))} only, asked for {micro_batch}")
        ends = sorted(points)
        at_right = min(max(bisect(ends, micro_batch), 1), len(ends) - 1)  # beyond the ends: along the last line
        low, high = ends[at_right - 1], ends[at_right]
        a, b = points[low], points[high]

        def at(x: int, y: int) -> int:
            return x - (x - y) * (micro_batch - low) // (high - low)  # rounded up

        return ChainSizes(
            paths=a.paths,
            base=at(a.base, b.base),
            options={
                name: tuple(
                    (at(p[0], q[0]), at(p[1], q[1]), at(p[2], q[2])) for p, q in zip(rows, b.options[name], strict=True)
                )
                for name, rows in a.options.items()
            },
            gaps=tuple((at(p[0], q[0]), at(p[1], q[1])) for p, q in zip(a.gaps, b.gaps, strict=True)),
            optimizer=at(a.optimizer, b.optimizer),
        )
