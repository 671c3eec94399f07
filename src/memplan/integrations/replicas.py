"""The loss in chunks under DistributedDataParallel, which may copy all that a model returns.

Where it looks for unused parameters (`find_unused_parameters=True`), and in the first backward of a static graph, it
clones each output that has a gradient. A clone of logits that are not there makes them, with autograd: the head then
runs as a whole, and the peak is above the plan by about two tensors of logits.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import nn

from memplan.errors import PlanMismatch
from memplan.integrations.fsdp import is_sharded, mixed_in
from memplan.integrations.scripts import REPLICATED
from memplan.levers.loss_head import find_head, rows_of
from memplan.plan_record import Plan
from memplan.strategy import Strategy, load_strategy

_LEVER: Final = "loss-head"


def for_replicas(
    strategy: str | Path | Strategy, model: nn.Module, accelerator: Any, args: Any = None
) -> tuple[str | Path | Strategy, tuple[str, ...]]:
    """The strategy, without the loss in chunks where DistributedDataParallel would read the logits, and a word on that.

    Args:
        accelerator: by which the model is going to be wrapped.
        args: of the Trainer whose accelerator that is; None: it is a script's own.
    """
    option = copying(accelerator, args)
    if option is None or not isinstance(strategy, str | Path | Strategy):  # planning says what is wrong with others
        return strategy, ()
    chosen = load_strategy(strategy)
    if _LEVER not in chosen.levers or find_head(model) is None:
        return strategy, ()
    levers, first = (tuple(lever for lever in s if lever != _LEVER) for s in (chosen.levers, chosen.levers_first))
    said = f"the loss is not computed in chunks: {_why(option)}. {_way_out(option, args is not None)}"
    return replace(chosen, levers=levers, levers_first=first), (said,)


def copying(accelerator: Any, args: Any = None) -> str | None:
    """The option by which DistributedDataParallel is going to copy a model's outputs; None: it hands them on."""
    if accelerator.num_processes == 1 or accelerator.distributed_type not in REPLICATED:
        return None
    handler = accelerator.ddp_handler
    if handler is not None:
        unused, static = handler.find_unused_parameters, handler.static_graph
    elif args is not None:  # older Trainers decide when they wrap the model; a plan has switched checkpointing off then
        unused, static = args.ddp_find_unused_parameters is not False, getattr(args, "ddp_static_graph", None)
    else:
        return None
    return "static_graph" if static else "find_unused_parameters" if unused else None


def refuse_copied(plan: Plan, accelerator: Any) -> None:
    """For a plan that was made elsewhere.

    Raises:
        PlanMismatch: it computes the loss in chunks, which the run would undo.
    """
    option = copying(accelerator)
    if option is not None and any(rows_of(decision) for decision in plan.decisions.values()):
        raise PlanMismatch(
            f"the plan computes the loss in chunks, and {_why(option)}. {_way_out(option, False)}; or plan for this "
            "run, without a file."
        )


def _why(option: str) -> str:
    return (
        f"DistributedDataParallel with {option}=True copies what the model returns, so that its logits would be there "
        "as a whole, twice"
    )


def _way_out(option: str, is_trainer: bool) -> str:
    needed = "" if option == "static_graph" else "If every parameter takes part in every step, "
    where = (
        f"make the trainer with ddp_{option}=False"
        if is_trainer
        else f"pass Accelerator(kwargs_handlers=[DistributedDataParallelKwargs({option}=False)])"
    )
    words = f"{needed}{where}"
    return words[0].upper() + words[1:]


def ranks_in(accelerator: Any, model: nn.Module) -> dict[str, Any]:
    """What DistributedDataParallel or FSDP2 make of a step, as arguments of a `Recipe`."""
    if is_sharded(accelerator):
        return {"shards": accelerator.num_processes, "mixed": mixed_in(accelerator, model)}
    if accelerator.distributed_type not in REPLICATED or accelerator.num_processes == 1:
        return {}
    handler = accelerator.ddp_handler
    return {
        "replicas": accelerator.num_processes,
        "bucket_view": bool(handler is not None and handler.gradient_as_bucket_view),
    }
