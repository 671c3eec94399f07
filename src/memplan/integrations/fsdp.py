"""FSDP2 in an Accelerate script, sharded as memplan counts it.

::

    accelerator = Accelerator(fsdp_plugin=memplan.MemplanFSDPPlugin())
    memplan.attach(accelerator, gpu="auto")
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

Each block is gathered by itself and all other weights with the model, as `memplan.sharding` has it. The plan is in the
model before it is sharded, and what it recomputes keeps its random state. Accelerate's own plugin shards embedding and
head as units of their own, and its checkpoints draw other dropout masks in the backward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from memplan.blocks import find_blocks
from memplan.errors import UsageError
from memplan.mixed_precision import MixedPrecision
from memplan.packed import bits_of


class MemplanFSDPPlugin(FullyShardedDataParallelPlugin):  # type: ignore[misc]  # Accelerate ships no types
    """Accelerate's plugin with its arguments, for FSDP2 in an Accelerator that memplan is attached to.

    What of them is not counted, `memplan.attach` refuses. Without memplan attached, Accelerate shards by it as ever.
    """

    fsdp_version: int | None

    def __post_init__(self) -> None:
        if self.fsdp_version is None:
            self.fsdp_version = 2
        super().__post_init__()

    def set_auto_wrap_policy(self, model: nn.Module) -> None:
        """Accelerate looks for classes by their names, which sharding changes. What is sharded needs no policy."""
        from torch.distributed.fsdp import FSDPModule  # seconds, which those without FSDP need not wait for

        if not isinstance(model, FSDPModule):
            super().set_auto_wrap_policy(model)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether its processes share the weights of one model."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def refuse_uncounted(accelerator: Accelerator) -> None:
    """Raises UsageError, if its FSDP is not what memplan counts."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    if not isinstance(plugin, MemplanFSDPPlugin):
        raise UsageError(
            "Accelerate's own FSDP plugin shards embedding and head in a way that memplan does not count. Use "
            "Accelerator(fsdp_plugin=memplan.MemplanFSDPPlugin()), which takes the same arguments."
        )
    asked = {
        "fsdp_version=1": (plugin.fsdp_version != 2, "what FSDP1 keeps in memory is not known to memplan"),
        "activation_checkpointing": (plugin.activation_checkpointing, "the plan decides what is recomputed"),
        "reshard_after_forward=False": (not plugin.reshard_after_forward, "blocks are counted as sharded after each"),
        "cpu_offload": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "weights are counted on the device"),
        "ignored_modules": (plugin.ignored_modules is not None, "all weights are counted as sharded"),
        "cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "each rank has to have the weights"),
        "mixed_precision='fp16'": (
            accelerator.mixed_precision == "fp16" or torch.float16 in _types(plugin),
            "scaling a loss whose gradients are spread over ranks has not been tried; bf16 needs none",
        ),
        "even_batches=False": (
            not accelerator.even_batches,
            "ranks may have other numbers of micro-batches, in each of which they wait for each other",
        ),
        "parallelism_config": (
            getattr(accelerator, "parallelism_config", None) is not None,
            "all processes are to share the weights",
        ),
        "one process": (accelerator.num_processes == 1, "there is nobody to share its weights with"),
    }
    for what, (is_asked, why) in asked.items():
        if is_asked:
            raise UsageError(
                f"{what} is not counted with FSDP2: {why}. Leave it out, also of Accelerate's config file."
            )


def _types(plugin: MemplanFSDPPlugin) -> tuple[torch.dtype | None, ...]:
    policy = plugin.mixed_precision_policy
    return () if policy is None else (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)


def mixed_in(accelerator: Accelerator, model: nn.Module) -> MixedPrecision | None:
    """What FSDP2 is going to cast of a model. With mixed precision what is trained is kept in float32.

    That is Accelerate's own rule for models that it shards itself (`fsdp2_prepare_model` in
    accelerate/utils/fsdp_utils.py), so it is kept here.
    """
    if accelerator.mixed_precision != "no":
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.to(torch.float32)
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    return None if policy is None else MixedPrecision.of(model, policy)


@contextmanager
def sharded(accelerator: Accelerator, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Around Accelerate's `prepare`, to which a model that is sharded already is as good as its own.

    Raises:
        UsageError: packed weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = accelerator.state.fsdp_plugin.mixed_precision_policy or MixedPrecisionPolicy()
    packed = [name for name, parameter in model.named_parameters() if bits_of(parameter)]
    if packed:
        raise UsageError(
            f"{packed[0]} and {len(packed) - 1} more are packed by bitsandbytes: what a rank holds of such a weight is "
            "not counted. Train on one card or with DistributedDataParallel."
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [[[names[id(p)] for p in group["params"]] for group in o.param_groups] for o in optimizers]

    def hand_out() -> None:
        parameters = dict(model.named_parameters())
        for optimizer, groups in zip(optimizers, held, strict=True):
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [parameters[name] for name in own]

    for path in find_blocks(model):
        fully_shard(model.get_submodule(path), mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    hand_out()
    # Gradients are counted as scattered after each micro-batch. `accumulate()` would hold them whole until the last.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    yield
    hand_out()  # Accelerate tells parameters by their addresses; those without rows on this rank have the same
