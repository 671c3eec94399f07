"""FSDP2 on two processes, planned for one of them: `torchrun --nproc_per_node=2 examples/06_fsdp2.py`.

Each rank holds half of the weights, gradients and optimizer state. memplan counts what gathering and scattering take,
so that the step fits into 16 MiB on every rank; from a laptop, `World(shards=1024)` plans for a cluster the same way.
"""

import os
import pydoc_data.topics

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from memplan import World, autofit  # +

LENGTH, BATCH, STEPS = 64, 8, 12


def batches(rank: int) -> list[torch.Tensor]:
    """The manual that ships with Python, one token per byte; each rank has rows of its own."""
    tokens = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")))
    return list(tokens[: LENGTH * BATCH * STEPS * 2].view(2, STEPS, BATCH, LENGTH)[rank])


def main() -> None:
    init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=6, vocab_size=256, max_position_embeddings=LENGTH))
    rows = batches(rank)

    size = BATCH
    size = autofit(model, "cpu:16MiB", effective_batch=BATCH, world=World(shards=2)).plan.micro_batch  # +
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number, batch in enumerate(rows):
        for micro in batch.split(size):
            loss = model(input_ids=micro, labels=micro).loss
            (loss * len(micro) / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and number % 3 == 0:
            print(f"step {number:2d}, {size} of {BATCH} rows at a time   loss {loss.item():.3f}")
    destroy_process_group()


if __name__ == "__main__":
    main()
