"""Run by two processes (`torch.distributed.run`): the training script under DistributedDataParallel, weights to a file.

python -m torch.distributed.run --nproc_per_node=2 ranks.py FOLDER PLAN|none ROWS MODEL MODEL-OF-RANK-1 [SWITCH...]

The switches are those of Accelerate's DataLoaderConfiguration: split_batches, dispatch_batches.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import DataLoaderConfiguration
from two_ranks import leave

from integrations.scripts import padded, train
from memplan.errors import MemplanError
from memplan.integrations.accelerate import attach

LONGEST = 16


def equally_long(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Where the first process reads for all, Accelerate joins batches, which have to be of one length."""
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    pad = torch.nn.functional.pad
    return {name: pad(t, (0, LONGEST - t.shape[1]), value=filled[name]) for name, t in padded(rows).items()}


def main() -> None:
    folder, plan, rows, model = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    rank = int(os.environ["RANK"])
    line = None if plan == "none" else partial(attach, plan=plan)
    if plan.startswith("cpu"):
        line = partial(attach, gpu=plan, micro_batch=2, strategy="huggingface")
    switches = sys.argv[6:]
    own = {"dataloader_config": DataLoaderConfiguration(**dict.fromkeys(switches, True))}
    loader = {"collate_fn": equally_long} if "dispatch_batches" in switches else {}
    try:
        ran = train(line, rows=rows, model=model if rank == 0 else sys.argv[5], loader=loader, accelerator=own)
    except MemplanError as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        return
    accelerator = ran.accelerator
    seen = {
        "weights": [w.tolist() for w in ran.weights],
        "rates": ran.rates,
        "losses": ran.losses,
        "plan": accelerator.memplan.plan.model_dump_json() if line else None,
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
