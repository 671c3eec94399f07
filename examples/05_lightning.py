"""A Lightning fit, and the one callback that makes it fit: `python examples/05_lightning.py`.

The batch of 16 rows stays the batch: memplan cuts it into micro-batches and decides what is recomputed, so that the
step fits into 32 MiB (in real life a card's size, or "auto" for the card at hand).
"""

import pydoc_data.topics

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from memplan.integrations.lightning import MemplanCallback  # +

LENGTH, BATCH, STEPS = 64, 16, 12


def rows() -> list[dict[str, torch.Tensor]]:
    """The manual that ships with Python, one token per byte."""
    tokens = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")))
    return [{"input_ids": row, "labels": row} for row in tokens[: LENGTH * BATCH * STEPS].view(-1, LENGTH)]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**shape, num_hidden_layers=6, vocab_size=256, max_position_embeddings=LENGTH)
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        callbacks=[MemplanCallback(gpu="cpu:32MiB")],  # + the one callback
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        **quiet,
    )
    trainer.fit(Model(), DataLoader(rows(), batch_size=BATCH, shuffle=True))
    print(f"{trainer.global_step} optimizer steps, last loss {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
