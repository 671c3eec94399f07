"""A trainer on two ranks, of which one runs out of memory: both fall, neither waits, the weights are right."""

from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks

pytestmark = pytest.mark.slow

RANK = Path(__file__).with_name("guarded_trainer_rank.py")
BOUND_S = 500  # nothing may hang
FALLS = ("forward", "backward", "both", "again")

Ran = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Ran]:
    """What came of every scenario, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks.heard(RANK, folder, bound_s=BOUND_S)


def off(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float((torch.tensor(one["weights"]) - torch.tensor(other["weights"])).abs().max())


def test_where_nothing_happens_it_is_the_run_of_replicas_that_are_left_to_themselves(ranks: list[Ran]) -> None:
    for rank in ranks:
        assert off(rank["well"], rank["left alone"]) <= 1e-6  # gradients are added up in another order
        assert rank["well"]["changed"] == 0
        assert rank["well"]["divided"] == [2, 4]
        assert not any(rank["well"]["by themselves"])
    assert off(ranks[0]["well"], ranks[1]["well"]) == 0
    assert off(ranks[0]["well"], ranks[0]["well afterwards"]) == 0


def test_replicas_whose_exchange_takes_too_long_are_left_to_themselves(ranks: list[Ran]) -> None:
    for rank in ranks:
        alone = rank["left alone"]["by themselves"]
        assert alone == [False, *[True] * (len(alone) - 1)]
    assert off(ranks[0]["left alone"], ranks[1]["left alone"]) == 0


@pytest.mark.parametrize("name", FALLS)
def test_one_runs_out_and_all_take_the_step_again_by_a_smaller_plan(ranks: list[Ran], name: str) -> None:
    for rank in ranks:
        assert off(rank[name], rank["well"]) == 0
        assert rank[name]["logged"] == rank["well"]["logged"]
        assert rank[name]["changed"] > 0
        assert any("its plan falls from" in line for line in rank[name]["said"])
    assert ranks[0][name]["changed"] == ranks[1][name]["changed"]
    assert off(ranks[0][name], ranks[1][name]) == 0


def test_a_step_that_was_taken_again_does_not_tell_how_long_the_exchange_takes(ranks: list[Ran]) -> None:
    for rank in ranks:
        assert rank["later decided"]["by themselves"] == [False, False, True, True]
    assert off(ranks[0]["later decided"], ranks[1]["later decided"]) == 0


def test_a_trainer_trains_again_after_a_fall(ranks: list[Ran]) -> None:
    assert ranks[0]["twice"]["changed"] == ranks[1]["twice"]["changed"] > 0
    assert off(ranks[0]["twice"], ranks[1]["twice"]) == 0


def test_with_one_micro_batch_a_step_it_is_the_same(ranks: list[Ran]) -> None:
    for rank in ranks:
        assert rank["whole"]["divided"] == [8, 1]
        assert rank["whole, backward"]["changed"] > 0
        assert off(rank["whole, backward"], rank["whole"]) == 0
    assert off(ranks[0]["whole"], ranks[1]["whole"]) == 0


def test_an_evaluation_that_one_cannot_hold_is_taken_again_by_all(ranks: list[Ran]) -> None:
    """In its second epoch's second batch of four; what each has found is gathered behind every batch."""
    for rank in ranks:
        plain, faulty = rank["evaluated"], rank["evaluated, out of memory"]
        assert plain["rows"] == [4] * 6
        assert faulty["rows"] == [4] * 5 + [2] * 6
        assert off(faulty, plain) == 0
        assert faulty["logged"] == plain["logged"]
        assert faulty["changed"] == 0
        assert faulty["put back"]


def test_ranks_that_wait_for_each_other_in_their_forwards_are_left_alone(ranks: list[Ran]) -> None:
    for rank in ranks:
        assert rank["sft"]["steps"] == 2
        assert any("since SFTTrainer has a" in line for line in rank["sft"]["said"])


def test_where_no_plan_is_smaller_all_end_as_they_were_before_the_step(ranks: list[Ran]) -> None:
    others, own = (rank["the end"] for rank in ranks)
    assert own["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert any("there is no smaller plan" in note for note in own["notes"])
    assert others["error"].startswith("DoesNotFit: rank 1 ran out of memory")
    assert own["gradients"] == others["gradients"] == 0
    assert off(own, others) == 0
