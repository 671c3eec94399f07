"""An Accelerator on DeepSpeed, and an engine for it that does what DeepSpeed's says that it does.

DeepSpeed itself is no dependency: the stand-in divides the loss by the config's number of micro-batches, and steps,
clips and drops gradients at the boundary that it is told. Accelerate's own code runs around it.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.accelerator
import accelerate.utils.deepspeed
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DistributedType
from torch import nn

BUCKET = 20_000  # elements


class Engine(nn.Module):
    """`deepspeed.DeepSpeedEngine`, as its docstrings have it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.optimizer, self.config = model, optimizer, dict(config)
        self.boundary, self.norm = True, None
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        micro_batch, self.micro_batches, batch = (self.config[name] for name in sizes)
        assert batch == micro_batch * self.micro_batches

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundary = is_boundary

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.micro_batches).backward()  # type: ignore[no-untyped-call]  # torch's

    def step(self) -> None:
        if self.boundary:
            self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config["gradient_clipping"])
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> torch.Tensor | None:
        return self.norm


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the engine where Accelerate looks for DeepSpeed's."""
    module = ModuleType("deepspeed")

    def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config_params: dict[str, Any]) -> Any:
        return Engine(model, optimizer, config_params), optimizer, None, None

    runtime = SimpleNamespace(lr_schedules=SimpleNamespace(VALID_LR_SCHEDULES=()))
    vars(module).update(initialize=initialize, runtime=runtime)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    names = ("DeepSpeedEngineWrapper", "DeepSpeedOptimizerWrapper", "DeepSpeedSchedulerWrapper")
    for name in (*names, "DummyOptim", "DummyScheduler"):
        monkeypatch.setattr(accelerate.accelerator, name, getattr(accelerate.utils.deepspeed, name), raising=False)
    monkeypatch.setattr(accelerate.accelerator, "compare_versions", lambda *_: True)


def with_engine(
    accelerator: Accelerator,
    then: Callable[[Accelerator], object] | None = None,
    zero: dict[str, Any] | None = None,
    **config: Any,
) -> Accelerator:
    """Accelerate takes its DeepSpeed plugin only where DeepSpeed is installed, and leaves it out where no cards are."""
    whole = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET, **(zero or {})},
        **config,
    }
    plugin = DeepSpeedPlugin(hf_ds_config=whole)
    plugin.set_mixed_precision("bf16" if "bf16" in config else "no")
    for state in (PartialState(), accelerator.state):  # the second is filled from the first, again and again
        state.distributed_type = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins = plugin
    accelerator.deepspeed_engine_wrapped = None
    if then is not None:
        then(accelerator)
    return accelerator
