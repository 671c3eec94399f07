"""FSDP2's mixed precision: a model computes in one type, and ranks keep their parts of its weights in another.

`fully_shard(module, mp_policy=MixedPrecisionPolicy(...))` gathers a unit's weights in `param_dtype`, casts the inputs
of its forward to that type and the outputs to `output_dtype`, reduces gradients in `reduce_dtype`, and adds them up in
the type in which the weights are kept, which is the optimizer's too (torch/distributed/fsdp/_fully_shard:
`_fsdp_state.py`, `_fsdp_param.py`, `_fsdp_collectives.py`). Before a model is sharded it does none of that by itself:
for as long as it is looked at, it is made to compute as it is going to.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.utils import _apply_to_tensors

from memplan.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

_FIELDS: Final = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")


@dataclass(frozen=True, slots=True)
class MixedPrecision:
    """What a `MixedPrecisionPolicy` makes of one model.

    Attributes:
        kept: of each of the parameters, by its ``id``, the type that it has without the policy. Parameters may be
            replaced between two looks (`to_empty`), so each look at the model notes them anew.
        param_dtype, reduce_dtype, output_dtype, cast_forward_inputs: the policy's.
    """

    kept: dict[int, torch.dtype]
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True

    @classmethod
    def of(cls, model: nn.Module, policy: "MixedPrecisionPolicy | None" = None) -> "MixedPrecision":
        """Without a policy nothing is cast."""
        kept = _types_of(model)
        return cls(kept) if policy is None else cls(kept, *(getattr(policy, name) for name in _FIELDS))

    def gathered(self, parameter: Tensor) -> torch.dtype:
        """The type in which a parameter is gathered."""
        kept = self.kept[id(parameter)]
        return self.param_dtype or kept if kept.is_floating_point else kept

    def reduced(self, parameter: Tensor) -> torch.dtype:
        """The type in which its gradient is reduced."""
        return self.reduce_dtype or self.gathered(parameter)

    @contextmanager
    def on(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
        """The model as it computes when these blocks and itself are sharded. Parameters that are cast have copies.

        Gradients are taken off for the while.
        """
        self.kept.clear()
        self.kept.update(_types_of(model))
        own = [(p, p.data, p.grad) for p in model.parameters() if self.gathered(p) != p.dtype]
        with ExitStack() as undone:
            for parameter, data, gradient in own:  # whatever fails from here on, memory for the copies perhaps
                undone.callback(_put_back, parameter, data, gradient)
                parameter.grad = None
                parameter.data = data.to(self.gathered(parameter))
            for module in (model, *map(model.get_submodule, blocks)):
                cast_in = module.register_forward_pre_hook(self._cast_inputs, prepend=True, with_kwargs=True)
                undone.callback(cast_in.remove)
                undone.callback(module.register_forward_hook(self._cast_outputs).remove)
            yield

    def _cast_inputs(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (self.cast_forward_inputs and self.param_dtype):
            return args, kwargs
        return _cast(args, self.param_dtype), _cast(kwargs, self.param_dtype)

    def _cast_outputs(self, _module: nn.Module, _args: object, output: object) -> object:
        return output if self.output_dtype is None else _cast(output, self.output_dtype)

    def __str__(self) -> str:
        """The policy, such as "param_dtype=bfloat16, reduce_dtype=float32"; "" if it casts nothing."""
        types = {name: getattr(self, name) for name in _FIELDS[:-1]}
        said = [f"{name}={str(dtype).removeprefix('torch.')}" for name, dtype in types.items() if dtype is not None]
        return ", ".join([*said, *([] if self.cast_forward_inputs or not said else ["cast_forward_inputs=False"])])


def _types_of(model: nn.Module) -> dict[int, torch.dtype]:
    return {id(parameter): parameter.dtype for parameter in model.parameters()}


def _put_back(parameter: Tensor, data: Tensor, gradient: Tensor | None) -> None:
    parameter.data = data
    parameter.grad = gradient


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return _apply_to_tensors(lambda x: x.to(dtype) if torch.is_floating_point(x) else x, values)


def check_policy(policy: object) -> None:
    """Raises UsageError, if it is no `MixedPrecisionPolicy`."""
    if policy is not None and not all(hasattr(policy, name) for name in _FIELDS):
        raise UsageError(
            f"mp_policy is a {type(policy).__name__}. Pass what fully_shard gets, such as "
            "torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)."
        )
