"""A Lightning fit on two ranks by DistributedDataParallel: one plan for both, the weights of the fit without one."""

from pathlib import Path
from typing import Any

import pytest
import two_ranks

import memplan

RANK = Path(__file__).with_name("lightning_rank.py")
BOUND_S = 300  # nothing may hang

pytestmark = pytest.mark.slow

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks has left."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks.heard(RANK, folder, bound_s=BOUND_S)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_same_weights(ranks: Ranks, model: str) -> None:
    """The llama's batches are split, with a ragged end; the other has dropout on."""
    for rank in ranks:
        plain, planned = rank[model], rank[f"{model}-planned"]
        assert two_ranks.difference(plain, planned) <= 1e-5
        assert planned["rates"] == plain["rates"]
        assert planned["loss"] == pytest.approx(plain["loss"], rel=1e-4)


@pytest.mark.parametrize(("model", "accumulation"), [("llama", 8), ("gpt2", 1)])
def test_one_plan_for_both(ranks: Ranks, model: str, accumulation: int) -> None:
    first, second = (memplan.Plan.model_validate_json(rank[f"{model}-planned"]["plan"]) for rank in ranks)
    assert first == second
    assert first.changed
    assert first.accumulation == accumulation
    assert first.replicas == 2
    assert any("2 replicas" in said for said in first.assumptions)
