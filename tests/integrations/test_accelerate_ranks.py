"""Two processes over gloo: the same weights as without a plan, one plan for both, one error for both."""

import json
from pathlib import Path
from typing import Any

import pytest
import two_ranks

import memplan
from integrations import scripts

RANKS = Path(__file__).with_name("ranks.py")
BOUND_S = 240  # nothing may hang


def run(
    folder: Path, plan: str, rows: int, models: tuple[str, str] = ("llama", "llama"), switches: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """What each rank has left; `switches` are those of Accelerate's loaders."""
    folder.mkdir()
    two_ranks.run(RANKS, folder, plan, rows, *models, *switches, bound_s=BOUND_S)
    return [
        json.loads(file.read_text()) if file.suffix == ".json" else {"error": file.read_text()}
        for file in sorted(folder.glob("*.*"))
    ]


@pytest.mark.slow
def test_ddp(tmp_path: Path) -> None:
    """37 rows: at the end of an epoch Accelerate repeats some, by the script's batch and not by the micro-batch."""
    plain = run(tmp_path / "plain", "none", 37)
    ours = run(tmp_path / "planned", scripts.plan_file("llama", 2, 8, replicas=2), 37)
    for a, b in zip(plain, ours, strict=True):
        assert two_ranks.difference(a, b) <= 1e-5
        assert a["rates"] == b["rates"]
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-5)
    assert two_ranks.difference(ours[0], ours[1]) == 0
    assert ours[0]["plan"] == ours[1]["plan"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switches", "micro_batch", "batch"),
    [(("split_batches",), 2, 4), (("dispatch_batches",), 8, 8), (("split_batches", "dispatch_batches"), 4, 4)],
    ids=["split", "dispatched", "both"],
)
def test_batches_that_are_dealt_out_otherwise(
    tmp_path: Path, switches: tuple[str, ...], micro_batch: int, batch: int
) -> None:
    """What the ranks share is divided by the rank's own part; what the first one reads for all stays whole."""
    plan = scripts.plan_file("llama", micro_batch, batch, "huggingface", replicas=2)
    plain = run(tmp_path / "plain", "none", 40, switches=switches)
    ours = run(tmp_path / "planned", plan, 40, switches=switches)
    assert len(plain) == len(ours) == 2
    for a, b in zip(plain, ours, strict=True):
        assert two_ranks.difference(a, b) <= 1e-5
        assert a["rates"] == b["rates"]
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-5)
    assert two_ranks.difference(ours[0], ours[1]) == 0
    planned = memplan.Plan.model_validate_json(ours[0]["plan"])
    assert (planned.micro_batch, planned.effective_batch) == (micro_batch, batch)
    assert len(planned.recomputed) == 4


@pytest.mark.slow
def test_one_plan_is_made_for_all(tmp_path: Path) -> None:
    ours = run(tmp_path / "planned", "cpu:1GiB", 64)
    assert ours[0]["plan"] == ours[1]["plan"]
    assert "2 replicas" in ours[0]["plan"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "models", "switches", "words"),
    [
        ("cpu:600KiB", ("llama", "llama"), (), "DoesNotFit"),
        ("cpu:1GiB", ("llama", "gpt2"), (), "PlanMismatch: ranks 1 have another model than rank 0"),
        (
            "cpu:1GiB",
            ("llama", "llama"),
            ("dispatch_batches",),
            "UsageError: micro_batch=2 would split a batch of 8: its loss is not a mean over samples or tokens, or "
            "batch norm couples them, so that parts of a batch have other gradients than the whole; or the first "
            "process reads for all (dispatch_batches)",
        ),
    ],
)
def test_an_error_is_everybodys(
    tmp_path: Path, plan: str, models: tuple[str, str], switches: tuple[str, ...], words: str
) -> None:
    errors = run(tmp_path / "planned", plan, 64, models, switches)
    assert len(errors) == 2
    assert all(found["error"].startswith(words) for found in errors)
