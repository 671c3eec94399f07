"""What lies around the blocks runs as before, and the gradients reach it."""

import peft
import pytest
import tiny
import torch
from torch import nn

from memplan.blocks import alike, find_blocks
from memplan.skipping import skipped


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "resnet"])
def test_the_rest_of_the_model_still_makes_a_loss_and_its_gradients(name: str) -> None:
    model, batch = getattr(tiny, name)()
    model.train()
    blocks = find_blocks(model)
    before = {path: dict(model.get_submodule(path).__dict__) for path in blocks}
    with skipped(model, alike(model, blocks)):
        model(**batch).loss.backward()
    inside = tuple(f"{path}." for path in blocks)
    reached = {path for path, p in model.named_parameters() if p.grad is not None}
    assert not [path for path in reached if path.startswith(inside)]
    assert reached
    assert {path: dict(model.get_submodule(path).__dict__) for path in blocks} == before


def test_the_gradient_goes_through_to_what_lies_before_the_blocks() -> None:
    model, batch = tiny.llama()
    with skipped(model, alike(model, find_blocks(model))):
        model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_each_group_runs_once_and_its_blocks_then_hand_on_their_input() -> None:
    runs: list[int] = []
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    for layer in model:
        layer.forward = lambda x, own=nn.Linear.forward, layer=layer: (runs.append(1), own(layer, x))[1]
    x = torch.randn(2, 3)
    with skipped(model, [("0", "1"), ("2", "3")]):
        assert torch.equal(model(x), x)
        assert torch.equal(model(x + 1), x + 1)
    assert len(runs) == 2
    assert not torch.equal(model(x), x)


def test_where_a_block_changes_the_shape_its_one_output_is_handed_on() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    x = torch.randn(4, 3)
    with skipped(model, [("0",), ("1",)]):
        out = model(x)
        assert out.shape == (4, 2)
        assert out.requires_grad
        assert torch.equal(model(x + 1), out)


def test_with_a_frozen_base_the_blocks_that_learn_still_start_a_gradient() -> None:
    model, batch = tiny.llama()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with skipped(model, alike(model, find_blocks(model))):
        assert model(**batch).loss.requires_grad


def test_an_error_in_a_block_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError), skipped(model, [("0", "1")]):
        model(torch.randn(2, 4))
    assert "forward" not in model[0].__dict__
