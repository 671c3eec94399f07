"""Run by two processes (`torch.distributed.run`): a step under FSDP2, its peak measured on each rank.

python -m torch.distributed.run --standalone --nproc_per_node=2 shards.py FOLDER CASE
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import tiny
import torch
from collectives import without_copies
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from memplan import levers
from memplan.blocks import find_blocks
from memplan.levers import loss_head

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def llama() -> tiny.Made:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "use_cache": False}
    return tiny.llama(layers=6, rows=4, length=64, **sizes)


def wide() -> tiny.Made:
    """Whose logits decide the peak."""
    return tiny.llama(layers=2, rows=4, length=64, hidden_size=64, vocab_size=8192, use_cache=False)


def lora() -> tiny.Made:
    """Adapters with dropout on a frozen base."""
    base, batch = llama()
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")).train(), batch


MODELS: dict[str, Callable[[], tiny.Made]] = {"llama": llama, "lora": lora, "wide": wide, "gpt2": tiny.gpt2}


class Case(NamedTuple):
    model: str
    option: str
    accumulation: int
    mp_policy: MixedPrecisionPolicy = MixedPrecisionPolicy()


HALF, FULL = torch.bfloat16, torch.float32
CASES = {
    "plain": Case("llama", "keep", 1),
    "accumulated": Case("llama", "keep", 2),
    "recomputed": Case("llama", "recompute", 1),
    "both": Case("llama", "recompute", 2),
    "frozen": Case("lora", "keep", 1),
    "logits": Case("wide", "keep", 1),
    "chunked": Case("wide", "chunked-32", 2),
    "mixed-chunked": Case("wide", "chunked-32", 1, MixedPrecisionPolicy(HALF, FULL)),
    "mixed": Case("llama", "keep", 1, MixedPrecisionPolicy(HALF, FULL)),
    "mixed-both": Case("llama", "recompute", 2, MixedPrecisionPolicy(HALF, HALF, HALF)),
    "mixed-frozen": Case("lora", "keep", 2, MixedPrecisionPolicy(HALF)),
}
WITH_DROPOUT = {"kept": Case("gpt2", "keep", 2), "made-again": Case("gpt2", "recompute", 2)}
STEPS = 3


def decided(model: nn.Module, option: str) -> dict[str, str]:
    """An option of all blocks or, where it is one, of the loss head."""
    if loss_head.is_option(option) and option != "keep":
        return {str(loss_head.find_head(model)): option}
    return dict.fromkeys(find_blocks(model), option)


def main() -> None:
    from accuracy import meter
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    folder, (name, option, accumulation, policy) = Path(sys.argv[1]), (CASES | WITH_DROPOUT)[sys.argv[2]]
    torch.set_num_threads(1)
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model, batch = MODELS[name]()
    levers.install(model, decided(model, option))
    for path in find_blocks(model):
        fully_shard(model.get_submodule(path), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        for _ in range(accumulation):
            (model(**batch).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()

    if sys.argv[2] in WITH_DROPOUT:
        for _ in range(STEPS):
            step()
        whole = [p.full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]  # all are DTensors now
        torch.save(whole, folder / os.environ["RANK"])
    else:
        with without_copies():
            step()
            (folder / os.environ["RANK"]).write_text(str(meter()(step)))
    destroy_process_group()


if __name__ == "__main__":
    main()
