"""The contract of the lever `select`: what a step computes is the same to the bit, and undo leaves no trace."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import tiny
import torch
from imprint import Imprint
from selecting import (
    MODELS,
    POINTS,
    captured_of,
    differences,
    dropped_names,
    gradients,
    holding,
    install,
    made,
    names,
    rows,
    run,
    same,
    selected,
)
from test_recompute import unplanned
from torch import Tensor, nn

from memplan import levers
from memplan.blocks import find_blocks
from memplan.levers import replay, select
from memplan.levers.capture import Call

for_every_model = pytest.mark.parametrize("name", MODELS)


# --- nothing changes but memory and time ----------------------------------------------------------------------------


@for_every_model
@pytest.mark.parametrize("number", range(POINTS))
def test_results_are_the_same_along_the_frontier(name: str, number: int) -> None:
    with selected(name, number) as (model, batch):
        assert differences(run(model, batch), unplanned(name)) == []


@for_every_model
def test_results_are_the_same_under_autocast(name: str) -> None:
    """Casts are operators too, so the names are found under autocast."""
    model, batch = MODELS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        graphs = {path: captured.graph for path, captured in captured_of(model, batch).items()}
    selections = {path: tuple(g.values[v].name for v in g.droppable) for path, g in graphs.items()}
    for number in range(2):  # captured, and by the capture
        model, batch = MODELS[name]() if not number else (model, batch)
        model.load_state_dict(MODELS[name]()[0].state_dict())
        model.zero_grad()
        with levers.decided(model, {path: path for path in selections}, selections):
            assert differences(run(model, batch, bf16=True), unplanned(name, bf16=True)) == []


@for_every_model
def test_results_are_the_same_over_three_micro_batches(name: str) -> None:
    """The first is captured; the others only pass the hooks."""
    with selected(name) as (model, batch):
        assert differences(run(model, batch, micro_steps=3), unplanned(name, micro_steps=3)) == []


@for_every_model
def test_every_block_drops_something(name: str) -> None:
    assert all(names(name).values())


def test_batch_norms_count_a_batch_once() -> None:
    with selected("resnet") as (model, batch):
        run(model, batch, micro_steps=2)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert {int(norm.num_batches_tracked) for norm in norms} == {2}


# --- undo, twice, copies --------------------------------------------------------------------------------------------


@for_every_model
def test_undo_restores_the_very_same_attributes(name: str) -> None:
    model, _ = MODELS[name]()
    selections = names(name)
    before = Imprint(model)
    undo = levers.install(model, {path: path for path in selections}, selections)
    assert before.differences() != []
    undo()
    undo()
    assert before.differences() == []


def test_a_selection_on_top_of_another_replaces_it() -> None:
    block, x = made(), rows()
    plain = gradients(block, x)
    undo = install(block, x)
    inner = select.install(block, "b", dropped_names(block, x)[:1])
    assert same(gradients(block, x), plain)
    assert holding(block) == 1
    assert not isinstance(block.forward.__wrapped__, select.Selected)
    inner()
    assert same(gradients(block, x), plain)
    assert holding(block) > 1
    undo()
    assert "forward" not in vars(block)


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet", "lora"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("is_used", [False, True])
def test_a_copy_runs_by_the_selection_and_stands_on_its_own(
    name: str, duplicate: Callable[[nn.Module], nn.Module], is_used: bool
) -> None:
    with selected(name) as (model, batch):
        if is_used:
            state = copy.deepcopy(model.state_dict())
            run(model, batch)
            model.load_state_dict(state)
            model.zero_grad()
        copied = duplicate(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
        assert differences(run(copied, batch), unplanned(name)) == []
        assert all(holding(copied.get_submodule(path)) for path in find_blocks(copied))


# --- how a block is called ------------------------------------------------------------------------------------------


def test_nothing_is_captured_where_nothing_runs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made(), rows()
    install(block, x)
    monkeypatch.setattr(select, "capturing", None)
    with torch.no_grad():
        block(x)
    block.eval()
    block(x).sum().backward()


def test_a_backward_can_be_run_twice() -> None:
    block, x = made(), rows()
    plain = gradients(block, x)
    install(block, x)
    for _ in range(2):
        torch.manual_seed(5)
        block.zero_grad()
        out = block(x)
        for number in range(2):
            x.grad = None
            out.square().sum().backward(retain_graph=number == 0)
            assert torch.equal(x.grad, plain[1])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.square().sum().backward()


def test_gradients_of_a_subset_of_inputs_first() -> None:
    block, x = made(), rows()
    plain = gradients(block, x)
    install(block, x)
    for _ in range(2):
        torch.manual_seed(5)
        loss = block(x).square().sum()
        last = torch.autograd.grad(loss, block.last.weight, retain_graph=True)[0]
        first, other = torch.autograd.grad(loss, [block.first.weight, x])
        assert same([other, first, last], [plain[1], plain[2], plain[6]])


def test_a_gradient_of_a_gradient() -> None:
    def penalty(block: nn.Module, x: Tensor) -> list[Tensor | None]:
        torch.manual_seed(5)
        block.zero_grad()
        (slope,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [parameter.grad for parameter in block.parameters()]

    block, x = made(), rows()
    plain = penalty(block, x)
    install(block, x)
    for _ in range(2):
        assert same(penalty(block, x), plain)


def test_lengths_that_vary_are_captured_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block = made()
    inputs = [rows(n, count) for n, count in enumerate((4, 6, 4, 3, 6))]
    plain = [gradients(block, x) for x in inputs]
    install(block, inputs[0])
    captures: list[int] = []
    capturing = select.capturing

    def counted(block: nn.Module, *args: object) -> object:
        captures.append(1)
        return capturing(block, *args)

    monkeypatch.setattr(select, "capturing", counted)
    for x, wanted in zip(inputs, plain, strict=True):
        assert same(gradients(block, x), wanted)
        assert holding(block)
    assert len(captures) == 3


# --- the comparison notices levers that are wrong -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "lora", "plain"])
def test_another_random_state_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "unlike", lambda *_: set())
    monkeypatch.setattr(replay, "set_random_state", lambda device, state: None)
    with selected(name) as (model, batch):
        assert any("gradient" in difference for difference in differences(run(model, batch), unplanned(name)))


@pytest.mark.parametrize("name", MODELS)
def test_a_value_that_is_a_little_off_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call_run = Call.run

    def off(call: Call, base_of: Callable[[int], Tensor]) -> list[tuple[int, Tensor]]:
        results = call_run(call, base_of)
        return [(value, t * (1 + 2**-20) if t.is_floating_point() else t) for value, t in results]

    monkeypatch.setattr(select, "unlike", lambda *_: set())
    monkeypatch.setattr(Call, "run", off)
    with selected(name) as (model, batch):
        assert any("gradient" in difference for difference in differences(run(model, batch), unplanned(name)))


def test_the_proof_notices_it_before_anything_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made(), rows()
    plain = gradients(block, x)
    install(block, x)
    monkeypatch.setattr(replay, "set_random_state", lambda device, state: None)
    with pytest.warns(select.PlanNotFollowed, match=r"b computes .* differently when it is run again"):
        found = gradients(block, x)
    assert same(found[:-1], plain[:-1])  # the last is the random state, which cannot be put back here


def test_tiny_models_are_as_they_were() -> None:
    """What the comparisons rest on: a model that is made twice gives the same results."""
    assert differences(run(*tiny.gpt2(use_cache=False)), unplanned("gpt2")) == []
