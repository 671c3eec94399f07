"""The one training step that all benchmarks measure, so that their numbers can be compared.

    step = make_step(model, batch, optimizer="adamw", autocast=torch.bfloat16, accumulation=2)
    step()      # forward and backward twice, one optimizer step, gradients set to None

Nothing outlives the step but what training needs: weights, optimizer state and the batch. Of the model's output only
the loss is kept, and only until its backward has run.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import nn

os.environ.setdefault("MEMPLAN_CACHE", "off")  # what one benchmark measures must not change the plans of another

OptimizerName = Literal["adamw", "adamw-foreach-false", "sgd-momentum"]


def make_optimizer(model: nn.Module, name: OptimizerName = "adamw") -> torch.optim.Optimizer:
    """An optimizer of that name over the parameters that require gradients; torch's defaults but for what it says."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    match name:
        case "adamw":
            return torch.optim.AdamW(trained)
        case "adamw-foreach-false":
            return torch.optim.AdamW(trained, foreach=False)
        case "sgd-momentum":
            return torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    raise ValueError(f"unknown optimizer {name!r}: one of {', '.join(get_args(OptimizerName))}")


def make_step(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    optimizer: OptimizerName | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    accumulation: int = 1,
) -> Callable[[], None]:
    """One whole optimizer step over `accumulation` micro-batches, each of them `batch`.

    Forward under autocast where a dtype is given, backward outside of it; the loss is divided by `accumulation`. The
    optimizer's state is created by the first call, so the second call is the first steady one.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation is {accumulation}, it must be at least 1")
    optim = make_optimizer(model, optimizer) if isinstance(optimizer, str) else optimizer
    device_type = next(model.parameters()).device.type

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(device_type, dtype=autocast) if autocast is not None else nullcontext()

    def micro_step() -> None:
        with precision():
            loss = model(**batch).loss
        (loss / accumulation if accumulation > 1 else loss).backward()

    def step() -> None:
        for _ in range(accumulation):
            micro_step()
        optim.step()
        optim.zero_grad(set_to_none=True)

    return step
