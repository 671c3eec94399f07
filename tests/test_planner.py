"""The outer search on a synthetic profile, against brute force over every micro-batch and every choice."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import BadBatch
from memplan.planner import NoPlan, Outcome, search
from memplan.problem import Block, Choice, Gap, Option, Problem
from memplan.simulator import simulate
from memplan.solvers import SOLVERS, Solution, smallest_budget
from memplan.strategy import Strategy
from memplan.tradeoff import GIB

MIB = 2**20
SPEED = Strategy(name="speed", tolerance=0.0)
LOOSE = Strategy(name="loose", tolerance=0.05)
LARGE = Strategy(name="large", objective="micro-batch")
SMALL = Strategy(name="small", objective="peak")


@dataclass(frozen=True)
class Affine:
    """Bytes and seconds that are affine in the micro-batch; gradients stay between micro-steps."""

    layers: int = 4
    weights: int = 100 * MIB
    sample: int = 10 * MIB  # activations of one layer, per sample
    launch_s: float = 0.010  # per layer and micro-step, whatever its size
    sample_s: float = 0.002
    can_split: bool = True
    largest_micro_batch: int = 64
    variants: tuple[str, ...] = ("keep",)

    def problem(self, micro_batch: int, accumulation: int, budget_bytes: int, variant: str = "keep") -> Problem:
        assert 1 <= micro_batch <= self.largest_micro_batch
        static = 3 * self.weights + (self.weights if accumulation > 1 else 0)
        act, edge = self.sample * micro_batch, self.sample * micro_batch // 8
        step_s = self.launch_s + self.sample_s * micro_batch
        keep = Option("keep", act, act, act + edge, step_s)
        recompute = Option("recompute", edge, act // 2, act + 2 * edge, step_s * 1.3)
        blocks = tuple(Block(f"layers.{i}", static, (keep, recompute)) for i in range(self.layers))
        gap = Gap(static + edge, static + 2 * edge)
        head = Gap(static + act, static + act)
        return Problem(
            budget_bytes, blocks, (gap,) * self.layers + (head,), 4 * self.weights, 0.005, 0.020, accumulation
        )


def planned(found: Outcome | NoPlan) -> Outcome:
    assert isinstance(found, Outcome)
    return found


def every_plan(profile: Affine, budget: int, sizes: list[tuple[int, int]]) -> list[tuple[int, int, Problem, Choice]]:
    """Every micro-batch with every choice that the simulator accepts."""
    plans = []
    for micro_batch, accumulation in sizes:
        problem = profile.problem(micro_batch, accumulation, budget)
        choices = product(*(range(len(block.options)) for block in problem.blocks))
        plans += [(micro_batch, accumulation, problem, c) for c in choices if simulate(problem, c).fits]
    return plans


PROFILES = st.builds(
    Affine,
    layers=st.integers(1, 4),
    weights=st.integers(1, 200 * MIB),
    sample=st.integers(8, 40 * MIB),
    launch_s=st.floats(0.0, 0.02),
    sample_s=st.floats(0.0005, 0.01),
)
BUDGETS = st.integers(0, 1200 * MIB)


@given(profile=PROFILES, budget=BUDGETS, batch=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_a_given_effective_batch_equals_brute_force(profile: Affine, budget: int, batch: int) -> None:
    sizes = [(n, batch // n) for n in range(1, batch + 1) if batch % n == 0]
    plans = every_plan(profile, budget, sizes)
    found = search(profile, budget, SPEED, effective_batch=batch)
    if not plans:
        assert isinstance(found, NoPlan)
        assert found.smallest_bytes == min(smallest_budget(profile.problem(n, k, budget)) for n, k in sizes)
        return
    best_s = min(problem.step_s(choice) for _, _, problem, choice in plans)
    outcome = planned(found)
    assert outcome.timeline.step_s == pytest.approx(best_s, rel=1e-12)
    assert outcome.timeline.fits
    assert outcome.micro_batch * outcome.accumulation == batch
    assert outcome.gap <= 1e-9


@given(profile=PROFILES, budget=BUDGETS, largest=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_a_free_batch_equals_brute_force(profile: Affine, budget: int, largest: int) -> None:
    profile = replace(profile, largest_micro_batch=largest)  # up to 4, every size is on the ladder
    plans = every_plan(profile, budget, [(n, 1) for n in range(1, largest + 1)])
    found = search(profile, budget, SPEED)
    if not plans:
        assert isinstance(found, NoPlan)
        return
    best = max(n / problem.step_s(choice) for n, _, problem, choice in plans)
    assert planned(found).samples_per_s == pytest.approx(best, rel=1e-12)


@given(profile=PROFILES, budget=BUDGETS, batch=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_the_smallest_peak_equals_brute_force(profile: Affine, budget: int, batch: int) -> None:
    plans = every_plan(profile, budget, [(n, batch // n) for n in range(1, batch + 1) if batch % n == 0])
    found = search(profile, budget, SMALL, effective_batch=batch)
    if not plans:
        assert isinstance(found, NoPlan)
        return
    peaks = [simulate(problem, choice).peak_bytes for _, _, problem, choice in plans]
    outcome = planned(found)
    assert outcome.timeline.peak_bytes == min(peaks)
    fastest = min(plan[2].step_s(plan[3]) for plan, peak in zip(plans, peaks, strict=True) if peak == min(peaks))
    assert outcome.timeline.step_s == pytest.approx(fastest, rel=1e-12)


@given(profile=PROFILES, budget=BUDGETS, more=st.integers(0, 200 * MIB))
@settings(deadline=None, max_examples=40)
def test_more_budget_is_never_slower(profile: Affine, budget: int, more: int) -> None:
    tight = search(profile, budget, SPEED, effective_batch=12)
    wide = search(profile, budget + more, SPEED, effective_batch=12)
    if isinstance(tight, Outcome):
        assert planned(wide).timeline.step_s <= tight.timeline.step_s * (1 + 1e-12)


# --- which sizes ----------------------------------------------------------------------------------------------------


@given(budget=st.integers(400 * MIB, 3000 * MIB))
@settings(deadline=None, max_examples=40)
def test_the_largest_micro_batch_is_the_true_maximum(budget: int) -> None:
    profile = Affine()
    fits = [n for n in range(1, 65) if smallest_budget(profile.problem(n, 1, budget)) <= budget]
    found = search(profile, budget, LARGE)
    assert (planned(found).micro_batch if fits else 0) == max(fits, default=0)


def test_a_given_micro_batch_is_taken_and_not_accumulated() -> None:
    outcome = planned(search(Affine(), 800 * MIB, SPEED, micro_batch=5))
    assert (outcome.micro_batch, outcome.accumulation) == (5, 1)


def test_a_given_micro_batch_accumulates_to_the_effective_batch() -> None:
    outcome = planned(search(Affine(), 900 * MIB, SPEED, micro_batch=3, effective_batch=12))
    assert (outcome.micro_batch, outcome.accumulation) == (3, 4)


def test_freed_memory_goes_into_the_larger_batch_where_that_is_faster() -> None:
    """Launch-bound layers: 64 samples take hardly longer than one."""
    profile = Affine(launch_s=0.010, sample_s=0.00001)
    budget = 1500 * MIB
    outcome = planned(search(profile, budget, SPEED))
    keeps_all = max(n for n in range(1, 65) if simulate(profile.problem(n, 1, budget), (0, 0, 0, 0)).fits)
    assert outcome.micro_batch > keeps_all


def test_compute_bound_layers_keep_everything_at_a_smaller_batch() -> None:
    outcome = planned(search(Affine(launch_s=0.0, sample_s=0.01), 800 * MIB, SPEED))
    assert outcome.slowdown == 0.0


def test_within_the_tolerance_the_larger_micro_batch_is_taken() -> None:
    profile = Affine(layers=6, launch_s=0.00001, sample_s=0.01)
    one_recomputed = simulate(profile.problem(32, 1, 1), (1, 0, 0, 0, 0, 0)).peak_bytes
    strict = planned(search(profile, one_recomputed, SPEED, effective_batch=32))
    loose = planned(search(profile, one_recomputed, LOOSE, effective_batch=32))
    assert (strict.micro_batch, loose.micro_batch) == (16, 32)
    assert loose.samples_per_s >= strict.samples_per_s * 0.95
    assert loose.gap == pytest.approx(1 - loose.samples_per_s / strict.samples_per_s)


def test_a_batch_that_must_not_be_split_is_recomputed_instead() -> None:
    profile = Affine(can_split=False)
    smallest = smallest_budget(profile.problem(16, 1, 1))
    outcome = planned(search(profile, smallest, SPEED, effective_batch=16))
    assert (outcome.micro_batch, outcome.accumulation) == (16, 1)
    assert outcome.slowdown > 0
    refused = search(profile, smallest - 1, SPEED, effective_batch=16)
    assert refused == NoPlan(16, 1, smallest, "no plan by the strategy's levers fits the budget")


@pytest.mark.parametrize(
    ("profile", "effective_batch", "micro_batch", "message"),
    [
        (Affine(), 12, 5, "the nearest that divide it: 4 and 6"),
        (Affine(), 8, 16, "the nearest that divide it: 8"),
        (Affine(can_split=False), 8, 4, "couple the samples"),
        (Affine(), None, 65, "beyond the 64"),
        (Affine(can_split=False), 128, None, "beyond the 64"),
        (Affine(), 0, None, "effective_batch = 0 has to be a whole number and at least 1"),
        (Affine(), None, -1, "micro_batch = -1 has to be a whole number and at least 1"),
    ],
)
def test_batches_that_cannot_be(
    profile: Affine, effective_batch: int | None, micro_batch: int | None, message: str
) -> None:
    with pytest.raises(BadBatch, match=message):
        search(profile, GIB, SPEED, effective_batch=effective_batch, micro_batch=micro_batch)


# --- what the strategy says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recompute", "keep"])
def test_what_every_block_does_leaves_no_other_option(name: Literal["keep", "recompute"]) -> None:
    strategy = Strategy(name="test", every_block=name)
    outcome = planned(search(Affine(), 2000 * MIB, strategy, micro_batch=2))
    chosen = zip(outcome.problem.blocks, outcome.solution.choice or (), strict=True)
    assert {block.options[k].name for block, k in chosen} == {name}


def test_recomputing_all_is_slower_than_keeping_all() -> None:
    outcome = planned(search(Affine(launch_s=0.0), GIB, Strategy(name="test", every_block="recompute"), micro_batch=2))
    step_s = 4 * 1.3 * 0.004 + 0.025
    assert outcome.slowdown == pytest.approx(step_s / (4 * 0.004 + 0.025) - 1)


def test_a_block_that_can_only_keep_is_left_as_it_is() -> None:
    class Mixed(Affine):
        def problem(self, micro_batch: int, accumulation: int, budget_bytes: int, variant: str = "keep") -> Problem:
            problem = Affine.problem(self, micro_batch, accumulation, budget_bytes)
            first = replace(problem.blocks[0], options=problem.blocks[0].options[:1])
            return replace(problem, blocks=(first, *problem.blocks[1:]))

    outcome = planned(search(Mixed(), GIB, Strategy(name="test", every_block="recompute"), micro_batch=2))
    assert [block.options[0].name for block in outcome.problem.blocks] == ["keep"] + ["recompute"] * 3


def test_a_plan_slower_than_max_slowdown_is_refused_with_the_budget_that_helps() -> None:
    profile = Affine()
    strategy = Strategy(name="test", max_slowdown=0.1)
    tight = smallest_budget(profile.problem(8, 1, 1))
    refused = search(profile, tight, strategy, micro_batch=8)
    assert isinstance(refused, NoPlan)
    assert "max_slowdown" in refused.reason
    assert refused.smallest_bytes is not None
    outcome = planned(search(profile, refused.smallest_bytes, strategy, micro_batch=8))
    assert outcome.slowdown <= 0.1
    assert isinstance(search(profile, refused.smallest_bytes - 1, strategy, micro_batch=8), NoPlan)


def test_no_budget_makes_recomputing_all_quick_enough() -> None:
    strategy = Strategy(name="test", every_block="recompute", max_slowdown=0.1)
    refused = search(Affine(), 100 * GIB, strategy, micro_batch=8)
    assert isinstance(refused, NoPlan)
    assert refused.smallest_bytes is None


def test_max_slowdown_limits_the_micro_batch() -> None:
    free = planned(search(Affine(), 900 * MIB, LARGE))
    held = planned(search(Affine(), 900 * MIB, replace(LARGE, max_slowdown=0.1)))
    assert held.micro_batch < free.micro_batch
    assert held.slowdown <= 0.1 < free.slowdown


def test_the_smallest_peak_is_that_of_one_sample() -> None:
    outcome = planned(search(Affine(), 900 * MIB, SMALL))
    assert (outcome.micro_batch, outcome.timeline.peak_bytes) == (1, outcome.smallest_bytes)


def test_the_smallest_peak_that_is_quick_enough() -> None:
    profile = Affine(weights=MIB, layers=4)
    outcome = planned(search(profile, GIB, replace(SMALL, max_slowdown=0.1), micro_batch=8))
    peaks = [
        simulate(problem, choice).peak_bytes
        for _, _, problem, choice in every_plan(profile, GIB, [(8, 1)])
        if problem.step_s(choice) <= 1.1 * problem.step_s((0, 0, 0, 0))
    ]
    assert outcome.timeline.peak_bytes == min(peaks)


# --- what the outcome says ------------------------------------------------------------------------------------------


def test_nothing_is_recomputed_when_memory_is_plentiful() -> None:
    outcome = planned(search(Affine(), 100 * GIB, SPEED, effective_batch=16))
    assert outcome.solution.choice == (0, 0, 0, 0)
    assert (outcome.slowdown, outcome.shadow_price_s_per_gib) == (0.0, 0.0)


def test_the_shadow_price_is_what_one_gib_more_saves() -> None:
    profile = Affine(sample=100 * MIB)
    budget = smallest_budget(profile.problem(8, 1, 1)) + 100 * MIB
    outcome = planned(search(profile, budget, SPEED, micro_batch=8))
    richer = planned(search(profile, budget + GIB, SPEED, micro_batch=8))
    assert outcome.shadow_price_s_per_gib == pytest.approx(outcome.timeline.step_s - richer.timeline.step_s)
    assert outcome.shadow_price_s_per_gib > 0


def test_the_frontier_buys_time_with_memory() -> None:
    profile = Affine()
    budget = smallest_budget(profile.problem(8, 1, 1)) + 40 * MIB
    outcome = planned(search(profile, budget, SPEED, micro_batch=8))
    peaks = [point.peak_bytes for point in outcome.frontier]
    times = [point.step_s for point in outcome.frontier]
    assert list(peaks) == sorted(set(peaks))
    assert list(times) == sorted(set(times), reverse=True)
    assert peaks[0] == outcome.smallest_bytes
    assert times[-1] == profile.problem(8, 1, 1).step_s((0, 0, 0, 0))
    (own,) = [point for point in outcome.frontier if point.peak_bytes == outcome.timeline.peak_bytes]
    assert own.options == tuple(option.name for option in outcome.problem.chosen(outcome.solution.choice or ()))
    for point in outcome.frontier:
        problem = profile.problem(8, 1, point.peak_bytes)
        names = [[option.name for option in block.options] for block in problem.blocks]
        choice = tuple(known.index(name) for known, name in zip(names, point.options, strict=True))
        assert (simulate(problem, choice).peak_bytes, problem.step_s(choice)) == (point.peak_bytes, point.step_s)


def test_the_same_twice() -> None:
    assert search(Affine(), 900 * MIB, LOOSE) == search(Affine(), 900 * MIB, LOOSE)


def test_sizes_that_cannot_win_are_not_solved() -> None:
    """Compute-bound with an accumulation that costs: once a size wins, most others are not worth a solve."""
    solved: list[int] = []

    def counting(problem: Problem) -> Solution:
        solved.append(problem.accumulation)
        return SOLVERS["dp"](problem)

    search(Affine(launch_s=0.02, sample_s=0.001), 100 * GIB, SPEED, effective_batch=48, solve=counting)
    assert set(solved) == {1}


def test_a_choice_that_the_simulator_does_not_accept_is_an_internal_error() -> None:
    def reckless(problem: Problem) -> Solution:
        keep = (0,) * len(problem.blocks)
        return Solution.of(problem, keep, bound_s=problem.step_s(keep))

    budget = smallest_budget(Affine().problem(8, 1, 1))
    with pytest.raises(RuntimeError, match="internal error: the solver's choice needs"):
        search(Affine(), budget, SPEED, micro_batch=8, solve=reckless)


def test_a_solver_that_gives_up_where_something_fits_is_an_internal_error() -> None:
    with pytest.raises(RuntimeError, match="internal error: the solver found nothing"):
        search(Affine(), GIB, SPEED, micro_batch=8, solve=lambda _: Solution.infeasible())


# --- variants, levers and the link ----------------------------------------------------------------------------------


class Rich(Affine):
    """With a smaller and slower loss head, an option that copies to the host, and one that keeps a part."""

    def problem(self, micro_batch: int, accumulation: int, budget_bytes: int, variant: str = "keep") -> Problem:
        problem = Affine.problem(self, micro_batch, accumulation, budget_bytes)
        keep, recompute = problem.blocks[0].options
        half = (keep.hold_bytes + recompute.hold_bytes) // 2
        select = replace(recompute, name="select-1", hold_bytes=half, step_s=keep.step_s * 1.1)
        offload = replace(keep, name="offload-1", hold_bytes=half, link_bytes=keep.hold_bytes - half)
        options = (keep, recompute, select, offload)
        gaps = problem.gaps
        if variant == "chunked-512":
            head = Gap(gaps[0].forward_bytes, gaps[0].backward_bytes)
            return replace(
                problem,
                blocks=tuple(replace(block, options=options) for block in problem.blocks),
                gaps=(*gaps[:-1], head),
                rest_s=problem.rest_s * 1.5,
            )
        assert variant == "keep"
        logits = Gap(gaps[-1].forward_bytes + 100 * MIB, gaps[-1].backward_bytes + 100 * MIB)
        blocks = tuple(replace(block, options=options) for block in problem.blocks)
        return replace(problem, blocks=blocks, gaps=(*gaps[:-1], logits))


RICH = Rich(layers=8, variants=("keep", "chunked-512"))
TIGHT = smallest_budget(RICH.problem(8, 1, 1)) + 40 * MIB


def names(outcome: Outcome) -> set[str]:
    chosen = zip(outcome.problem.blocks, outcome.solution.choice or (), strict=True)
    return {block.options[k].name for block, k in chosen}


def test_the_faster_variant_is_taken() -> None:
    roomy = planned(search(RICH, 100 * GIB, SPEED, micro_batch=8))
    assert (roomy.variant, roomy.slowdown) == ("keep", 0.0)
    least = smallest_budget(RICH.problem(8, 1, 1, "chunked-512"))
    tight = planned(search(RICH, least, SPEED, micro_batch=8))
    assert tight.variant == "chunked-512"
    assert tight.smallest_bytes == least < smallest_budget(RICH.problem(8, 1, 1))
    keep_all_s = RICH.problem(8, 1, 1).step_s((0,) * 8)
    assert tight.slowdown == pytest.approx(tight.timeline.step_s / keep_all_s - 1)


def test_the_other_variant_has_to_be_faster_whatever_the_tolerance() -> None:
    """The tolerance is for larger micro-batches."""
    told: list[tuple[float, float | None]] = []

    def listening(problem: Problem) -> Solution:
        solution = SOLVERS["dp"](problem)
        told.append((problem.at_most_s, solution.step_s))
        return solution

    search(RICH, TIGHT, replace(SPEED, tolerance=0.5), micro_batch=8, solve=listening)
    (_, first_s), (limit_s, _) = told
    assert limit_s == pytest.approx(first_s)


@pytest.mark.parametrize("objective", ["samples-per-second", "micro-batch", "peak"])
def test_of_two_variants_none_is_better_by_the_objective(
    objective: Literal["samples-per-second", "micro-batch", "peak"],
) -> None:
    strategy = Strategy(name="test", objective=objective, tolerance=0.0)
    both = planned(search(RICH, TIGHT, strategy, effective_batch=8))
    alone = [
        planned(search(replace(RICH, variants=("keep",)), TIGHT, strategy, effective_batch=8)),
        planned(search(RICH, TIGHT, replace(strategy, levers=("recompute", "select")), effective_batch=8)),
    ]
    for one in alone:
        if objective == "samples-per-second":
            assert both.timeline.step_s <= one.timeline.step_s
        elif objective == "micro-batch":
            assert both.micro_batch >= one.micro_batch
        else:
            assert both.timeline.peak_bytes <= one.timeline.peak_bytes


def test_the_frontier_and_the_price_of_memory_go_over_all_variants() -> None:
    least = smallest_budget(RICH.problem(8, 1, 1, "chunked-512"))
    outcome = planned(search(RICH, least, SPEED, micro_batch=8))
    assert [outcome.frontier[i].variant for i in (0, -1)] == ["chunked-512", "keep"]
    richer = planned(search(RICH, least + GIB, SPEED, micro_batch=8))
    assert richer.variant == "keep"
    assert outcome.shadow_price_s_per_gib == outcome.timeline.step_s - richer.timeline.step_s


def test_a_strategy_s_levers_are_all_that_is_used() -> None:
    only = Strategy(name="test", levers=("select",))
    refused = search(RICH, TIGHT, only, micro_batch=8, link_bytes_s=1e10, host_bytes=GIB)
    assert isinstance(refused, NoPlan)
    assert refused.smallest_bytes is not None
    least = planned(search(RICH, refused.smallest_bytes, only, micro_batch=8, link_bytes_s=1e10, host_bytes=GIB))
    assert "select-1" in names(least) <= {"keep", "select-1"}
    assert least.variant == "keep"
    none = Strategy(name="test", levers=())
    assert isinstance(search(RICH, TIGHT, none, micro_batch=8, link_bytes_s=1e10, host_bytes=GIB), NoPlan)
    roomy = simulate(RICH.problem(8, 1, 1), (0,) * 8).peak_bytes - 100 * MIB
    copy = replace(only, levers=("offload",))
    copied = planned(search(RICH, roomy, copy, micro_batch=8, link_bytes_s=1e10, host_bytes=GIB))
    assert "offload-1" in names(copied) <= {"keep", "offload-1"}
    assert 0 < copied.timeline.host_bytes <= GIB
    assert isinstance(search(RICH, roomy, copy, micro_batch=8), NoPlan)


def test_levers_wanted_first_are_joined_by_others_only_where_they_have_to_be() -> None:
    first = Strategy(name="test", levers_first=("offload",), tolerance=0.0)
    slow = 2e9
    most = simulate(RICH.problem(8, 1, 1), (0,) * 8).peak_bytes
    alone = planned(search(RICH, most - 100 * MIB, first, micro_batch=8, link_bytes_s=slow, host_bytes=GIB))
    assert (names(alone), alone.variant) == ({"keep", "offload-1"}, "keep")
    joined = planned(search(RICH, TIGHT - 39 * MIB, first, micro_batch=8, link_bytes_s=slow, host_bytes=GIB))
    assert names(joined) - {"keep", "offload-1"}
    assert (alone.levers, joined.levers) == (("offload",), first.levers)
