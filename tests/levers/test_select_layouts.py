"""Blocks whose saved tensors are reshaped, or share a storage: what a dispatch mode shows differently."""

from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from imprint import Imprint
from selecting import captured_of, everything, point
from test_other_models import MODELS
from test_recompute import differences, run

from memplan import levers
from memplan.graph import BlockGraph

MADE: dict[str, Callable[[], tiny.Made]] = {
    **MODELS,
    "llama, eager": partial(tiny.llama, use_cache=False, attn_implementation="eager"),
    "llama, attention dropout": partial(tiny.llama, use_cache=False, attention_dropout=0.1),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("choose", [everything, lambda graph: point(graph, 0)], ids=["everything", "first"])
def test_a_selection_is_followed_in_every_step(name: str, choose: Callable[[BlockGraph], tuple[int, ...]]) -> None:
    """PlanNotFollowed would be an error here."""
    wanted = run(*MADE[name]())
    model, batch = MADE[name]()
    graphs = {path: captured.graph for path, captured in captured_of(model, batch).items()}
    dropped = {path: tuple(graph.values[v].name for v in choose(graph)) for path, graph in graphs.items()}
    model.zero_grad()
    before = Imprint(model)
    with levers.decided(model, {path: path for path in dropped}, dropped):
        for _ in range(3):
            model.zero_grad()
            assert differences(run(model, batch), wanted) == []
    model.zero_grad()
    torch.set_rng_state(torch.from_numpy(before.random[0]))
    assert before.differences() == []
