"""What a loop holds of an output keeps its values, and no more."""

from typing import Any
from weakref import ref

import pytest
import tiny
import torch
from torch import Tensor, nn

from memplan import levers
from memplan.integrations.letting_go import Handed, unviewed


class Box:
    """A tensor that autograd saves."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def called(model: nn.Module, batch: Any) -> tuple[Any, list["ref[Box]"]]:
    """The output, and what its graph holds."""
    boxes: list[ref[Box]] = []

    def pack(tensor: Tensor) -> Box:
        boxes.append(ref(box := Box(tensor.detach())))  # with its graph it would hold itself
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        output = unviewed(model(**batch))
    return output, boxes


def alive(boxes: list["ref[Box]"]) -> int:
    return sum(box() is not None for box in boxes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_the_graph_ends_and_the_values_stay(name: str) -> None:
    model, batch = getattr(tiny, name)()
    model.eval()
    output, boxes = called(model, batch)
    handed, values = Handed(output), [output.loss.item(), output.logits.detach().clone()]
    trained = output.loss * 2
    assert alive(boxes) > 20
    handed.let_go(trained)
    assert alive(boxes) == 0
    assert output.loss.item() == values[0]
    assert trained.item() == 2 * values[0]
    assert torch.equal(output.logits, values[1])


def test_lazy_logits() -> None:
    model, batch = tiny.llama()
    output = model(**batch)
    whole = output.logits.detach()
    undo = levers.install(model, {"lm_head": "chunked-4"})
    output, boxes = called(model, batch)
    Handed(output).let_go(output.loss)
    assert alive(boxes) == 0
    with pytest.warns(UserWarning, match="are read by something else"):
        assert torch.allclose(output.logits.detach().clone(), whole, atol=1e-6)
    undo()


def test_a_parameter_in_the_output_stays_one() -> None:
    model = nn.Linear(4, 3)
    output = {"loss": model(torch.ones(2, 4)).sum(), "scale": model.weight, "text": "x"}
    Handed(output).let_go(output["loss"])
    assert model.weight.requires_grad
    assert not output["loss"].requires_grad


def test_nothing_is_kept_alive() -> None:
    model, batch = tiny.llama()
    output, boxes = called(model, batch)
    handed = Handed(output)
    loss = output.loss.detach()
    del output
    assert alive(boxes) == 0
    handed.let_go(loss)


def test_views_are_no_views_and_have_the_same_gradients() -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(2, 5, 4)
    plain = model(x)
    assert plain._is_view()
    output = unviewed({"logits": plain, "beside": (plain.sum(), "text")})
    assert not output["logits"]._is_view()
    assert output["logits"].data_ptr() == plain.data_ptr()
    assert output["beside"][1] == "text"
    gradients = [
        torch.autograd.grad(y.square().sum(), list(model.parameters()), retain_graph=True)
        for y in (plain, output["logits"])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert unviewed(same := {"logits": plain.detach()}) is same
