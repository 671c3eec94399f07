"""Run by two processes (`torch.distributed.run`): the training script on DeepSpeed, with and without memplan.

python -m torch.distributed.run --standalone --nproc_per_node=2 zero_rank.py FOLDER
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from accelerate import Accelerator
from two_ranks import leave

import memplan
from integrations.engines import with_engine
from integrations.peaks import left_behind, peaks_of, steadied
from integrations.scripts import fresh_accelerate, train

ROWS = 21  # for two ranks and batches of 8: ragged
MEASURED = 3
SPLIT = {"gpu": "cpu:840KiB", "micro_batch": 2}  # between the least that fits and what needs no plan
WIDE = {"gpu": "cpu:26MiB", "micro_batch": 2}
ZERO = {"reduce_bucket_size": 300_000}


def trained(wishes: dict[str, Any] | None) -> dict[str, Any]:
    line = partial(with_engine, then=None if wishes is None else partial(memplan.attach, **wishes))
    ran = train(line, rows=ROWS, accumulate=True)
    plan = None if wishes is None else ran.accelerator.memplan.plan.model_dump_json()
    weights = [weight.tolist() for weight in ran.weights]
    return {"weights": weights, "rates": ran.rates, "losses": ran.losses, "plan": plan}


def peaks(**config: Any) -> dict[str, int]:
    """Of a step as people write it, predicted and measured."""
    left = left_behind()
    with fresh_accelerate():
        accelerator = with_engine(Accelerator(cpu=True), partial(memplan.attach, **WIDE), ZERO, **config)
        found = peaks_of(accelerator, rows=64, runs=MEASURED)
        accelerator.free_memory()  # or the next engine would be measured beside this one
        return {**found, "measured": found["measured"] - left}


def main() -> None:
    import deepspeed  # type: ignore[import-not-found]  # no dependency

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo itself; this one is compiled first
    ran: dict[str, Any] = {"plain": trained(None), "planned": trained(SPLIT)}
    steadied()
    ran["peaks"] = {"no": peaks(), "bf16": peaks(bf16={"enabled": True})}
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(ran))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
