"""What a block holds for its backward and lets go of: predicted, measured, and by the references that are left."""

import gc
import weakref

import pytest
import torch
from real import peak_of
from selecting import MODELS, capture, install, made, rows, selected
from torch import Tensor

from memplan.levers import replay, select
from memplan.levers.capture import Capture
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample

KIB = 1024


@pytest.mark.parametrize("number", [1, None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "plain"])
def test_the_predicted_peak_is_the_measured_one(name: str, number: int | None) -> None:
    """Of a step by the selection, to the random states that stay on the host."""
    with selected(name, number) as (model, batch):
        sample = Sample.of(batch)
        predicted = Recorder(model, Recipe()).record(sample).peak_bytes
        model(**batch)["loss"].backward()  # captured and proved; that takes more once
        model.zero_grad()
        step_peak = peak_of(model, sample, Recipe())
        assert abs(predicted - step_peak) <= 2 * KIB, (predicted, step_peak)


def wide_rows() -> Tensor:
    return rows(0, 512)


def test_it_lets_go_of_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward holds with everything dropped is the rest of the graph's saved bytes."""
    block, x = made(), wide_rows()
    graph = capture(block, x).graph
    given = {x.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in block.parameters())}
    saved: list[replay.Saved] = []

    class Noted(replay.Saved):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__(tensor)
            saved.append(self)

    monkeypatch.setattr(select, "Saved", Noted)

    def held() -> int:
        saved.clear()
        out = block(x)
        assert out.requires_grad
        storages = [entry.held.tensor.untyped_storage() for entry in saved if entry.held is not None]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in given}.values())

    select.install(block, "b", ())
    assert [held(), held()] == [graph.saved_bytes()] * 2
    install(block, x)
    assert [held(), held()] == [graph.saved_bytes(graph.droppable)] * 2
    assert graph.saved_bytes(graph.droppable) < graph.saved_bytes() / 3


def test_each_node_runs_again_once_in_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made(), rows()
    graph = capture(block, x).graph
    install(block, x)
    block(x).sum().backward()
    ran: list[int] = []
    rerun = replay.rerun

    def counted(captured: object, node: int, read: object) -> object:
        ran.append(node)
        return rerun(captured, node, read)

    monkeypatch.setattr(replay, "rerun", counted)
    for _ in range(2):
        block(x).sum().backward()
        assert sorted(ran) == list(graph.reruns(graph.droppable))
        ran.clear()


def test_nothing_outlives_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sources nor what was made again, nor the graph through them; without the garbage collector."""
    block, x = made(), rows()
    install(block, x)
    reruns: list[weakref.ref[replay.Rerun]] = []
    begun = replay._begun

    class Rerun(replay.Rerun):
        __slots__ = ("__weakref__",)

    monkeypatch.setattr(replay, "Rerun", Rerun)

    def noted(*args: object) -> replay.Rerun:
        again = begun(*args)
        reruns.append(weakref.ref(again))
        return again

    monkeypatch.setattr(replay, "_begun", noted)
    gc.disable()
    try:
        for _ in range(3):
            given = x * 1
            source = weakref.ref(given.untyped_storage())
            out = block(given)
            del given
            loss = out.square().sum()
            assert source() is not None
            assert reruns[-1]() is not None
            loss.backward()
            assert [again for again in reruns if again() is not None] == []
            assert source() is None
            dead = block(x * 1)
            del dead
            assert [again for again in reruns if again() is not None] == []
    finally:
        gc.enable()
    assert reruns


def test_what_is_made_again_is_let_go_when_nobody_is_left_to_ask() -> None:
    block, x = made(), rows()
    captured = capture(block, x)
    (part,) = replay.parts_of(captured, captured.graph.droppable)
    saved = [replay.Saved(torch.empty(0)) for _ in captured.saved]
    again = replay._begun(part, saved, block, [x], torch.get_rng_state())
    for _ in range(2):
        for _, view in reversed(part.entries):
            again.give(view)
        assert again.made == {}


def test_the_random_state_is_left_alone_by_a_backward() -> None:
    block, x = made(), rows()
    install(block, x)
    for _ in range(2):
        loss = block(x).sum()
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)


def test_no_dispatch_mode_runs_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made(), rows()
    install(block, x)
    block(x).sum().backward()
    monkeypatch.setattr(Capture, "__enter__", None)
    block(x).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_worked_out_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with selected(name) as (model, batch):
        model(**batch)["loss"].backward()
        monkeypatch.setattr(select, "parts_of", None)
        model(**batch)["loss"].backward()
