"""The oracle: the same problem as a mixed-integer linear programme, solved by HiGHS.

With x[i,o] = 1 where block i takes option o, and one row for every moment that the budget limits:

    minimise    sum of t_i(o) x[i,o]
    subject to  sum over o of x[i,o] = 1                                                           for every block i
                sum over j < i of hold_j(o) x[j,o] + sum over o of load_i(o) x[i,o] <= budget      for every block i
                sum over j < i of hold_j(o) x[j,o] + gap_i                          <= budget      for every gap i

where load_i(o) = base_i + max(forward_i(o), backward_i(o)). Where options copy to the host, three columns join: the
staging area, at least DEPTH times every copy taken and added to the rows between the first block and the last, and the
waits of the forward and of the backward, at least what the link is busier than either. The copies sum to the host limit
at most. Of the queues that is a relaxation: then the bound is proven for all choices, the choice itself only the best
by that. It shares no search with `memplan.solvers.dp`: that two so
different programmes agree is what the tests believe. Sizes are bytes, times are seconds.
"""

from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memplan.errors import UsageError
from memplan.link import staging_bytes
from memplan.problem import Choice, Problem
from memplan.solvers.solution import Solution, peak_bytes

TOLERANCE = 1e-9  # relative, of HiGHS: rows may be exceeded and the optimum missed by as much
ROWS_ABOUT = 2.0**13  # rows are scaled to this size, where the tolerance is far below one byte


@dataclass(frozen=True, slots=True)
class _Programme:
    """min cost @ x with rows @ x <= room and, per block, its x summing to 1.

    Sizes are bytes above the least that each block adds to a row, which is taken off the room in exact integers.
    """

    cost: NDArray[np.float64]
    rows: NDArray[np.int64]
    room: NDArray[np.int64]
    staged: tuple[bool, ...]  # per row: whether the staging area is alive then
    first: tuple[int, ...]  # the column of each block's option 0, and the number of columns


@dataclass(frozen=True, slots=True)
class _Copies:
    """What copying to the host adds to the programme, per column."""

    allowed: NDArray[np.bool_]
    bytes: NDArray[np.int64]
    out_s: NDArray[np.float64]  # seconds that the link is busy beyond the option's forward
    back_s: NDArray[np.float64]  # and beyond its backward
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The optimum of the programme, in which copies wait for the link no longer than they keep it busy."""

    choice: Choice
    bound_s: float  # proven by HiGHS: in one micro-step the blocks of no choice take less


def solve(problem: Problem) -> Solution:
    """The fastest choice within the budget, proven by branch and bound.

    Raises:
        UsageError: highspy is not installed.
    """
    found = relaxed(problem)
    if found is None:
        return Solution.infeasible()
    over = peak_bytes(problem, found.choice) - problem.budget_bytes
    if over > 0:
        raise RuntimeError(f"internal error: HiGHS exceeded the budget by {over} bytes")
    step_s = problem.step_s(found.choice)
    bound_s = problem.whole_s(found.bound_s)
    return Solution.of(problem, found.choice, step_s if step_s - bound_s <= TOLERANCE * step_s else bound_s)


def relaxed(problem: Problem) -> Relaxed | None:
    """The optimum of the programme above, to TOLERANCE; None if nothing fits.

    Raises:
        UsageError: highspy is not installed.
    """
    highspy = _highspy()
    programme = _programme(problem)
    if (programme.room < 0).any():
        return None
    return _optimum(highspy, programme, _copies(problem)) if problem.blocks else Relaxed((), 0.0)


def _highspy() -> Any:
    try:
        return import_module("highspy")
    except ModuleNotFoundError as error:
        raise UsageError("the exact solver needs HiGHS: pip install 'memplan[exact]', or take 'dp'") from error


def _silent(highspy: Any) -> Any:
    class Silent(highspy.Highs):  # type: ignore[misc]  # highspy is imported late, as Any
        def enableCallbacks(self) -> None:  # noqa: N802
            """The constructor calls this first, and any first call prints a banner on stdout unless output is off."""
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    return Silent()


def _programme(problem: Problem) -> _Programme:
    options = [option for block in problem.blocks for option in block.options]
    first = tuple(np.cumsum([0] + [len(block.options) for block in problem.blocks]).tolist())
    holds = np.array([option.hold_bytes for option in options], dtype=np.int64)
    gaps = [max(gap.forward_bytes, gap.backward_bytes) for gap in problem.gaps]
    rows = [np.zeros(len(options), dtype=np.int64)]  # before the first block nothing is held, in the optimizer neither
    room = [problem.budget_bytes - max(gaps[0], problem.optimizer_bytes)]
    for block, gap, start, stop in zip(problem.blocks, gaps[1:], first, first[1:], strict=False):
        at, after = np.zeros_like(rows[0]), np.zeros_like(rows[0])
        at[:start], after[:stop] = holds[:start], holds[:stop]
        at[start:stop] = [block.base_bytes + max(o.forward_bytes, o.backward_bytes) for o in block.options]
        rows += [at, after]
        room += [problem.budget_bytes, problem.budget_bytes - gap]
    matrix, rooms = np.array(rows), np.array(room)
    for start, stop in pairwise(first):
        least = matrix[:, start:stop].min(axis=1)
        matrix[:, start:stop] -= least[:, None]
        rooms -= least
    staged = (False, *([True, True] * len(problem.blocks))[:-1], False)[: len(rows)]
    return _Programme(np.array([option.step_s for option in options]), matrix, rooms, staged, first)


def _copies(problem: Problem) -> _Copies:
    options = [option for block in problem.blocks for option in block.options]
    copies = np.array([option.link_bytes for option in options], dtype=np.int64)
    busy_s = copies / (problem.link_bytes_s or 1.0)  # without a link only options that copy nothing are allowed
    forward_s = np.array([option.forward_s for option in options])
    return _Copies(
        allowed=np.array([problem.allows(option) for option in options]),
        bytes=copies,
        out_s=busy_s - forward_s,
        back_s=busy_s - (np.array([option.step_s for option in options]) - forward_s),
        host_bytes=problem.host_bytes or 0,
    )


def _optimum(highspy: Any, programme: _Programme, copies: _Copies) -> Relaxed | None:
    columns = programme.first[-1]
    scale = ROWS_ABOUT / 2.0 ** float(
        np.ceil(np.log2(max(int(programme.rows.max()), 1)))
    )  # a power of 2 rounds nothing
    pace = 1.0 / max(float(programme.cost.max()), 1e-12)
    solver = _silent(highspy)
    for name in ("mip_rel_gap", "mip_abs_gap"):
        solver.setOptionValue(name, 0.0)
    for name in ("mip_feasibility_tolerance", "primal_feasibility_tolerance"):
        solver.setOptionValue(name, TOLERANCE)
    every = np.arange(columns, dtype=np.int32)
    solver.addVars(columns, np.zeros(columns), copies.allowed.astype(np.float64))
    solver.changeColsCost(columns, every, programme.cost * pace)
    solver.changeColsIntegrality(columns, every, np.full(columns, highspy.HighsVarType.kInteger))
    for start, stop in pairwise(programme.first):
        solver.addRow(1.0, 1.0, stop - start, every[start:stop], np.ones(stop - start))
    copying = bool((copies.allowed & (copies.bytes > 0)).any())
    staging = columns  # the next column, in units of `scale`
    if copying:
        _add_copies(highspy, solver, copies, scale, pace)
    for row, room, staged in zip(programme.rows, programme.room, programme.staged, strict=True):
        if row.sum() > room or (copying and staged):  # others cannot be exceeded
            used, sizes = np.flatnonzero(row).astype(np.int32), row[row != 0] * scale
            if copying and staged:
                used, sizes = np.append(used, np.int32(staging)), np.append(sizes, 1.0)
            solver.addRow(-highspy.kHighsInf, float(room) * scale, len(used), used, sizes)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"internal error: HiGHS ended with {solver.modelStatusToString(solver.getModelStatus())}")
    x = np.array(solver.getSolution().col_value)
    return Relaxed(_choice(programme, x), float(solver.getInfo().mip_dual_bound) / pace)


def _add_copies(highspy: Any, solver: Any, copies: _Copies, scale: float, pace: float) -> None:
    """Three columns, the staging area and the two waits, with the rows that push them up, and the host limit."""
    columns = len(copies.bytes)
    staging, *waits = range(columns, columns + 3)
    solver.addVars(3, np.zeros(3), np.full(3, highspy.kHighsInf))
    solver.changeColsCost(2, np.array(waits, dtype=np.int32), np.ones(2))
    every = np.arange(columns, dtype=np.int32)
    for column in np.flatnonzero(copies.allowed & (copies.bytes > 0)):
        most = float(staging_bytes([int(copies.bytes[column])])) * scale
        solver.addRow(-highspy.kHighsInf, 0.0, 2, np.array([column, staging], dtype=np.int32), np.array([most, -1.0]))
    for wait, excess_s in zip(waits, (copies.out_s, copies.back_s), strict=True):
        index = np.append(every, np.int32(wait))
        solver.addRow(-highspy.kHighsInf, 0.0, columns + 1, index, np.append(excess_s * pace, -1.0))
    solver.addRow(-highspy.kHighsInf, float(copies.host_bytes) * scale, columns, every, copies.bytes * scale)


def _choice(programme: _Programme, x: NDArray[np.float64]) -> Choice:
    """HiGHS returns binaries as floats near 0 and 1: more than one half is taken."""
    return tuple(int(np.flatnonzero(x[start:stop] > 0.5)[0]) for start, stop in pairwise(programme.first))
