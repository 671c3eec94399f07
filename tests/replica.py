"""One of two replicas that train together by DistributedDataParallel on the CPU: its peak, as a number on stdout.

python tests/replica.py RANK STORE VIEW ACCUMULATION, where STORE is a file that both share.
"""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from real import bytes_of
from two_ranks import leave

from memplan.meter import allocator_record

REPLICAS, WIDTH = 2, 1024
_TASKS = Path("/proc/self/task")  # a thread each; the state is behind the name in brackets


class Tower(nn.Module):
    """Weights of 4 MiB each, more than one bucket of 25 MiB, with small ones between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).square().mean()


def tower() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Tower(), torch.randn(16, WIDTH)


def step_of(replica: DistributedDataParallel, x: torch.Tensor, accumulation: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(replica.parameters(), lr=1e-3, momentum=0.9, foreach=False)

    def step() -> None:
        for later in reversed(range(accumulation)):
            exchange: AbstractContextManager[None] = replica.no_sync() if later else nullcontext()
            with exchange:
                loss = replica(x)
                (loss / accumulation).backward()
                del loss
        optimizer.step()
        optimizer.zero_grad()

    return step


def let_go() -> None:
    """Wait until gloo's own threads wait: one may still hold a bucket, and what is freed on it is not recorded."""
    while any("gloo" in stat and ") R " in stat for stat in ((task / "stat").read_text() for task in _TASKS.iterdir())):
        time.sleep(0.01)


def peak_of_one(view: bool, accumulation: int) -> int:
    """Bytes at the peak of a steady step. The record begins before the buckets are made, which only C++ holds."""
    model, x = tower()
    there = bytes_of([*model.parameters(), x])
    with allocator_record() as record:
        # Without the first exchange of weights: a copy of all of them, which gloo's thread may be the last to hold.
        step = step_of(DistributedDataParallel(model, gradient_as_bucket_view=view, init_sync=False), x, accumulation)
        for _ in range(3):  # buckets are made anew in the second
            step()
            let_go()
        start = torch.empty(1)
        step()
    events = list(record)
    # It is there to the end; whatever had its address before came earlier.
    begin = max(at for at, (address, change) in enumerate(events) if address == start.data_ptr() and change > 0)
    now, peak = there, 0
    for at, (_, change) in enumerate(events):
        now += change
        peak = max(peak, now) if at >= begin else 0
    return peak


def main() -> None:
    rank, store, view, accumulation = sys.argv[1:]
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=REPLICAS, timeout=wait)
    try:
        print(peak_of_one(view == "True", int(accumulation)), flush=True)  # noqa: T201  # what it is asked for
    finally:
        leave()


if __name__ == "__main__":
    main()
