"""What is seen of a block's forward: names, nodes, and what cannot be run again."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from selecting import MODELS, Block, capture, captured_of, dropped_names, gradients, holding, install, made, rows, same
from torch import Tensor, nn

from memplan import levers
from memplan.errors import PlanNotFollowed
from memplan.levers.capture import RANDOM_STATE


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_and_the_same_every_time(name: str) -> None:
    first, second = (captured_of(*MODELS[name]()) for _ in range(2))
    assert first
    for path, captured in first.items():
        names = [value.name for value in captured.graph.values]
        assert len(set(names)) == len(names)
        assert captured.graph == second[path].graph


@pytest.mark.parametrize("name", MODELS)
def test_nodes_read_nothing_that_comes_later(name: str) -> None:
    for captured in captured_of(*MODELS[name]()).values():
        graph = captured.graph
        for n, found in enumerate(graph.nodes):
            assert all(graph.values[v].node is None or graph.values[v].node < n for v in found.reads)
            assert all(graph.values[v].node == n for v in found.writes)


def test_values_are_named_by_module_and_operator() -> None:
    graph = capture(made(), rows()).graph
    names = {value.name for value in graph.values}
    assert {"first/addmm", "act/gelu", "norm.weight", "input 0", "last/addmm"} <= names
    assert sum(name.startswith("norm/native_layer_norm") for name in names) == 3


def test_views_are_no_nodes() -> None:
    def function(block: Block, x: Tensor) -> Tensor:
        return block.first(x).view(2, 2, 8).transpose(0, 1).flatten(0, 1).relu()[1:]

    graph = capture(made(function), rows()).graph
    made_by = [found.name for found in graph.nodes]
    assert made_by == ["aten::addmm", "aten::clone", "aten::relu"] or made_by == ["aten::addmm", "aten::relu"]


def test_what_is_written_in_place_belongs_to_what_made_it() -> None:
    def function(block: Block, x: Tensor) -> Tensor:
        return block.last(block.first(x).add_(1).mul_(3).relu_())

    captured = capture(made(function), rows())
    first = captured.graph.nodes[0]
    assert first.repeatable
    assert [call.func._schema.name for call in captured.calls[0]] == [
        "aten::addmm", "aten::add_", "aten::mul_", "aten::relu_"
    ]  # fmt: skip
    assert dropped_names(made(function), rows()) == ("first/addmm",)


def test_bytes_and_what_is_saved_are_those_of_the_tensors() -> None:
    graph = capture(made(), rows()).graph
    by_name = {value.name: value for value in graph.values}
    assert by_name["first/addmm"].bytes == 4 * 8 * 4
    assert by_name["first/addmm"].saved
    assert by_name["input 0"].bytes == 0
    assert by_name["input 0"].is_given
    assert not by_name["last/addmm"].saved


def test_random_operators_hang_together_by_the_state() -> None:
    def function(block: Block, x: Tensor) -> Tensor:
        return block.dropout(block.dropout(block.first(x)))

    captured = capture(made(function), rows())
    values = [v for v, value in enumerate(captured.graph.values) if value.name.startswith(RANDOM_STATE)]
    assert len(values) == 3
    assert sorted(captured.states.values()) == [(values[0], values[1]), (values[1], values[2])]


# --- what cannot be run again ---------------------------------------------------------------------------------------

OUTSIDE = torch.linspace(-1, 1, 32).view(4, 8)


def writes_to_its_input(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(1.0)
    return x.exp()


def reads_from_outside(block: Block, x: Tensor) -> Tensor:
    return (x * OUTSIDE).exp()


def of_a_generator(block: Block, x: Tensor) -> Tensor:
    return (x * torch.rand(4, 8, generator=torch.Generator().manual_seed(3))).exp()


def the_largest(block: Block, x: Tensor) -> Tensor:
    return x.topk(3)[0].exp()


def of_no_fixed_shape(block: Block, x: Tensor) -> Tensor:
    return x[(x > 0).any(-1).nonzero()[:, 0]].exp()


def after_asking(block: Block, x: Tensor) -> Tensor:
    return (x * x.sum().item()).exp()


def through_another_type(block: Block, x: Tensor) -> Tensor:
    return x * (x.detach() * 2).view(torch.int32).bitwise_and(-2).view(torch.float32)


def written_after_it_was_read(block: Block, x: Tensor) -> Tensor:
    copied = x.detach() * 2
    summed = copied + 1
    copied.mul_(2)
    return x * summed * copied


def two_draws_around_another(block: Block, x: Tensor) -> Tensor:
    first = torch.empty(4, 8).bernoulli_(0.5)
    second = torch.empty(4, 8).bernoulli_(0.5)
    return x * first.bernoulli_(0.5) * second


@pytest.mark.parametrize(
    ("function", "spoiled"),
    [
        (writes_to_its_input, ["exp"]),
        (reads_from_outside, ["mul", "exp"]),
        (of_a_generator, ["rand"]),
        (the_largest, ["topk", "topk#2"]),
        (of_no_fixed_shape, ["nonzero"]),
        (after_asking, ["mul", "exp"]),
        (through_another_type, ["bitwise_and"]),
        (written_after_it_was_read, ["mul", "add"]),
        (two_draws_around_another, ["empty", "empty#2"]),
    ],
)
def test_it_is_marked_and_all_that_hangs_on_it_kept(function: Callable[..., Tensor], spoiled: list[str]) -> None:
    block, x = made(function), rows()
    graph = capture(block, x).graph
    assert [graph.values[v].name for v in graph.named(spoiled) if graph.can_rerun(v)] == []
    assert not any(graph.values[v].name in spoiled for v in graph.droppable)
    plain = gradients(block, x)
    install(block, x)
    for _ in range(2):
        assert same(gradients(block, x), plain)


def test_what_nobody_can_see_is_found_by_the_proof() -> None:
    """A kernel that is not torch's, which writes into an empty tensor: another thing each time, say."""
    count = iter(range(100))

    def function(block: Block, x: Tensor) -> Tensor:
        unseen = torch.zeros(4, 8)
        unseen.numpy()[:] = np.float32(7 + next(count) // 100)
        return block.last(block.first(x) * (unseen + 1))

    block, x = made(function), rows()
    plain = gradients(block, x)
    install(block, x)
    with pytest.warns(PlanNotFollowed, match="computes .*add.* differently when it is run again"):
        assert same(gradients(block, x), plain)
    assert same(gradients(block, x), plain)


def test_what_is_found_in_one_block_is_not_dropped_in_those_like_it() -> None:
    """Whose proof would be that one's, had it not failed."""
    count = iter(range(10_000))

    def function(block: Block, x: Tensor) -> Tensor:
        unseen = torch.zeros(4, 8)
        unseen.numpy()[:] = np.float32(7 + next(count) // 100)
        return block.last(block.first(x) * (unseen + 1))

    blocks, x = [made(function) for _ in range(2)], rows()
    dropped = dropped_names(made(function), x)
    model = nn.ModuleDict({"a": blocks[0], "b": blocks[1]})
    undo = levers.install(model, {"a": "select-1", "b": "select-1"}, {"select-1": dropped})
    for block in blocks:
        with pytest.warns(PlanNotFollowed, match="differently when it is run again"):
            block(x).sum().backward()
    undo()


# --- given ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_norm", [lambda: nn.BatchNorm1d(8), lambda: nn.BatchNorm1d(8).eval()])
def test_batch_norms_in_training_and_frozen(make_norm: Callable[[], nn.Module]) -> None:
    def function(block: Block, x: Tensor) -> Tensor:
        return block.last(torch.relu(block.statistics(block.first(x))))

    results = []
    for has_lever in (False, True):
        block, x = made(function), rows()
        block.statistics = make_norm()
        if has_lever:
            names = dropped_names(block, x)
            assert "relu" in names
            block.statistics = make_norm()  # capturing was a forward too
            install(block, x)
            block.statistics = make_norm()
        gradients_of = [gradients(block, x) for _ in range(3)]
        results.append([*gradients_of[-1], *block.buffers()])
        assert not has_lever or holding(block)
    assert same(*results)


@pytest.mark.filterwarnings("error")
def test_tensors_of_inference_mode_can_be_sources() -> None:
    with torch.inference_mode():
        mask = torch.ones(4, 8)
    block, x = made(lambda block, x, mask: block.last(torch.relu(block.first(x) + mask))), rows()
    plain = gradients(block, x, mask)
    install(block, x, mask)
    for _ in range(2):
        assert same(gradients(block, x, mask), plain)
    assert holding(block) == 1


def test_a_slice_of_something_larger_is_read_where_it_lies() -> None:
    block = made()
    inputs = [torch.randn(9, 8)[n : n + 4].requires_grad_() for n in (0, 3, 5)]
    plain = [gradients(block, x) for x in inputs]
    install(block, inputs[0])
    for x, wanted in zip(inputs, plain, strict=True):
        assert same(gradients(block, x), wanted)


def test_capturing_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = nn.modules.module
    capture(made(), rows())
    with pytest.raises(ZeroDivisionError):
        capture(made(lambda block, x: x / 0 if 1 // 0 else x), rows())
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
