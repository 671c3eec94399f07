"""`Profile`: what each block costs under each option, read off traces, for any micro-batch.

Traces in which every block shows each of its options in turn give all sizes of the chain (`problem.Block`). Between
two micro-batches every size is affine in the number of samples (allocations are products of shapes); the profile takes
that from two of them. The last word on a plan is a trace of the plan itself, so what the affine picture misses costs
time to plan, never a wrong promise.
"""

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from memplan.problem import KEEP, Block, Gap, Option, Problem
from memplan.trace import BlockRun, MicroStep, Span, Trace


class Times(Protocol):
    """Seconds, measured or estimated."""

    def block_s(self, path: str, option: str, micro_batch: int) -> float:
        """Forward and backward of one block in one micro-step, with any recomputation."""

    def rest_s(self, micro_batch: int, variant: str) -> float:
        """Everything of a micro-step that lies outside the blocks."""

    @property
    def optimizer_s(self) -> float:
        """One optimizer step."""

    def stepping_s(self, variant: str) -> float:
        """What an optimizer step of a variant takes beyond that; below 0: less."""


Row = tuple[int, int, int, int]  # hold, forward peak, backward peak, bytes copied to the host


@dataclass(frozen=True, slots=True)
class Level:
    """A trace with a decision for every block."""

    decisions: Mapping[str, str]  # block path -> option name
    trace: Trace
    copied: Mapping[str, int] = field(default_factory=dict)  # block path -> bytes to the host, where it offloads


@dataclass(frozen=True)
class ChainSizes:
    """The sizes of one micro-step at one micro-batch, in bytes.

    Attributes:
        base: alive when the first block's forward starts, every block's holds taken off.
        options: per block, option name -> row; the peaks are above base + earlier holds.
        gaps: per gap (forward, backward), absolute but for earlier holds.
        optimizer: peak of the optimizer step.
    """

    paths: tuple[str, ...]
    base: int
    options: tuple[Mapping[str, Row], ...]
    gaps: tuple[tuple[int, int], ...]
    optimizer: int

    @classmethod
    def of(cls, levels: Sequence[Level], step: int, paths: Collection[str]) -> "ChainSizes":
        """From traces in which every block of `paths` shows each of its options; `step` picks the micro-step."""
        chains = [_Chain(level.trace, level.trace.steps[step], paths) for level in levels]
        order = tuple(block.path for block in chains[0].blocks)
        rows: tuple[dict[str, Row], ...] = tuple({} for _ in order)
        for level, chain in zip(levels, chains, strict=True):
            for i, row in enumerate(chain.options):
                rows[i].setdefault(level.decisions[order[i]], (*row, level.copied.get(order[i], 0)))
        gaps = zip(*(chain.gaps for chain in chains), strict=True)
        return cls(
            paths=order,
            base=max(chain.base for chain in chains),
            options=rows,
            gaps=tuple((max(g[0] for g in gap), max(g[1] for g in gap)) for gap in gaps),
            optimizer=max(level.trace.peak_in(level.trace.optimizer) for level in levels),
        )

    def around(self, other: "ChainSizes") -> "ChainSizes":
        """The same blocks, with what lies around them as in another chain."""
        return replace(self, base=other.base, gaps=other.gaps, optimizer=other.optimizer)


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
    lines, so between two micro-batches it is never above the line, and beyond them it may be: see `with_levels`.

    Attributes:
        first, other: variant -> micro-batch -> chain sizes of the first micro-step, and of one with gradients resident.
            With one micro-batch, nothing else may be asked.
    """

    first: Mapping[str, Mapping[int, ChainSizes]]
    other: Mapping[str, Mapping[int, ChainSizes]]
    times: Times
    can_split: bool
    largest_micro_batch: int

    @classmethod
    def of(
        cls,
        levels: Mapping[int, Mapping[str, Sequence[Level]]],
        paths: Collection[str],
        times: Times,
        *,
        can_split: bool,
        largest_micro_batch: int,
    ) -> "Profile":
        """From traces: micro-batch -> variant -> levels. The first variant shows all options, the others one level."""
        empty = cls({}, {}, times, can_split, largest_micro_batch)
        for micro_batch, by_variant in levels.items():
            empty = empty.with_levels(micro_batch, by_variant, paths)
        return empty

    @property
    def variants(self) -> tuple[str, ...]:
        """Ways to run what lies outside the blocks, the plain one first."""
        return tuple(self.first)

    def problem(self, micro_batch: int, accumulation: int, budget_bytes: int, variant: str = KEEP) -> Problem:
        """The planning problem of one optimizer step. With accumulation, every micro-step is priced as the dearest."""
        sizes = self._sizes(variant, micro_batch, accumulation > 1)
        blocks = []
        for path, rows in zip(sizes.paths, sizes.options, strict=True):
            keep_s = self.times.block_s(path, KEEP, micro_batch)
            options = tuple(
                self._option(name, row, self.times.block_s(path, name, micro_batch), keep_s)
                for name, row in rows.items()
            )
            blocks.append(Block(path, sizes.base, options))
        return Problem(
            budget_bytes=budget_bytes,
            blocks=tuple(blocks),
            gaps=tuple(Gap(*gap) for gap in sizes.gaps),
            optimizer_bytes=sizes.optimizer,
            rest_s=self.times.rest_s(micro_batch, variant),
            optimizer_s=max(0.0, self.times.optimizer_s + self.times.stepping_s(variant)),
            accumulation=accumulation,
        )

    def _option(self, name: str, row: Row, step_s: float, keep_s: float) -> Option:
        return Option(name, *row[:3], step_s=step_s, link_bytes=row[3], recompute_s=max(0.0, step_s - keep_s))

    def with_levels(
        self, micro_batch: int, levels: Mapping[str, Sequence[Level]], paths: Collection[str] | None = None
    ) -> "Profile":
        """The profile with the sizes of one more micro-batch."""
        known = paths if paths is not None else next(iter(next(iter(self.first.values())).values())).paths
        return replace(
            self,
            first=_with(self.first, micro_batch, levels, 0, known),
            other=_with(self.other, micro_batch, levels, -1, known),
        )

    def _sizes(self, variant: str, micro_batch: int, accumulates: bool) -> ChainSizes:
        points = (self.other if accumulates else self.first)[variant]
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

        def row(p: Row, q: Row) -> Row:
            return at(p[0], q[0]), at(p[1], q[1]), at(p[2], q[2]), at(p[3], q[3])

        return ChainSizes(
            paths=a.paths,
            base=at(a.base, b.base),
            options=tuple(
                {name: row(p, after[name]) for name, p in before.items()}
                for before, after in zip(a.options, b.options, strict=True)
            ),
            gaps=tuple((at(p[0], q[0]), at(p[1], q[1])) for p, q in zip(a.gaps, b.gaps, strict=True)),
            optimizer=at(a.optimizer, b.optimizer),
        )


def _with(
    sizes: Mapping[str, Mapping[int, ChainSizes]],
    micro_batch: int,
    levels: Mapping[str, Sequence[Level]],
    step: int,
    paths: Collection[str],
) -> dict[str, dict[int, ChainSizes]]:
    """A variant with levels of its own for every option has its own blocks; else they are those of what it varies."""
    whole = {variant: len(each) == len(levels[KEEP]) for variant, each in levels.items()}
    found: dict[str, ChainSizes] = {}
    for variant, each in levels.items():
        own = ChainSizes.of(each, step, paths)
        varied = variant.partition("+")[2]
        blocks = found[varied] if varied in found and whole[varied] else found.get(KEEP, own)
        found[variant] = own if whole[variant] else blocks.around(own)
    return {variant: {**sizes.get(variant, {}), micro_batch: own} for variant, own in found.items()}
