"""How fast and how good the solvers are: blocks x options -> milliseconds, gap, and the exact solver's answer.

    python benchmarks/solver.py                        prints the tables (about five minutes)
    python benchmarks/solver.py --only "with copies"   measures the rows whose name has these words, keeps the others
    python benchmarks/solver.py --write                and puts them into docs/solver.md

The chains are synthetic and seeded, the budgets lie at shares of the way from the least that fits to what the fastest
options need. Times are CPU time in one process, medians of repeated solves; the exact solver is asked once, where it is
quick enough.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from memplan.planner import Outcome, search
from memplan.problem import Block, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import SOLVERS, Solution, smallest_budget
from memplan.strategy import Strategy

MIB = 2**20
DOC = Path(__file__).parents[1] / "docs" / "solver.md"
START, END = "<!-- benchmarks/solver.py writes from here", "<!-- to here -->"
SHARES = (0.02, 0.1, 0.3, 0.6, 0.95)
REPEATS = 9  # of a solve, but no further one after so many seconds:
LONG_S = 1.0
EXACT_UP_TO = 32 * 8  # blocks x options: HiGHS takes seconds to minutes above


CHAINS = """\
| blocks are | blocks | options | median | slowest budget | worst gap | HiGHS |
|---|--:|--:|--:|--:|--:|---|
"""
SEARCHES = """\
| search over 12 micro-batches in 4 variants, 128 blocks, 24 options | CPU time | gap | taken |
|---|--:|--:|--:|
"""


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


@dataclass(frozen=True)
class Case:
    """One row."""

    shape: str
    points: Points
    blocks: int
    options: int
    identical: bool
    copies: bool

    @property
    def name(self) -> str:
        alike = "identical" if self.identical else "different"
        return f"{self.shape}, {alike}{', with copies' if self.copies else ''}"


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


def with_copies(problem: Problem, link_bytes_s: float = 25e9) -> Problem:
    """Each block may also copy to the host: its boundary while it recomputes, or most of what it saves."""

    def more(block: Block) -> Block:
        most, least = (pick(block.options, key=lambda option: option.hold_bytes) for pick in (max, min))
        quickest = min(option.step_s for option in block.options)
        known = [replace(option, recompute_s=option.step_s - quickest) for option in block.options]
        stay, rest = least.hold_bytes // 8, least.hold_bytes // 4
        boundary = replace(least, name="offload-boundary", hold_bytes=stay, link_bytes=least.hold_bytes - stay)
        saved = replace(most, name="offload-saved", hold_bytes=rest, step_s=quickest, link_bytes=most.hold_bytes - rest)
        boundary = replace(boundary, recompute_s=boundary.step_s - quickest)
        return replace(block, options=(*known, boundary, saved))

    blocks = tuple(map(more, problem.blocks))
    return replace(problem, blocks=blocks, link_bytes_s=link_bytes_s, host_bytes=2**40)


def with_share(problem: Problem, share: float) -> Problem:
    quickest = tuple(min(range(len(b.options)), key=lambda k: b.options[k].step_s) for b in problem.blocks)
    low, high = smallest_budget(problem), simulate(problem, quickest).peak_bytes
    return replace(problem, budget_bytes=low + int((high - low) * share))


def _slower(micro_batch: int) -> float:
    return 0.2 + 0.8 * micro_batch / 32


@dataclass(frozen=True)
class Scaled:
    """A profile in which everything grows with the micro-batch; implements `planner.Profile`.

    Its loss may be computed in chunks, which takes a sixteenth of its memory and a little time, and its optimizer may
    step one parameter at a time.
    """

    whole: Problem  # at 32 samples
    can_split: bool = True
    largest_micro_batch: int = 4096
    blocks: dict[int, tuple[Block, ...]] = field(default_factory=dict)
    variants: tuple[str, ...] = ("keep", "chunked-128", "optimizer-single", "chunked-128+optimizer-single")

    def problem(self, micro_batch: int, accumulation: int, budget_bytes: int, variant: str = "keep") -> Problem:
        """Seconds have a fixed part of a fifth, bytes have none."""
        share, slower = micro_batch / 32, _slower(micro_batch)
        head, extra_s = (16, 2e-3 * slower) if "chunked" in variant else (1, 0.0)
        extra_s += 1e-3 if "single" in variant else 0.0
        *inner, last = self.whole.gaps
        gaps = (*inner, Gap(last.forward_bytes // head, last.backward_bytes // head))
        return replace(
            self.whole,
            budget_bytes=budget_bytes,
            blocks=self._blocks_for(micro_batch),
            gaps=tuple(Gap(int(g.forward_bytes * share), int(g.backward_bytes * share)) for g in gaps),
            rest_s=self.whole.rest_s * slower + extra_s,
            accumulation=accumulation,
        )

    def _blocks_for(self, micro_batch: int) -> tuple[Block, ...]:
        """Made once for each micro-batch: it is the search that is timed."""
        if micro_batch not in self.blocks:
            share, slower = micro_batch / 32, _slower(micro_batch)

            def scaled(option: Option) -> Option:
                return replace(
                    option,
                    hold_bytes=int(option.hold_bytes * share),
                    forward_bytes=int(option.forward_bytes * share),
                    backward_bytes=int(option.backward_bytes * share),
                    step_s=option.step_s * slower,
                    link_bytes=int(option.link_bytes * share),
                    recompute_s=option.recompute_s * slower,
                )

            blocks = (replace(block, options=tuple(map(scaled, block.options))) for block in self.whole.blocks)
            self.blocks[micro_batch] = tuple(blocks)
        return self.blocks[micro_batch]


# --- the measurements -----------------------------------------------------------------------------------------------


def timed_ms(problem: Problem) -> tuple[float, Solution]:
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < LONG_S * 1e3:
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


def measured(case: Case) -> str:
    """A row of the first table: one chain at all budgets."""
    plain = chain(case.points, case.blocks, case.options, identical=case.identical)
    problems = [with_share(with_copies(plain) if case.copies else plain, share) for share in SHARES]
    results = [timed_ms(problem) for problem in problems]
    gaps = []
    for problem, (_, solution) in zip(problems, results, strict=True):
        assert solution.choice is not None
        assert solution.gap is not None
        assert simulate(problem, solution.choice).fits
        gaps.append(solution.gap)
    exact = "not asked"
    if case.blocks * case.options <= EXACT_UP_TO and case.points is not proportional and not case.copies:
        pairs = [against_exact(p, solution) for p, (_, solution) in zip(problems, results, strict=True)]
        slower = max(pair[0] for pair in pairs)
        exact = f"{'same' if abs(slower) < 1e-9 else f'{slower:+.1e}'}, {statistics.median(p[1] for p in pairs):.0f} ms"
    times = [result[0] for result in results]
    gap = "0" if max(gaps) == 0 else f"{max(gaps) * 100:.1g} %"
    median_ms, worst_ms = statistics.median(times), max(times)
    start = f"| {case.name} | {case.blocks} | {case.options} |"
    return f"{start} {median_ms:.1f} ms | {worst_ms:.1f} ms | {gap} | {exact} |"


def searched(case: Case) -> str:
    """A row of the second table: the whole outer search, over the 12 splits of a batch of 60."""
    plain = chain(case.points, case.blocks, case.options, identical=case.identical)
    whole = with_copies(plain) if case.copies else plain
    link = {"link_bytes_s": whole.link_bytes_s, "host_bytes": whole.host_bytes}
    start = time.process_time()
    found = search(Scaled(whole), with_share(plain, 0.1).budget_bytes, Strategy("any"), effective_batch=60, **link)
    took = time.process_time() - start
    assert isinstance(found, Outcome)
    gap = "0" if found.gap == 0 else f"{found.gap * 100:.1g} %"
    return f"| {case.name} | {took:.2f} s | {gap} | {found.micro_batch} x {found.accumulation} |"


# --- the tables -----------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Of the first table."""
    shapes: list[tuple[str, Points, tuple[tuple[int, int], ...]]] = [
        ("keep or recompute", keep_or_recompute, ((32, 2), (64, 2), (128, 2))),
        ("selective", selective, ((32, 8), (32, 24), (128, 24))),
        ("scattered", scattered, ((32, 8), (32, 24), (128, 24))),
        ("proportional", proportional, ((32, 8), (128, 24))),
    ]
    for copies in (False, True):
        for shape, points, sizes in shapes[:3] if copies else shapes:
            for identical in (True, False):
                for blocks, options in sizes[::2] if copies else sizes:
                    yield Case(shape, points, blocks, options, identical, copies)


def searches() -> Iterator[Case]:
    """Of the second."""
    for shape, points in (("selective", selective), ("scattered", scattered), ("proportional", proportional)):
        for identical in (True, False):
            for copies in (False, True):
                yield Case(shape, points, 128, 24, identical, copies)


def table(cases: Iterable[Case], row: Callable[[Case], str], only: str, known: list[str], keys: int) -> str:
    """The rows, those without the words `only` in their name as they were; `keys` cells tell them apart."""
    lines = []
    for case in cases:
        start = f"| {case.name} |" + "".join(f" {size} |" for size in (case.blocks, case.options)[: keys - 1])
        kept = [] if only in case.name else [line for line in known if line.startswith(start)]
        lines += kept[:1] if kept else [row(case)]
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/solver.md")
    parser.add_argument("--only", default="", help="words in the names of the rows to measure; others stay as they are")
    given = parser.parse_args()
    before, rest = DOC.read_text(encoding="utf-8").split(START)
    line, after = rest.split("\n", 1)[0], rest.split(END)[1]
    chains, _, whole = rest.partition("| search over")
    solved = table(cases(), measured, given.only, chains.splitlines(), 3)
    found = table(searches(), searched, given.only, whole.splitlines(), 1)
    text = f"{CHAINS}{solved}\n\n{SEARCHES}{found}"
    if given.write:
        DOC.write_text(f"{before}{START}{line}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
