"""What `cuda_measure.py` does with a step on a card, whatever the model: the step itself, its peaks, its errors."""

from collections.abc import Callable, Mapping
from typing import Any

import peers
import torch
import transformers
from cuda_card import Card
from cuda_models import BitsandbytesMissing
from peers import Undo
from torch import Tensor, nn

from memplan.prediction import Prediction

LAPS = 3  # timed steps of a setting by itself

Answer = dict[str, Any]


def sizes_of(prediction: Prediction) -> dict[str, int | None]:
    """A prediction's sizes in bytes; those that only a CUDA target has are None elsewhere."""
    return {
        "peak": prediction.peak_bytes,
        "reserved": prediction.reserved_bytes,
        "completes": prediction.completes_bytes,
        "fits": prediction.fits_bytes,
    }


def checkpointed(model: nn.Module) -> Undo:
    """transformers' own checkpointing of every block, non-reentrant; its older name where there is no newer one."""
    if hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
        return peers.checkpointed(model)
    owner = next(module for module in model.modules() if isinstance(module, transformers.PreTrainedModel))
    owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def disable() -> None:
        owner.gradient_checkpointing_disable()
        owner.disable_input_require_grads()  # its own disable leaves the hook on the embeddings

    return disable


def is_out_of_memory(error: BaseException) -> bool:
    """The allocator's own error, cuBLAS's, the driver's, or any of them as the cause."""
    words = ("out of memory", "ALLOC_FAILED")
    said = isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
    return said or (error.__cause__ is not None and is_out_of_memory(error.__cause__))


def failed(error: Exception) -> Answer:
    """An error as an answer."""
    kind = "BitsandbytesMissing" if isinstance(error, BitsandbytesMissing) else type(error).__name__
    return {"error": f"{kind}: {error}".splitlines()[0][:300], "kind": kind, "oom": is_out_of_memory(error)}


def taken(card: Card, step: Callable[[], None], laps: int = LAPS) -> Answer:
    """Peaks of a steady step, retries since before the first one, seconds of a few more."""
    before = card.retries()
    peaks = card.device.peaks_of(step)
    seconds = card.device.seconds_of(step, laps)
    retries = card.retries() - before
    return {
        "allocated": peaks.tensor_bytes,
        "reserved": peaks.reserved_bytes,
        "retries": retries,
        "seconds": [round(s, 5) for s in seconds],
    }


def step_of(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: torch.dtype | None,
    accumulation: int = 1,
) -> Callable[[], None]:
    """One whole step over micro-batches that are each `batch`: `steps.make_step` with a live optimizer."""
    kind = next(iter(batch.values())).device.type

    def step() -> None:
        for _ in range(accumulation):
            with torch.autocast(kind, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(**batch).loss
            (loss / accumulation if accumulation > 1 else loss).backward()
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
