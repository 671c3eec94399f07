"""A fit with the callback trains what it trains without."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from integrations.scripts import BATCH, EPOCHS, Texts, make_model, padded
from memplan import cache
from memplan.errors import UsageError
from memplan.integrations import parts
from memplan.integrations.lightning import MemplanCallback, _not_logging, _step_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning's own imports warn of
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.loggers import Logger

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning"),
]


class Module(LightningModule):
    def __init__(self, model: str, steps: int) -> None:
        super().__init__()
        self.model, self.steps = make_model(model), steps
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"longest": float(batch["labels"].shape[1])}, reduce_fx="max", on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(
    callback: MemplanCallback | None,
    rows: int = 40,
    model: str = "llama",
    own: int = 1,
    checkpointed: bool = False,
    **trainer: Any,
) -> Module:
    seed_everything(0, verbose=False)
    module = Module(model, EPOCHS * -(-rows // (BATCH * own)))
    if checkpointed:
        module.model.gradient_checkpointing_enable()
    order = torch.Generator().manual_seed(2)
    loader = DataLoader(Texts(rows), BATCH, shuffle=True, collate_fn=padded, generator=order)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "accumulate_grad_batches": own, "gradient_clip_val": 1.0}
    lightning = Trainer(callbacks=[] if callback is None else [callback], **{**quiet, **options, **trainer})
    seed_everything(3, verbose=False)
    lightning.fit(module, loader)
    return module


class Notebook(Logger):
    name, version = "notebook", 0

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append(metrics)

    @property
    def of_the_module(self) -> list[dict[str, float]]:
        return [record for record in self.records if not any(name.startswith("memplan/") for name in record)]

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """A run's arguments."""


def difference(a: Module, b: Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


class Unlabelled(Module):
    """Divides by the number of labels by hand, also where that is none."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch["labels"]
        logits = self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        counts = (labels.flatten() != -100).float()
        loss: Tensor = (each * counts).sum() / counts.sum()
        self.log("loss", loss.detach())
        return loss


def half_labelled(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows whose first token is odd have no label."""
    batch = padded(rows)
    batch["labels"][batch["input_ids"][:, 0] % 2 == 1] = -100
    return batch


def test_a_part_without_labels_teaches_nothing() -> None:
    def trained(callback: MemplanCallback | None) -> Unlabelled:
        seed_everything(0, verbose=False)
        module = Unlabelled("llama", 4)
        options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "max_epochs": 1}
        lightning = Trainer(
            callbacks=[] if callback is None else [callback], accelerator="cpu", enable_progress_bar=False, **options
        )
        lightning.fit(module, DataLoader(Texts(32), BATCH, collate_fn=half_labelled))
        return module

    callback = MemplanCallback(gpu="cpu:1GiB", micro_batch=2, strategy="huggingface", normalise="tokens")
    ours = trained(callback)
    assert callback.plan is not None
    assert callback.plan.accumulation == 4
    assert difference(trained(None), ours) <= 1e-5


@pytest.mark.parametrize(("rows", "own"), [(40, 1), (35, 1), (35, 2)])
def test_same_weights(rows: int, own: int) -> None:
    callback = MemplanCallback(gpu="cpu:1GiB", micro_batch=2, strategy="huggingface")
    written = {"log_every_n_steps": 1}
    plain_log, our_log = Notebook(), Notebook()
    plain, ours = (
        fit(None, rows, own=own, logger=plain_log, **written),
        fit(callback, rows, own=own, logger=our_log, **written),
    )
    assert callback.plan is not None
    assert callback.plan.accumulation == 4 * own
    assert difference(plain, ours) <= 1e-5
    assert ours.rates == plain.rates
    assert our_log.of_the_module == [pytest.approx(record, rel=1e-5) for record in plain_log.of_the_module]
    assert len(plain_log.of_the_module) == len(plain.rates) + EPOCHS


def test_the_plan_is_said_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    callback, notebook = MemplanCallback(gpu="cpu:1GiB", micro_batch=2, strategy="huggingface"), Notebook()
    fit(callback, 8, logger=notebook)
    assert callback.plan is not None
    assert notebook.records[0] == callback.plan.record()
    said = capsys.readouterr().err
    assert "2 x 4 accumulated = 8 per step (was 8 x 1)" in said
    assert "MemplanCallback(enabled=False)" in said


def test_the_second_step_is_measured_and_remembered(cache_folder: Path) -> None:
    callback, notebook = MemplanCallback(gpu="cpu:1GiB", micro_batch=2, strategy="huggingface"), Notebook()
    fit(callback, 32, logger=notebook)
    plan = callback.plan
    assert plan is not None
    (measured,) = (record for record in notebook.records if "memplan/peak_bytes" in record)
    assert measured == {"memplan/peak_bytes": measured["memplan/peak_bytes"], **plan.record()}
    assert measured["memplan/peak_bytes"] == pytest.approx(plan.peak_bytes, rel=0.03)
    ((run,),) = cache.all_runs().values()
    assert (run.step_s, run.peak_bytes) == (None, measured["memplan/peak_bytes"])


def test_dropout_where_the_batch_is_not_split() -> None:
    callback = MemplanCallback(gpu="cpu:1GiB", micro_batch=8, strategy="huggingface")
    plain, ours = fit(None, 35, "gpt2"), fit(callback, 35, "gpt2")
    assert callback.plan is not None
    assert callback.plan.recomputed
    assert difference(plain, ours) <= 1e-5


def test_a_module_that_transformers_checkpoints_is_planned_as_one_that_it_does_not() -> None:
    """The plan decides what is recomputed, and afterwards its blocks are checkpointed as they were."""
    callbacks = [MemplanCallback(gpu="cpu:1GiB", micro_batch=2, strategy="huggingface") for _ in range(2)]
    ours, other = fit(callbacks[0], 35, checkpointed=True), fit(callbacks[1], 35)
    plan, same = (callback.plan for callback in callbacks)
    assert plan is not None
    assert same is not None
    assert plan.peak_bytes == same.peak_bytes
    assert plan.recomputed == same.recomputed
    assert difference(ours, other) == 0
    assert difference(ours, fit(None, 35)) <= 1e-5
    assert ours.model.is_gradient_checkpointing
    assert not other.model.is_gradient_checkpointing


def test_a_wrong_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.Split, "weights", lambda self, batches: [1 / len(batches)] * len(batches))
    callback = MemplanCallback(gpu="cpu:1GiB", micro_batch=2, strategy="huggingface")
    assert difference(fit(None), fit(callback)) > 1e-3


def test_everything_as_it_was_afterwards() -> None:
    callback = MemplanCallback(gpu="cpu:1GiB", micro_batch=2, strategy="huggingface")
    module = fit(callback)
    assert "training_step" not in module.__dict__
    assert not callback._undo


def test_refusals() -> None:
    callback = MemplanCallback(gpu="cpu:1GiB", micro_batch=2)
    with pytest.raises(UsageError, match="limit_train_batches = 3 counts batches"):
        fit(callback, limit_train_batches=3)
    with pytest.raises(UsageError, match="no setting of memplan"):
        MemplanCallback(card="24GiB")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "lightning.pytorch")


class Unnumbered(Module):
    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss


class Renamed(Module):
    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss


@pytest.mark.parametrize("kind", [Module, Unnumbered, Renamed])
def test_the_number_of_a_batch_is_passed_as_lightning_passes_it(kind: type[Module]) -> None:
    module = kind("llama", 1)
    with _not_logging(module):
        assert _step_loss(module, padded([Texts(4)[at] for at in range(4)])).requires_grad
