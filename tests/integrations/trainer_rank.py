"""Run by two processes (`torch.distributed.run`): a trainer under DistributedDataParallel, what it leaves to a file.

python -m torch.distributed.run --nproc_per_node=2 trainer_rank.py FOLDER trainer|sft|own-items BUDGET|none ROWS
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import memplan
from integrations import trainers


def main() -> None:
    folder, kind, budget, rows = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    asked = {"train_dataset": trainers.dataset(rows), "ddp_backend": "gloo"}
    asked |= {"average_tokens_across_devices": kind != "own-items"}
    torch.manual_seed(0)
    if kind == "sft":
        trainer = trainers.sft_trainer(folder / "out", lora=True, **asked)
    else:
        trainer = trainers.trainer(folder / "out", **asked)
    rank = int(os.environ["RANK"])
    plan = None
    try:
        if budget != "none":
            plan = memplan.autofit(trainer, budget, micro_batch=2, strategy="huggingface").plan
        ran = trainers.Run.of(trainer)
    except memplan.MemplanError as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        return
    seen = {
        "weights": {name: weight.tolist() for name, weight in ran.weights.items()},
        "steps": ran.steps,
        "logged": ran.logged,
        "plan": None if plan is None else json.loads(plan.model_dump_json()),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
