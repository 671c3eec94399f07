"""The second micro-step of a step that accumulates gradients, from the first.

What lasts from one micro-step to the next is the gradients. Where the first leaves nothing else behind, the second does
the same over again, but for the moment in which autograd is done with a gradient: where the first one keeps it (or a
copy of it), the second adds it to what is there, in place, and drops it. Whether that is all, a trace of both tells;
see `MicroSteps`. Every further micro-step is like the second.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from memplan.assembly import Border, MicroBorders
from memplan.notes import Notes

_ADD = "aten::add_"  # `variable_grad += new_grad` (torch/csrc/autograd/functions/accumulate_grad.h)


def repeated(notes: Notes, first: MicroBorders, grads: Sequence[int]) -> tuple[Notes, MicroBorders] | None:
    """Notes of the first micro-step and one more, and the borders of that.

    Args:
        notes: of the first micro-step, from the beginning; also if they go on behind it.
        grads: the storages that are parameter gradients.

    None if the first micro-step leaves anything else behind, or its gradients in another way than autograd does.
    """
    count, stop = bisect_left(notes.born, first.stop.tick), first.stop
    died = [tick if tick is not None and tick < stop.tick else None for tick in notes.died[:count]]
    given = _given(notes, stop.op)
    if given is None or sorted(each.row for each in given) != [row for row, tick in enumerate(died) if tick is None]:
        return None
    if sorted(grads) != sorted(each.row for each in given):  # some share a storage
        return None
    return _Again(notes, first, died, given).result()


@dataclass(frozen=True, slots=True)
class _Given:
    """A parameter's gradient, as the first micro-step leaves it."""

    row: int
    first: int  # operator by which autograd did it
    stop: int
    size: int
    is_copy: bool  # else it is what the backward had made


def _given(notes: Notes, stop: int) -> list[_Given] | None:
    """In the order of the backward. None if autograd did more, between or with them, than to keep or copy."""
    found: list[_Given] = []
    additions = [addition for addition in notes.additions if addition[0] < stop]
    for row, group in groupby(additions, key=lambda addition: addition[1]):
        operators, _, sizes = zip(*group, strict=True)
        in_a_row = operators == tuple(range(operators[0], operators[0] + len(operators)))
        if row is None or not in_a_row:
            return None
        is_copy = notes.born[row] >= notes.op_ticks[operators[0]]
        found.append(_Given(row, operators[0], operators[-1] + 1, sizes[0], is_copy))
    return found


class _Again:
    """The first micro-step's notes, and behind them the same again."""

    def __init__(self, notes: Notes, first: MicroBorders, died: list[int | None], given: list[_Given]) -> None:
        self.notes, self.first, self.died, self.given = notes, first, died, given
        self.late = first.stop.tick - first.start.tick  # how much later the second micro-step is
        # Ticks behind which one more stands in the second micro-step (a gradient dies), or one less (no copy is born).
        self.more = np.array([notes.op_ticks[each.first] for each in given if not each.is_copy], np.int64)
        self.less = np.array([notes.born[each.row] for each in given if each.is_copy], np.int64)
        by_first = {each.first: each for each in given}
        dropped = {op for each in given for op in range(each.first + 1, each.stop)}
        # Of each operator, how many ticks and operators the second micro-step has more or less in front of it.
        grown = (0 if op not in by_first else -1 if by_first[op].is_copy else 1 for op in range(first.stop.op))
        self.grown = list(accumulate(grown, initial=0))
        self.shrunk = list(accumulate((-(op in dropped) for op in range(first.stop.op)), initial=0))
        self.by_first, self.dropped = by_first, dropped

    def result(self) -> tuple[Notes, MicroBorders]:
        notes, stop, count = self.notes, self.first.stop, len(self.died)
        copies = {each.row for each in self.given if each.is_copy}
        rows = [row for row in range(count) if row not in copies]
        place = {row: count + at for at, row in enumerate(rows)}
        born, died = self._rows(rows)
        again = Notes(
            notes.modules,
            bytes=notes.bytes[:count] + [notes.bytes[row] for row in rows],
            module=notes.module[:count] + [notes.module[row] for row in rows],
            born=notes.born[:count] + born,
            died=self.died + died,
            recomputed=notes.recomputed[:count] + [notes.recomputed[row] for row in rows],
            now=self._tick(stop.tick, stop.op),
            op_names=dict(notes.op_names),
            dtypes=notes.dtypes,
            op_columns=notes.op_columns[: stop.op],
            op_ticks=notes.op_ticks[: stop.op],
            additions=notes.additions,
            probes={
                probe: [row for old in asked if old < count for row in (old, place[old])]
                for probe, asked in notes.probes.items()
            },
            visits=notes.visits[: stop.visit] + [self._visit(*visit) for visit in notes.visits[: stop.visit]],
        )
        self._add_operators(again)
        borders = (self._border(border) for border in (self.first.start, self.first.backward, stop))
        return again, MicroBorders(*borders)

    def _rows(self, rows: list[int]) -> tuple[list[int], list[int | None]]:
        """When the storages are born and die again."""
        dropped = {each.row: self._tick(self.notes.op_ticks[each.first], each.first) for each in self.given}
        born = self._events([self.notes.born[row] for row in rows])
        last = self._events([self.died[row] or 0 for row in rows])
        return born, [dropped.get(row, tick) for row, tick in zip(rows, last, strict=True)]

    def _events(self, ticks: list[int]) -> list[int]:
        """Of births and deaths in the first micro-step, their ticks in the second."""
        old = np.array(ticks, np.int64)
        new = old + self.late + np.searchsorted(self.more, old, "right") - np.searchsorted(self.less, old, "left")
        moved: list[int] = new.tolist()
        return moved

    def _tick(self, tick: int, op: int) -> int:
        """Of a moment with so many operators before it."""
        return tick + self.late + self.grown[op]

    def _op(self, op: int) -> int:
        return op + self.first.stop.op - self.first.start.op + self.shrunk[op]

    def _border(self, border: Border) -> Border:
        visits = self.first.stop.visit - self.first.start.visit
        return Border(self._tick(border.tick, border.op), self._op(border.op), border.visit + visits)

    def _visit(self, module: int, tick: int, last_tick: int, op: int, last_op: int) -> tuple[int, int, int, int, int]:
        return module, self._tick(tick, op), self._tick(last_tick, last_op), self._op(op), self._op(last_op)

    def _add_operators(self, again: Notes) -> None:
        for op in range(self.first.stop.op):
            if op in self.dropped:
                continue
            again.op_ticks.append(self._tick(self.notes.op_ticks[op], op))
            each = self.by_first.get(op)
            name, module, flops, moved, dtype = self.notes.op_columns[op]
            if each is not None:
                name = again.op_names.setdefault(_ADD, len(again.op_names))
                moved = 3 * each.size  # two read, one written
            again.op_columns.append((name, module, flops, moved, dtype))
