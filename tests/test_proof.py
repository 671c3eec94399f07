"""A lever that proves itself: what is right passes, what changes the mathematics is found, nothing is left behind."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import tiny
import torch
from imprint import Imprint
from torch import Tensor, nn

from memplan.levers.undo import set_attributes
from memplan.proof import difference
from memplan.recipe import Recipe
from memplan.samples import Sample


def loss_from(model: nn.Module, labels: Tensor, hidden: Tensor, shift: int) -> Tensor:
    """Cross-entropy over chunks of rows, of the labels `shift` places further."""
    rows = hidden[:, : hidden.shape[1] - shift].flatten(0, 1)
    wanted = labels[:, shift:].flatten()
    parts = [
        nn.functional.cross_entropy(model.lm_head(chunk).float(), some, reduction="sum")
        for chunk, some in zip(rows.split(7), wanted.split(7), strict=True)
    ]
    return torch.stack(parts).sum() / len(wanted)


@contextmanager
def head(model: nn.Module, shift: int) -> Iterator[None]:
    def forward(input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_from(model, labels, model.model(input_ids).last_hidden_state, shift)}

    undo = set_attributes(model, {"forward": forward})
    try:
        yield
    finally:
        undo()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    model.lm_head.weight.requires_grad_(False)
    try:
        yield
    finally:
        model.lm_head.weight.requires_grad_(True)


RECIPES = [Recipe(), Recipe(autocast=torch.bfloat16)]


@pytest.mark.parametrize("recipe", RECIPES, ids=["float32", "autocast"])
def test_a_head_that_is_right_passes_and_leaves_the_model_alone(recipe: Recipe) -> None:
    model, batch = tiny.llama(layers=1, use_cache=False)
    before = Imprint(model)
    assert difference(model, recipe, Sample.of(batch), lambda: head(model, 1)) is None
    assert before.differences() == []


@pytest.mark.parametrize("recipe", RECIPES, ids=["float32", "autocast"])
@pytest.mark.parametrize("shift", [0, 2])
def test_labels_that_are_shifted_wrongly_are_found(recipe: Recipe, shift: int) -> None:
    model, batch = tiny.llama(layers=1, use_cache=False)
    before = Imprint(model)
    found = difference(model, recipe, Sample.of(batch), lambda: head(model, shift))
    assert found is not None
    assert "differs by" in found
    assert before.differences() == []


def test_a_gradient_that_is_missing_is_found() -> None:
    model, batch = tiny.llama(layers=1, use_cache=False)
    found = difference(model, Recipe(), Sample.of(batch), lambda: frozen(model))
    assert found == "1 gradients are in one of the two only"


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.resnet, tiny.plain])
def test_dropout_and_running_statistics_are_no_difference(make: object) -> None:
    model, batch = make()
    before = Imprint(model)
    assert difference(model, Recipe(), Sample.of(batch), nullcontext) is None
    assert before.differences() == []
