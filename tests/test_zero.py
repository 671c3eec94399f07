"""The trace of one rank under DeepSpeed's ZeRO-2: what a rank holds, and when."""

from functools import cache

import pytest
import tiny
import torch
from torch import nn

from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import CATEGORIES, Trace
from memplan.zero import Zero

GRADS = CATEGORIES.index("grads")
BUCKET = 1500  # elements: the model has 5,000 in 20 parameters, the largest of them of 1,024


def shared(model: nn.Module, ranks: int = 2, bucket: int = BUCKET, buckets: int = 1) -> Zero:
    numels = tuple(p.numel() for p in model.parameters())
    return Zero(ranks, (numels,), next(model.parameters()).dtype, bucket, buckets)


@cache
def recorded(ranks: int = 2, bucket: int = BUCKET, buckets: int = 1, accumulation: int = 1) -> Trace:
    model, batch = tiny.plain(layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = Recipe(optimizer=optimizer, accumulation=accumulation, zero=shared(model, ranks, bucket, buckets))
    return Recorder(model, recipe).record(Sample.of(batch))


@pytest.mark.parametrize(
    ("ranks", "numels", "parts", "kept"),
    [
        (2, ((10, 6),), (8,), (10, 6)),  # the second rank has a part of both
        (2, ((8, 8),), (8,), (8,)),
        (2, ((5,), (2, 2)), (4, 2), (5, 2)),  # each group is padded by itself
        (4, ((100, 1, 1),), (26,), (100, 1, 1)),
        (1, ((7, 2),), (10,), (7, 2)),
    ],
)
def test_the_parts_of_a_rank(
    ranks: int, numels: tuple[tuple[int, ...], ...], parts: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    zero = Zero(ranks, numels, torch.bfloat16, 1000, 1)
    assert zero.parts == parts
    assert zero.kept == kept


def test_weights_are_whole_and_states_are_shared() -> None:
    model, _ = tiny.plain(layers=2)
    (part,) = shared(model).parts
    at_first = recorded().breakdown(0)
    assert at_first["params"] == sum(p.nbytes for p in model.parameters())
    assert at_first["optimizer"] == part * 3 * 4 + 4  # the master weights, two states, a counter of steps


def test_gradients_are_kept_as_far_as_the_rank_owns_them() -> None:
    """Those of the second micro-step beside those of the first, until they are added."""
    model, _ = tiny.plain(layers=2)
    kept = sum(shared(model).kept) * 4
    trace = recorded(accumulation=2)
    ends = [trace.of_category(GRADS)[step.backward.stop - 1] for step in trace.steps]
    assert ends == [kept + BUCKET * 4, 2 * kept + BUCKET * 4]
    assert trace.of_category(GRADS)[trace.steps[1].forward.stop] == kept


def test_a_bucket_is_there_from_the_first_gradient_to_the_end_of_the_backward() -> None:
    step = recorded().steps[0].backward
    more = recorded(buckets=2).of_category(GRADS) - recorded().of_category(GRADS)
    ticks = more.nonzero()[0]
    assert set(more[ticks]) == {BUCKET * 4}
    assert step.start < ticks[0] < ticks[-1] == step.stop - 1


def test_what_does_not_fit_into_a_bucket_stays_until_it_is_sent() -> None:
    small = recorded(bucket=500).of_category(GRADS)
    step = recorded().steps[0].backward
    assert small[step.start : step.stop].max() > 500 * 4 + 1024 * 4


def test_more_ranks_never_need_more() -> None:
    peaks = [recorded(ranks=ranks).peak_bytes for ranks in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_a_card_s_rank_steps_in_float32() -> None:
    """Weights in bfloat16: the part of the gradients is copied, and what it is copied from is gone at the step."""
    model, batch = tiny.llama(layers=2)
    model.to(torch.bfloat16)
    zero = shared(model, bucket=2000)
    trace = Recorder(model, Recipe(optimizer=torch.optim.AdamW(model.parameters()), zero=zero)).record(Sample.of(batch))
    (part,), kept = zero.parts, sum(zero.kept)
    span = trace.optimizer
    before = trace.live_at(span.start)
    flat = before + kept * 2 + part * 2 + part * 4
    norm = before + kept * 2 + min(max(zero.kept), part) * 8
    step = before + part * 4 + 2 * part * 4  # its gradient, and AdamW's denominator and update
    assert trace.peak_in(span) == max(flat, norm, step)
    assert trace.live_at(span.stop) == before + part * 4  # its gradient, gone before the next step
