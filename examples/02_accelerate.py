"""An Accelerate script, and the one line that makes it fit: `accelerate launch examples/02_accelerate.py`.

The batch of 16 rows stays the batch: memplan cuts it into micro-batches and decides what is recomputed, so that the
step fits into 32 MiB (in real life a card's size, or "auto" for the card at hand). The loss that is printed is that of
a step's last micro-batch; `accelerator.memplan.loss` is the step's.
"""

import pydoc_data.topics

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import memplan  # +

LENGTH, BATCH, STEPS = 64, 16, 12


def rows() -> list[dict[str, torch.Tensor]]:
    """The manual that ships with Python, one token per byte."""
    tokens = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")))
    return [{"input_ids": row, "labels": row} for row in tokens[: LENGTH * BATCH * STEPS].view(-1, LENGTH)]


def main() -> None:
    accelerator = Accelerator(cpu=True)
    memplan.attach(accelerator, gpu="cpu:32MiB")  # + the one line
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=6, vocab_size=256, max_position_embeddings=LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader = DataLoader(rows(), batch_size=BATCH, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    model.train()
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if accelerator.sync_gradients:
            print(f"loss {loss.item():.3f}   learning rate {schedule.get_last_lr()[0]:.1e}")


if __name__ == "__main__":
    main()
