"""How fast and how good the solvers are: blocks x options -> milliseconds, gap, and the exact solver's answer.

    python benchmarks/solver.py            prints the table (about two minutes)
    python benchmarks/solver.py --write    and puts it into docs/solver.md

The chains are synthetic and seeded, the budgets lie at shares of the way from the least that fits to what the fastest
options need. Times are CPU time in one process, medians of repeated solves; the exact solver is asked once, where it is
quick enough.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from memplan.problem import Block, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import SOLVERS, Solution, smallest_budget

MIB = 2**20
DOC = Path(__file__).parents[1] / "docs" / "solver.md"
START, END = "<!-- benchmarks/solver.py writes from here", "<!-- to here -->"
SHARES = (0.02, 0.1, 0.3, 0.6, 0.95)
REPEATS = 9
EXACT_UP_TO = 32 * 8  # blocks x options: HiGHS takes seconds to minutes above


@dataclass(frozen=True)
class Row:
    shape: str
    blocks: int
    options: int
    median_ms: float  # over all budgets
    worst_ms: float  # the median at the slowest budget
    worst_gap: float
    exact: str


# --- the chains -----------------------------------------------------------------------------------------------------


def keep_or_recompute(rng: random.Random, _: int) -> list[tuple[int, float]]:
    hold = rng.randrange(300, 900) * MIB
    return [(hold, 1.2e-2), (rng.randrange(8, 64) * MIB, 1.2e-2 + rng.uniform(2e-3, 4e-3))]


def selective(rng: random.Random, count: int) -> list[tuple[int, float]]:
    """Holds fall and recomputation rises along a convex front with noise, as when more and more is not saved."""
    holds = sorted(rng.randrange(16 * MIB, 1024 * MIB) for _ in range(count))
    extra = [*sorted((3e-3 * rng.random() ** 2 for _ in range(count - 1)), reverse=True), 0.0]
    fastest = 1e-2 * rng.uniform(0.8, 1.2)
    return [(hold, fastest + more) for hold, more in zip(holds, extra, strict=True)]


def scattered(rng: random.Random, count: int) -> list[tuple[int, float]]:
    return [(rng.randrange(MIB, 1024 * MIB), rng.uniform(1e-2, 2e-2)) for _ in range(count)]


def proportional(rng: random.Random, count: int) -> list[tuple[int, float]]:
    """The worst case: time falls exactly as holds rise, so that no label is more promising than another."""
    holds = [rng.randrange(MIB, 1024 * MIB) for _ in range(count)]
    return [(hold, 2e-2 - 1e-2 * hold / (1024 * MIB)) for hold in holds]


Points = Callable[[random.Random, int], list[tuple[int, float]]]


def chain(points: Points, blocks: int, options: int, *, identical: bool) -> Problem:
    rng = random.Random(blocks * 1000 + options)

    def block_options() -> tuple[Option, ...]:
        drawn = points(rng, options)
        most = max(hold for hold, _ in drawn)
        names = ["keep", "recompute"] if options == 2 else [f"select-{k}" for k in range(options)]
        return tuple(Option(n, hold, most, most + 64 * MIB, s) for n, (hold, s) in zip(names, drawn, strict=True))

    one = block_options()
    every = tuple(Block(f"layers.{i}", 4 * MIB, one if identical else block_options()) for i in range(blocks))
    return Problem(1, every, (Gap(64 * MIB, 64 * MIB),) * blocks + (Gap(2048 * MIB, 2048 * MIB),), 0, 1e-2, 1e-2)


def with_share(problem: Problem, share: float) -> Problem:
    quickest = tuple(min(range(len(b.options)), key=lambda k: b.options[k].step_s) for b in problem.blocks)
    low, high = smallest_budget(problem), simulate(problem, quickest).peak_bytes
    return replace(problem, budget_bytes=low + int((high - low) * share))


# --- the measurements -----------------------------------------------------------------------------------------------


def timed_ms(problem: Problem) -> tuple[float, Solution]:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        solution = SOLVERS["dp"](problem)
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times), solution


def against_exact(problem: Problem, solution: Solution) -> tuple[float, float]:
    """How much longer the default solver's step is (share), and the milliseconds that the exact solver took."""
    start = time.process_time()
    exact = SOLVERS["exact"](problem)
    took_ms = (time.process_time() - start) * 1e3
    assert exact.step_s is not None
    assert solution.step_s is not None
    return solution.step_s / exact.step_s - 1, took_ms


def measured(shape: str, points: Points, blocks: int, options: int, *, identical: bool) -> Row:
    problems = [with_share(chain(points, blocks, options, identical=identical), share) for share in SHARES]
    results = [timed_ms(problem) for problem in problems]
    gaps = []
    for problem, (_, solution) in zip(problems, results, strict=True):
        assert solution.choice is not None
        assert solution.gap is not None
        assert simulate(problem, solution.choice).fits
        gaps.append(solution.gap)
    exact = "not asked"
    if blocks * options <= EXACT_UP_TO and points is not proportional:
        pairs = [against_exact(p, solution) for p, (_, solution) in zip(problems, results, strict=True)]
        slower = max(pair[0] for pair in pairs)
        exact = f"{'same' if abs(slower) < 1e-9 else f'{slower:+.1e}'}, {statistics.median(p[1] for p in pairs):.0f} ms"
    times = [result[0] for result in results]
    name = f"{shape}, {'identical' if identical else 'different'}"
    return Row(name, blocks, options, statistics.median(times), max(times), max(gaps), exact)


def table(rows: list[Row]) -> str:
    head = "| blocks are | blocks | options | median | slowest budget | worst gap | HiGHS |\n"
    head += "|---|--:|--:|--:|--:|--:|---|\n"
    return head + "".join(
        f"| {row.shape} | {row.blocks} | {row.options} | {row.median_ms:.1f} ms | {row.worst_ms:.1f} ms | "
        f"{'0' if row.worst_gap == 0 else f'{row.worst_gap * 100:.1g} %'} | {row.exact} |\n"
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/solver.md")
    write = parser.parse_args().write
    cases: list[tuple[str, Points, tuple[tuple[int, int], ...]]] = [
        ("keep or recompute", keep_or_recompute, ((32, 2), (64, 2), (128, 2))),
        ("selective", selective, ((32, 8), (32, 24), (128, 24))),
        ("scattered", scattered, ((32, 8), (32, 24), (128, 24))),
        ("proportional", proportional, ((32, 8), (128, 24))),
    ]
    rows = [
        measured(shape, points, blocks, options, identical=identical)
        for shape, points, sizes in cases
        for identical in (True, False)
        for blocks, options in sizes
    ]
    text = table(rows)
    print(text)
    if write:
        before, rest = DOC.read_text(encoding="utf-8").split(START)
        line, after = rest.split("\n", 1)[0], rest.split(END)[1]
        DOC.write_text(f"{before}{START}{line}\n\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
