"""The default solver beyond the contract: large chains, its bound when labels are dropped, and rotor's optimum."""

import random
from dataclasses import dataclass, replace
from functools import cache

import pytest
from chains import brute_force, chain, least_peak, problems, with_share
from hypothesis import given, settings

from memplan.problem import Block, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import Status, dp, exact, labels, smallest_budget

ULP = 1e-12


@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
@pytest.mark.parametrize("same", [False, True], ids=["different", "identical"])
@pytest.mark.parametrize("shape", ["selective", "scattered", "proportional"])
@pytest.mark.parametrize(("blocks", "options"), [(32, 2), (32, 24), (64, 8), (128, 2), (128, 24)])
def test_the_gap_of_large_chains_is_at_most_half_a_percent(
    blocks: int, options: int, shape: str, same: bool, share: float
) -> None:
    problem = with_share(chain(blocks, options, seed=blocks + options, same=same, shape=shape), share)
    solution = dp.solve(problem)
    assert solution.choice is not None
    assert solution.gap is not None
    assert simulate(problem, solution.choice).fits
    assert solution.gap <= 0.005
    if shape != "proportional":  # the one where every label is equally promising
        assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("same", [False, True], ids=["different", "identical"])
@pytest.mark.parametrize("shape", ["selective", "scattered"])
def test_large_chains_equal_the_exact_optimum(shape: str, same: bool, share: float) -> None:
    problem = with_share(chain(24, 4, seed=7, same=same, shape=shape), share)
    assert dp.solve(problem).step_s == pytest.approx(exact.solve(problem).step_s, rel=1e-8)


@pytest.mark.parametrize("distinct", [1, 2, 4])
def test_keep_or_recompute_is_exact(distinct: int) -> None:
    """Two options and a few kinds of block, as in every transformer: few prefix sums, so nothing is dropped."""
    kinds = [chain(1, 2, seed=k).blocks[0].options for k in range(distinct)]
    problem = chain(48, 1, seed=0)
    blocks = tuple(replace(block, options=kinds[i % distinct]) for i, block in enumerate(problem.blocks))
    for share in (0.1, 0.5, 0.9):
        assert dp.solve(with_share(replace(problem, blocks=blocks), share)).gap == 0.0


@given(problem=problems())
@settings(deadline=None, max_examples=120)
def test_the_bound_holds_when_labels_are_dropped(problem: Problem) -> None:
    optimum = brute_force(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "WIDTHS", (1, 2))
        solution = dp.solve(problem)
    if optimum is None:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.choice is not None
    assert solution.bound_s is not None
    assert simulate(problem, solution.choice).fits
    assert solution.bound_s <= problem.step_s(optimum) * (1 + ULP)
    assert problem.step_s(optimum) <= problem.step_s(solution.choice) * (1 + ULP)


def test_dropped_labels_are_admitted() -> None:
    problem = with_share(chain(20, 6, seed=1, shape="proportional"), 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "WIDTHS", (8,))
        solution = dp.solve(problem)
    assert solution.status is Status.BOUNDED
    assert solution.gap is not None
    assert 0 < solution.gap < 0.05


def test_of_equally_fast_choices_the_one_that_holds_less_is_taken() -> None:
    options = (Option("a", 9, 9, 9, 1.0), Option("b", 5, 9, 9, 1.0), Option("c", 1, 9, 9, 2.0))
    problem = Problem(100, (Block("x", 0, options),) * 3, (Gap(0, 0),) * 4, 0, 0.0, 0.0)
    assert dp.solve(problem).choice == (1, 1, 1)
    assert dp.solve(replace(problem, budget_bytes=15)).choice is not None


# --- the smallest budget --------------------------------------------------------------------------------------------


@given(problem=problems())
@settings(deadline=None, max_examples=120)
def test_the_smallest_budget_is_the_least_peak_of_all_choices(problem: Problem) -> None:
    smallest = smallest_budget(problem)
    assert smallest == least_peak(problem)
    assert dp.solve(replace(problem, budget_bytes=smallest)).peak_bytes == smallest
    assert dp.solve(replace(problem, budget_bytes=smallest - 1)).status is Status.INFEASIBLE


# --- rotor ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage of a chain in rotor's words. Stage i reads x_i and writes x_{i+1}."""

    forward_s: float
    backward_s: float
    input: int
    output: int
    saved: int  # what its backward needs, the output included
    forward_extra: int
    backward_extra: int


def rotor(stages: tuple[Stage, ...], memory: int, *, nested: bool) -> float | None:
    """The least time of one forward and backward, by the recursion of rotor (Beaumont et al., arXiv:1911.13214).

    Opt(m, i, j) runs stages i..j with m bytes besides x_i and the gradient of x_{j+1}. Either stage i keeps what its
    backward needs, or its input is the checkpoint from which i..s-1 run once more later. `nested=False` allows only
    s = i + 1, so that a stage is recomputed alone and once: then it is memplan's problem. Nested schedules recompute
    within the recomputation, which memplan does not do; rotor's optimum with them can only be faster.
    """

    @cache
    def opt(m: int, i: int, j: int) -> float | None:
        stage = stages[i]
        if i == j:
            needs = stage.input + stage.saved + max(stage.forward_extra, stage.backward_extra)
            return stage.forward_s + stage.backward_s if m >= needs else None
        times = []
        keeps = max(stage.output + stage.forward_extra, stage.input + stage.backward_extra) + stage.saved
        rest = opt(m - stage.saved, i + 1, j) if m >= keeps else None
        if rest is not None:
            times.append(stage.forward_s + stage.backward_s + rest)
        once = 0.0
        for s in range(i + 1, j + 1 if nested else i + 2):
            before = stages[s - 1]
            carried = before.input if s - 1 > i else 0  # the intermediate value that the forward-only pass has in hand
            if m < stages[j].output + before.output + before.forward_extra + carried:
                break
            once += before.forward_s
            later, again = opt(m - before.output, s, j), opt(m, i, s - 1)
            if later is not None and again is not None:
                times.append(once + later + again)
        return min(times, default=None)

    return opt(memory, 0, len(stages) - 1)


def as_problem(stages: tuple[Stage, ...], memory: int) -> Problem:
    """rotor's chain without nesting: the last stage (the loss) is always kept, gaps and optimizer need nothing."""
    end = stages[-1].output
    blocks = []
    for i, s in enumerate(stages):
        keep = Option(
            "keep",
            s.saved,
            s.output + s.saved + s.forward_extra,
            s.input + s.saved + s.backward_extra,
            s.forward_s + s.backward_s,
        )
        again = s.input + s.saved + max(s.forward_extra, s.backward_extra)
        recompute = Option(
            "recompute", s.output, end + s.output + s.forward_extra, again, 2 * s.forward_s + s.backward_s
        )
        last = replace(keep, forward_bytes=again, backward_bytes=again)
        blocks.append(Block(f"stages.{i}", 0, (keep, recompute) if i < len(stages) - 1 else (last,)))
    return Problem(memory, tuple(blocks), (Gap(0, 0),) * (len(blocks) + 1), 0, rest_s=0.0, optimizer_s=0.0)


def rotor_chain(length: int, seed: int) -> tuple[Stage, ...]:
    rng = random.Random(seed)
    edges = [rng.randrange(1, 6) for _ in range(length + 1)]
    return tuple(
        Stage(
            forward_s=float(rng.randrange(1, 9)),
            backward_s=float(rng.randrange(2, 18)),
            input=edges[i],
            output=edges[i + 1],
            saved=edges[i + 1] + rng.randrange(0, 12),
            forward_extra=rng.randrange(0, 4),
            backward_extra=rng.randrange(0, 6),
        )
        for i in range(length)
    )


@pytest.mark.parametrize("seed", range(12))
def test_equals_rotor_without_nesting(seed: int) -> None:
    stages = rotor_chain(3 + seed, seed)
    for memory in range(0, sum(stage.saved for stage in stages) + 20, 3):
        assert dp.solve(as_problem(stages, memory)).step_s == rotor(stages, memory, nested=False)


@pytest.mark.parametrize("seed", range(4))
def test_rotor_with_nesting_is_never_slower_and_the_same_with_memory(seed: int) -> None:
    stages = rotor_chain(8, seed)
    plenty = sum(stage.saved for stage in stages) + 20
    for memory in range(0, plenty, 4):
        ours, theirs = dp.solve(as_problem(stages, memory)).step_s, rotor(stages, memory, nested=True)
        assert ours is None or (theirs is not None and theirs <= ours)
    assert dp.solve(as_problem(stages, plenty)).step_s == rotor(stages, plenty, nested=True)
