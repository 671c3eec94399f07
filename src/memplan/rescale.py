"""`Scaling`: the trace of a step at one micro-batch, from that at another, where all of its sizes were seen at both.

A model's blocks have many options, and all of them run the operators that the plain step and full recomputation run,
only more or less often. What size an allocation has at another micro-batch is then known from traces of those two.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from memplan.profile import Level
from memplan.trace import Trace

Row = tuple[object, ...]  # sizes first, the module last


@dataclass(frozen=True)
class Scaling:
    """From one micro-batch to another.

    Attributes:
        micro_batch: the other.
        storages: (bytes, whether the optimizer makes it, block, category, module) -> bytes. Where all that were seen
            without the last, the last two or three agree, that much is known of any.
        operators: (flops, bytes, name, dtype, module) -> flops and bytes, in the same way.
    """

    micro_batch: int
    storages: Mapping[Row, Row]
    operators: Mapping[Row, Row]

    @classmethod
    def learned(cls, pairs: Iterable[tuple[Trace, Trace]]) -> Self | None:
        """From traces at both micro-batches of the same decisions; None if they differ in more than in sizes."""
        storages: list[tuple[Row, Row]] = []
        operators: list[tuple[Row, Row]] = []
        other = None
        for one, other in pairs:
            try:
                storages += zip(_by_birth(one), _by_birth(other), strict=True)
                operators += zip(_working(one), _working(other), strict=True)
            except ValueError:  # another number of them
                return None
        if other is None or any(a[1:] != b[1:] for a, b in storages) or any(a[2:] != b[2:] for a, b in operators):
            return None
        return cls(other.micro_batch, _agreed(storages, 1), _agreed(operators, 2))

    def of(self, trace: Trace) -> Trace | None:
        """A trace at the other micro-batch; None if it holds what was not seen, or is not the same everywhere."""
        storages = [_found(self.storages, row) for row in _storages(trace)]
        operators = [_found(self.operators, row) if any(row[:2]) else (0, 0) for row in _operators(trace)]
        if None in storages or None in operators:
            return None
        size = np.array(storages, np.int64).reshape(-1, 1)
        work = np.array(operators, np.int64).reshape(-1, 2)
        return replace(
            trace, micro_batch=self.micro_batch, storage_bytes=size[:, 0], op_flops=work[:, 0], op_bytes=work[:, 1]
        )


def levels_at(firsts: Sequence[Level], teachers: Sequence[Level], take: Callable[[Level], Level]) -> list[Level]:
    """Levels of one micro-batch at another: the teachers are taken there, others only where those do not teach them."""
    taken = {id(first): take(first) for first in teachers}
    if all(id(first) in taken for first in firsts):
        return [taken[id(first)] for first in firsts]
    scaling = Scaling.learned((first.trace, taken[id(first)].trace) for first in teachers)

    def at(first: Level) -> Level:
        if id(first) in taken:
            return taken[id(first)]
        scaled = None if scaling is None or first.copied else scaling.of(first.trace)
        return take(first) if scaled is None else Level(first.decisions, scaled)

    return [at(first) for first in firsts]


def _storages(trace: Trace) -> list[Row]:
    made = trace.born >= trace.optimizer.start
    homes = _homes(trace)
    rows = _columns(trace.storage_bytes, made, trace.storage_category, trace.storage_module)
    return [(size, made, homes[module], category, trace.modules[module]) for size, made, category, module in rows]


def _homes(trace: Trace) -> list[str]:
    """Of each module the block that it is in; "" outside."""
    blocks = {run.path for step in trace.steps for run in step.blocks}
    return [next((p for p in accumulate(m.split("."), "{}.{}".format) if p in blocks), "") for m in trace.modules]


def _by_birth(trace: Trace) -> list[Row]:
    rows = _storages(trace)
    return [rows[i] for i in np.lexsort((trace.storage_bytes, trace.storage_category, trace.born)).tolist()]


def _operators(trace: Trace) -> list[Row]:
    names = [trace.op_names[code] for code in trace.op_name.tolist()]
    dtypes = [trace.dtypes[code] for code in trace.op_dtype.tolist()]
    modules = [trace.modules[index] for index in trace.op_module.tolist()]
    columns = _columns(trace.op_flops, trace.op_bytes), names, dtypes, modules
    return [(*work, *others) for work, *others in zip(*columns, strict=True)]


def _working(trace: Trace) -> list[Row]:
    """Its operators but views and their like."""
    return [row for row in _operators(trace) if any(row[:2])]


def _columns(*columns: NDArray[Any]) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _agreed(pairs: Sequence[tuple[Row, Row]], sizes: int) -> dict[Row, Row]:
    """What all rows that were seen alike became; their first so many columns are sizes."""
    became: dict[Row, set[Row]] = defaultdict(set)
    for one, other in dict.fromkeys(pairs):  # blocks do the same again and again
        for known in _less_and_less(one):
            became[known].add(other[:sizes])
    return {row: found.pop() for row, found in became.items() if len(found) == 1}


def _found(known: Mapping[Row, Row], row: Row) -> Row | None:
    if row in known:  # as most are
        return known[row]
    return next((known[less] for less in _less_and_less(row) if less in known), None)


def _less_and_less(row: Row) -> tuple[Row, ...]:
    return row, row[:-1], row[:-2], row[:-3]
