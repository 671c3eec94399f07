"""What memplan has to find in somebody's Accelerate script, and what it refuses there before any step is run."""

from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from memplan._compat import is_checkpointing_layer
from memplan.blocks import check_plannable
from memplan.errors import AlreadyApplied, UsageError
from memplan.integrations.deepspeed import check_engine, is_deepspeed
from memplan.integrations.fsdp import is_sharded, refuse_uncounted
from memplan.integrations.loaders import batch_size_of
from memplan.world import of_first, on_any

PRECISIONS: Final = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What Accelerate casts to, by its word for it; None: nothing."""

REPLICATED: Final = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_KNOWN_WORLDS: Final = (DistributedType.NO, *REPLICATED, DistributedType.FSDP, DistributedType.DEEPSPEED)


def model_and_loader(objects: tuple[Any, ...]) -> tuple[nn.Module, int]:
    """The model, and the place of the training loader: the one that shuffles, else the first."""
    models = [o for o in objects if isinstance(o, nn.Module)]
    loaders = [at for at, o in enumerate(objects) if isinstance(o, DataLoader)]
    if len(models) != 1 or not loaders:
        raise UsageError(
            f"memplan plans in accelerator.prepare(...), for one model and its training loader; this call has "
            f"{len(models)} models and {len(loaders)} loaders. Prepare both in one call, evaluation afterwards: "
            "model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)"
        )
    shuffled = [at for at in loaders if isinstance(objects[at].sampler, RandomSampler)]
    (model,) = models
    check_plannable(model)
    refuse_spread(model)
    _refuse_checkpointed(model)
    place = shuffled[0] if len(shuffled) == 1 else loaders[0]
    if getattr(objects[place], "_is_accelerate_prepared", False) or hasattr(objects[place], "base_dataloader"):
        raise UsageError("the training loader was prepared already, so its batches are fixed. Pass the plain loader.")
    return model, place


def refuse_spread(model: nn.Module) -> None:
    """A model that `device_map` has spread over devices, which Accelerate and Trainer leave there."""
    for module in model.modules():
        mapped = {str(place) for place in (getattr(module, "hf_device_map", None) or {}).values()}
        if len(mapped) > 1 and len({parameter.device for parameter in module.parameters()}) > 1:
            raise UsageError(
                f"device_map has spread the weights over {', '.join(sorted(mapped))}, and a plan is for one device. "
                "Load them without it, or onto one: device_map={'': 0}. What one card cannot hold, cards share by "
                "FSDP2 (memplan.MemplanFSDPPlugin)."
            )


def _refuse_checkpointed(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if is_checkpointing_layer(module) and getattr(module, "gradient_checkpointing", False):
            raise AlreadyApplied(
                f"{path or 'the model'} is checkpointed by transformers already. Call "
                "model.gradient_checkpointing_disable() and let the plan decide what is recomputed."
            )


def refuse_unknown_runs(accelerator: Accelerator) -> None:
    if accelerator.distributed_type not in _KNOWN_WORLDS:
        raise UsageError(
            f"memplan does not know what {accelerator.distributed_type.value} keeps in memory, so its plan could be "
            "wrong. Run with DistributedDataParallel or on one card."
        )
    if is_sharded(accelerator):
        refuse_uncounted(accelerator)
    elif getattr(accelerator, "parallelism_config", None) is not None:
        raise UsageError(
            "parallelism_config has ranks divide the model, which is not planned for. Leave it out, so that each has "
            "all of it."
        )
    if is_deepspeed(accelerator):
        check_engine(accelerator)
    if accelerator.mixed_precision not in PRECISIONS:
        raise UsageError(
            f"mixed_precision={accelerator.mixed_precision!r} puts other layers into the model when it is prepared, "
            "after the plan. Use 'bf16', 'fp16' or 'no', or run without a plan: memplan.attach(accelerator, "
            "enabled=False)."
        )
    compiles = getattr(accelerator.state, "dynamo_plugin", None)
    if compiles is not None and str(getattr(compiles.backend, "value", compiles.backend)).upper() != "NO":
        raise UsageError(
            "the Accelerator compiles the model (dynamo_backend), and what a plan does inside of its blocks would be "
            "compiled away. Leave that out, or plan with enabled=False."
        )
    if accelerator.dataloader_config.use_stateful_dataloader:
        raise UsageError(
            "a stateful loader (use_stateful_dataloader) saves its place in micro-batches, and another plan would go "
            "on with other rows. Leave that out: accelerator.skip_first_batches finds the place."
        )
    state = accelerator.gradient_state
    if state.num_steps > 1 and not state.sync_with_dataloader:
        raise UsageError(
            "the Accelerator accumulates across the ends of epochs (sync_with_dataloader=False), where memplan begins "
            "a new step. Leave that out."
        )


def own_batch_size(accelerator: Accelerator, loader: DataLoader[Any]) -> int:
    """Samples in one of the script's batches on one process."""
    size: int = batch_size_of(loader)
    if not accelerator.split_batches:
        return size
    if size % accelerator.num_processes:
        raise UsageError(
            f"with split_batches a batch of {size} has to be a multiple of the {accelerator.num_processes} processes"
        )
    return size // int(accelerator.num_processes)


def refuse_other_batches(own_rows: int) -> None:
    """To be called on every rank, with the samples in its batches: one plan divides those of all."""
    first = of_first(own_rows)
    if on_any(own_rows != first):
        raise UsageError(
            f"the loader makes batches of {own_rows} on this rank and of {first} on the first, or others have another "
            "size, and one plan is for all. Give every rank the same batch_size."
        )


def is_dealt_out(accelerator: Accelerator, loader: DataLoader[Any]) -> bool:
    """Whether the first process reads for all: then other rows would come to a process if batches were cut."""
    dispatches = accelerator.dispatch_batches
    if dispatches is None:
        dispatches = isinstance(loader.dataset, IterableDataset) and accelerator.device_placement
    return bool(dispatches) and accelerator.num_processes > 1
