"""What a step of a prepared training script needs on a rank, predicted and measured."""

import gc
import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import tiny
import torch
from accelerate import Accelerator
from accuracy import meter
from torch.utils.data import DataLoader

from memplan.meter import reachable_storages


def let_go(wait: Callable[..., Any]) -> Callable[..., Any]:
    """When a wait returns, gloo's thread has let go of what was sent: the profiler does not see what that frees."""

    def waited(*arguments: Any) -> Any:
        result = wait(*arguments)
        time.sleep(0.002)
        return result

    return waited


def steadied() -> None:
    """From here on every wait for another rank lets gloo end first."""
    work = torch._C._distributed_c10d.Work
    work.wait = let_go(work.wait)  # type: ignore[method-assign]


def left_behind() -> int:
    """Bytes that are there before anything is measured: what engines before have left stays for good."""
    gc.collect()
    return sum(reachable_storages().values())


def peaks_of(accelerator: Accelerator, rows: int, runs: int) -> dict[str, int]:
    """Of a step as people write it, with a Llama of 6 layers and batches of 4 out of so many rows.

    gloo's thread may let go of a tensor where no profiler sees it, so that the least of so many runs counts.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 352, "use_cache": False}
    model, batch = tiny.llama(layers=6, rows=rows, length=64, **sizes)
    dataset = [{name: value[at] for name, value in batch.items()} for at in range(rows)]
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset, batch_size=4, shuffle=True))
    batches = chain.from_iterable(repeat(loader))
    output: Any = None

    def step() -> None:
        nonlocal output
        for _ in range(accelerator.memplan.plan.accumulation):
            with accelerator.accumulate(model):
                output = model(**next(batches))
                accelerator.backward(output.loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    step()
    measured = min(meter()(step) for _ in range(runs))
    return {"predicted": accelerator.memplan.plan.peak_bytes, "measured": measured}
