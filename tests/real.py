"""Steps that are really run, and the bytes that torch's allocator says they needed."""

import gc
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from memplan import optimizers, packed
from memplan.device import CpuDevice
from memplan.losses import loss_of
from memplan.meter import allocator_record
from memplan.recipe import Recipe
from memplan.samples import Sample

_OTHER_METER = Path(__file__).resolve().parents[2] / "shared" / "tools" / "true_peak.py"


def step_of(model: nn.Module, sample: Sample, recipe: Recipe) -> Callable[[], None]:
    """One whole optimizer step as a `Recipe` says it, the way a training loop writes it."""
    made = recipe.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizers.build(made, trained) if isinstance(made, str) else made

    def micro_step() -> None:
        with nullcontext() if recipe.autocast is None else torch.autocast("cpu", recipe.autocast):
            loss = loss_of(model, sample, recipe.loss)
        (loss / recipe.accumulation if recipe.accumulation > 1 else loss).backward()

    def step() -> None:
        for _ in range(recipe.accumulation):
            micro_step()
        if recipe.clips:
            clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


Meter = Callable[[Callable[[], None]], int]


def peak_of(
    model: nn.Module,
    sample: Sample,
    recipe: Recipe = Recipe(),  # noqa: B008  # frozen
    meter: Meter = CpuDevice().peak_of,  # noqa: B008  # holds nothing
) -> int:
    """Peak bytes of a steady step, counted from zero but without what other tests have left alive."""
    step = step_of(model, sample, recipe)
    held = [*model.parameters(), *model.buffers(), *sample.tensors(), *(t for _, t in packed.named_scales(model))]
    if not isinstance(recipe.optimizer, str):
        held += [t for state in recipe.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    gc.collect()
    others = meter(lambda: None) - bytes_of(held)
    return meter(step) - others


def other_meter() -> Meter:
    """One that owes nothing to memplan, where it lies beside the project; else the test is skipped."""
    if not _OTHER_METER.exists():
        pytest.skip("the independent meter is not beside the project")
    spec = importlib.util.spec_from_file_location("true_peak", _OTHER_METER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    meter: Meter = module.true_peak
    return meter


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def growth_of(function: Callable[..., object], *inputs: Tensor) -> int:
    """The most that a call has allocated at any moment, on top of its inputs."""
    with allocator_record() as record:
        function(*inputs)
    return max(accumulate(change for _, change in record), default=0)
