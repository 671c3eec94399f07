"""DeepSpeed's ZeRO-2 and ZeRO-3 in an Accelerate script: what its engine makes of a step, and the plan in its config.

::

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False))
    memplan.attach(accelerator, gpu="auto")
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

A plan is for one rank (`memplan.zero`, `memplan.zero3`). The micro-batch and the number of micro-batches are in the
engine's config before the engine is made. It then divides losses by that number, where Accelerate does so elsewhere,
and steps where Accelerate's flag says so. So micro-batches are weighted, and ragged ends come out, as without it.

Defaults of options are those of deepspeed/runtime/zero/config.py (0.19.8). What would make other sizes is refused.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn
from torch.optim import Optimizer

from memplan.errors import UsageError
from memplan.gathering import Gathers
from memplan.packed import bits_of
from memplan.plan_record import Plan
from memplan.recipe import Recipe
from memplan.zero import Zero
from memplan.zero3 import Zero3

# Sizes in elements, by default: what Accelerate makes of "auto", for a model of a width, is beside each.
_SIZES: Final[dict[str, tuple[int, Callable[[int], int] | None]]] = {
    "reduce_bucket_size": (500_000_000, lambda width: width**2),
    "stage3_prefetch_bucket_size": (50_000_000, lambda width: int(0.9 * width**2)),
    "stage3_param_persistence_threshold": (100_000, lambda width: 10 * width),
    "stage3_model_persistence_threshold": (sys.maxsize, None),
    "stage3_max_live_parameters": (1_000_000_000, None),
    "stage3_max_reuse_distance": (1_000_000_000, None),
    "sub_group_size": (1_000_000_000, None),
}

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
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",  # outside of steps, as the next two are
        "stage3_gather_fp16_weights_on_model_save",
        "pipeline_loading_checkpoint",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
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
}
_WEIGHTS: Final = 3  # the stage that shares the weights too

# Gathered with all that is in them: DEFAULT_LEAF_MODULE_CLASSES of deepspeed/runtime/zero/leaf_module_config.py.
_LEAVES: Final = frozenset({"MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock"})


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether its model is run by DeepSpeed's engine."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def shares_weights(accelerator: Accelerator) -> bool:
    """Whether its engine gives each rank a part of the weights only."""
    return is_deepspeed(accelerator) and _stage(_config(accelerator)) == _WEIGHTS


def check_engine(accelerator: Accelerator) -> None:
    """Raises UsageError, if its DeepSpeed is set to what memplan does not count."""
    config = _config(accelerator)
    stage = _stage(config)
    if stage not in (2, _WEIGHTS):
        raise UsageError(f"{_STAGES.get(stage, f'ZeRO-{stage} is not known to memplan')}.")
    asked = dict(_uncounted(config))
    if accelerator.mixed_precision == "fp8":
        asked["fp8"] = "what it keeps in memory is not known to memplan"
    if not accelerator.even_batches:
        asked["even_batches=False"] = "ranks may have other numbers of micro-batches, and wait for each other in each"
    if stage == _WEIGHTS and accelerator.state.deepspeed_plugin.transformer_moe_cls_names is not None:
        asked["transformer_moe_cls_names"] = "weights are counted as gathered module by module"
    if getattr(accelerator, "parallelism_config", None) is not None:
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
        if _is_set(zero[name]) and (_stage(config) == _WEIGHTS or not name.startswith("stage3_")):
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
        UsageError: the config is for another batch; the model's weights are not whole, or packed.
    """
    config = _config(accelerator)
    if shares_weights(accelerator):
        _check_weights(model)
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


def _check_weights(model: nn.Module) -> None:
    """Raises UsageError, if the model is not one whose weights ZeRO-3 would gather module by module."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UsageError(
            "the model's weights are spread over the ranks already, and a plan needs them whole: make the model under "
            "DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False), and outside of deepspeed.zero.Init."
        )
    if any(not p.is_floating_point() or bits_of(p) for p in model.parameters()):
        raise UsageError(
            "some weights are packed: what a rank holds of such a weight under ZeRO-3 is not counted. Use zero_stage=2."
        )
    leaves = {type(module).__name__ for module in model.modules() if getattr(module, "_z3_leaf", False)}
    leaves |= _LEAVES & {type(module).__name__ for module in model.modules()}
    if leaves:
        raise UsageError(
            f"DeepSpeed gathers {', '.join(sorted(leaves))} with all that is in it at once, which is not counted under "
            "ZeRO-3. Use zero_stage=2."
        )


def as_the_engine_runs(recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> Recipe:
    """The recipe of a step, on one of the engine's ranks.

    Raises:
        UsageError: the engine would make an optimizer that is not known to memplan.
    """
    config = _config(accelerator)
    optimizer: str | Optimizer = recipe.optimizer
    groups = [list(model.parameters())]
    if isinstance(optimizer, str):
        optimizer = _own_optimizer(config)
    else:
        groups = [group["params"] for group in optimizer.param_groups]
    trained = [[p for p in group if p.requires_grad] for group in groups]
    make = _weights_shared if _stage(config) == _WEIGHTS else _shared
    shared = make(accelerator, model, trained)
    # It clips by a norm of its own making, which is counted with the step, and casts no operator.
    return replace(recipe, optimizer=optimizer, autocast=None, clips=False, zero=shared)


def _shared(accelerator: Accelerator, model: nn.Module, trained: Sequence[Sequence[nn.Parameter]]) -> Zero:
    zero = _config(accelerator)["zero_optimization"]
    return Zero(
        ranks=accelerator.num_processes,
        numels=_numels(trained),
        dtype=_dtype(accelerator),
        bucket_numel=_numel(zero, "reduce_bucket_size", model),
        buckets=2 if zero.get("overlap_comm") else 1,
    )


def _weights_shared(accelerator: Accelerator, model: nn.Module, trained: Sequence[Sequence[nn.Parameter]]) -> Zero3:
    zero = _config(accelerator)["zero_optimization"]
    known = {id(parameter) for group in trained for parameter in group}
    gathers = Gathers(
        ranks=accelerator.num_processes,
        bucket=_numel(zero, "reduce_bucket_size", model),
        prefetch=_numel(zero, "stage3_prefetch_bucket_size", model),
        live=_numel(zero, "stage3_max_live_parameters", model),
        reuse=_numel(zero, "stage3_max_reuse_distance", model),
        whole=_numel(zero, "stage3_param_persistence_threshold", model),
        all_whole=_numel(zero, "stage3_model_persistence_threshold", model),
        holds_no_views=bool(zero.get("memory_efficient_linear", True)),
    )
    numels = [parameter.numel() for parameter in model.parameters()]
    return Zero3(
        trained=_numels(trained),
        others=tuple(p.numel() for p in model.parameters() if id(p) not in known),
        dtype=_dtype(accelerator),
        sub_group=_numel(zero, "sub_group_size", model),
        gathers=gathers,
        stay=tuple(numel for numel, stays in zip(numels, gathers.staying(numels), strict=True) if stays),
    )


def _numels(groups: Sequence[Sequence[nn.Parameter]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(parameter.numel() for parameter in group) for group in groups)


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


def _stage(config: Mapping[str, Any]) -> int:
    return int(config["zero_optimization"].get("stage", 0))


def _is_set(value: object) -> bool:
    """Whether an option, or one of several, is on. A device is one where it is not "none"."""
    if isinstance(value, Mapping):
        return bool(value.get("enabled", True)) and any(map(_is_set, value.values()))
    return bool(value) and value not in ("none", "false")


def _dtype(accelerator: Accelerator) -> torch.dtype:
    """In which the engine keeps weights and gradients."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def _numel(zero: Mapping[str, Any], name: str, model: nn.Module) -> int:
    """As Accelerate fills in "auto" (`Accelerator._prepare_deepspeed`), for which it needs `model.config` itself."""
    default, of_width = _SIZES[name]
    asked = zero.get(name, default)
    if asked != "auto" or of_width is None:
        return int(asked)
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or max(getattr(config, "hidden_sizes", None) or [0])
    if not width:
        raise UsageError(
            f'{name} is "auto" in the DeepSpeed config, and the model has no config.hidden_size to take it from. Give '
            "it a number of elements."
        )
    return of_width(int(width))


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
