"""One of two ranks that tell each other things: what each has heard, to a file in the folder that is named.

python -m torch.distributed.run --nproc_per_node=2 world_rank.py FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from guarding import VOCABULARY, texts
from torch import Tensor, nn
from two_ranks import leave

import memplan
from memplan import fitting, pipeline
from memplan.errors import MemoryTaken, MemplanError, UsageError
from memplan.rungs import ladders
from memplan.samples import Sample
from memplan.world import World, largest, odd_ranks, of_first, on_all, rooms_of_all

WORLD = World(replicas=2)
SHORT, LONG = 8, 16  # tokens of the first rank's rows and of the second's
SIZES = {"effective_batch": 4, "micro_batch": 2}
KEEP = memplan.Strategy("keep-all", levers=())
BLOCKS = memplan.Strategy("blocks", levers=("recompute",))


def error_of(call: Callable[[], object]) -> str:
    try:
        return f"none: {call()}"
    except MemplanError as error:
        return f"{type(error).__name__}: {error}"


def ids(length: int) -> Tensor:
    return torch.arange(2 * length).view(2, length) % VOCABULARY


def samples(rank: int) -> dict[str, Any]:
    """The second rank has fewer rows, which are longer; ids count on, so that they can be told apart."""
    rows = torch.arange(1000)[: 4 * SHORT].view(4, SHORT) if rank == 0 else torch.arange(100, 100 + LONG)[None]
    content = {"ids": rows, "mask": rows > 110, "weight": torch.tensor(0.5), "use_cache": False}
    sample, said = largest(Sample.of(content), f"seen on rank {rank}")
    own, alike = Sample.of(torch.full((2, 3), rank)), f"seen on rank {rank}"
    same, words = largest(own, alike)
    return {
        "ids": sample.content["ids"].tolist(),
        "mask": sample.content["mask"].tolist(),
        "dtypes": [str(t.dtype) for t in sample.tensors()],
        "others": sample.content["use_cache"],
        "said": said,
        "alike": (same is own, words),
        "unsent": error_of(lambda: largest(Sample.of({"x": rows, "function": lambda: rank}))),
    }


def fitted(rank: int) -> dict[str, Any]:
    """By the whole way of `autofit`, with a sample on each rank."""
    length = (SHORT, LONG)[rank]
    plan = fit(ids(length)).plan
    told = fit(ids(3), data=memplan.Data([3, length])).plan
    return {
        "plan": json.loads(plan.model_dump_json()),
        "told": [told.sample[0].shape, told.assumptions],
        "refused": error_of(lambda: fit(ids(length) if rank == 0 else "no sample")),
    }


def fit(sample: object, model: nn.Module | None = None, **more: Any) -> memplan.Fit:
    model = texts(False) if model is None else model
    return memplan.autofit(model, "cpu:1GiB", sample=sample, world=WORLD, strategy=KEEP, **SIZES, **more)


def unequal(rank: int) -> dict[str, Any]:
    """Of the whole way of `autofit`: the second rank has three quarters of the memory; then, another model."""
    own = pipeline.room_of
    pipeline.room_of = lambda *_: (2**30, 3 * 2**28)[rank]
    plan = fit(ids(SHORT)).plan
    pipeline.room_of = own
    other = error_of(lambda: fit(ids(SHORT), model=texts(False) if rank == 0 else nn.Sequential(texts(False))))
    return {"budget": plan.budget_bytes, "said": plan.assumptions, "other model": other}


def taken(rank: int) -> dict[str, Any]:
    """Memory that other processes take on the second rank, between plan and training: for good, or for a moment."""
    model, own, looked = texts(False), fitting._check_room, []

    def gone(*_: object) -> None:
        if rank == 1:
            raise MemoryTaken("of 24 GiB only 3 are free", 2**30)

    def for_a_moment(*_: object) -> None:
        looked.append(1)
        if len(looked) == 1:
            gone()

    fitting._check_room = gone
    error = error_of(lambda: fit(ids(SHORT), model=model))
    fitting._check_room = for_a_moment
    again = error_of(lambda: fit(ids(SHORT), model=model).undo())
    fitting._check_room = own
    return {"for good": error, "for a moment": again, "tries": len(looked)}


def ladder() -> dict[str, Any]:
    """Made on the first rank when a guard falls, and used on both."""
    model = texts(False)
    planned = memplan.autofit(model, "cpu:1GiB", sample=ids(64), world=WORLD, strategy=KEEP, **SIZES)
    plans = memplan.ladder(model, planned.plan, BLOCKS, SIZES["micro_batch"], WORLD)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    guard = memplan.Guard(planned, optimizer, plans, replica=replica)
    needs = [guard.plan.needs_bytes]
    while guard._fall(0, "is to fall"):
        needs.append(guard.plan.needs_bytes)
    changed = len(guard.plan.changed)
    guard.undo()
    return {"needs": needs, "changed": changed}


def by_length() -> dict[str, Any]:
    """Classes of lengths for a guard on both: each one's first two plans, and a step of either class."""
    model = texts(False)
    fit = memplan.autofit(model, "cpu:1GiB", sample=ids(64), world=WORLD, strategy=KEEP, **SIZES)
    fit.undo()
    made = {n: list(plans)[:2] for n, plans in ladders(model, fit.plan, [16], BLOCKS, 2, WORLD).items()}
    optimizer = torch.optim.AdamW(model.parameters())
    replica = torch.nn.parallel.DistributedDataParallel(model)
    guard = memplan.Guard(memplan.apply(model, fit.plan), optimizer, made, replica=replica)
    in_force = []

    def run() -> None:
        replica(ids(length)).mean().backward()
        guard.exchange()
        optimizer.step()
        optimizer.zero_grad()

    for length in (16, 64, 12):
        guard.step(run, tokens=length)
        in_force.append(guard.plan.sample[0].shape[-1])
    guard.undo()
    needs = {n: [(p.sample[0].shape[-1], p.needs_bytes) for p in plans] for n, plans in made.items()}
    return {"needs": needs, "in force": in_force}


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def failing() -> int:
        if rank == 1:
            raise UsageError("the loader has no batch size")
        return 7

    heard = {
        "first": of_first(f"from {rank}"),
        "least": rooms_of_all(lambda: (100, 75)[rank]).least,
        "odd": odd_ranks(f"model {rank}"),
        "alike": odd_ranks("model"),
        "all": on_all(lambda: rank),
        "failed": error_of(lambda: on_all(failing)),
        "samples": samples(rank),
        "fitted": fitted(rank),
        "unequal": unequal(rank),
        "taken": taken(rank),
        "ladder": ladder(),
        "by length": by_length(),
    }
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
