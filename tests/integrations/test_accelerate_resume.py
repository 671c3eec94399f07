"""Runs that are saved and gone on with, under the same plan, another one, or none."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from integrations import scripts
from integrations.scripts import BATCH, Texts, fresh_accelerate, make_model, padded
from memplan.errors import UsageError
from memplan.integrations.accelerate import attach

pytestmark = pytest.mark.slow


def run(plan: str | None, folder: Path | None, save_at: int | None) -> list[Tensor]:
    """One epoch of 5 steps over 37 rows. Saves and stops after so many steps, or goes on from a folder."""
    with fresh_accelerate():
        set_seed(0)
        accelerator = Accelerator(cpu=True)
        if plan is not None:
            attach(accelerator, plan=plan)
        net = make_model("llama")
        optimizer = torch.optim.AdamW(net.parameters())
        loader = DataLoader(
            Texts(37), BATCH, collate_fn=padded, shuffle=True, generator=torch.Generator().manual_seed(2)
        )
        net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        batches, at, steps = loader, 0, 0
        if folder is not None and save_at is None:
            accelerator.load_state(folder)
            at = int((folder / "batches.txt").read_text())
            batches = accelerator.skip_first_batches(loader, at)
        for batch in batches:
            accelerator.backward(net(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            at, steps = at + 1, steps + accelerator.sync_gradients
            if steps == save_at and folder is not None:
                accelerator.save_state(folder)
                (folder / "batches.txt").write_text(str(at))
                break
        return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 2)])
def test_going_on_under_a_plan(tmp_path: Path, before: int, after: int) -> None:
    plans = {size: scripts.plan_file("llama", size, BATCH) for size in (before, after)}
    run(plans[before], tmp_path, save_at=3)
    resumed = run(plans[after], tmp_path, save_at=None)
    whole = run(None, None, None)
    assert max(float((a - b).abs().max()) for a, b in zip(resumed, whole, strict=True)) <= 1e-5


def test_a_checkpoint_from_before_memplan(tmp_path: Path) -> None:
    """It has counted the script's own batches."""
    run(None, tmp_path, save_at=3)
    whole = run(None, None, None)
    resumed = run(scripts.plan_file("llama", 2, BATCH), tmp_path, save_at=None)
    assert max(float((a - b).abs().max()) for a, b in zip(resumed, whole, strict=True)) <= 1e-5


def test_batches_that_are_counted_otherwise(tmp_path: Path) -> None:
    """As scripts do that go on twice."""
    plan = scripts.plan_file("llama", 2, BATCH)
    run(plan, tmp_path, save_at=3)
    (tmp_path / "batches.txt").write_text("4")  # steps would be 3, batches 12
    with pytest.raises(UsageError, match=r"had taken 3 steps.*: skip 3 batches of 8 samples.*, or 12 of 2"):
        run(plan, tmp_path, save_at=None)


@pytest.mark.parametrize("before", [2, 4])
def test_batches_that_a_script_works_out_of_its_steps(tmp_path: Path, before: int) -> None:
    run(scripts.plan_file("llama", before, BATCH), tmp_path, save_at=3)
    (tmp_path / "batches.txt").write_text("3")  # the script's own
    resumed = run(scripts.plan_file("llama", 2, BATCH), tmp_path, save_at=None)
    whole = run(None, None, None)
    assert max(float((a - b).abs().max()) for a, b in zip(resumed, whole, strict=True)) <= 1e-5


def test_what_was_skipped_counts_when_it_is_saved_again(tmp_path: Path) -> None:
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        attach(accelerator, plan=scripts.plan_file("llama", 2, BATCH))
        net = make_model("llama")
        parts = net, torch.optim.AdamW(net.parameters()), DataLoader(Texts(37), BATCH, collate_fn=padded)
        net, optimizer, loader = accelerator.prepare(*parts)
        saved = []
        for batch in accelerator.skip_first_batches(loader, 2):
            accelerator.backward(net(**batch).loss)
            optimizer.step()
            if accelerator.sync_gradients:
                accelerator.save_state(tmp_path)
                saved.append((tmp_path / "memplan_steps.txt").read_text())
        assert saved == ["3\n", "4\n", "5\n"]
