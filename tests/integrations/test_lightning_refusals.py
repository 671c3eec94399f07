"""What a Lightning fit asks for that no plan goes with: one clear error before any step, and everything as it was."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from integrations import scripts
from integrations.scripts import BATCH, Texts, make_model, padded
from memplan.errors import DoesNotFit, PlanMismatch, UsageError
from memplan.integrations.lightning import MemplanCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning's own imports warn of
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import FSDPStrategy
    from lightning.pytorch.utilities import CombinedLoader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "lightning.pytorch")


class Module(LightningModule):
    """Notes the batches that it trains on, and may fail at one of them."""

    def __init__(self, by_hand: bool = False, fails_at: int | None = None) -> None:
        super().__init__()
        self.model, self.fails_at = make_model("llama"), fails_at
        self.automatic_optimization = not by_hand
        self.rows: list[int] = []

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.rows.append(len(batch["labels"]))
        if batch_idx == self.fails_at:
            raise KeyError("of the module itself")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def texts(**options: Any) -> DataLoader[Any]:
    return DataLoader(Texts(16), **({"batch_size": BATCH, "collate_fn": padded} | options))


def trainer(callback: MemplanCallback, **options: Any) -> Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
        False,
    )
    return Trainer(callbacks=[callback], max_epochs=1, accelerator="cpu", **quiet, **options)


def state_of(module: Module) -> list[dict[str, object]]:
    """What says how each of its modules runs, but for what Lightning itself sets on the outermost."""
    return [{**part.__dict__} for part in module.model.modules()]


def refused(
    kind: type[Exception],
    words: str,
    *,
    module: Module | None = None,
    loader: Any = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """No batch is trained on, the module and the trainer run afterwards as before."""
    module = module or Module()
    callback = MemplanCallback(**({"gpu": "cpu:1GiB", "strategy": "huggingface"} | (settings or {})))
    lightning, before = trainer(callback, **options), state_of(module)
    with pytest.raises(kind, match=words):
        lightning.fit(module, texts() if loader is None else loader)
    assert callback.plan is None
    assert module.rows == []
    assert state_of(module) == before
    assert not {"training_step", "log", "log_dict"} & module.__dict__.keys()
    assert lightning.accumulate_grad_batches == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_check_interval": 2}, "val_check_interval = 2 counts batches.* such as 0.25"),
        ({"overfit_batches": 1}, "limit_train_batches = 1 counts batches"),
        ({"fast_dev_run": 1}, "fast_dev_run counts batches"),
        ({"limit_train_batches": 0.3}, "limit_train_batches = 0.3 of 2 batches is no whole number of them"),
        ({"overfit_batches": 0.3}, "0.3 of 2 batches is no whole number of them"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs makes new loaders"),
    ],
)
def test_numbers_of_batches(options: dict[str, Any], words: str) -> None:
    refused(UsageError, words, settings={"micro_batch": 2}, **options)


def test_batches_that_change_during_the_fit() -> None:
    callback = MemplanCallback(gpu="cpu:1GiB", micro_batch=2)
    lightning = trainer(callback)
    lightning.callbacks.append(GradientAccumulationScheduler({0: 1, 1: 2}))
    with pytest.raises(UsageError, match="a GradientAccumulationScheduler changes the batch of a step"):
        lightning.fit(Module(), texts())


class Counting(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches == 2
        return super().configure_optimizers()


class EveryOther(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 2}]


def test_a_schedule_that_counts_batches() -> None:
    refused(UsageError, "frequency that counts batches", module=EveryOther(), settings={"micro_batch": 2})


def twice(rows: list[Any]) -> Any:
    return padded([*rows, *rows])


def test_a_collator_that_makes_more_rows() -> None:
    refused(UsageError, "the collator makes 16 rows of 8", loader=DataLoader(Texts(16), 8, collate_fn=twice))


def test_a_loader_that_is_set_up_already() -> None:
    divided = {"micro_batch": 2}
    refused(UsageError, r"estimated_stepping_batches in configure_optimizers does", module=Counting(), settings=divided)


@pytest.mark.slow
def test_what_only_divided_batches_do_not_go_with() -> None:
    module, callback = Counting(), MemplanCallback(gpu="cpu:1GiB")
    trainer(callback, reload_dataloaders_every_n_epochs=1, val_check_interval=0.3).fit(module, texts())
    assert callback.plan is not None
    assert module.rows == [BATCH] * 2


class Saving(Module):
    """Saves after so many batches, and fails then."""

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__()
        self.folder, self.at = folder, at

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.rows) == self.at:
            self.trainer.save_checkpoint(self.folder / "half.ckpt")


@pytest.mark.filterwarnings("ignore")  # Lightning's, of resuming
@pytest.mark.parametrize(("at", "is_whole"), [(3, False), (8, True)])
def test_a_checkpoint_from_the_middle_of_an_epoch(tmp_path: Path, at: int, is_whole: bool) -> None:
    divided = {"gpu": "cpu:1GiB", "strategy": "huggingface", "micro_batch": 2}
    lightning = trainer(MemplanCallback(**divided))
    lightning.fit(Saving(tmp_path, at), texts())
    if is_whole:
        lightning.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer(MemplanCallback(**divided))
    again.fit_loop.max_epochs = 2
    module = Module()
    if is_whole:
        again.fit(module, texts(), ckpt_path=tmp_path / "half.ckpt")
        assert module.rows == [2] * 8
    else:
        with pytest.raises(UsageError, match="saved after 3 batches of an epoch"):
            again.fit(module, texts(), ckpt_path=tmp_path / "half.ckpt")


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (Texts(20)[at] for at in range(20))


def test_rows_of_a_stream_that_make_no_whole_batch() -> None:
    module, callback = Module(), MemplanCallback(gpu="cpu:1GiB", strategy="huggingface", micro_batch=2)
    trainer(callback).fit(module, DataLoader(Rows(), batch_size=BATCH, collate_fn=padded, drop_last=True))
    assert callback.plan is not None
    assert module.rows == [2] * (20 // BATCH * BATCH // 2)


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))

    def training_step(self, batch: Any) -> Tensor:
        loss: Tensor = self.layers(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_inputs_of_the_precision_that_lightning_makes_of_them(precision: Any) -> None:
    callback = MemplanCallback(gpu="cpu:1GiB")
    rows = TensorDataset(torch.ones(8, 4))
    trainer(callback, precision=precision).fit(Regression(), DataLoader(rows, batch_size=4))
    assert callback.plan is not None


def test_a_module_that_optimizes_by_hand() -> None:
    refused(UsageError, r"automatic_optimization=False.*memplan.autofit\(module", module=Module(by_hand=True))


def test_several_devices_by_another_strategy() -> None:
    """Told before the trainer is asked for anything else."""
    fsdp = SimpleNamespace(world_size=2, strategy=FSDPStrategy())
    with pytest.raises(UsageError, match=r"this fit has 2 by a FSDPStrategy\. Use memplan\.attach with Accelerate"):
        MemplanCallback(gpu="cpu:1GiB").on_fit_start(fsdp, Module())  # type: ignore[arg-type]


class Once(IterableDataset[dict[str, list[int]]]):
    """A stream that can be read once."""

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return self

    def __next__(self) -> dict[str, list[int]]:
        raise AssertionError("nothing of it is used up")


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (lambda: CombinedLoader([texts(), texts()]), "one training DataLoader; this fit has a CombinedLoader"),
        (lambda: [padded([Texts(8)[at] for at in range(8)])], "one training DataLoader; this fit has a list"),
        (lambda: texts(batch_size=None, collate_fn=None), "batch_size=None: its data set makes the batches"),
        (lambda: DataLoader(Once(), BATCH, collate_fn=padded), "a stream that can be read once"),
    ],
    ids=["several", "none", "no-batches", "once"],
)
def test_loaders_that_cannot_be_cut(loader: Any, words: str) -> None:
    refused(UsageError, words, loader=loader())


@pytest.mark.slow
def test_no_room() -> None:
    refused(DoesNotFit, "does not fit", settings={"gpu": "cpu:600KiB"})


def test_a_plan_for_another_batch() -> None:
    refused(
        PlanMismatch,
        "16 samples per optimizer step, the script has 8",
        settings={"plan": scripts.plan_file("llama", 2, 16)},
    )


class Contrastive(Module):
    """Each row is told from the others of its batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = self.model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state.mean(1)
        return torch.nn.functional.cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)))


def test_a_loss_over_the_batch_cannot_be_made_to_split() -> None:
    words = "micro_batch=2 would split a batch of 8: its loss is not a mean"
    refused(UsageError, words, module=Contrastive(), settings={"micro_batch": 2})


@pytest.mark.slow
def test_a_loss_over_the_batch_is_not_split() -> None:
    callback, module = MemplanCallback(gpu="cpu:1GiB", strategy="huggingface"), Contrastive()
    trainer(callback).fit(module, texts())
    assert callback.plan is not None
    assert (callback.plan.micro_batch, callback.plan.accumulation) == (BATCH, 1)
    assert module.rows == [8, 8]


@pytest.mark.slow
def test_a_fit_that_fails_leaves_everything_as_it_was() -> None:
    callback, module = MemplanCallback(gpu="cpu:1GiB", strategy="huggingface", micro_batch=2), Module(fails_at=5)
    lightning, loader, before = trainer(callback), texts(), state_of(module)
    with pytest.raises(KeyError, match="of the module itself"):
        lightning.fit(module, loader)
    assert callback.plan is not None
    assert callback.plan.recomputed
    assert module.rows == [2] * 6
    assert state_of(module) == before
    assert "training_step" not in module.__dict__
    assert lightning.accumulate_grad_batches == 1
    assert lightning.fit_loop._data_source.instance is loader


def test_switched_off() -> None:
    callback, module = MemplanCallback(gpu="cpu:1GiB", enabled=False), Module()
    trainer(callback).fit(module, texts())
    assert callback.plan is None
    assert module.rows == [8, 8]
