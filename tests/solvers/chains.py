"""Chains to solve: strategies for small ones, a seeded generator for large ones, and the brute-force oracle."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from hypothesis import strategies as st

from memplan.problem import Block, Choice, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import smallest_budget
from memplan.solvers.bounds import Prices

MIB = 2**20
ROUNDING = 1e-9  # relative; HiGHS proves to as much
COPIED = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0.0, 1.0)
MEMORY = st.just(0.0) | st.floats(0.0, 1.0) | st.floats(0.0, 1e-9)
PRICES = st.builds(Prices, COPIED, COPIED, st.just(0.0) | st.floats(0.0, 4.0), MEMORY, MEMORY)


def choices(problem: Problem) -> Iterator[Choice]:
    return product(*(range(len(block.options)) for block in problem.blocks))


def accepted(problem: Problem) -> list[Choice]:
    """Every choice that the simulator accepts."""
    return [choice for choice in choices(problem) if simulate(problem, choice).fits]


def brute_force(problem: Problem) -> Choice | None:
    """The fastest choice that the simulator accepts, by trying every one."""
    return min(accepted(problem), key=problem.step_s, default=None)


def least_peak(problem: Problem) -> int:
    """The smallest peak of all choices, by trying every one."""
    timelines = (simulate(replace(problem, budget_bytes=10**15), choice) for choice in choices(problem))
    return min(timeline.peak_bytes for timeline in timelines if timeline.fits)


def fastest(problem: Problem) -> Choice:
    return tuple(
        min((option.step_s, k) for k, option in enumerate(block.options) if option.link_bytes == 0)[1]
        for block in problem.blocks
    )


def with_share(problem: Problem, share: float) -> Problem:
    """The budget at `share` of the way from the least that fits to what the fastest options need."""
    low = smallest_budget(problem)
    high = simulate(problem, fastest(problem)).peak_bytes
    return replace(problem, budget_bytes=low + int((high - low) * share))


# Coarse sizes and times make ties and exact fits likely; fine ones make every prefix sum different.
_SIZES = st.integers(0, 6) | st.integers(0, 10**11)
_TIMES = st.integers(1, 5).map(float) | st.floats(1e-3, 10.0)

_OPTIONS = st.builds(Option, st.just("keep"), _SIZES, _SIZES, _SIZES, _TIMES)
_GAPS = st.builds(Gap, _SIZES, _SIZES)


@st.composite
def problems(draw: st.DrawFn, most_blocks: int = 8, most_choices: int = 700) -> Problem:
    """Chains of up to eight blocks with few enough choices for brute force; half of them repeat one block."""
    count = draw(st.integers(0, most_blocks))
    most_options = max(k for k in range(1, 6) if k**count <= most_choices)
    options = st.lists(_OPTIONS, min_size=1, max_size=most_options).map(tuple)
    same = draw(options) if draw(st.booleans()) else None
    blocks = tuple(Block(f"layers.{i}", draw(_SIZES), same or draw(options)) for i in range(count))
    gaps = tuple(draw(_GAPS) for _ in range(count + 1))
    problem = Problem(
        budget_bytes=1,
        blocks=blocks,
        gaps=gaps,
        optimizer_bytes=draw(_SIZES),
        rest_s=draw(st.floats(0.0, 1.0)),
        optimizer_s=draw(st.floats(0.0, 1.0)),
        accumulation=draw(st.integers(1, 3)),
    )
    if draw(st.booleans()):
        return replace(problem, budget_bytes=draw(st.integers(0, 2 * smallest_budget(problem) + 10)))
    return with_share(problem, draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])))


@st.composite
def offloading_problems(draw: st.DrawFn) -> Problem:
    """Chains of up to five blocks in which some options copy to the host, mostly with a link and a limit for it."""
    problem = draw(problems(most_blocks=5, most_choices=100))
    copies = st.integers(1, 6) | st.integers(1, 10**11)

    def some(block: Block) -> Block:
        copying = [
            replace(o, name="offload", link_bytes=draw(copies)) for o in block.options[:1] if draw(st.booleans())
        ]
        return replace(block, options=(*block.options, *copying))

    return replace(
        problem,
        blocks=tuple(some(block) for block in problem.blocks),
        link_bytes_s=draw(st.sampled_from([1.0, 10.0, 1e10, 1e12])),
        host_bytes=draw(st.none() | st.integers(0, 20) | st.integers(0, 10**14)),
    )


@st.composite
def tight(draw: st.DrawFn) -> Problem:
    """Of which the blocks are all there is, at budgets from the least that fits when copies help."""
    problem = replace(draw(offloading_problems()), accumulation=1, rest_s=0.0, optimizer_s=0.0)
    return with_share(problem, draw(st.sampled_from([0.0, 0.05, 0.3, 0.7])))


@st.composite
def forced(draw: st.DrawFn) -> Problem:
    """Every block has to copy, over a link about as fast as the blocks: here a wrong price shows."""
    sizes = st.integers(0, 6)
    seconds = st.floats(1.0, 5.0)
    copying = st.builds(
        Option, st.just("offload"), sizes, sizes, sizes, seconds, st.integers(1, 6), st.just(0.0) | st.floats(0.0, 1.0)
    )
    too_large = Option("keep", 10**6, 10**6, 10**6, 1.0)
    count = draw(st.integers(1, 4))
    blocks = tuple(
        Block(f"layers.{i}", 0, (too_large, *draw(st.lists(copying, min_size=1, max_size=3)))) for i in range(count)
    )
    problem = Problem(
        budget_bytes=1,
        blocks=blocks,
        gaps=(Gap(0, 0),) * (count + 1),
        optimizer_bytes=0,
        rest_s=0.0,
        optimizer_s=0.0,
        link_bytes_s=draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])),
        host_bytes=draw(st.just(10**6) | st.integers(6, 24)),
    )
    return replace(problem, budget_bytes=smallest_budget(problem) + draw(st.integers(0, 20)))


def largest_copy(problem: Problem, choice: Choice) -> int:
    return max((option.link_bytes for option in problem.chosen(choice)), default=0)


def rounding_s(problem: Problem, prices: Prices) -> float:
    """What sums of so many seconds may be off by."""
    host_s = (problem.host_bytes or 0) / (problem.link_bytes_s or 1.0)
    blocks_s = sum(max(option.step_s for option in block.options) for block in problem.blocks)
    copies_s = sum(max(option.link_bytes for option in block.options) for block in problem.blocks)
    return ROUNDING * (prices.host * host_s + blocks_s + copies_s / (problem.link_bytes_s or 1.0))


def offloading(problem: Problem, *, seed: int, bytes_s: float, host_bytes: int = 10**15) -> Problem:
    """The chain with four more options per block, which copy shares of what the largest ones hold."""
    rng = random.Random(seed)
    drawn: dict[tuple[Option, ...], tuple[Option, ...]] = {}

    def more(options: tuple[Option, ...]) -> tuple[Option, ...]:
        copying = []
        for k, source in enumerate(sorted(options, key=lambda option: -option.hold_bytes)[:4]):
            size = int(source.hold_bytes * rng.choice([0.1, 0.3, 0.5, 0.9]))
            held = source.hold_bytes - size
            copying.append(replace(source, name=f"offload-{k}", hold_bytes=held, link_bytes=size))
        return (*options, *copying)

    for block in problem.blocks:
        if block.options not in drawn:
            drawn[block.options] = more(block.options)
    blocks = tuple(replace(block, options=drawn[block.options]) for block in problem.blocks)
    return replace(problem, blocks=blocks, link_bytes_s=bytes_s, host_bytes=host_bytes)


def chain(blocks: int, options: int, *, seed: int, same: bool = False, shape: str = "selective") -> Problem:
    """A large chain: about 1 GiB and 15 ms per block; its budget has still to be set, by `with_share`.

    "selective": options save subsets of six tensors and recompute the rest, as selective checkpointing does.
    "scattered": holds and times that have nothing to do with each other.
    "proportional": time falls exactly as holds rise, so that no option is more promising than another.
    """
    rng = random.Random(seed)
    one = _options(rng, options, shape)
    every = tuple(Block(f"layers.{i}", 4 * MIB, one if same else _options(rng, options, shape)) for i in range(blocks))
    gaps = tuple(Gap(rng.randrange(900, 1100) * MIB, rng.randrange(900, 1100) * MIB) for _ in range(blocks + 1))
    return Problem(1, every, gaps, optimizer_bytes=1024 * MIB, rest_s=1e-2, optimizer_s=1e-2)


def _options(rng: random.Random, count: int, shape: str) -> tuple[Option, ...]:
    points = {"selective": _selective, "scattered": _scattered, "proportional": _proportional}[shape](rng, count)
    most = max(hold for hold, _ in points)
    return tuple(Option(f"option {k}", hold, most, most + 64 * MIB, time) for k, (hold, time) in enumerate(points))


def _selective(rng: random.Random, count: int) -> list[tuple[int, float]]:
    tensors = [(rng.randrange(16 * MIB, 300 * MIB), rng.uniform(1e-4, 2e-3)) for _ in range(6)]
    subsets = [[tensor for k, tensor in enumerate(tensors) if mask >> k & 1] for mask in range(64)]
    whole_s = 1e-2 + sum(time for _, time in tensors)
    points = sorted((sum(size for size, _ in s), whole_s - sum(time for _, time in s)) for s in subsets)
    front = [p for k, p in enumerate(points) if all(p[1] < before[1] for before in points[:k])]
    step = max(1.0, (len(front) - 1) / (count - 1)) if count > 1 else 1.0
    return [front[round(k * step)] for k in range(min(count, len(front)))]


def _scattered(rng: random.Random, count: int) -> list[tuple[int, float]]:
    return [(rng.randrange(MIB, 1024 * MIB), rng.uniform(1e-2, 2e-2)) for _ in range(count)]


def _proportional(rng: random.Random, count: int) -> list[tuple[int, float]]:
    holds = [rng.randrange(MIB, 1024 * MIB) for _ in range(count)]
    return [(hold, 2e-2 - 1e-2 * hold / (1024 * MIB)) for hold in holds]
