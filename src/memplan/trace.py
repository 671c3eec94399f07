"""`Trace`: what one training step did to memory, in order. Plain columns, no torch.

Time is counted in *ticks*: every allocation and every release is one tick. A storage lives over the half-open range
``born <= tick < died``; one that outlives the step has ``died == ticks``. The live bytes at a tick are the sum over the
storages alive there, so peaks, breakdowns and block costs are all sums over one table.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import get_args, get_origin

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
CHECKPOINT = "torch::checkpoint"  # the operator that stands for the random state that torch's checkpoint takes

CATEGORIES = (
    "params",
    "buffers",
    "inputs",
    "optimizer",
    "libraries",  # what cuBLAS and its like keep for themselves
    "grads",
    "activations",
    "logits/loss",
    "temporaries",
)


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of ticks, or of operators."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BlockRun:
    """One block in one micro-step."""

    path: str
    forward: Span  # ticks from entering to leaving its forward
    backward: Span  # ticks from its first to its last backward operator, recomputation included; empty if it has none
    forward_ops: Span
    backward_ops: Span


@dataclass(frozen=True, slots=True)
class MicroStep:
    """Forward, loss and backward of one micro-batch. `loss` starts where the last block has returned."""

    forward: Span
    loss: Span
    backward: Span
    forward_ops: Span
    loss_ops: Span
    backward_ops: Span
    blocks: tuple[BlockRun, ...]  # in forward order


@dataclass(frozen=True, eq=False)
class Trace:
    """One steady-state training step (optimizer state exists).

    What outlives the step without having been there before it (gradients, an output that the loop keeps) is gone before
    the next one, unless the loop holds it longer: then the step begins with it, as rows that are born at 0 and die.

    With accumulation, two micro-steps are kept: the first, and one with gradients resident, which all later ones equal.
    """

    how: str  # "fake": abstract, no memory and no arithmetic; "recorded": forward and backward ran for real
    micro_batch: int
    accumulation: int
    modules: tuple[str, ...]  # dotted paths; index 0 is the model itself ("")
    # one row per storage
    storage_bytes: NDArray[np.int64]
    storage_category: NDArray[np.int8]  # index into CATEGORIES
    storage_module: NDArray[np.int32]  # index into modules
    born: NDArray[np.int64]
    died: NDArray[np.int64]
    # one row per operator
    op_names: tuple[str, ...]
    op_name: NDArray[np.int32]  # index into op_names
    op_module: NDArray[np.int32]
    op_flops: NDArray[np.int64]
    op_bytes: NDArray[np.int64]  # read + written
    op_dtype: NDArray[np.int8]  # index into dtypes
    dtypes: tuple[str, ...]
    # structure
    ticks: int
    steps: tuple[MicroStep, ...]
    optimizer: Span
    optimizer_ops: Span
    assumptions: tuple[str, ...] = ()
    early_state: int = 0  # so many of the optimizer's rows, the first, are there before the first step ever is made

    @cached_property
    def live(self) -> NDArray[np.int64]:
        """Bytes alive at every tick, shape [ticks]."""
        return self._alive_of(np.ones(len(self.born), dtype=np.bool_))

    def of_category(self, code: int) -> NDArray[np.int64]:
        """Bytes of one category (index into CATEGORIES) alive at every tick, shape [ticks]."""
        return self._alive_of(self.storage_category == code)

    def _alive_of(self, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        change = np.zeros(self.ticks + 1, dtype=np.int64)
        np.add.at(change, self.born[rows], self.storage_bytes[rows])
        np.subtract.at(change, self.died[rows], self.storage_bytes[rows])
        return np.cumsum(change)[: self.ticks]

    @property
    def peak_tick(self) -> int:
        return int(np.argmax(self.live))

    @property
    def peak_bytes(self) -> int:
        return int(self.live.max())

    def peak_in(self, span: Span) -> int:
        """Largest live bytes inside a range of ticks; those at its start if it is empty."""
        if span.stop <= span.start:
            return self.live_at(span.start)
        return int(self.live[span.start : span.stop].max())

    def live_at(self, tick: int) -> int:
        """Bytes alive just before the event of a tick happens."""
        return int(self.live[tick - 1]) if tick > 0 else 0

    def phase_of(self, tick: int) -> str:
        """One of "forward", "loss", "backward", "optimizer"; what is released between two counts to the later one."""
        for step in self.steps:
            for name, span in (("forward", step.forward), ("loss", step.loss), ("backward", step.backward)):
                if tick < span.stop:
                    return name
        return "optimizer"

    def alive(self, tick: int) -> NDArray[np.bool_]:
        """Which storages are alive at a tick, shape [storages]."""
        alive: NDArray[np.bool_] = (self.born <= tick) & (tick < self.died)
        return alive

    def breakdown(self, tick: int) -> dict[str, int]:
        """Bytes alive at a tick by category; activations are split by module (``activations/<path>``)."""
        alive = self.alive(tick)
        totals: dict[str, int] = {}
        for code, name in enumerate(CATEGORIES):
            rows = alive & (self.storage_category == code)
            if name != "activations":
                totals[name] = int(self.storage_bytes[rows].sum())
                continue
            by_module = np.bincount(self.storage_module[rows], self.storage_bytes[rows], len(self.modules))
            totals |= {f"activations/{self.modules[m]}": int(by_module[m]) for m in np.flatnonzero(by_module)}
        return totals

    def to_json(self) -> str:
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        record["steps"] = [asdict(step) for step in self.steps]
        record["optimizer"], record["optimizer_ops"] = asdict(self.optimizer), asdict(self.optimizer_ops)
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in record.items()}
        return json.dumps({"schema": SCHEMA, **plain})

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """Inverse of `to_json`. Raises ValueError on another schema version."""
        record = json.loads(text)
        if record.pop("schema", None) != SCHEMA:
            raise ValueError(f"not a trace of schema version {SCHEMA}; record it again with this version of memplan")
        for field in fields(cls):
            value = record[field.name]
            if get_origin(field.type) is np.ndarray:
                _, dtype = get_args(field.type)
                record[field.name] = np.asarray(value, dtype=get_args(dtype)[0])
            elif isinstance(value, list) and field.name != "steps":
                record[field.name] = tuple(value)
        record["optimizer"], record["optimizer_ops"] = Span(**record["optimizer"]), Span(**record["optimizer_ops"])
        record["steps"] = tuple(_micro_step(step) for step in record["steps"])
        return cls(**record)


def _micro_step(record: Mapping[str, object]) -> MicroStep:
    parts = dict(record)
    blocks = parts.pop("blocks")
    assert isinstance(blocks, list)
    spans = {name: Span(**span) for name, span in parts.items()}  # type: ignore[arg-type]  # JSON objects, checked by Span
    return MicroStep(**spans, blocks=tuple(_block_run(block) for block in blocks))


def _block_run(record: Mapping[str, object]) -> BlockRun:
    parts = dict(record)
    path = str(parts.pop("path"))
    return BlockRun(path=path, **{name: Span(**span) for name, span in parts.items()})  # type: ignore[arg-type]  # as above
