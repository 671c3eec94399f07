"""Where the loss lies in what a model gives back, and modules that wrap another."""

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan.errors import BadLoss, UsageError


class Scored(nn.Module):
    """Gives back what it computes in a tuple, the loss at some place in it."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.order = nn.Linear(8, 8), order

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        out = self.layer(x)
        values = out, out.square().mean(), None, out.detach().sum()
        return tuple(values[at] for at in self.order)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2, 3, 1), (1,)])
def test_the_one_differentiable_scalar_of_a_tuple_is_the_loss(order: tuple[int, ...]) -> None:
    assert memplan.predict(Scored(order), torch.ones(4, 8)).peak_bytes > 0


@pytest.mark.parametrize("order", [(0, 2), (0, 1, 1)])
def test_a_tuple_without_one_is_not_guessed_at(order: tuple[int, ...]) -> None:
    with pytest.raises(BadLoss, match=r"no scalar but of shape \(4, 8\)"):
        memplan.predict(Scored(order), torch.ones(4, 8))


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's, at its first compile
def test_a_compiled_module_is_planned_as_what_is_inside() -> None:
    model = Scored((0, 1))
    compiled = torch.compile(model)
    plain = memplan.predict(model, torch.ones(4, 8))
    assert memplan.predict(compiled, torch.ones(4, 8)) == plain
    plan = memplan.plan(compiled, "cpu:1GiB", sample=torch.ones(4, 8), micro_batch=4)
    assert plan.model == "Scored"
    with pytest.raises(UsageError, match=r"the module that torch\.compile was given"):
        memplan.apply(compiled, plan)
