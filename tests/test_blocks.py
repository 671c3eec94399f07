"""`find_blocks`, `alike`, `signature`: which modules are the links of the chain, and which are the same."""

from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from memplan.blocks import alike, check_plannable, describe, find_blocks, is_batch_coupled, signature, statement
from memplan.errors import UsageError


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def layer(width: int = 4, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))


# --- find_blocks ----------------------------------------------------------------------------------------------------

FOUND: dict[str, tuple[Callable[[], tiny.Made], int]] = {
    "llama": (tiny.llama, 4),
    "gpt2": (tiny.gpt2, 3),
    "bert": (tiny.bert, 3),
    "vit": (tiny.vit, 3),
    "resnet": (tiny.resnet, 6),
    "t5": (tiny.t5, 4),
    "lora": (tiny.lora, 4),
    "plain": (tiny.plain, 4),
}


@pytest.mark.parametrize("name", FOUND)
def test_blocks_of_every_kind_of_model(name: str) -> None:
    make, count = FOUND[name]
    model, _ = make()
    blocks = find_blocks(model)
    assert len(blocks) == len(set(blocks)) == count
    order = [path for path, _ in model.named_modules()]
    assert sorted(blocks, key=order.index) == list(blocks)
    assert not any(inner.startswith(f"{outer}.") for outer in blocks for inner in blocks)
    assert len({type(model.get_submodule(path)) for path in blocks}) == 1


def test_paths() -> None:
    assert find_blocks(tiny.llama(layers=2)[0]) == ("model.layers.0", "model.layers.1")
    assert find_blocks(tiny.gpt2(layers=2)[0]) == ("transformer.h.0", "transformer.h.1")
    t5 = ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert find_blocks(tiny.t5(layers=2)[0]) == t5


def test_a_wrapped_model_has_the_blocks_of_its_base() -> None:
    inner = find_blocks(tiny.llama()[0])
    assert find_blocks(tiny.lora()[0]) == tuple(f"base_model.model.{path}" for path in inner)


def test_stages_that_are_checkpointing_layers_are_taken_as_they_are() -> None:
    model = swin()
    blocks = [model.get_submodule(path) for path in find_blocks(model)]
    assert blocks
    assert len({type(block) for block in blocks}) == 1


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_twins_in_a_container(container: type[nn.Module]) -> None:
    layers = [layer() for _ in range(3)]
    model = nn.Module()
    model.stem = nn.Linear(4, 4)
    model.body = container(layers) if container is nn.ModuleList else container(*layers)
    assert find_blocks(model) == ("body.0", "body.1", "body.2")


def test_stages_that_differ_are_looked_into() -> None:
    stages = [nn.Sequential(*(layer(width) for _ in range(2))) for width in (4, 8)]
    assert find_blocks(nn.ModuleList(stages)) == ("0.0", "0.1", "1.0", "1.1")


def test_a_model_may_be_its_own_container() -> None:
    assert find_blocks(nn.Sequential(layer(), layer())) == ("0", "1")


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        layer(),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)),  # one operation each
        nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())),  # no parameters
        nn.Sequential(layer(2), layer(3), layer(4)),  # no twins
        nn.ModuleDict({"a": layer(), "b": layer()}),  # no order
    ],
    ids=["one layer", "one block", "operations", "no parameters", "no twins", "dict"],
)
def test_models_without_blocks(model: nn.Module) -> None:
    assert find_blocks(model) == ()


# --- alike ------------------------------------------------------------------------------------------------------------


def runs(model: nn.Module) -> list[int]:
    return [len(run) for run in alike(model, find_blocks(model))]


@pytest.mark.parametrize(("name", "expected"), [("llama", [4]), ("gpt2", [3]), ("bert", [3]), ("lora", [4])])
def test_layers_of_one_model_are_alike(name: str, expected: list[int]) -> None:
    assert runs(FOUND[name][0]()[0]) == expected


def test_blocks_of_two_containers_are_not_one_run() -> None:
    assert max(runs(tiny.t5(layers=2)[0])) <= 2
    assert len(runs(tiny.t5(layers=2)[0])) >= 2


def test_runs_are_in_order_and_complete() -> None:
    model, _ = tiny.llama(layers=5)
    model.model.layers[2].self_attn.attention_dropout = 0.5
    blocks = find_blocks(model)
    found = alike(model, blocks)
    assert [len(run) for run in found] == [2, 1, 2]
    assert tuple(path for run in found for path in run) == blocks


def _freeze(block: nn.Module) -> None:
    next(block.parameters()).requires_grad_(False)


def _dropout(block: nn.Module) -> None:
    block.dropout.p = 0.3


def _evaluate(block: nn.Module) -> None:
    block.dropout.eval()


def _attribute(block: nn.Module) -> None:
    block.is_sliding = True


def _half(block: nn.Module) -> None:
    block.narrow.to(torch.bfloat16)


def _hook(block: nn.Module) -> None:
    block.register_forward_hook(lambda *_: None)


def _replace(block: nn.Module) -> None:
    block.dropout = nn.Identity()


def _forward(block: nn.Module) -> None:
    def forward(x: Tensor, **_: object) -> Tensor:
        return x

    block.forward = forward


def _buffer(block: nn.Module) -> None:
    block.register_buffer("more", torch.zeros(2))


def _strides(block: nn.Module) -> None:
    rows, columns = block.wide.weight.shape
    block.wide.weight = nn.Parameter(torch.randn(columns, rows).t())


@pytest.mark.parametrize(
    "change",
    [_freeze, _dropout, _evaluate, _attribute, _half, _hook, _replace, _forward, _buffer, _strides],
    ids=lambda change: change.__name__.strip("_"),
)
def test_what_tells_blocks_apart(change: Callable[[nn.Module], None]) -> None:
    model, _ = tiny.plain(layers=5)
    assert runs(model) == [5]
    blocks = find_blocks(model)
    change(model.blocks[1])
    assert [len(run) for run in alike(model, blocks)] == [1, 1, 3]


def test_layer_types_tell_blocks_apart() -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = transformers.Gemma3TextConfig(**sizes, **heads, layer_types=types)
    assert runs(transformers.Gemma3ForCausalLM(config)) == [2, 2]


def test_a_position_is_no_difference_but_other_numbers_are() -> None:
    model, _ = tiny.plain(layers=3)
    for position, block in enumerate(model.blocks):
        block.layer_idx = position
    assert runs(model) == [3]
    for position, block in enumerate(model.blocks):
        block.width = position
    assert runs(model) == [1, 1, 1]


def test_a_description_is_stable() -> None:
    model, _ = tiny.llama(layers=1)
    block = model.model.layers[0]
    assert describe(block, "model.layers.0") == describe(block, "model.layers.0")


# --- signature --------------------------------------------------------------------------------------------------------


def test_a_signature_is_that_of_shapes_not_of_values() -> None:
    model, _ = tiny.plain()
    expected = signature(model)
    for parameter in model.parameters():
        parameter.data.normal_()
    assert signature(model) == signature(model.to("meta")) == signature(tiny.plain()[0]) == expected
    assert len(expected) == 16


@pytest.mark.parametrize("change", [_freeze, _half, lambda block: setattr(block, "other", nn.Linear(1, 1))])
def test_a_signature_sees_every_parameter(change: Callable[[nn.Module], None]) -> None:
    model, _ = tiny.plain()
    before = signature(model)
    change(model.blocks[2])
    assert signature(model) != before


@pytest.mark.parametrize("make", [partial(tiny.plain, width=8), partial(tiny.plain, layers=3), tiny.llama])
def test_signatures_of_other_models_differ(make: Callable[[], tiny.Made]) -> None:
    assert signature(make()[0]) != signature(tiny.plain()[0])


# --- batch norms ------------------------------------------------------------------------------------------------------


def test_what_is_trained_is_told() -> None:
    model, _ = tiny.lora(layers=2)
    counts = {False: 0, True: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    told = statement(model.bfloat16(), 2048)
    assert f"{counts[False]:,} of bfloat16 frozen" in told
    assert f"{counts[True]:,} of bfloat16 trained, adapters of rank {model.peft_config['default'].r}" in told
    assert told.endswith("; samples of 2,048 tokens")
    assert statement(nn.Linear(2, 2), None) == "weights: 6 of float32 trained"


def test_only_training_batch_norms_couple_a_batch() -> None:
    model, _ = tiny.resnet()
    assert is_batch_coupled(model)
    assert is_batch_coupled(model.eval())  # a step is taken in training mode
    model.train()
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    assert not is_batch_coupled(model)  # frozen on purpose
    assert not is_batch_coupled(tiny.llama()[0])


# --- check_plannable ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.ModuleDict({"inside": nn.DataParallel(model)})])
def test_copies_on_several_cards_are_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny.llama(layers=2)[0]
    check_plannable(model)
    with pytest.raises(UsageError, match=r"inside nn\.DataParallel.* one process for each card .*DistributedDataPara"):
        check_plannable(wrap(model))
