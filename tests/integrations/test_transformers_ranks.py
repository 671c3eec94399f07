"""A trainer on two processes over gloo: the same weights as without a plan, one plan for both, one error for both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks

RANK = Path(__file__).with_name("trainer_rank.py")
BOUND_S = 300  # nothing may hang


def run(folder: Path, kind: str, budget: str, rows: int) -> list[dict[str, Any]]:
    folder.mkdir()
    two_ranks.run(RANK, folder, kind, budget, rows, bound_s=BOUND_S)
    return [
        json.loads(file.read_text()) if file.suffix == ".json" else {"error": file.read_text()}
        for file in sorted(folder.glob("[01].*"))
    ]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one["weights"].keys() == other["weights"].keys()
    pairs = ((torch.tensor(one["weights"][n]), torch.tensor(other["weights"][n])) for n in one["weights"])
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_the_weights_are_those_of_the_run_without_a_plan(tmp_path: Path, kind: str) -> None:
    plain = run(tmp_path / "plain", kind, "none", 64)
    ours = run(tmp_path / "planned", kind, "cpu:1GiB", 64)
    assert len(plain) == len(ours) == 2
    for a, b in zip(plain, ours, strict=True):
        assert difference(a, b) <= 1e-5
        assert a["steps"] == b["steps"] == 8
        assert [step for step, *_ in a["logged"]] == [step for step, *_ in b["logged"]]
        for (_, loss, rate), (_, our_loss, our_rate) in zip(a["logged"], b["logged"], strict=True):
            assert our_loss == pytest.approx(loss, rel=1e-4)
            assert our_rate == rate
    assert difference(ours[0], ours[1]) == 0
    plans = [found["plan"] for found in ours]
    assert plans[0] == plans[1]
    assert (plans[0]["replicas"], plans[0]["micro_batch"], plans[0]["accumulation"]) == (2, 2, 4)
    assert "recompute" in plans[0]["decisions"].values()


@pytest.mark.slow
def test_rows_that_come_again_are_counted(tmp_path: Path) -> None:
    """37 rows are 40 for two ranks in micro-batches of 2, and 48 in those of 8."""
    found = run(tmp_path / "planned", "trainer", "cpu:1GiB", 37)
    said = " ".join(found[0]["plan"]["assumptions"])
    assert "fill up the last step of an epoch with 3 rows that come again; without the plan it would be 11" in said
    assert found[0]["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "budget"),
    [("unused", "cpu:24MiB"), ("used", "cpu:14MiB")],  # 14 MiB: without chunks even the smallest plan needs more
)
def test_the_loss_in_chunks_where_the_logits_would_be_copied(tmp_path: Path, kind: str, budget: str) -> None:
    """It is left out, and the plan says so; where nothing is copied, nobody reads the logits."""
    for found in run(tmp_path / "planned", kind, budget, 32):
        in_chunks = [option for option in found["plan"]["decisions"].values() if option.startswith("chunked")]
        said = " ".join(found["plan"]["assumptions"])
        assert found["uses"]["reads"] == 0
        if kind == "unused":
            assert not in_chunks
            assert "the loss is not computed in chunks" in said
            assert "make the trainer with ddp_find_unused_parameters=False" in said
        else:
            assert len(in_chunks) == 1
            assert found["uses"]["losses"] > 0
            assert "not computed in chunks" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "budget", "words"),
    [
        ("trainer", "cpu:600KiB", "DoesNotFit"),
        ("own-items", "cpu:1GiB", "BadBatch: micro_batch=2 would change the result of the 8 x 1 rows per step: avera"),
    ],
)
def test_an_error_is_everybodys(tmp_path: Path, kind: str, budget: str, words: str) -> None:
    errors = run(tmp_path / "planned", kind, budget, 64)
    assert len(errors) == 2
    assert all(found["error"].startswith(words) for found in errors)
