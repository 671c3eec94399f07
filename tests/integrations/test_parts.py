import torch
from torch import nn

from memplan.integrations.parts import LastOutput


def test_a_part_without_labels_has_gradients_of_zeros_through_all_of_the_model() -> None:
    """Also where its loss, a mean by hand, has gradients that are no numbers."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    last, labels = LastOutput(model), torch.zeros(2)
    loss = (model(torch.ones(2, 3)).squeeze(1) * labels).sum() / labels.sum()
    last.nothing_to_learn(loss).backward(retain_graph=True)
    assert [float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None] == [0.0] * 4
    (loss.nan_to_num() * 0.0).backward()
    assert all(p.grad.isnan().all() for p in model.parameters() if p.grad is not None)  # as the loss itself has them
    last.undo()
    assert not model._forward_hooks


def test_where_the_output_is_a_loss_that_one_is_taken() -> None:
    model = nn.Linear(3, 1)
    last = LastOutput(model)
    model.register_forward_hook(lambda *given: given[-1].mean())
    loss = model(torch.ones(2, 3))
    last.forget()
    last.nothing_to_learn(loss).backward()
    assert model.weight.grad is not None
    assert not model.weight.grad.any()
