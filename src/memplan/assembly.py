"""From tapes to a `Trace`: what is always there, the micro-steps, the optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from memplan.notes import Notes
from memplan.trace import CATEGORIES, BlockRun, MicroStep, Span, Trace

_CODE = {name: number for number, name in enumerate(CATEGORIES)}

Static = tuple[str, int]  # category and bytes of a storage that is there all the time


@dataclass(frozen=True, slots=True)
class Border:
    """Where a tape stood between two parts of the step."""

    tick: int
    op: int
    visit: int

    @classmethod
    def of(cls, notes: Notes) -> "Border":
        return cls(notes.now, len(notes.op_columns), len(notes.visits))


@dataclass(frozen=True, slots=True)
class MicroBorders:
    start: Border
    backward: Border  # the loss is there, its backward begins
    stop: Border


def assemble(
    notes: Notes,
    borders: Sequence[MicroBorders],
    static: Sequence[Static],
    grads: Sequence[int],
    blocks: Sequence[str],
    *,
    weights: Sequence[int] = (),
    how: str,
    micro_batch: int,
    accumulation: int,
) -> Trace:
    """The trace of the micro-steps; the optimizer's span is empty until `with_optimizer` adds it.

    Args:
        static: the storages that are there all the time.
        grads: the tape's rows that are parameter gradients.
        blocks: paths of the blocks to be told apart.
        weights: the tape's rows that are weights, where these come and go.
    """
    rows, ops, stop = notes.rows(), notes.operators(), notes.now
    steps = tuple(_micro_step(notes, border, blocks) for border in borders)
    categories = _categories(rows, steps, grads, np.asarray(notes.recomputed, dtype=bool))
    categories[list(weights)] = _CODE["params"]
    fixed = np.array([size for _, size in static], dtype=np.int64)
    kinds = [_CODE[name] for name, _ in static]
    return Trace(
        how=how,
        micro_batch=micro_batch,
        accumulation=accumulation,
        modules=notes.modules,
        storage_bytes=np.concatenate([fixed, rows["storage_bytes"]]),
        storage_category=np.concatenate([np.array(kinds, dtype=np.int8), categories]),
        storage_module=np.concatenate([np.zeros(len(fixed), dtype=np.int32), rows["storage_module"]]),
        born=np.concatenate([np.zeros(len(fixed), dtype=np.int64), rows["born"]]),
        died=np.concatenate([np.full(len(fixed), stop, dtype=np.int64), rows["died"]]),
        op_names=tuple(notes.op_names),
        op_name=ops["op_name"],
        op_module=ops["op_module"],
        op_flops=ops["op_flops"],
        op_bytes=ops["op_bytes"],
        op_dtype=ops["op_dtype"],
        dtypes=tuple(notes.dtypes),
        ticks=stop,
        steps=steps,
        optimizer=Span(stop, stop),
        optimizer_ops=Span(len(notes.op_columns), len(notes.op_columns)),
    )


def with_optimizer(trace: Trace, notes: Notes) -> Trace:
    """The trace with the optimizer step of another tape behind it."""
    rows, ops = notes.rows(), notes.operators()
    names = {name: i for i, name in enumerate(dict.fromkeys([*trace.op_names, *notes.op_names]))}
    dtypes = {name: i for i, name in enumerate(dict.fromkeys([*trace.dtypes, *notes.dtypes]))}
    own_names = np.array([names[name] for name in notes.op_names], dtype=np.int32)
    own_dtypes = np.array([dtypes[name] for name in notes.dtypes], dtype=np.int8)
    stop, count = trace.ticks + notes.now, len(trace.op_name)
    died = np.where(trace.died >= trace.ticks, stop, trace.died)
    temporaries = np.full(len(rows["born"]), _CODE["temporaries"], dtype=np.int8)
    return replace(
        trace,
        storage_bytes=np.concatenate([trace.storage_bytes, rows["storage_bytes"]]),
        storage_category=np.concatenate([trace.storage_category, temporaries]),
        storage_module=np.concatenate([trace.storage_module, np.zeros(len(temporaries), dtype=np.int32)]),
        born=np.concatenate([trace.born, rows["born"] + trace.ticks]),
        died=np.concatenate([died, rows["died"] + trace.ticks]),
        op_names=tuple(names),
        op_name=np.concatenate([trace.op_name, own_names[ops["op_name"]]]),
        op_module=np.concatenate([trace.op_module, np.zeros(len(ops["op_name"]), dtype=np.int32)]),
        op_flops=np.concatenate([trace.op_flops, ops["op_flops"]]),
        op_bytes=np.concatenate([trace.op_bytes, ops["op_bytes"]]),
        op_dtype=np.concatenate([trace.op_dtype, own_dtypes[ops["op_dtype"]]]),
        dtypes=tuple(dtypes),
        ticks=stop,
        optimizer=Span(trace.ticks, stop),
        optimizer_ops=Span(count, count + len(ops["op_name"])),
    )


def with_leftovers(trace: Trace, *, grads: bool, others: bool) -> Trace:
    """The trace with what the step before left to it: its gradients, and what else outlived it (the output).

    Leftovers live until the first forward has returned; each is a row again, born with the step.
    """
    outlives = (trace.born > 0) & (trace.died == trace.ticks)
    is_grad = trace.storage_category == _CODE["grads"]
    left = np.flatnonzero(outlives & ((is_grad & grads) | (~is_grad & others)))
    if not len(left):
        return trace
    nothing, until = np.zeros(len(left), dtype=np.int64), trace.steps[0].backward.start
    return replace(
        trace,
        storage_bytes=np.concatenate([trace.storage_bytes, trace.storage_bytes[left]]),
        storage_category=np.concatenate([trace.storage_category, trace.storage_category[left]]),
        storage_module=np.concatenate([trace.storage_module, trace.storage_module[left]]),
        born=np.concatenate([trace.born, nothing]),
        died=np.concatenate([trace.died, nothing + until]),
    )


def _micro_step(notes: Notes, borders: MicroBorders, blocks: Sequence[str]) -> MicroStep:
    start, middle, stop = borders.start, borders.backward, borders.stop
    index = {path: i for i, path in enumerate(notes.modules)}
    wanted = {index[path]: path for path in blocks}
    visits = [visit for visit in notes.visits[start.visit : middle.visit] if visit[0] in wanted]
    back = _backward_ops(notes, Span(middle.op, stop.op), blocks)
    ticks = [*notes.op_ticks[middle.op : stop.op], stop.tick]
    nowhere = Span(stop.op, stop.op)
    runs = []
    for module, tick, last_tick, op, last_op in sorted(visits, key=lambda visit: visit[1]):
        ops = back.get(wanted[module], nowhere)
        backward = Span(ticks[ops.start - middle.op], ticks[ops.stop - middle.op])
        runs.append(BlockRun(wanted[module], Span(tick, last_tick), backward, Span(op, last_op), ops))
    inner = [visit for visit in notes.visits[start.visit : middle.visit] if visit[0]]
    head, head_op = max(((visit[2], visit[4]) for visit in (visits or inner)), default=(middle.tick, middle.op))
    return MicroStep(
        forward=Span(start.tick, head),
        loss=Span(head, middle.tick),
        backward=Span(middle.tick, stop.tick),
        forward_ops=Span(start.op, head_op),
        loss_ops=Span(head_op, middle.op),
        backward_ops=Span(middle.op, stop.op),
        blocks=tuple(runs),
    )


def _backward_ops(notes: Notes, ops: Span, blocks: Sequence[str]) -> dict[str, Span]:
    """First to last backward operator of each block."""
    owner = owners(notes.modules, blocks)
    spans: dict[str, Span] = {}
    for at in range(ops.start, ops.stop):
        path = owner[notes.op_columns[at][1]]
        if path is not None:
            spans[path] = Span(spans[path].start if path in spans else at, at + 1)
    return spans


def owners(modules: Sequence[str], blocks: Sequence[str]) -> list[str | None]:
    """The block that each module lies in, if any."""
    wanted = set(blocks)
    found: list[str | None] = []
    for path in modules:
        parts = path.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found.append(next((p for p in above if p in wanted), None))
    return found


def _categories(
    rows: dict[str, NDArray[np.int64]],
    steps: Sequence[MicroStep],
    grads: Sequence[int],
    recomputed: NDArray[np.bool_],
) -> NDArray[np.int8]:
    """What each storage is, told by when it was born and whether it outlives the forward."""
    born, died = rows["born"], rows["died"]
    category = np.full(len(born), _CODE["temporaries"], dtype=np.int8)
    for step in steps:
        outlives = died > step.backward.start
        category[(born >= step.forward.start) & (born < step.loss.start) & outlives] = _CODE["activations"]
        category[(born >= step.loss.start) & (born < step.backward.start)] = _CODE["logits/loss"]
    category[recomputed] = _CODE["activations"]
    category[list(grads)] = _CODE["grads"]
    return category
