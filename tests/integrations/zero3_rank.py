"""Run by two processes (`torch.distributed.run`): the training script on DeepSpeed's ZeRO-3, with and without memplan.

python -m torch.distributed.run --standalone --nproc_per_node=2 zero3_rank.py FOLDER
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
SPLIT = {"gpu": "cpu:1000KiB", "micro_batch": 2}
ZERO = {"stage": 3, "reduce_bucket_size": 300_000, "stage3_param_persistence_threshold": 1000}
FAR = {**ZERO, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 30_000}


def trained(wishes: dict[str, Any] | None) -> dict[str, Any]:
    import deepspeed  # type: ignore[import-not-found]  # no dependency

    line = partial(with_engine, zero={**ZERO, "reduce_bucket_size": 20_000})
    attach = None if wishes is None else partial(memplan.attach, **wishes)
    ran = train(partial(line, then=attach), rows=ROWS, accumulate=True)
    engine = ran.accelerator.deepspeed_engine_wrapped.engine
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        weights = [parameter.detach().tolist() for parameter in parameters]
    plan = None if wishes is None else ran.accelerator.memplan.plan.model_dump_json()
    return {"weights": weights, "rates": ran.rates, "losses": ran.losses, "plan": plan}


def peaks(gpu: str, zero: dict[str, Any], **config: Any) -> dict[str, int]:
    """Of a step as people write it, predicted and measured beyond what engines before have left: they stay for good."""
    left = left_behind()
    with fresh_accelerate():
        attach = partial(memplan.attach, gpu=gpu, micro_batch=2)
        accelerator = with_engine(Accelerator(cpu=True), attach, zero, **config)
        found = peaks_of(accelerator, rows=64, runs=MEASURED)
        recomputed = len(accelerator.memplan.plan.recomputed)
    return {"predicted": found["predicted"], "measured": found["measured"] - left, "recomputed": recomputed}


def main() -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo itself; this one is compiled first
    ran: dict[str, Any] = {"plain": trained(None), "planned": trained(SPLIT)}
    steadied()
    ran["peaks"] = {
        "whole": peaks("cpu:64MiB", ZERO),
        "near": peaks("cpu:24MiB", ZERO),
        "far": peaks("cpu:22MiB", FAR),
        "bf16": peaks("cpu:16.3MiB", ZERO, bf16={"enabled": True}),
    }
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(ran))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
