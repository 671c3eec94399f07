"""Trainers over tiny models and rows of unequal lengths, and what a run of one leaves behind."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import tiny
import torch
import transformers
import trl
from guarding import Fault
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

ROWS, BATCH = 37, 8  # a ragged tail: the last step has 5 rows


def lengths(count: int = ROWS, longest: int = 24) -> list[int]:
    return [4 + (7 * at * at + 3 * at) % (longest - 3) for at in range(count)]


def rows(count: int = ROWS, longest: int = 24) -> list[dict[str, list[int]]]:
    """Token ids of unequal lengths, their own labels."""
    chance = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, tiny.VOCABULARY, (n,), generator=chance).tolist() for n in lengths(count, longest)]
    return [{"input_ids": row, "labels": list(row)} for row in ids]


def dataset(count: int = ROWS, longest: int = 24) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows(count, longest))


def collated(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded to the longest row, with a mask."""
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(row: list[int], value: int) -> list[int]:
        return row + [value] * (longest - len(row))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in batch]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in batch]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in batch]),
    }


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each number below the vocabulary's size, made on the spot."""
    words = {"<pad>": 0, "<eos>": 1, **{str(n): n for n in range(2, tiny.VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def arguments(folder: Path, kind: type = transformers.TrainingArguments, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return kind(**(values | changes))


def trainer(folder: Path, model: nn.Module | None = None, **changes: Any) -> transformers.Trainer:
    """Full fine-tuning of a Llama, without dropout, unless another model is given."""
    model = tiny.llama(layers=3)[0] if model is None else model
    data = changes.pop("train_dataset", None) or dataset()
    passed = {n: changes.pop(n) for n in ("optimizers", "compute_loss_func", "eval_dataset") if n in changes}
    kind = changes.pop("kind", transformers.Trainer)
    made: transformers.Trainer = kind(
        model, arguments(folder, **changes), train_dataset=data, data_collator=collated, **passed
    )
    return made


def sft_trainer(folder: Path, lora: bool = False, **changes: Any) -> trl.SFTTrainer:
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    data = changes.pop("train_dataset", None) or dataset()
    return trl.SFTTrainer(
        changes.pop("model", None) or tiny.llama(layers=3)[0],
        arguments(folder, trl.SFTConfig, **({"max_length": 24} | changes)),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=adapters if lora else None,
    )


class Begins(transformers.TrainerCallback):
    """Faults are counted from the first step on, and not in what is planned before."""

    def __init__(self, *faults: Fault) -> None:
        self.faults, self.stack = faults, ExitStack()

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        for fault in self.faults:
            self.stack.enter_context(fault.on(model))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.stack.close()


@dataclass(frozen=True)
class Run:
    """What a training run leaves behind."""

    weights: dict[str, Tensor]
    steps: int
    logged: list[tuple[int, float, float]]  # step, loss, learning rate

    @classmethod
    def of(cls, trainer: Any) -> "Run":
        trainer.train()
        history = [r for r in trainer.state.log_history if "loss" in r]
        return cls(
            {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
            trainer.state.global_step,
            [(r["step"], r["loss"], r["learning_rate"]) for r in history],
        )

    def distance(self, other: "Run") -> float:
        """The largest difference of any weight."""
        assert self.weights.keys() == other.weights.keys()
        return max(float((self.weights[n] - other.weights[n]).abs().max()) for n in self.weights)


def run(make: Callable[[], Any], planned: Callable[[Any], object] = lambda _: None) -> Run:
    """A run from the same seed each time; `planned` gets the trainer before it trains."""
    torch.manual_seed(0)
    made = make()
    planned(made)
    return Run.of(made)
