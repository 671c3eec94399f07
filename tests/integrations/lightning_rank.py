"""Run by two processes (`torch.distributed.run`): a Lightning fit by strategy="ddp", with and without the callback.

python -m torch.distributed.run --standalone --nproc_per_node=2 lightning_rank.py FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from two_ranks import leave

from integrations.test_lightning import fit
from memplan.integrations.lightning import MemplanCallback

SPLIT = {"gpu": "cpu:1GiB", "micro_batch": 2, "strategy": "huggingface"}
WHOLE = {"gpu": "cpu:2000KiB", "micro_batch": 8}
ROWS = 21  # ragged on both ranks


def trained(model: str, wishes: dict[str, Any] | None, own: int) -> dict[str, Any]:
    callback = None if wishes is None else MemplanCallback(**wishes)
    module = fit(callback, ROWS, model, own, devices=2, strategy="ddp")
    assert module.trainer.world_size == 2
    return {
        "weights": [parameter.tolist() for parameter in module.parameters()],
        "rates": module.rates,
        "loss": float(module.trainer.callback_metrics["loss_epoch"]),
        "plan": None if callback is None or callback.plan is None else callback.plan.model_dump_json(),
    }


def main() -> None:
    torch.set_num_threads(1)
    ran = {
        f"{model}{'' if wishes is None else '-planned'}": trained(model, wishes, own)
        for model, planned, own in (("llama", SPLIT, 2), ("gpt2", WHOLE, 1))
        for wishes in (None, planned)
    }
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(ran))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
