"""The events of a whole run: what comes when, that nothing is lost, and what the allocator makes of it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import memplan
from memplan.allocator import FREE, Events, Settings, replayed
from memplan.kernels.cuda import CudaBackend
from memplan.recipe import AFTER_FORWARD, Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import CATEGORIES, Trace
from memplan.training_run import events_of, usage_of

CARD = CudaBackend((8, 6))


def traced(recipe: Recipe, layers: int = 2) -> Trace:
    model, batch = tiny.gpt2(layers=layers)
    return Recorder(model, recipe, CARD).record(Sample.of(batch))


def live(events: Events) -> np.ndarray:
    """Requested bytes in use after each event."""
    sizes = dict[int, int]()
    changes = []
    for identity, size in zip(events.ids.tolist(), events.sizes.tolist(), strict=True):
        if size == FREE:
            changes.append(-sizes.pop(identity))
        else:
            sizes[identity] = size
            changes.append(size)
    return np.cumsum(changes)


def rows_of(trace: Trace, category: str) -> np.ndarray:
    return np.flatnonzero((trace.storage_category == CATEGORIES.index(category)) & (trace.storage_bytes > 0))


RECIPES = {
    "plain": Recipe(),
    "keeps the output": Recipe(keeps_output=True),
    "drops gradients late": Recipe(drops=AFTER_FORWARD),
    "both, accumulated": Recipe(keeps_output=True, drops=AFTER_FORWARD, accumulation=3),
    "steps in the backward": Recipe(stepping="in-backward"),
    "adagrad": Recipe(optimizer="adagrad"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_but_the_first_has_the_peak_of_the_trace(name: str) -> None:
    trace = traced(RECIPES[name])
    ends = [len(events_of(trace, steps).ids) for steps in (1, 2, 3, 4)]
    events = events_of(trace, 4)
    now = live(events)
    peaks = [int(now[start:stop].max()) for start, stop in pairwise(ends)]
    assert peaks == [trace.peak_bytes] * 3
    assert now[: ends[0]].max() <= trace.peak_bytes
    assert events.peak_requested_bytes == trace.peak_bytes


def test_weights_come_first_in_the_order_in_which_a_model_is_moved() -> None:
    model, batch = tiny.gpt2(layers=2)
    order: list[int] = []
    model._apply(lambda tensor: order.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
    events = events_of(Recorder(model, Recipe(), CARD).record(Sample.of(batch)), 1)
    tied = model.lm_head.weight.nbytes  # is moved with the embedding; the head, the last, finds it moved
    assert order.pop() == tied
    assert events.sizes[: len(order)].tolist() == [CARD.rounded(size) for size in order]


def test_state_is_made_by_the_first_step_of_the_optimizer_unless_it_has_it() -> None:
    for optimizer, is_late in (("adamw", True), ("adagrad", False)):
        trace = traced(Recipe(optimizer=optimizer))
        state = rows_of(trace, "optimizer")
        events = events_of(trace, 2)
        born = [int(np.flatnonzero(events.ids == row)[0]) for row in state]
        first_own = int(np.flatnonzero(events.ids == np.flatnonzero(trace.born > 0)[0])[0])
        assert born == list(range(born[0], born[0] + len(born)))
        assert (born[0] > first_own) is is_late


def test_workspaces_come_with_the_first_forward_and_the_first_backward() -> None:
    trace = traced(Recipe())
    forward, backward = rows_of(trace, "libraries").tolist()
    events = events_of(trace, 1)
    order = events.ids.tolist()
    own = np.flatnonzero((trace.born > 0) & (trace.storage_bytes > 0))
    in_backward = own[trace.born[own] >= trace.steps[0].backward.start]
    assert order.index(forward) < order.index(int(own[0]))
    assert order.index(int(own[0])) < order.index(backward) < order.index(int(in_backward[0]))


def test_what_the_loop_holds_longer_goes_when_the_next_forward_has_returned() -> None:
    plain, late = traced(Recipe()), traced(Recipe(drops=AFTER_FORWARD))
    grads = sum(int(plain.storage_bytes[row]) for row in rows_of(plain, "grads"))
    assert late.live_at(late.steps[0].backward.start) == plain.live_at(plain.steps[0].backward.start) + grads
    assert late.live[late.steps[0].backward.start] == plain.live[plain.steps[0].backward.start]
    kept = traced(Recipe(keeps_output=True))
    logits = 2 * 16 * tiny.VOCABULARY * 4
    assert kept.live_at(kept.steps[0].backward.start) >= plain.live_at(plain.steps[0].backward.start) + logits


def test_reserved_is_what_a_settled_run_reserves() -> None:
    trace = traced(Recipe(keeps_output=True), layers=3)
    usage = usage_of(trace, Settings(), completes=True)
    assert usage.completes_bytes is not None
    assert usage == replace(replayed(events_of(trace, 12), Settings()), completes_bytes=usage.completes_bytes)
    assert usage_of(trace, Settings()) == replace(usage, completes_bytes=None)
    assert trace.peak_bytes <= usage.peak_allocated_bytes <= usage.completes_bytes
    assert usage.completes_bytes <= usage.fits_bytes == usage.peak_reserved_bytes


def test_an_unknown_word_for_when_gradients_are_dropped() -> None:
    with pytest.raises(ValueError, match="after-step or after-forward, got 'never'"):
        Recorder(torch.nn.Linear(2, 2), Recipe(drops="never"), CARD)


@pytest.mark.parametrize(
    ("make", "autocast", "accumulation"),
    [(tiny.gpt2, None, 1), (tiny.llama, torch.bfloat16, 2), (tiny.vit, None, 2), (tiny.lora, torch.bfloat16, 1)],
)
def test_a_prediction_for_a_card_says_what_a_run_takes_of_it(
    make: Callable[[], tiny.Made], autocast: torch.dtype | None, accumulation: int
) -> None:
    model, batch = make()
    asked: dict[str, Any] = {"autocast": autocast, "accumulation": accumulation}
    for gpu in ("rtx-3060", "24GiB"):
        found = memplan.predict(model, batch, gpu=gpu, **asked)
        assert found.reserved_bytes is not None
        assert found.completes_bytes is not None
        assert found.fits_bytes is not None
        assert (
            sum(found.breakdown.values())
            == found.peak_bytes
            == max(found.timeline.total) + found.breakdown["allocator"]
        )
        assert found.breakdown["allocator"] >= 0
        assert found.peak_bytes <= found.completes_bytes <= found.fits_bytes <= found.reserved_bytes
        assert found.needs() in found.describe()
    plain = memplan.predict(model, batch, **asked)
    assert (plain.reserved_bytes, plain.completes_bytes, plain.fits_bytes, plain.needs()) == (None, None, None, "")
    assert "allocator" not in plain.breakdown
