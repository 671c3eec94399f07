"""Fine-tune with transformers' Trainer inside a memory budget: the plain script and one line more.

Runs on the CPU of any machine: `python examples/03_trainer.py`. The text is the manual that ships with Python.
"""

import pydoc_data.topics
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import memplan

BUDGET, STEPS = "cpu:12MiB", 8


def rows(count: int = 200, longest: int = 128) -> list[dict[str, list[int]]]:
    """Paragraphs of unequal lengths, one token per byte."""
    text = "\n\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    paragraphs = [list(part[:longest]) for part in text.split(b"\n\n") if len(part) > 20]
    return [{"input_ids": ids, "labels": ids} for ids in paragraphs[:count]]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded to the longest row, without a loss on the padding."""
    longest = max(len(row["input_ids"]) for row in batch)
    filled = {"input_ids": 0, "labels": -100}
    made = {n: [row[n] + [fill] * (longest - len(row[n])) for row in batch] for n, fill in filled.items()}
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
    return {name: torch.tensor(values) for name, values in {**made, "attention_mask": mask}.items()}


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=256))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        max_steps=STEPS,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), data_collator=collate)
    memplan.autofit(trainer, BUDGET)  # the one line
    trainer.train()


if __name__ == "__main__":
    main()
