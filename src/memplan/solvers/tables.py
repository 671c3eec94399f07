"""A problem as arrays, for the solver that asks of thousands of choices whether they fit."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from memplan.link import staging_bytes
from memplan.problem import Choice, Problem
from memplan.solvers.labels import Bytes, Index, Seconds
from memplan.solvers.solution import gap_peaks


@dataclass(frozen=True, slots=True)
class Tables:
    """Sizes and seconds by [block, option]; 0 where a block has no such option."""

    rows: Index
    hold: Bytes
    load: Bytes
    copy: Bytes
    time: Seconds
    gaps: Bytes  # the larger peak of each gap, in order
    equal: tuple[tuple[int, ...], ...]  # blocks with the same options, where there are several
    problem: Problem

    @classmethod
    def of(cls, problem: Problem) -> "Tables":
        """Of a problem with at least one block."""
        most = max(len(block.options) for block in problem.blocks)
        shape = len(problem.blocks), most
        hold, load, copy = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        time = np.zeros(shape)
        for i, block in enumerate(problem.blocks):
            for k, option in enumerate(block.options):
                hold[i, k], copy[i, k], time[i, k] = option.hold_bytes, option.link_bytes, option.step_s
                load[i, k] = block.base_bytes + max(option.forward_bytes, option.backward_bytes)
        gaps = np.array(gap_peaks(problem), dtype=np.int64)
        groups: dict[object, list[int]] = defaultdict(list)
        for i, block in enumerate(problem.blocks):
            groups[block.options].append(i)
        equal = tuple(tuple(members) for members in groups.values() if len(members) > 1)
        return cls(np.arange(shape[0]), hold, load, copy, time, gaps, equal, problem)

    def sum_s(self, choice: Choice) -> float:
        """Seconds of the blocks without waiting."""
        return float(self.time[self.rows, choice].sum())

    def fits(self, choice: Choice) -> bool:
        """Whether `solution.peak_bytes` is within the budget and the copies within the host limit."""
        hold, copy = self.hold[self.rows, choice], self.copy[self.rows, choice]
        after = np.cumsum(hold)
        staged = np.full(len(hold), staging_bytes([int(copy.max())]))
        loads = after - hold + self.load[self.rows, choice] + staged
        staged[-1] = 0  # the queue is empty while the head runs
        gaps = after + self.gaps[1:] + staged
        peak = max(int(loads.max()), int(gaps.max()), int(self.gaps[0]), self.problem.optimizer_bytes)
        return peak <= self.problem.budget_bytes and int(copy.sum()) <= (self.problem.host_bytes or 0)

    def spread(self, choice: Choice) -> Choice:
        """The same options handed out anew among equal blocks, so that the link is busy evenly and not at the end."""
        spread = list(choice)
        for members in self.equal:
            counts = Counter(choice[i] for i in members)
            # Of n blocks with one option the j-th lies at about (j + 1/2) / n of the group, copies a little earlier.
            places = [
                ((j + (0.25 if self.copy[members[0], k] else 0.75)) / count, k)
                for k, count in counts.items()
                for j in range(count)
            ]
            for i, (_, k) in zip(members, sorted(places), strict=True):
                spread[i] = k
        return tuple(spread)
