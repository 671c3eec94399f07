"""Cards under which a step runs the same operators: what a backend notes, against traces of those cards themselves."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from memplan.gpus import all_gpus
from memplan.kernels import capability_of
from memplan.kernels.cuda import CudaBackend
from memplan.kernels.cuda_attention import Capability
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import CATEGORIES, Trace

EVERY = {capability_of(card) for card in all_gpus()}
VOLTA = {(7, 0), (7, 5)}
CUDNN_FIRST = {(9, 0), (10, 0)}


class Attention(nn.Module):
    """Heads of 80, with a mask of numbers: torch's memory-efficient kernel, whose tiles depend on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(80, 240)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.linear(x).unflatten(-1, (3, 80)).unsqueeze(1).unbind(-2)
        mask = torch.zeros(len(x), 1, x.shape[1], x.shape[1], dtype=x.dtype)
        return nn.functional.scaled_dot_product_attention(query, key, value, mask).square().mean()


def half_llama() -> tuple[nn.Module, object]:
    model, batch = tiny.llama(layers=2, use_cache=False)
    return model.to(torch.bfloat16), batch


def half_attention() -> tuple[nn.Module, object]:
    return Attention().half(), torch.zeros(2, 192, 80, dtype=torch.float16)


def traced(model: nn.Module, batch: object, capability: Capability, alike: set[Capability]) -> Trace:
    return Recorder(model, Recipe(), CudaBackend(capability, alike)).record(Sample.of(batch))


def same(one: Trace, other: Trace) -> bool:
    """But for what libraries keep."""
    for field in fields(Trace):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "storage_bytes":
            rows = one.storage_category != CATEGORIES.index("libraries")
            a, b = a[rows], b[rows]
        if not (np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b):
            return False
    return True


@pytest.mark.parametrize(
    ("make", "own", "alike"),
    [
        (half_llama, (8, 6), EVERY - VOLTA - CUDNN_FIRST),
        (half_llama, (9, 0), CUDNN_FIRST),
        (half_attention, (8, 6), {(8, 6), (8, 9)}),
    ],
)
def test_a_trace_holds_for_the_cards_that_are_left(
    make: Callable[[], tuple[nn.Module, object]], own: Capability, alike: set[Capability]
) -> None:
    model, batch = make()
    left = set(EVERY)
    mine = traced(model, batch, own, left)
    assert left == alike
    for capability in left - {own}:
        assert same(mine, traced(model, batch, capability, set())), capability
