from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor, nn

from memplan.integrations.parts import LastOutput
from memplan.levers import loss_head


@dataclass(slots=True)
class Output:
    logits: Tensor


class Head(nn.Module):
    """With a weight that is in the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Output:
        return Output(self.layers(x))


def gradients(through: Callable[[LastOutput, Tensor], Tensor]) -> list[float]:
    """Of a part without labels, whose loss is a mean by hand."""
    model, labels = Head(), torch.zeros(2)
    last = LastOutput(model)
    each = model(torch.ones(2, 3)).logits.squeeze(1)
    loss = (each * labels).sum() / labels.sum() + model.scale
    through(last, loss).backward()
    last.undo()
    assert not model._forward_hooks
    return [float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None]


def test_a_part_without_labels_has_gradients_of_zeros_for_every_weight() -> None:
    assert gradients(lambda last, loss: last.nothing_to_learn(loss)) == [0.0] * 5
    by_the_loss = gradients(lambda _, loss: loss.nan_to_num() * 0.0)
    assert len(by_the_loss) == 5
    assert any(value != value for value in by_the_loss)  # what it is for


@pytest.mark.filterwarnings("ignore::memplan.errors.PlanNotFollowed")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_logits_that_are_not_there_send_back_zeros_too(reduction: str) -> None:
    """Of a loss in chunks, or of one that has them computed."""
    model, batch = tiny.llama(layers=1)
    labels = torch.full_like(batch["labels"], -100).flatten()
    undo = loss_head.install(model.lm_head, "chunked-5")
    last = LastOutput(model)
    logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels, reduction=reduction).sum() / (labels != -100).sum()
    last.nothing_to_learn(loss).backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    undo()


def test_where_the_output_is_a_loss_that_one_is_taken() -> None:
    model = nn.Linear(3, 1)
    model.register_forward_hook(lambda *given: given[-1].mean())
    last = LastOutput(model)
    last.nothing_to_learn(model(torch.ones(2, 3))).backward()
    assert model.weight.grad is not None
    assert not model.weight.grad.any()
