"""Trace a long model by a short one, where that is provably the same.

Of a run of blocks that cannot be told apart (`blocks.alike`) a few are traced. The middle three must have left *the
same trace*, event by event: the same allocations of the same sizes, dying at the same offsets in the same or the
neighbouring block. Since a block's events depend only on what its neighbours hand it, and three in a row did the same,
every further one inserted between them does the same again; the omitted blocks' events are copies of the middle
block's, moved. A model's first trace is of seven blocks of a run, so that its ends may be another thing, and what the
model does to the first of its blocks by their number is met. The second is of seven and of five; if both come to the
same, those that follow are of five. Where the check fails the model is traced whole.

What autocast has cast goes at the end of its region, all at one moment and in an order that is chance. It makes no
difference to any sum, nor to an allocator, so where the check fails it is made again with each moment's tensors in the
order of their births.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from memplan.runs import Run
from memplan.trace import BlockRun, MicroStep, Span, Trace


class NotPeriodic(Exception):
    """The middle blocks did not leave the same trace."""


def lengthened(trace: Trace, runs: Sequence[Run]) -> Trace:
    """The trace of the whole model from that of the shortened one. Raises NotPeriodic where that cannot be shown."""
    try:
        return _lengthened(trace, runs)
    except NotPeriodic:
        return _lengthened(_settled(trace), runs)


def same_events(one: Trace, other: Trace) -> bool:
    """Whether two traces have the same events; what goes in one moment may go in any order."""

    def columns(trace: Trace) -> tuple[NDArray[np.int64], ...]:
        settled = _settled(trace)
        rows = settled.storage_bytes, settled.died, settled.born
        return np.stack(rows)[:, np.lexsort(rows)], trace.op_flops, trace.op_bytes

    return all(map(np.array_equal, columns(one), columns(other)))


def same_step(one: Trace, other: Trace) -> bool:
    """Whether two traces have the same events in the same parts of the step."""
    return one.steps == other.steps and same_events(one, other)


def _lengthened(trace: Trace, runs: Sequence[Run]) -> Trace:
    for run in runs:
        trace = _Insertion(trace, run).result()
    return trace


def _settled(trace: Trace) -> Trace:
    """Of the tensors that go one right after the other the first born goes first."""
    died = trace.died.copy()
    died[np.lexsort((trace.born, _moments(trace)))] = np.sort(trace.died)
    return replace(trace, died=died)


@dataclass(frozen=True, slots=True)
class _Place:
    """One region of ticks: a block's forward or backward in one micro-step, up to where the next one starts."""

    step: int
    kind: str  # "forward" | "backward"
    index: int  # relative to the template: -2 .. 2
    span: Span


class _Insertion:
    """Insert `len(run.omitted)` copies of the template block's events into a trace."""

    def __init__(self, trace: Trace, run: Run) -> None:
        self.trace, self.run = trace, run
        self.copies = len(run.omitted)
        births = np.append(np.sort(trace.born), trace.ticks)
        self.places = [p for n, step in enumerate(trace.steps) for p in _places(n, step, run, "ticks", births)]
        self.op_places = [p for n, step in enumerate(trace.steps) for p in _places(n, step, run, "ops", births)]
        self.place_of_row, self.offset = _locate(trace.born, self.places)
        self.death_place, self.death_offset = _locate(trace.died, self.places)
        # of each place its number relative to the template; the template's rows, and which go outside of all places
        self.index = np.array([place.index for place in self.places])
        self.rows = np.flatnonzero((self.place_of_row >= 0) & (self.index[self.place_of_row] == 0))
        self.moment = _moments(trace)
        self.leaving = self._leaving()
        self.cuts, self.op_cuts = _cuts(self.places, self.copies), _cuts(self.op_places, self.copies)
        self.cuts += [(first + 1, self.copies * len(rows)) for first, rows in self.leaving.items()]
        # of each place: the template's place, that one's new first tick, and how far from there on each copy is
        ours = {(place.step, place.kind): at for at, place in enumerate(self.places) if place.index == 0}
        self.template = np.array([ours[place.step, place.kind] for place in self.places])
        self.first = _shift(np.array([place.span.start for place in self.places]), self.cuts)
        self.stride = np.array([_length(p.span) * (1 if p.kind == "forward" else -1) for p in self.places])

    def result(self) -> Trace:
        self._check()
        born, died = _shift(self.trace.born, self.cuts), self._moved_deaths()
        template = self.rows
        order = np.concatenate([np.arange(len(born)), np.tile(template, self.copies)])
        modules, renamed = self._modules()
        copies = np.arange(1, self.copies + 1)[:, None]
        births, deaths = self._copied_births(template, copies), self._copied_deaths(template, copies)
        owner = self.trace.storage_module
        new_owner = [owner, *(renamed[k][owner[template]] for k in range(self.copies))]
        ops, op_owner = self._operators(renamed)
        return replace(
            self.trace,
            modules=modules,
            storage_bytes=self.trace.storage_bytes[order],
            storage_category=self.trace.storage_category[order],
            storage_module=np.concatenate(new_owner),
            born=np.concatenate([born, births.ravel()]),
            died=np.concatenate([died, deaths.ravel()]),
            op_name=self.trace.op_name[ops],
            op_module=op_owner,
            op_flops=self.trace.op_flops[ops],
            op_bytes=self.trace.op_bytes[ops],
            op_dtype=self.trace.op_dtype[ops],
            ticks=_shifted(self.trace.ticks, self.cuts),
            steps=tuple(self._step(number, step) for number, step in enumerate(self.trace.steps)),
        )

    def _leaving(self) -> dict[int, NDArray[np.intp]]:
        """First tick of a moment outside of all regions -> the template's rows that go in it."""
        rows = self.rows[(self.death_place[self.rows] < 0) & (self.trace.died[self.rows] < self.trace.ticks)]
        return {int(first): rows[self.moment[rows] == first] for first in np.unique(self.moment[rows])}

    # -- the proof -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """The three middle blocks have equal rows, and nothing else reaches across where copies go."""
        profiles: dict[tuple[int, str], list[tuple[int, list[tuple[object, ...]]]]] = {}
        for at, place in enumerate(self.places):
            if abs(place.index) <= 1:
                rows = np.flatnonzero(self.place_of_row == at)
                profile = [self._fingerprint(row, place) for row in rows]
                profiles.setdefault((place.step, place.kind), []).append((place.span.stop - place.span.start, profile))
        for (step, kind), found in profiles.items():
            if any(other != found[0] for other in found[1:]):
                raise NotPeriodic(f"blocks around {self.run.template} differ in the {kind} of micro-step {step}")

    def _fingerprint(self, row: np.intp, place: _Place) -> tuple[object, ...]:
        trace, death = self.trace, self.death_place[row]
        if death >= 0:
            end = self.places[death]
            if abs(end.index - place.index) > 1:
                raise NotPeriodic(f"a tensor of {self.run.template} lives across {end.index - place.index} blocks")
            fate: tuple[object, ...] = (end.step, end.kind, end.index - place.index, int(self.death_offset[row]))
        else:
            fate = ("elsewhere", int(self.moment[row]))
        path = trace.modules[trace.storage_module[row]]
        local = ".".join(path.split(".")[len(self.run.template.split(".")) :])
        return int(self.offset[row]), int(trace.storage_bytes[row]), int(trace.storage_category[row]), local, fate

    # -- ticks ---------------------------------------------------------------------------------------------------

    def _start(self, places: NDArray[np.intp], copies: NDArray[np.int64]) -> NDArray[np.int64]:
        """New first ticks of copies (0: the template itself) of the template's regions, for places like these."""
        places = self.template[places]
        starts: NDArray[np.int64] = self.first[places] + copies * self.stride[places]
        return starts

    def _moved_deaths(self) -> NDArray[np.int64]:
        """Deaths of the traced rows: one in the next block over is in the copy that now stands there."""
        died = _shift(self.trace.died, self.cuts)
        rows = np.flatnonzero((self.place_of_row >= 0) & (self.death_place >= 0))
        home, end = self.index[self.place_of_row[rows]], self.index[self.death_place[rows]]
        copy = np.where((home <= 0) & (end > 0), 1, np.where((end <= 0) & (home > 0), self.copies, 0))
        rows, copy = rows[copy > 0], copy[copy > 0]
        died[rows] = self._start(self.death_place[rows], copy) + self.death_offset[rows]
        return died

    def _copied_births(self, rows: NDArray[np.intp], copies: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shape [copies, rows]."""
        return self._start(self.place_of_row[rows], copies) + self.offset[rows]

    def _copied_deaths(self, rows: NDArray[np.intp], copies: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shape [copies, rows]."""
        places = self.death_place[rows]
        target = copies + self.index[places]
        inside = self._start(places, target) + self.death_offset[rows]
        # Beyond the last copy is the traced block behind it, which is where the row dies already.
        died = np.where((places >= 0) & (target <= self.copies), inside, _shift(self.trace.died[rows], self.cuts))
        for first, leaving in self.leaving.items():
            begin = _shifted(first, self.cuts) + 1
            ours = np.searchsorted(rows, leaving)
            died[:, ours] = begin + (copies - 1) * len(leaving) + np.arange(len(leaving))
        return died

    # -- operators, modules, steps -------------------------------------------------------------------------------

    def _modules(self) -> tuple[tuple[str, ...], list[NDArray[np.int32]]]:
        """All module paths, and for each copy a map from the template's module indices to the copy's."""
        names = list(self.trace.modules)
        prefix = self.run.template
        inside = [i for i, path in enumerate(names) if path == prefix or path.startswith(f"{prefix}.")]
        maps = []
        for path in self.run.omitted:
            renamed = np.arange(len(self.trace.modules), dtype=np.int32)
            for i in inside:
                renamed[i] = len(names)
                names.append(path + self.trace.modules[i].removeprefix(prefix))
            maps.append(renamed)
        return tuple(names), maps

    def _operators(self, renamed: list[NDArray[np.int32]]) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        pieces: list[NDArray[np.intp]] = []
        owners: list[NDArray[np.int32]] = []
        at = 0

        def take(span: Span, copy: int | None) -> None:
            rows = np.arange(span.start, span.stop)
            owner = self.trace.op_module[rows]
            pieces.append(rows)
            owners.append(owner if copy is None else renamed[copy][owner])

        for place in sorted((p for p in self.op_places if p.index == 0), key=lambda p: p.span.start):
            forward = place.kind == "forward"
            border = place.span.stop if forward else place.span.start
            take(Span(at, border), None)
            for copy in range(self.copies) if forward else reversed(range(self.copies)):
                take(place.span, copy)
            at = border
        take(Span(at, len(self.trace.op_name)), None)
        return np.concatenate(pieces), np.concatenate(owners)

    def _step(self, number: int, step: MicroStep) -> MicroStep:
        def ticks(span: Span) -> Span:
            return _moved(span, self.cuts)

        def ops(span: Span) -> Span:
            return _moved(span, self.op_cuts)

        blocks: list[BlockRun] = []
        for block in step.blocks:
            moved = BlockRun(
                block.path, ticks(block.forward), ticks(block.backward), ops(block.forward_ops), ops(block.backward_ops)
            )
            blocks.append(moved)
            if block.path == self.run.template:
                lengths = [
                    next(_length(p.span) for p in places if (p.step, p.kind, p.index) == (number, kind, 0))
                    for places in (self.places, self.op_places)
                    for kind in ("forward", "backward")
                ]
                blocks += [_copy_of(moved, path, k, lengths) for k, path in enumerate(self.run.omitted, 1)]
        return MicroStep(
            ticks(step.forward),
            ticks(step.loss),
            ticks(step.backward),
            ops(step.forward_ops),
            ops(step.loss_ops),
            ops(step.backward_ops),
            tuple(blocks),
        )


def _places(number: int, step: MicroStep, run: Run, axis: str, births: NDArray[np.int64]) -> list[_Place]:
    """The regions of the template and of two blocks on each side, on the axis of ticks or of operators.

    A region goes on to where the next block's begins, of the outermost traced ones to the next birth.
    """

    def gone(tick: int) -> int:
        return int(births[np.searchsorted(births, tick)]) if axis == "ticks" else tick

    at = next((i for i, block in enumerate(step.blocks) if block.path == run.template), None)
    if at is None or at < run.ends or at + run.ends >= len(step.blocks):
        raise NotPeriodic(f"{run.template} did not run once, in order, with its neighbours")
    around = step.blocks[at - run.ends : at + run.ends + 1]
    if tuple(block.path for block in around) != run.traced:
        raise NotPeriodic(f"the blocks around {run.template} did not run in the order of their container")
    suffix = "" if axis == "ticks" else "_ops"
    forward: list[Span] = [getattr(block, f"forward{suffix}") for block in around]
    backward: list[Span] = [getattr(block, f"backward{suffix}") for block in around]
    if not (_in_order(forward) and _in_order(backward[::-1])):
        raise NotPeriodic(f"the blocks around {run.template} did not run back in reverse order")
    places = []
    for i in range(run.ends - 2, run.ends + 3):
        ahead = forward[i + 1].start if i + 1 < run.kept else gone(forward[i].stop)
        behind = backward[i - 1].start if i else gone(backward[i].stop)
        places.append(_Place(number, "forward", i - run.ends, Span(forward[i].start, ahead)))
        places.append(_Place(number, "backward", i - run.ends, Span(backward[i].start, behind)))
    return places


def _in_order(spans: Sequence[Span]) -> bool:
    return all(one.start <= other.start for one, other in pairwise(spans))


def _locate(ticks: NDArray[np.int64], places: list[_Place]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """For each tick the number of the region it lies in (-1: none), and its offset there."""
    found = np.full(len(ticks), -1, dtype=np.intp)
    offset = np.zeros(len(ticks), dtype=np.int64)
    for number, place in enumerate(places):
        inside = (ticks >= place.span.start) & (ticks < place.span.stop)
        found[inside] = number
        offset[inside] = ticks[inside] - place.span.start
    return found, offset


def _moments(trace: Trace) -> NDArray[np.int64]:
    """For each row the first tick of the moment in which it dies: of a run of deaths with nothing else between them."""
    dies, begins = np.zeros(trace.ticks + 1, dtype=bool), np.zeros(trace.ticks + 1, dtype=bool)
    dies[trace.died] = True
    dies[trace.born] = False
    spans = [span for step in trace.steps for span in (step.forward, step.loss, step.backward)]
    spans += [span for step in trace.steps for block in step.blocks for span in (block.forward, block.backward)]
    begins[[tick for span in spans for tick in (span.start, span.stop)]] = True
    begins |= ~np.concatenate([[False], dies[:-1]])
    begins[-1] = True  # never
    first: NDArray[np.int64] = np.maximum.accumulate(np.where(begins, np.arange(trace.ticks + 1), 0))
    return first[trace.died]


def _cuts(places: list[_Place], copies: int) -> list[tuple[int, int]]:
    """Where the copies go, and how far what lies behind moves."""
    template = [place for place in places if place.index == 0]
    return [(p.span.stop if p.kind == "forward" else p.span.start, copies * _length(p.span)) for p in template]


def _shift(ticks: NDArray[np.int64], cuts: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Old ticks to new ones: everything behind an insertion moves by its length."""
    moved = ticks.copy()
    for border, length in cuts:
        moved += np.where(ticks >= border, length, 0)
    return moved


def _shifted(tick: int, cuts: list[tuple[int, int]]) -> int:
    return tick + sum(length for border, length in cuts if tick >= border)


def _moved(span: Span, cuts: list[tuple[int, int]]) -> Span:
    """A span behind the insertions before it, longer by those inside it."""
    first = _shifted(span.start, cuts)
    if span.stop <= span.start:
        return Span(first, first)
    return Span(first, _shifted(span.stop - 1, cuts) + 1)


def _copy_of(block: BlockRun, path: str, copy: int, lengths: list[int]) -> BlockRun:
    forward, backward, forward_ops, backward_ops = lengths
    return BlockRun(
        path,
        _by(block.forward, copy * forward),
        _by(block.backward, -copy * backward),
        _by(block.forward_ops, copy * forward_ops),
        _by(block.backward_ops, -copy * backward_ops),
    )


def _by(span: Span, distance: int) -> Span:
    return Span(span.start + distance, span.stop + distance)


def _length(span: Span) -> int:
    return span.stop - span.start
