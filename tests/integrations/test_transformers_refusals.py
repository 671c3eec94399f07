"""What a Trainer asks for that no plan goes with: one clear error before any step is run, and the trainer as it was."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

import memplan
from integrations.trainers import arguments, collated, dataset, rows, trainer
from memplan.errors import BadBatch, DoesNotFit, UsageError
from memplan.integrations.trainer_data import rows_of
from memplan.integrations.trainer_loss import coupling
from memplan.recipe import Recipe

WHOLE = {"gpu": "cpu:100MiB", "strategy": "huggingface"}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    return lambda **changes: trainer(tmp_path, changes.pop("model", None) or tiny.llama(layers=2)[0], **changes)


def refused(made: transformers.Trainer, words: str, **asked: Any) -> None:
    """Nothing of the trainer or of its arguments is another one afterwards."""
    args, own = dict(vars(made.args)), dict(vars(made))
    with pytest.raises(UsageError, match=words):
        memplan.autofit(made, **WHOLE, **asked)
    assert vars(made.args) == args
    assert vars(made) == own


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("deepspeed", "zero2.json", "deepspeed divides weights and states by rules of its own"),
        (
            "fsdp",
            True,
            r"MemplanFSDPPlugin is\. With FSDP2, .*activation_checkpointing'\] draws other dropout",
        ),
        ("_n_gpu", 2, r"copied to 2 cards \(DataParallel\).*CUDA_VISIBLE_DEVICES=0"),
        ("use_liger_kernel", True, "use_liger_kernel changes the model when training starts"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "use_reentrant=True is asked for"),
        ("optim", "galore_adamw_layerwise", "optim=galore_adamw_layerwise steps inside the backward"),
    ],
)
def test_arguments_that_contradict_a_plan(make: Any, argument: str, value: object, words: str) -> None:
    """They are set afterwards, since what most of them ask for is not installed here."""
    made = make()
    setattr(made.args, argument, value)
    refused(made, words)


class OwnLoader(transformers.Trainer):
    """Batches as `made` has them."""

    made: dict[str, Any]

    def get_train_dataloader(self) -> DataLoader[Any]:
        sizes = {name: value(self) if callable(value) else value for name, value in self.made.items()}
        return DataLoader(self.train_dataset, collate_fn=collated, **sizes)


class ByTokens(Sampler[list[int]]):
    def __iter__(self) -> Any:
        return iter([[0, 1], [2]])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"batch_size": 8}, "asked for 8 and 9 it makes 8 and 8"),
        ({"batch_size": lambda trainer: 2 * trainer._train_batch_size}, "asked for 8 and 9 it makes 16 and 18"),
        ({"batch_size": None}, "has batch_size=None"),
        ({"batch_sampler": ByTokens()}, "ByTokens has no batch_size"),
    ],
)
def test_a_loader_that_does_not_follow_the_plan(tmp_path: Path, made: dict[str, Any], words: str) -> None:
    own = OwnLoader(tiny.llama(layers=2)[0], arguments(tmp_path), train_dataset=rows(), data_collator=collated)
    own.made = made
    refused(own, words)


def test_a_loader_of_ones_own_that_follows_the_plan(tmp_path: Path) -> None:
    own = OwnLoader(tiny.llama(layers=2)[0], arguments(tmp_path), train_dataset=rows(), data_collator=collated)
    own.made = {"batch_size": lambda trainer: trainer._train_batch_size}
    assert rows_of(own).sample.batch_size > 1
    assert own.args.per_device_train_batch_size == 8


def test_a_model_that_is_made_when_training_starts(tmp_path: Path) -> None:
    made = transformers.Trainer(
        args=arguments(tmp_path),
        model_init=lambda: tiny.llama(layers=2)[0],
        train_dataset=dataset(),
        data_collator=collated,
    )
    refused(made, "model_init makes another model when training starts. Pass the model itself")


def test_ranks_that_divide_the_model_by_a_config(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    monkeypatch.setattr(type(made.args), "world_size", 2)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_GPU)
    monkeypatch.setattr(Accelerator, "parallelism_config", object())
    refused(made, "2 ranks divide the model by MULTI_GPU")


# -- no batch to plan for ----------------------------------------------------------------------------------------------


def test_a_trainer_without_data(make: Any) -> None:
    made = make()
    made.train_dataset = None
    refused(made, "the trainer has no train_dataset")


def test_a_loader_of_ones_own_that_makes_no_batch_before_training(make: Any) -> None:
    made = make()
    made.get_train_dataloader = lambda: [collated(rows(2))]
    refused(made, "loader is a list without dataset and collate_fn")


# -- batches that stay as they are -------------------------------------------------------------------------------------


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows in an order of their own, as often as they are asked for."""

    def __iter__(self) -> Any:
        return iter(rows(16))


class MeanOfItems(nn.Module):
    """A mean over a micro-batch's labels, though transformers would have it divide by the items of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(tiny.VOCABULARY, 8)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, **_: object) -> dict[str, Tensor]:
        scores = self.words(input_ids) @ self.words.weight.T
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())}


@pytest.mark.slow
def test_a_stream_is_not_divided_otherwise(make: Any) -> None:
    made = partial(make, train_dataset=Stream(), max_steps=2)
    with pytest.raises(BadBatch, match=r"micro_batch=2 would change the result of the 8 x 1 .* the data is a stream"):
        memplan.autofit(made(), **WHOLE, micro_batch=2)
    fit = memplan.autofit(made(), **WHOLE)
    assert (fit.plan.micro_batch, fit.plan.accumulation) == (8, 1)
    assert any("the batch stays divided as it is, 8 x 1" in said for said in fit.plan.assumptions)


def test_a_mean_that_transformers_would_add_up_is_told_apart(make: Any) -> None:
    alike = [{name: ids[:8] for name, ids in row.items()} for row in rows(64) if len(row["input_ids"]) >= 8]
    made = make(model=MeanOfItems(), train_dataset=alike)
    assert "so that transformers adds those means up" in str(coupling(made, rows_of(made), Recipe()))


@pytest.mark.slow
def test_a_batch_that_is_too_large_and_not_to_be_divided_says_why(make: Any) -> None:
    made = make(dataloader_drop_last=True)
    args, own = dict(vars(made.args)), dict(vars(made))
    with pytest.raises(DoesNotFit, match="the batch stays divided as it is, 8 x 1: dataloader_drop_last"):
        memplan.autofit(made, "cpu:600KiB", strategy="huggingface")
    assert vars(made.args) == args
    assert vars(made) == own


class OwnStep(transformers.Trainer):
    """Does not divide by the number of micro-batches."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_of_ones_own_keeps_its_batch(make: Any, tmp_path: Path) -> None:
    def made() -> transformers.Trainer:
        like = make()
        return OwnStep(like.model, like.args, like.data_collator, like.train_dataset)

    with pytest.raises(BadBatch, match="OwnStep has a training_step of its own"):
        memplan.autofit(made(), **WHOLE, micro_batch=2)
    fit = memplan.autofit(made(), **WHOLE)
    assert (fit.plan.micro_batch, fit.plan.accumulation) == (8, 1)


def test_a_collator_that_makes_pairs_of_rows(make: Any) -> None:
    made = make()
    collate = made.data_collator
    made.data_collator = lambda rows: collate([*rows, *rows])
    refused(made, "makes 4 rows of 2, as those of preference pairs")
