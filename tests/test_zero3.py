"""The trace of one rank under DeepSpeed's ZeRO-3: its parts, and weights that come and go."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from memplan import levers
from memplan.errors import UsageError
from memplan.gathering import Gathers
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import CATEGORIES, Trace
from memplan.zero3 import Zero3

GRADS, PARAMS = CATEGORIES.index("grads"), CATEGORIES.index("params")
BUCKET = 5_000  # elements
NOTHING_AHEAD = Gathers(2, BUCKET, prefetch=0, live=0, reuse=0, whole=100, all_whole=10**9, holds_no_views=True)


def shared(model: nn.Module, gathers: Gathers = NOTHING_AHEAD) -> Zero3:
    numels = tuple(p.numel() for p in model.parameters())
    stay = tuple(n for n, stays in zip(numels, gathers.staying(numels), strict=True) if stays)
    return Zero3((numels,), (), next(model.parameters()).dtype, 10**9, gathers, stay)


@cache
def recorded(decisions: tuple[str, ...] = (), accumulation: int = 1, **options: Any) -> Trace:
    """Of a Llama with all blocks kept but for some."""
    model, batch = tiny.llama(use_cache=False)
    gathers = dataclasses.replace(NOTHING_AHEAD, **options)
    recipe = Recipe(optimizer=torch.optim.AdamW(model.parameters()), accumulation=accumulation)
    recipe = dataclasses.replace(recipe, zero=shared(model, gathers))
    installed = dict.fromkeys(decisions, "recompute")
    return Recorder(model, recipe).record(Sample.of(batch), lambda: levers.decided(model, installed))


def whole_bytes() -> int:
    return sum(p.nbytes for p in tiny.llama()[0].parameters())


def staying_bytes() -> int:
    return sum(p.nbytes for p in tiny.llama()[0].parameters() if p.numel() <= NOTHING_AHEAD.whole)


def gathered_bytes(trace: Trace, staying: int = 0) -> int:
    """The most that is there of weights beyond the rank's part and what stays whole."""
    return int((trace.of_category(PARAMS) - trace.of_category(PARAMS)[0]).max()) - staying


def test_a_rank_has_its_part_of_everything() -> None:
    model, _ = tiny.llama()
    parts = sum(-(-p.numel() // 2) for p in model.parameters())
    at_first = recorded().breakdown(0)
    assert at_first["params"] == parts * 4
    assert at_first["optimizer"] == parts * 3 * 4 + 4  # the master weights, two states, a counter of steps
    assert at_first["grads"] == (BUCKET + parts) * 4


def test_small_weights_are_away_while_the_optimizer_steps() -> None:
    trace = recorded()
    there = trace.of_category(PARAMS)
    inside = there[trace.optimizer.start : trace.optimizer.stop]
    assert set(inside.tolist()) == {there[0]}
    assert there[1 : trace.steps[0].backward.stop].min() == there[0] + staying_bytes() > there[0]


@pytest.mark.parametrize(
    ("numels", "all_whole", "stay"),
    [((100, 101, 50), 10**9, [True, False, True]), ((90, 60, 10), 100, [True, False, True]), ((1,), 0, [False])],
)
def test_which_weights_stay_whole(numels: tuple[int, ...], all_whole: int, stay: list[bool]) -> None:
    assert dataclasses.replace(NOTHING_AHEAD, all_whole=all_whole).staying(numels) == stay


@pytest.mark.parametrize(
    ("sub_group", "found"),
    [(10**9, [[[5, 3, 2]], [[4]]]), (8, [[[5, 3], [2]], [[4]]]), (1, [[[5], [3], [2]], [[4]]])],
)
def test_sub_groups_are_of_whole_parts(sub_group: int, found: list[list[list[int]]]) -> None:
    zero = Zero3(((10, 5, 4), (8,)), (), torch.float32, sub_group, NOTHING_AHEAD, ())
    assert zero.sub_groups == found


def test_smaller_sub_groups_step_in_less() -> None:
    model, batch = tiny.llama(use_cache=False)
    peaks = []
    for sub_group in (10**9, 5_000):
        zero = dataclasses.replace(shared(model), sub_group=sub_group)
        trace = Recorder(model, Recipe(optimizer="adamw", zero=zero)).record(Sample.of(batch))
        peaks.append(trace.peak_in(trace.optimizer))
    assert peaks[1] < peaks[0]


def test_without_looking_ahead_no_more_than_a_module_is_there() -> None:
    """One weight, gathered in its place: the largest module of the model has no other."""
    largest = max(p.nbytes for p in tiny.llama()[0].parameters())
    assert gathered_bytes(recorded(), staying_bytes()) == largest


def test_what_is_fetched_ahead_is_there_twice_until_it_is_used() -> None:
    far = gathered_bytes(recorded(prefetch=10**9, live=10**9, reuse=10**9))
    near = gathered_bytes(recorded(prefetch=3_000, live=10**9))
    assert gathered_bytes(recorded()) < near < far
    assert far > whole_bytes()  # a flat buffer and what was copied out of it


def test_a_weight_that_is_used_again_soon_stays() -> None:
    """At the turn from the forward to the backward."""
    short, long = recorded(), recorded(reuse=10**9)
    at = [trace.steps[0].backward.start for trace in (short, long)]
    there = [trace.of_category(PARAMS)[tick] for trace, tick in zip((short, long), at, strict=True)]
    assert there[1] - there[0] > whole_bytes() / 2


def test_no_more_is_fetched_ahead_than_may_live() -> None:
    limited = gathered_bytes(recorded(prefetch=10**9, live=3_000))
    assert limited < gathered_bytes(recorded(prefetch=10**9, live=10**9))


def test_gradients_are_scattered_bucket_by_bucket() -> None:
    trace = recorded()
    model, _ = tiny.llama()
    born = (trace.storage_category == GRADS) & (trace.born > 0)
    assert trace.storage_bytes[born].sum() >= sum(p.nbytes for p in model.parameters())
    assert not (trace.died[born] >= trace.ticks).any()
    small, large = (recorded(bucket=bucket).breakdown(0)["grads"] for bucket in (BUCKET, 2 * BUCKET))
    assert large - small == BUCKET * 4


def test_a_recomputed_block_holds_its_weights_until_its_backward_has_used_them() -> None:
    kept, recomputed = recorded(), recorded(("model.layers.0",))
    assert gathered_bytes(recomputed) > gathered_bytes(kept)
    assert recomputed.live_at(recomputed.steps[0].loss.start) < kept.live_at(kept.steps[0].loss.start)


def test_views_that_are_held_for_the_backward_keep_their_weights() -> None:
    held, let_go = (recorded(holds_no_views=each) for each in (False, True))
    at = held.steps[0].backward.start, let_go.steps[0].backward.start
    assert held.of_category(PARAMS)[at[0]] > let_go.of_category(PARAMS)[at[1]]


def test_more_ranks_need_less_where_nothing_is_kept() -> None:
    peaks = [recorded(ranks=ranks).breakdown(0)["params"] for ranks in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_one_rank_gathers_nothing() -> None:
    assert gathered_bytes(recorded(ranks=1)) == 0


def test_the_model_is_left_as_it_was() -> None:
    model, batch = tiny.llama(use_cache=False)
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    linear = nn.functional.linear
    Recorder(model, Recipe(zero=shared(model))).record(Sample.of(batch))
    assert {name: (p, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert nn.functional.linear is linear
    assert all(type(module._parameters) is dict for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Reader(nn.Module):
    """Reads the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs @ self.inner.weight).mean()


def test_a_weight_that_another_module_reads_is_refused() -> None:
    model = Reader()
    with pytest.raises(UsageError, match=r"the weight inner\.weight is read outside"):
        Recorder(model, Recipe(zero=shared(model), loss=lambda m, x: m(x))).record(Sample.of(torch.randn(2, 32)))


class Scaled(nn.Module):
    """A block with a weight of its own beside those of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(32, 32), nn.Parameter(torch.ones(4, 32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + torch.tanh(self.inner(inputs)) * self.scale.sum(0)


def test_a_block_s_own_weight_is_there_when_it_is_recomputed() -> None:
    model = nn.Sequential(*(Scaled() for _ in range(3)))
    recipe = Recipe(zero=shared(model), loss=lambda m, x: m(x).mean())
    decided = dict.fromkeys(("0", "1", "2"), "recompute")
    trace = Recorder(model, recipe).record(Sample.of(torch.randn(2, 32)), lambda: levers.decided(model, decided))
    own = [at for at in range(len(trace.born)) if trace.storage_bytes[at] == 4 * 32 * 4 and trace.born[at] > 0]
    again = [
        at for at in own if trace.storage_category[at] == PARAMS and trace.born[at] > trace.steps[0].backward.start
    ]
    assert len(again) == 3
    assert np.all(trace.died[again] <= trace.steps[0].backward.stop)
