"""Run by two processes (`torch.distributed.run`): a trainer under DistributedDataParallel, what it leaves to a file.

python -m torch.distributed.run --nproc_per_node=2 trainer_rank.py FOLDER KIND BUDGET|none ROWS

The kinds: trainer, sft, own-items, unused, used.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
from two_ranks import leave

import memplan
from integrations import trainers
from memplan.levers import loss_head

# Where the loss in chunks pays: ddp_find_unused_parameters, as the Trainer would have it and as it has to be.
_WIDE = {"unused": None, "used": False}


def main() -> None:
    folder, kind, budget, rows = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    asked = {"train_dataset": trainers.dataset(rows), "ddp_backend": "gloo"}
    asked |= {"average_tokens_across_devices": kind != "own-items"}
    torch.manual_seed(0)
    if kind == "sft":
        trainer = trainers.sft_trainer(folder / "out", lora=True, **asked)
    else:
        if kind in _WIDE:
            asked |= {"train_dataset": trainers.dataset(rows, longest=64), "ddp_find_unused_parameters": _WIDE[kind]}
        model = tiny.llama(layers=3, vocab_size=2048)[0] if kind in _WIDE else None
        trainer = trainers.trainer(folder / "out", model, **asked)
    size, strategy = (trainers.BATCH, "balanced") if kind in _WIDE else (2, "huggingface")
    rank = int(os.environ["RANK"])
    plan = None
    try:
        if budget != "none":
            plan = memplan.autofit(trainer, budget, micro_batch=size, strategy=strategy).plan
        ran = trainers.Run.of(trainer)
    except memplan.MemplanError as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        return
    seen = {
        "weights": {name: weight.tolist() for name, weight in ran.weights.items()},
        "steps": ran.steps,
        "logged": ran.logged,
        "uses": dataclasses.asdict(loss_head.uses(trainer.model.lm_head)) if kind in _WIDE else None,
        "plan": None if plan is None else json.loads(plan.model_dump_json()),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
