"""What memory buys: the frontier of peak against time at one micro-batch, and the price of one GiB more."""

from dataclasses import dataclass

from memplan.simulator import simulate
from memplan.sizes import fastest
from memplan.task import Size, Solved, Task

GIB = 2**30
FRONTIER_POINTS = 8
ROUGH = 0.01  # share of a step by which those may be slower than need be


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of the frontier of memory against time."""

    variant: str
    options: tuple[str, ...]  # of each block
    peak_bytes: int
    step_s: float


def shadow_price(task: Task, taken: Solved, ways: list[Size]) -> float:
    """Seconds per step that 1 GiB above the plan's own budget would save, at the same micro-batch."""
    own_bytes = taken.timeline.peak_bytes if task.strategy.objective == "peak" else task.budget_bytes
    richer = task.quickest(ways, own_bytes + GIB)
    return max(0.0, taken.timeline.step_s - richer.timeline.step_s)


def frontier(task: Task, taken: Solved, ways: list[Size]) -> tuple[Point, ...]:
    """Peak against time from the smallest budget to the fastest options, and the plan taken; each step buys time."""
    rough = [size.asking(enough=ROUGH) for size in ways]
    low = min(size.smallest_bytes for size in rough)
    high = max(simulate(size.problem, fastest(size.problem)).peak_bytes for size in rough)
    budgets = sorted({low + (high - low) * k // (FRONTIER_POINTS - 1) for k in range(FRONTIER_POINTS)})
    own = _point(taken)
    points: list[Point] = []
    for point in sorted((_point(task.quickest(rough, budget)) for budget in budgets), key=_peak_and_time):
        if not points or point.step_s < points[-1].step_s:
            points.append(point)
    below = [point for point in points if point.peak_bytes < own.peak_bytes and point.step_s > own.step_s]
    above = [point for point in points if point.peak_bytes > own.peak_bytes and point.step_s < own.step_s]
    return (*below, own, *above)


def _point(solved: Solved) -> Point:
    assert solved.solution.choice is not None  # `Task.solved` has seen to it
    options = tuple(option.name for option in solved.size.problem.chosen(solved.solution.choice))
    return Point(solved.size.variant, options, solved.timeline.peak_bytes, solved.timeline.step_s)


def _peak_and_time(point: Point) -> tuple[int, float]:
    return point.peak_bytes, point.step_s
