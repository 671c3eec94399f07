"""Run by two processes (`torch.distributed.run`), each with data of its own: the plans that they come to, to a file.

python -m torch.distributed.run --nproc_per_node=2 longer_rank.py FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from two_ranks import leave

import memplan
from integrations import trainers
from integrations.scripts import KEEP_ALL, fresh_accelerate
from memplan.integrations import accelerate

ROWS = 16
LONGEST = (12, 24)  # tokens of the first rank's rows and of the second's


def attached(rank: int, **wishes: Any) -> memplan.Plan:
    """Of an Accelerate script."""
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        accelerate.attach(accelerator, gpu="cpu:1GiB", micro_batch=2, strategy="huggingface", **wishes)
        model, _ = tiny.llama(layers=2)
        texts: Any = trainers.rows(ROWS, LONGEST[rank])
        loader = DataLoader(texts, trainers.BATCH, collate_fn=trainers.collated)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        plan: memplan.Plan = accelerator.memplan.plan
        return plan


def shown(rank: int) -> memplan.Plan:
    """The same, with a batch that the script shows; the first rank's rows are the longer ones here."""
    return attached(rank, sample=trainers.collated(trainers.rows(4, LONGEST[1 - rank])))


def of_a_file(rank: int, folder: Path) -> memplan.Plan:
    """The same, by a plan that was made before."""
    path = folder / f"{rank}.plan"
    model, batch = tiny.llama(layers=2)
    sizes = {"micro_batch": 2, "effective_batch": trainers.BATCH}
    world = memplan.World(replicas=2)
    memplan.plan(model.to("meta"), "cpu:1GiB", sample=batch, strategy=KEEP_ALL, world=world, **sizes).save(path)
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        accelerate.attach(accelerator, plan=path)
        model, _ = tiny.llama(layers=2)
        texts: Any = trainers.rows(ROWS, LONGEST[rank])
        accelerator.prepare(model, DataLoader(texts, trainers.BATCH, collate_fn=trainers.collated))
        plan: memplan.Plan = accelerator.memplan.plan
        return plan


def trained(rank: int, folder: Path) -> memplan.Plan:
    """Of a trainer, which knows the lengths of its data."""
    with fresh_accelerate():
        data = trainers.dataset(ROWS, LONGEST[rank])
        trainer = trainers.trainer(folder / "out", tiny.llama(layers=2)[0], train_dataset=data, ddp_backend="gloo")
        return memplan.autofit(trainer, "cpu:1GiB", micro_batch=2, strategy="huggingface").plan


def failed(rank: int) -> str:
    """What becomes of it if the second rank cannot make its model ready."""
    try:
        with fresh_accelerate():
            accelerator = Accelerator(cpu=True)
            accelerate.attach(accelerator, gpu="cpu:1GiB")
            model, _ = tiny.llama(layers=2)
            if rank == 1:
                model.to = out_of_memory  # type: ignore[method-assign]
            texts: Any = trainers.rows(ROWS)
            accelerator.prepare(model, DataLoader(texts, trainers.BATCH, collate_fn=trainers.collated))
    except (torch.OutOfMemoryError, memplan.MemplanError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def out_of_memory(_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    plans = {
        "attached": attached(rank),
        "shown": shown(rank),
        "file": of_a_file(rank, folder),
        "trained": trained(rank, folder),
    }
    came = {name: json.loads(plan.model_dump_json()) for name, plan in plans.items()} | {"failed": failed(rank)}
    (folder / f"{rank}.json").write_text(json.dumps(came))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
