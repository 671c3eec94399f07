"""The profile: sizes of a chain read off two traces per micro-batch, against traces of whole plans."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from memplan import levers
from memplan.blocks import find_blocks
from memplan.problem import Choice
from memplan.profile import ChainSizes, Level, Profile
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.simulator import simulate
from memplan.trace import Trace

OPTIONS = (levers.KEEP, levers.RECOMPUTE)


class OneSecond:
    """Times that do not matter here."""

    optimizer_s = 1.0

    def stepping_s(self, variant: str) -> float:
        return 0.0

    def block_s(self, path: str, option: str, micro_batch: int) -> float:
        return 1.0 + micro_batch

    def rest_s(self, micro_batch: int, variant: str) -> float:
        return 1.0


class Model:
    """A tiny model with its recorder."""

    def __init__(self, make: Callable[[], tiny.Made]) -> None:
        self.model, batch = make()
        self.sample = Sample.of(batch)
        self.recorder = Recorder(self.model, Recipe())
        self.blocks = find_blocks(self.model)

    def trace(self, options: Sequence[str], micro_batch: int, accumulation: int) -> Trace:
        decisions = dict(zip(self.blocks, options, strict=True))
        sample = self.sample.resized(micro_batch)
        return self.recorder.record(sample, lambda: levers.decided(self.model, decisions), accumulation)

    def profile(self, micro_batches: Sequence[int]) -> Profile:
        levels = {b: {levers.KEEP: [self.level(option, b) for option in OPTIONS]} for b in micro_batches}
        return Profile.of(levels, self.blocks, OneSecond(), can_split=True, largest_micro_batch=64)

    def level(self, option: str, micro_batch: int) -> Level:
        trace = self.trace([option] * len(self.blocks), micro_batch, 2)
        return Level(dict.fromkeys(self.blocks, option), trace)

    def peaks(self, profile: Profile, choice: Choice, micro_batch: int, accumulation: int) -> tuple[int, int]:
        """(by the simulator on the profile's problem, by a trace of the model as planned)."""
        problem = profile.problem(micro_batch, accumulation, budget_bytes=1)
        assert tuple(block.path for block in problem.blocks) == self.blocks
        trace = self.trace([OPTIONS[k] for k in choice], micro_batch, accumulation)
        return simulate(problem, choice).peak_bytes, trace.peak_bytes


MODELS: dict[str, Callable[[], tiny.Made]] = {
    "llama": partial(tiny.llama, layers=3, use_cache=False),
    "gpt2": partial(tiny.gpt2, layers=2, use_cache=False),
    "vit": partial(tiny.vit, layers=2),
    "resnet": tiny.resnet,
    "plain": tiny.plain,
    "t5": partial(tiny.t5, layers=1),
    "lora": partial(tiny.lora, layers=2),
}

# Where a plan that mixes options is more, or less, than its parts: tensors that two neighbours share (the boundary, and
# what an encoder hands to every block of its decoder) are held by whichever of the two keeps them. In boundaries.
SHARED = {"t5": 4, "lora": 2}
BOUNDARY = 2 * 16 * 32 * 4  # rows x tokens x width x bytes


@cache
def profiled(name: str) -> tuple[Model, Profile]:
    model = Model(MODELS[name])
    return model, model.profile([model.sample.batch_size])


@pytest.mark.parametrize("name", MODELS)
def test_mixed_plans_have_the_peak_of_their_trace(name: str) -> None:
    model, profile = profiled(name)
    rng = random.Random(name)
    for accumulation in (1, 2):
        choice = tuple(rng.randrange(2) for _ in model.blocks)
        simulated, traced = model.peaks(profile, choice, model.sample.batch_size, accumulation)
        assert abs(simulated - traced) <= SHARED.get(name, 0) * BOUNDARY, choice
    for block in profile.problem(model.sample.batch_size, 1, 1).blocks:
        keep, recompute = block.options
        assert 0 <= recompute.hold_bytes < keep.hold_bytes


def test_sizes_at_other_micro_batches() -> None:
    """Every size is affine in the batch, so two micro-batches tell all others."""
    model = Model(partial(tiny.llama, layers=2, use_cache=False))
    profile = model.profile([2, 4])
    for micro_batch, accumulation in ((3, 1), (7, 2)):
        simulated, traced = model.peaks(profile, (0, 1), micro_batch, accumulation)
        assert simulated == traced


def test_the_optimizer_step_and_the_gradients_of_accumulation_are_inside() -> None:
    model, profile = profiled("llama")
    once, often = (profile.problem(model.sample.batch_size, n, 1) for n in (1, 3))
    trained = sum(parameter.nbytes for parameter in model.model.parameters())
    assert often.blocks[0].base_bytes - once.blocks[0].base_bytes == trained
    assert once.optimizer_bytes == often.optimizer_bytes >= 4 * trained
    assert (once.accumulation, often.accumulation) == (1, 3)


def test_options_and_times_are_passed_on() -> None:
    _, profile = profiled("plain")
    problem = profile.problem(8, 1, 123)
    assert problem.budget_bytes == 123
    assert [[option.name for option in block.options] for block in problem.blocks] == [list(OPTIONS)] * 4
    assert {option.step_s for block in problem.blocks for option in block.options} == {9.0}
    assert (problem.rest_s, problem.optimizer_s) == (1.0, 1.0)


def test_a_model_without_blocks_is_one_gap() -> None:
    model = Model(tiny.plain)
    model.blocks = ()
    trace = model.trace([], 256, 1)  # so many rows that the peak is not in the optimizer's step
    levels = {256: {"keep": [Level({}, trace)]}}
    profile = Profile.of(levels, (), OneSecond(), can_split=True, largest_micro_batch=256)
    problem = profile.problem(256, 1, 1)
    assert problem.blocks == ()
    assert simulate(problem, ()).peak_bytes == trace.peak_bytes > problem.optimizer_bytes


# --- between and beyond two micro-batches ---------------------------------------------------------------------------


def sizes(*values: int) -> ChainSizes:
    base, hold, gap, optimizer = values
    return ChainSizes(("block",), base, ({"keep": (hold, 0, 0, 0)},), ((gap, gap), (gap, gap)), optimizer)


def chain(low: int, a: ChainSizes, high: int, b: ChainSizes) -> Profile:
    points = {"keep": {low: a, high: b}}
    return Profile(points, points, OneSecond(), can_split=True, largest_micro_batch=4096)


@given(
    low=st.integers(1, 8),
    span=st.integers(1, 8),
    at_low=st.integers(0, 2**40),
    more=st.integers(0, 2**40),
    micro_batch=st.integers(1, 4096),
)
def test_sizes_are_affine_and_rounded_up(low: int, span: int, at_low: int, more: int, micro_batch: int) -> None:
    profile = chain(low, sizes(at_low, 0, 0, 0), low + span, sizes(at_low + more, 0, 0, 0))
    found = profile.problem(micro_batch, 1, 1).blocks[0].base_bytes
    assert 0 <= found * span - (at_low * span + more * (micro_batch - low)) < span


def test_every_size_is_interpolated() -> None:
    profile = chain(2, sizes(100, 10, 50, 7), 4, sizes(200, 30, 60, 7))
    problem = profile.problem(3, 1, 1)
    (block,) = problem.blocks
    assert (block.base_bytes, block.options[0].hold_bytes) == (150, 20)
    assert [(gap.forward_bytes, gap.backward_bytes) for gap in problem.gaps] == [(55, 55)] * 2
    assert problem.optimizer_bytes == 7
    assert profile.problem(5, 1, 1).blocks[0].base_bytes == 250
    assert profile.problem(1, 1, 1).blocks[0].base_bytes == 50


def test_sizes_run_from_one_micro_batch_to_the_next() -> None:
    """A peak bends upwards where another moment takes over: between two it is below the line, beyond them above."""
    profile = chain(2, sizes(100, 0, 0, 0), 4, sizes(110, 0, 0, 0))
    bent = replace(profile, first={"keep": {**profile.first["keep"], 8: sizes(310, 0, 0, 0)}})
    assert profile.problem(8, 1, 1).blocks[0].base_bytes == 130
    assert [bent.problem(b, 1, 1).blocks[0].base_bytes for b in (1, 3, 4, 6, 8, 9)] == [95, 105, 110, 210, 310, 360]


def test_a_profile_learns_from_traces_at_another_micro_batch() -> None:
    model = Model(partial(tiny.plain, layers=2))
    profile = model.profile([2, 4])
    learned = profile.with_levels(512, {"keep": [model.level(option, 512) for option in OPTIONS]})
    for accumulation in (1, 2):
        simulated, traced = model.peaks(learned, (0, 1), 512, accumulation)
        assert simulated == traced
        assert learned.problem(4, accumulation, 1) == profile.problem(4, accumulation, 1)


def test_accumulation_has_sizes_of_its_own() -> None:
    once, often = sizes(100, 1, 1, 1), sizes(500, 1, 1, 1)
    profile = Profile({"keep": {2: once}}, {"keep": {2: often}}, OneSecond(), can_split=True, largest_micro_batch=2)
    assert profile.problem(2, 1, 1).blocks[0].base_bytes == 100
    assert profile.problem(2, 4, 1).blocks[0].base_bytes == 500


def test_one_micro_batch_tells_nothing_of_others() -> None:
    profile = replace(chain(2, sizes(1, 1, 1, 1), 4, sizes(1, 1, 1, 1)), first={"keep": {2: sizes(1, 1, 1, 1)}})
    with pytest.raises(ValueError, match="profiled at micro-batch 2 only, asked for 3"):
        profile.problem(3, 1, 1)


def test_a_variant_has_the_blocks_of_the_plain_one_and_its_own_surroundings() -> None:
    plain, other = sizes(100, 10, 50, 7), sizes(90, 99, 20, 5)
    both = plain.around(other)
    assert (both.options, both.base, both.gaps, both.optimizer) == (plain.options, 90, ((20, 20), (20, 20)), 5)
