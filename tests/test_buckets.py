"""Gradient buckets: torch's own assignment, and the peak of two replicas that really train together."""

import subprocess
import sys
from pathlib import Path

import pytest
import replica
import tiny
import torch
from torch import nn

from memplan import runs
from memplan.allocator import Settings
from memplan.blocks import find_blocks
from memplan.buckets import CAP_BYTES, FIRST_BYTES, bucket_bytes
from memplan.errors import NoStepInBackward, UsageError
from memplan.gpus import find_gpu
from memplan.kernels import backend_for
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import CATEGORIES
from memplan.training_run import usage_of

GRADS, SECONDS = CATEGORIES.index("grads"), 120


def parameters(*megabytes: float, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(int(size * 2**20) // dtype.itemsize, dtype=dtype)) for size in megabytes]


@pytest.mark.parametrize(
    "shown",
    [
        parameters(),
        parameters(0.5),
        parameters(0.25, 0.5, 0.5, 0.125),
        parameters(1, 1),
        parameters(12, 12, 0.5, 30, 0.25, 0.5, 24.75, 0.25, 3),
        [*parameters(3, 0.5), *parameters(0.5, 7, 20, dtype=torch.bfloat16), *parameters(0.75, 2)],
    ],
)
def test_buckets_are_torch_s(shown: list[nn.Parameter]) -> None:
    ready = list(reversed(shown))
    limits = [FIRST_BYTES, CAP_BYTES]
    assigned = torch.distributed._compute_bucket_assignment_by_size(ready, limits)[0] if ready else []
    assert sorted(bucket_bytes(shown)) == sorted(sum(ready[at].nbytes for at in bucket) for bucket in assigned)


def test_the_caps_are_torch_s() -> None:
    assert torch.distributed._DEFAULT_FIRST_BUCKET_BYTES == FIRST_BYTES
    replicated = torch.nn.parallel.distributed
    assert replicated._DEFAULT_BUCKET_CAP_MB * replicated._MB_TO_BYTES == CAP_BYTES


def measured(folder: Path, view: bool, accumulation: int) -> list[int]:
    """The peak of each replica."""
    command = [sys.executable, "-W", "ignore", replica.__file__]
    tail = [str(folder / "store"), str(view), str(accumulation)]
    running = [
        subprocess.Popen([*command, str(rank), *tail], stdout=subprocess.PIPE, text=True)
        for rank in range(replica.REPLICAS)
    ]
    try:
        return [int(process.communicate(timeout=SECONDS)[0].split()[-1]) for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("view", [False, True])
def test_the_peak_of_replicas(view: bool, accumulation: int, tmp_path: Path) -> None:
    model, x = replica.tower()
    recipe = Recipe(optimizer="sgd-momentum", accumulation=accumulation, replicas=2, bucket_view=view)
    peak = Recorder(model, recipe).record(Sample.of(x)).peak_bytes
    for real in measured(tmp_path, view, accumulation):
        assert abs(peak / real - 1) <= 0.001, (peak, real)


def test_what_buckets_add() -> None:
    model, x = replica.tower()
    size = sum(p.nbytes for p in model.parameters())
    recipes = [Recipe(optimizer="sgd"), Recipe(optimizer="sgd", replicas=2)]
    recipes.append(Recipe(optimizer="sgd", replicas=2, bucket_view=True))
    alone, beside, views = (Recorder(model, recipe).record(Sample.of(x)) for recipe in recipes)
    assert [trace.of_category(GRADS).max() for trace in (alone, beside)] == [size, 2 * size]
    assert size < views.of_category(GRADS).max() < 1.2 * size
    assert beside.peak_bytes - alone.peak_bytes == size
    assert "beside buckets" in beside.assumptions[0]
    assert "in buckets" in views.assumptions[0]
    assert not alone.assumptions


def test_omitted_blocks_fill_buckets_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = tiny.llama(layers=11)
    assert runs.long_runs(model, find_blocks(model), runs.FEWEST)
    for accumulation in (1, 2):
        recipe = Recipe(replicas=2, bucket_view=True, accumulation=accumulation)
        with monkeypatch.context() as patch:
            patch.setattr("memplan.recorder.long_runs", lambda *_: [])
            whole = Recorder(model, recipe).record(Sample.of(sample))
        assert (Recorder(model, recipe).record(Sample.of(sample)).live == whole.live).all()


def test_buckets_on_a_card() -> None:
    """A single one in the first step; the others are cut from its segment, so they reserve no more."""
    model, x = replica.tower()
    card = backend_for(find_gpu("rtx-4090"))
    alone, beside = (
        usage_of(Recorder(model, Recipe(optimizer="sgd", replicas=n), card).record(Sample.of(x)), Settings())
        for n in (1, 2)
    )
    size = sum(bucket_bytes(model.parameters()))
    assert 0 <= beside.fits_bytes - alone.fits_bytes - size < 2**21


def test_replicas_that_are_none() -> None:
    model, batch = tiny.plain(layers=2)
    for recipe in (Recipe(replicas=0), Recipe(bucket_view=True)):
        with pytest.raises(UsageError, match="several have buckets"):
            Recorder(model, recipe)
    with pytest.raises(NoStepInBackward, match="2 replicas"):
        Recorder(model, Recipe(stepping="in-backward", replicas=2)).record(Sample.of(batch))
