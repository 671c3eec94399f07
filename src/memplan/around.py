"""Around each module of a model: what is to be done before and behind its forward and its backward.

The hooks of deepspeed/runtime/zero (0.19.8) in the order in which it puts them on a module
(`_register_deepspeed_module` of parameter_offload.py), and its linear layer, which holds no view of its weight for the
backward (`LinearFunctionForZeroStage3` of linear.py).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _Around(torch.autograd.Function):
    """A tensor, and something to be done when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, done: Callable[[], None]) -> Tensor:
        ctx.done = done
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            ctx.done()
        return gradient, None


class _Linear(torch.autograd.Function):
    """`LinearFunctionForZeroStage3`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias)
        if inputs.dim() == 2 and bias is not None:
            return torch.addmm(bias, inputs, weight.t())
        output = inputs.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias = ctx.saved_tensors
        for_inputs = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_weight = flat.t().matmul(inputs.reshape(-1, inputs.shape[-1])) if ctx.needs_input_grad[1] else None
        for_bias = flat.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return for_inputs, for_weight, for_bias


@contextmanager
def holding_no_views() -> Iterator[None]:
    """Linear layers run as DeepSpeed has them (`_enable_mem_efficient_linear` of partition_parameters.py)."""
    plain = nn.functional.linear
    nn.functional.linear = _linear  # type: ignore[assignment]  # its first argument has another name
    try:
        yield
    finally:
        nn.functional.linear = plain


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(inputs, weight, bias)  # type: ignore[no-any-return,no-untyped-call]  # torch's


def each_tensor(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`apply_to_tensors_only` of deepspeed/runtime/zero/utils.py: in tuples, lists and, in place, in dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        made = [each_tensor(function, each) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        for key in value:
            value[key] = each_tensor(function, value[key])
    return value


class Hooks:
    """Around the modules of a model: what is called before and behind each one's forward and backward."""

    def __init__(self, before: Callable[[nn.Module, bool], None], behind: Callable[[nn.Module, bool], None]) -> None:
        self._before, self._behind = before, behind
        self._awaited: dict[nn.Module, int] = {}  # gradients of a module's inputs, before it is through

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in model.modules():
                for handle in (
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave),
                ):
                    hooks.callback(handle.remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        with torch.no_grad():
            self._before(module, True)
        self._awaited[module] = 0
        return each_tensor(partial(self._await, module), args)

    def _await(self, module: nn.Module, tensor: Tensor) -> Tensor:
        self._awaited[module] += tensor.requires_grad
        return _Around.apply(tensor, partial(self._arrive, module))  # type: ignore[no-any-return,no-untyped-call]

    def _arrive(self, module: nn.Module) -> None:
        self._awaited[module] -= 1
        if self._awaited[module] == 0:
            self._behind(module, False)

    def _leave(self, module: nn.Module, _args: object, output: Any) -> Any:
        with torch.no_grad():
            self._behind(module, True)
        begin = partial(self._before, module, False)
        return each_tensor(lambda tensor: _Around.apply(tensor, begin), output)  # type: ignore[no-untyped-call]
