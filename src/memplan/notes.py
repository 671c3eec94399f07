"""`Notes`: what a tape has noted of a step, in columns: storages, operators, visits of modules."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memplan.kernels.probes import Probe


@dataclass(slots=True)
class Notes:
    """Ticks count births and deaths of storages; before the first one there is what is always there.

    Attributes:
        modules: paths, the model itself first, as "".
        bytes, module, born, died, recomputed: of each storage, in the order of birth. `died` is None of what lives;
            `recomputed` says that it was born in a forward inside the backward.
        now: the next tick.
        op_names, dtypes: name -> index, in the order of appearance.
        op_columns: name, module, flops, bytes and dtype of each operator.
        op_ticks: where each operator stands.
        additions: of operators by which autograd gives a parameter its gradient, or adds to it: number, storage, bytes.
        probes: operators to be run for their workspace -> their storages.
        visits: module, first and last tick, first and last operator of each.
    """

    modules: tuple[str, ...]
    bytes: list[int] = field(default_factory=list)
    module: list[int] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    died: list[int | None] = field(default_factory=list)
    recomputed: list[bool] = field(default_factory=list)
    now: int = 1
    op_names: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    op_columns: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    op_ticks: list[int] = field(default_factory=list)
    additions: list[tuple[int, int | None, int]] = field(default_factory=list)
    probes: dict[Probe, list[int]] = field(default_factory=dict)
    visits: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def operator(self, name: str, module: int, flops: int, moved: int, dtype: str) -> None:
        names, dtypes = self.op_names, self.dtypes
        row = names.setdefault(name, len(names)), module, flops, moved, dtypes.setdefault(dtype, len(dtypes))
        self.op_columns.append(row)

    def storage(self, size: int, module: int, *, briefly: bool, recomputed: bool) -> int:
        """A storage is born, and dies at once if it is there only `briefly`; its number."""
        self.bytes.append(size)
        self.module.append(module)
        self.born.append(self.now)
        self.died.append(self.now + 1 if briefly else None)
        self.recomputed.append(recomputed)
        self.now += 2 if briefly else 1
        return len(self.bytes) - 1

    def death(self, row: int) -> None:
        self.died[row] = self.now
        self.now += 1

    def rows(self) -> dict[str, NDArray[Any]]:
        """Columns of the storages, as in `Trace`."""
        return {
            "storage_bytes": np.asarray(self.bytes, dtype=np.int64),
            "storage_module": np.asarray(self.module, dtype=np.int32),
            "born": np.asarray(self.born, dtype=np.int64),
            "died": np.asarray([self.now if tick is None else tick for tick in self.died], dtype=np.int64),
        }

    def operators(self) -> dict[str, NDArray[Any]]:
        """Columns of the operators, as in `Trace`."""
        ops = np.asarray(self.op_columns, dtype=np.int64).reshape(-1, 5)
        return {
            "op_name": ops[:, 0].astype(np.int32),
            "op_module": ops[:, 1].astype(np.int32),
            "op_flops": ops[:, 2],
            "op_bytes": ops[:, 3],
            "op_dtype": ops[:, 4].astype(np.int8),
        }
