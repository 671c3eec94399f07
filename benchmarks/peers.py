"""What people set by hand to save activation memory: what memplan is compared with. Each can be taken out again.

    undo = PEERS["every 2nd matmul"](model)
    undo()                                  # every attribute of every module is the object that it was

A model of transformers is switched by transformers' own `activation_checkpointing_enable` (5.23 or later),
non-reentrant, with the hook on the embeddings that it sets. ResNet has no such switch: there each bottleneck's forward
is wrapped in torch's checkpoint, as its users do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

Undo = Callable[[], None]
Peer = Callable[[nn.Module], Undo]

_aten = torch.ops.aten

# The kernels behind scaled_dot_product_attention, as TRL lists them, and the CPU's. With dropout the CPU has no kernel:
# attention is then products and a softmax, and a policy by name finds nothing to save.
ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)
LINEAR = (_aten.mm.default, _aten.addmm.default, _aten.convolution.default)
MATMULS = (*LINEAR, _aten.bmm.default, _aten.baddbmm.default)


def checkpointed(model: nn.Module, every: int = 1, context_fn: Callable[[], Any] | None = None) -> Undo:
    """Checkpoint the layers whose index is a multiple of `every`; `context_fn` as for `torch.utils.checkpoint`."""
    undo = _remember(model)
    options: dict[str, Any] = {"use_reentrant": False} | ({} if context_fn is None else {"context_fn": context_fn})
    owner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if not owner.supports_gradient_checkpointing:
        blocks = [module for module in model.modules() if isinstance(module, ResNetBasicLayer | ResNetBottleNeckLayer)]
        for block in blocks[::every]:
            block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]
        return undo
    owner.activation_checkpointing_enable(activation_checkpointing_kwargs=options, every_n_layers=every)

    def disable() -> None:
        owner.disable_input_require_grads()  # its own disable leaves the hook on the embeddings
        undo()

    return disable


def compiled(model: nn.Module, budget: float) -> Undo:
    """torch.compile with `activation_memory_budget`, a share of the compiled graph's activations.

    Compiled at the first step; what was compiled outlives `undo`, so a process should see one budget only.
    """
    undo, before = _remember(model), torch._functorch.config.activation_memory_budget
    torch._functorch.config.activation_memory_budget = budget
    model.compile()

    def disable() -> None:
        torch._functorch.config.activation_memory_budget = before
        undo()

    return disable


def _every_second_matmul() -> Any:
    """torchtitan's rule: save attention and every other product of a linear layer, counted per forward of a block."""
    seen = {True: 0, False: 0}

    def policy(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if operator in LINEAR:
            seen[context.is_recompute] += 1
            saved = seen[context.is_recompute] % 2 == 1
        else:
            saved = operator in ATTENTION
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _saving(*operators: Any) -> Callable[[], Any]:
    return partial(create_selective_checkpoint_contexts, list(operators))


def _remember(model: nn.Module) -> Undo:
    """Give every module the instance attributes that it has now."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]

    def undo() -> None:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)

    return undo


FULL = "full"  # the one that the others are measured against

PEERS: dict[str, Peer] = {
    FULL: checkpointed,
    "every 2 layers": partial(checkpointed, every=2),
    "every 3 layers": partial(checkpointed, every=3),
    "every 4 layers": partial(checkpointed, every=4),
    "attention only": partial(checkpointed, context_fn=_saving(*ATTENTION)),
    "every 2nd matmul": partial(checkpointed, context_fn=_every_second_matmul),
    "matmuls + attention": partial(checkpointed, context_fn=_saving(*MATMULS, *ATTENTION)),
}
