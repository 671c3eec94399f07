"""What a trainer's arguments say about its step: which of them a plan cannot go with, and where it writes its own."""

from collections.abc import Callable
from typing import Any, Final

import torch

from memplan.blocks import check_plannable
from memplan.errors import UsageError
from memplan.integrations.scripts import REPLICATED, refuse_spread
from memplan.plan_record import Plan

_NAMES: Final = {  # of transformers' `optim` -> memplan's; what is not here is made as the run would make it
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw-fused",
    "adamw_bnb_8bit": "adam8bit",
    "adamw_8bit": "adam8bit",
    "paged_adamw_8bit": "paged-adamw8bit",
    "adagrad": "adagrad",
    "rmsprop": "rmsprop",
}

_SWITCHES: Final = ("activation_checkpointing", "gradient_checkpointing")  # the new name and, before 6, the old one


def check(trainer: Any) -> None:
    """Refuse what contradicts a plan or is not planned for.

    Raises:
        UsageError: the first of these, with the way out.
    """
    args = trainer.args
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    for is_so, what in (
        (trainer.model_init is not None, "model_init makes another model when training starts. Pass the model itself"),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size shrinks the batch after running out of memory and keeps the accumulation, so that "
            "the effective batch is another one. A plan makes it needless: set auto_find_batch_size=False",
        ),
        (args.deepspeed, "deepspeed divides weights and states by rules of its own, which are not planned for"),
        (
            bool(args.fsdp),
            "fsdp divides weights over ranks, which is not planned for here. An Accelerate loop with "
            "memplan.MemplanFSDPPlugin is. With FSDP2, fsdp_config['activation_checkpointing'] draws other "
            "dropout masks when it recomputes, so that gradients are wrong where there is dropout",
        ),
        (
            args.world_size > 1 and not _replicates(trainer.accelerator),
            f"{args.world_size} ranks divide the model by {trainer.accelerator.distributed_type.value}, which is not "
            "planned for here. Let each have all of it (DistributedDataParallel)",
        ),
        (
            args.world_size > 1 and trainer.accelerator.split_batches,
            "split_batches in accelerator_config has the ranks share each batch, and per_device_train_batch_size is "
            "not what a device gets. Leave it out",
        ),
        (
            args.n_gpu > 1,
            f"the model would be copied to {args.n_gpu} cards (DataParallel). Let it see one: CUDA_VISIBLE_DEVICES=0",
        ),
        (
            args.torch_compile,
            "torch_compile changes what a step keeps, and the plan is for the step as it is written. Set it to False",
        ),
        (
            args.use_liger_kernel,
            "use_liger_kernel changes the model when training starts, after the plan. Set it to False: memplan "
            "computes the loss in chunks too",
        ),
        (
            bool((kwargs or {}).get("use_reentrant")),
            "use_reentrant=True is asked for, and a plan recomputes without reentrance. Leave it out: nothing else "
            "has to change, also not for frozen weights",
        ),
        (
            getattr(args, "activation_offloading", False),
            "activation_offloading moves every saved tensor to the host, whatever the plan says. Set it to False; a "
            "plan copies to the host what pays (strategy='offload-first')",
        ),
        (
            getattr(args, "train_sampling_strategy", None) == "batch_rebalance",
            "train_sampling_strategy='batch_rebalance' makes micro-batches of changing size. Use another",
        ),
        (_layerwise(str(args.optim)), f"optim={args.optim!s} steps inside the backward by itself. Use another"),
    ):
        if is_so:
            raise UsageError(f"memplan.autofit(trainer): {what}.")
    check_plannable(trainer.model)
    refuse_spread(trainer.model)


def _replicates(accelerator: Any) -> bool:
    """Whether every rank has the whole model, and rows of its own."""
    divided = getattr(accelerator, "parallelism_config", None)
    return divided is None and accelerator.distributed_type in REPLICATED


def _layerwise(optim: str) -> bool:
    name = optim.rpartition(".")[2].lower()
    return "lomo" in name or name.endswith("layerwise")


def autocast_of(args: Any) -> torch.dtype | None:
    """The type of mixed precision."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def optimizer_of(trainer: Any) -> "str | torch.optim.Optimizer":
    """The optimizer that was passed, or a name; for what memplan has no name for the trainer makes its own now."""
    if trainer.optimizer is None:
        name = _NAMES.get(getattr(trainer.args.optim, "value", trainer.args.optim))
        if name is not None and trainer.optimizer_cls_and_kwargs is None and not trainer.args.optim_args:
            return name
        trainer.create_optimizer()  # as `train` does, which then takes this one
    optimizer: torch.optim.Optimizer = trainer.optimizer
    return optimizer


def set_arguments(trainer: Any, plan: Plan) -> Callable[[], None]:
    """Write the plan into a trainer, in all places where its run reads it. What is returned takes that back."""
    args = trainer.args
    values: dict[str, object] = {
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
    }
    for switch in _SWITCHES:
        values |= {name: value for name, value in ((switch, False), (f"{switch}_kwargs", None)) if hasattr(args, name)}
    before = {name: getattr(args, name) for name in values}
    of_trainer = trainer._train_batch_size
    for name, value in values.items():
        setattr(args, name, value)
    trainer._train_batch_size = plan.micro_batch

    def undo() -> None:
        for name, value in before.items():
            setattr(args, name, value)
        trainer._train_batch_size = of_trainer

    return undo


def differences(trainer: Any, plan: Plan) -> list[str]:
    """Where a trainer's arguments say something else than the plan by now."""
    args = trainer.args
    wanted = {
        "args.per_device_train_batch_size": (args.per_device_train_batch_size, plan.micro_batch),
        "trainer._train_batch_size": (trainer._train_batch_size, plan.micro_batch),
        "args.gradient_accumulation_steps": (args.gradient_accumulation_steps, plan.accumulation),
    }
    return [f"{name} is {is_now}, planned {planned}" for name, (is_now, planned) in wanted.items() if is_now != planned]
