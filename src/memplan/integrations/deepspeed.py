"""DeepSpeed's ZeRO-2 in an Accelerate script: what its engine makes of a step, and the plan in its config.

::

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    memplan.attach(accelerator, gpu="auto")
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

A plan is for one rank (`memplan.zero`). The micro-batch and the number of micro-batches are in the engine's config
before the engine is made. It then divides losses by that number, where Accelerate does so elsewhere, and steps where
Accelerate's flag says so. So micro-batches are weighted, and ragged ends come out, as without DeepSpeed.

Defaults of options are those of deepspeed/runtime/zero/config.py (0.19.8). What would make other sizes is refused.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn
from torch.optim import Optimizer

from memplan.errors import UsageError
from memplan.plan_record import Plan
from memplan.recipe import Recipe
from memplan.zero import Zero

_BUCKET_NUMEL: Final = 500_000_000  # reduce_bucket_size

# Of "zero_optimization": what changes no size, or is counted.
_COUNTED: Final = frozenset(
    {
        "stage",
        "reduce_bucket_size",
        "overlap_comm",
        "allgather_partitions",
        "allgather_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "ignore_unused_parameters",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "compute_grad_norm",
        "sub_group_size",
        "memory_efficient_linear",
        "override_module_apply",
    }
)
_FIXED: Final = {"contiguous_gradients": True, "reduce_scatter": True, "zero_hpz_partition_size": 1}  # so counted
_OFF: Final = {
    "activation_checkpointing": "the plan decides what is recomputed",
    "pipeline": "stages of a pipeline hold other micro-batches at the same time",
    "tensor_parallel": "weights are counted as whole on each rank",
    "elasticity": "the plan is for one number of ranks",
    "autotuning": "the plan decides the micro-batch",
    "data_types": "gradients are counted in the type of the weights",
    "communication_data_type": "gradients are counted as sent in their own type",
    "torch_autocast": "the model is counted as cast",
    "amp": "the model is counted as cast",
    "sparse_gradients": "gradients are counted as dense",
    "data_efficiency": "batches are counted as the loader makes them",
    "compression_training": "weights are counted as they are",
    "compile": "operators are counted as torch runs them one by one",
}
_STAGES: Final = {
    0: "DeepSpeed without ZeRO keeps gradients by rules of its own. Use DistributedDataParallel (no DeepSpeed plugin)",
    1: "ZeRO-1 keeps whole gradients by rules of its own. Use zero_stage=2, which needs less",
    3: "ZeRO-3 takes a module's weights away when the module has run, and what memplan runs again inside a block would "
    "find none. Use zero_stage=2, or FSDP2, which shares as much (memplan.MemplanFSDPPlugin)",
}


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether its model is run by DeepSpeed's engine."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def check_engine(accelerator: Accelerator) -> None:
    """Raises UsageError, if its DeepSpeed is set to what memplan does not count."""
    config = _config(accelerator)
    stage = int(config["zero_optimization"].get("stage", 0))
    if stage != 2:
        raise UsageError(f"{_STAGES.get(stage, f'ZeRO-{stage} is not known to memplan')}.")
    asked = dict(_uncounted(config))
    if accelerator.mixed_precision == "fp8":
        asked["fp8"] = "what it keeps in memory is not known to memplan"
    if not accelerator.even_batches:
        asked["even_batches=False"] = "ranks may have other numbers of micro-batches, and wait for each other in each"
    if accelerator.parallelism_config is not None:
        asked["parallelism_config"] = "all ranks are counted to have samples of their own"
    for what, why in asked.items():
        raise UsageError(f"{what} is not counted with DeepSpeed: {why}. Leave it out, also of the DeepSpeed config.")
    if "sync_gradients" not in inspect.signature(DeepSpeedEngineWrapper.backward).parameters:
        raise UsageError(
            "with this version of Accelerate, DeepSpeed's engine counts micro-batches by itself, and would take the "
            "last ones of an epoch for the first of the next one's. Update Accelerate (pip install -U accelerate)."
        )


def _uncounted(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a config asks for, and why that is not counted."""
    zero = config["zero_optimization"]
    yield from ((name, why) for name, why in _OFF.items() if _is_set(config.get(name)))
    for name, counted in _FIXED.items():
        if (found := zero.get(name, counted)) != counted:
            yield f"{name}={found}", f"it is counted as {counted}"
    for name in sorted(zero.keys() - _COUNTED - _FIXED.keys()):
        if not name.startswith("stage3_") and _is_set(zero[name]):  # those are for stage 3
            yield name, "what it keeps in memory is not known to memplan"
    for precision in ("bf16", "fp16"):
        for key, value in config.get(precision, {}).items():
            if value and ("master" in key or "states" in key):
                yield f"{precision}.{key}", "master weights and states are counted in float32"


def settle(accelerator: Accelerator, model: nn.Module, batch_size: int) -> None:
    """What Accelerate and the engine are going to do first, done before it is planned for.

    The config's number of batches per step, where it is one, is the Accelerator's; weights are cast to the type in
    which they are trained.

    Args:
        batch_size: samples in one of the loader's batches on one process.

    Raises:
        UsageError: the config is for another batch.
    """
    config = _config(accelerator)
    fixed = config.get("train_micro_batch_size_per_gpu", "auto")
    if fixed not in ("auto", batch_size):
        raise UsageError(
            f"the DeepSpeed config has train_micro_batch_size_per_gpu={fixed}, and the loader batches of {batch_size}. "
            'Set it to "auto": the plan decides the micro-batch.'
        )
    steps = config.get("gradient_accumulation_steps", "auto")
    if steps != "auto":
        accelerator.gradient_accumulation_steps = int(steps)
    dtype = _dtype(accelerator)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def as_the_engine_runs(recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> Recipe:
    """The recipe of a step, on one of the engine's ranks.

    Raises:
        UsageError: the engine would make an optimizer that is not known to memplan.
    """
    config = _config(accelerator)
    zero = config["zero_optimization"]
    optimizer: str | Optimizer = recipe.optimizer
    groups = [list(model.parameters())]
    if isinstance(optimizer, str):
        optimizer = _own_optimizer(config)
    else:
        groups = [group["params"] for group in optimizer.param_groups]
    shared = Zero(
        ranks=accelerator.num_processes,
        numels=tuple(tuple(p.numel() for p in group if p.requires_grad) for group in groups),
        dtype=_dtype(accelerator),
        bucket_numel=_bucket_numel(zero.get("reduce_bucket_size", _BUCKET_NUMEL), model),
        buckets=2 if zero.get("overlap_comm") else 1,
    )
    # It clips by a norm of its own making, which is counted with the step, and casts no operator.
    return replace(recipe, optimizer=optimizer, autocast=None, clips=False, zero=shared)


def write(accelerator: Accelerator, plan: Plan) -> None:
    """The plan's sizes, to where the engine reads them."""
    sizes = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.micro_batch * plan.accumulation * accelerator.num_processes,
    }
    _config(accelerator).update(sizes)


def _config(accelerator: Accelerator) -> dict[str, Any]:
    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    return config


def _is_set(value: object) -> bool:
    """Whether an option, or one of several, is on. A device is one where it is not "none"."""
    if isinstance(value, Mapping):
        return bool(value.get("enabled", True)) and any(map(_is_set, value.values()))
    return bool(value) and value not in ("none", "false")


def _dtype(accelerator: Accelerator) -> torch.dtype:
    """In which the engine keeps weights and gradients."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def _bucket_numel(asked: "int | float | str", model: nn.Module) -> int:
    """As Accelerate fills in "auto" (`Accelerator._prepare_deepspeed`), for which it needs `model.config` itself."""
    if asked != "auto":
        return int(asked)
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or max(getattr(config, "hidden_sizes", None) or [0])
    if not width:
        raise UsageError(
            'reduce_bucket_size is "auto" in the DeepSpeed config, and the model has no config.hidden_size to take it '
            "from. Give it a number of elements."
        )
    return int(width) ** 2


def _own_optimizer(config: Mapping[str, Any]) -> str:
    """The optimizer that the engine makes by its config (`_configure_basic_optimizer` in deepspeed/runtime/engine.py).

    Its FusedAdam has Adam's states and no temporaries.
    """
    asked = config.get("optimizer") or {}
    name = str(asked.get("type", "none")).lower()
    if name not in ("adam", "adamw"):
        raise UsageError(
            f"the DeepSpeed config has the optimizer {name}, whose state is not known to memplan. Pass one of torch "
            'to accelerator.prepare in this call, or have "Adam" or "AdamW" in the config.'
        )
    return name if asked.get("params", {}).get("torch_adam") else f"{name}-fused"
