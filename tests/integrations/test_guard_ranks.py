"""Two processes over gloo, of which one runs out of memory: both fall, neither waits, the weights are right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

RANK = Path(__file__).with_name("guarded_rank.py")
BOUND_S = 500  # for both processes, with all that they do
STEPS = 6

Ends = dict[str, Any]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[Ends]:
    """What came of every scenario, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    files = [folder / f"{rank}.json" for rank in (0, 1)]
    command = [sys.executable, str(RANK)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(file)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank, file in enumerate(files)
    ]
    try:
        said = [process.communicate(timeout=BOUND_S)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(text[-1500:] for text in said)
    return [json.loads(file.read_text()) for file in files]


def off(one: Ends, other: Ends, what: str = "weights") -> float:
    return float((torch.tensor(one[what]) - torch.tensor(other[what])).abs().max())


def test_where_nothing_happens_it_is_the_plain_run(ends: list[Ends]) -> None:
    for rank in ends:
        assert off(rank["well"], rank["plain"]) <= 1e-5  # gradients are added up in another order
        assert rank["well"]["losses"] == pytest.approx(rank["plain"]["losses"], abs=1e-5)
        assert rank["well"]["falls"] == []
    assert off(ends[0]["well"], ends[0]["plain"], "buffers") <= 1e-5
    assert off(ends[0]["well"], ends[1]["well"]) == 0
    assert off(ends[0]["well"], ends[1]["well"], "buffers") == 0


@pytest.mark.parametrize("name", ["forward", "backward", "forward, later", "backward, later", "both"])
def test_one_runs_out_and_all_fall(ends: list[Ends], name: str) -> None:
    for rank in ends:
        assert off(rank[name], rank["well"]) <= 1e-6
        assert off(rank[name], rank["well"], "buffers") <= 1e-6
        assert rank[name]["losses"] == pytest.approx(rank["well"]["losses"], abs=1e-6)
        assert rank[name]["fetched"] == STEPS
        assert rank[name]["plan"] == len(rank[name]["falls"]) == 1
    assert off(ends[0][name], ends[1][name]) == 0


@pytest.mark.parametrize("name", ["optimizer", "optimizer, later"])
def test_one_finishes_its_optimizers_step_by_itself(ends: list[Ends], name: str) -> None:
    for rank in ends:
        assert off(rank[name], rank["well"]) <= 1e-6
        assert rank[name]["plan"] == 0
    assert off(ends[0][name], ends[1][name]) == 0


def test_an_evaluation_shrinks_on_all(ends: list[Ends]) -> None:
    for rank in ends:
        assert rank["evaluation"]["asked"] == [8, 4, 2]
        assert rank["evaluation"]["plan"] == 0
        assert off(rank["evaluation"], rank["well"]) <= 1e-6


def test_an_evaluation_that_waits_for_the_others_shrinks_on_all(ends: list[Ends]) -> None:
    for rank in ends:
        assert rank["gathering evaluation"]["asked"] == [4, 2]
        assert rank["gathering evaluation"]["found"] == sum(at + 1 + at for at in range(4))
        assert off(rank["gathering evaluation"], rank["well"]) == 0
        assert rank["gathering evaluation"]["plan"] == 0


def test_what_else_breaks_an_evaluation_ends_both(ends: list[Ends]) -> None:
    others, own = (rank["broken evaluation"] for rank in ends)
    assert own["error"] == "KeyError: 'of rank 1'"
    assert others["error"].startswith("ModelFailed: rank 1 failed")


def test_one_is_close_and_all_fall_after_the_step_in_which_they_hear_of_it(ends: list[Ends]) -> None:
    for rank in ends:
        assert rank["nearly"]["used"] == [0, 0, 1, 1, 1, 1]
        assert off(rank["nearly"], rank["well"]) <= 1e-6


def test_at_the_end_of_the_ladder_both_are_as_before_the_step(ends: list[Ends]) -> None:
    others, own = (rank["the end"] for rank in ends)
    assert own["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "there is no smaller plan" in own["notes"][0]
    assert others["error"].startswith("DoesNotFit: rank 1 ran out of memory")
    assert own["off"] == others["off"] == 0


def test_another_error_ends_both(ends: list[Ends]) -> None:
    others, own = (rank["another error"] for rank in ends)
    assert own["error"] == "KeyError: 'of rank 1'"
    assert others["error"].startswith("ModelFailed: rank 1 failed")


def test_what_cannot_be_taken_back_ends_both(ends: list[Ends]) -> None:
    others, own = (rank["too late"] for rank in ends)
    assert own["error"].startswith("OutOfMemoryError")
    assert "not run again" in own["notes"][0]
    assert own["off"] == 0
    assert others["error"].startswith("ModelFailed: rank 1 failed")


def test_a_forgotten_exchange_is_an_error(ends: list[Ends]) -> None:
    for rank in ends:
        assert rank["forgotten exchange"]["error"].startswith("UsageError: call guard.exchange() before")


def test_plans_for_another_number_of_replicas_are_refused(ends: list[Ends]) -> None:
    for rank in ends:
        assert rank["another number"]["error"].startswith(
            "PlanMismatch: the plan is for 1 replicas and this is one of 2"
        )


def test_a_rank_that_says_nothing_is_not_waited_for_longer_than_asked(ends: list[Ends]) -> None:
    assert ends[0]["silent"]["error"].startswith("RuntimeError")
    assert 4 < ends[0]["silent"]["seconds"] < 30


def test_different_plans_are_refused_on_both(ends: list[Ends]) -> None:
    for rank in ends:
        assert rank["different plans"]["error"].startswith("PlanMismatch: ranks 1 have other plans than rank 0")
