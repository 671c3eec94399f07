"""What a loop holds of a forward whose backward ran out of memory: its values stay, what they were made from is freed.

A loop has the model's output in variables of its own, and each differentiable tensor in it holds the graph with all
that the backward had not come to. Cut off in place, it keeps its values.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from weakref import ref

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from memplan._compat import is_cache
from memplan.levers.lazy_logits import LazyLogits
from memplan.means import tensors_in


def unviewed(output: Any) -> Any:
    """A model's output where no tensor with a graph is a view, which could not be cut off: the same memory, no copy."""
    if not any(map(_is_graph_view, tensors_in(output))):
        return output
    return recursively_apply(_Unviewed.apply, output, test_type=_is_graph_view)


class Handed:
    """The tensors in a model's output that a loop has, none of which is kept alive here."""

    def __init__(self, output: Any) -> None:
        self._tensors = [ref(tensor) for tensor in _all_in(output) if tensor.grad_fn is not None]  # no parameter

    def let_go(self, loss: Tensor) -> None:
        """Cut them off from what they were made of, and the loss that the loop has made of them."""
        for tensor in (*(each() for each in self._tensors), loss):
            if tensor is not None:
                _cut_off(tensor)


def _cut_off(tensor: Tensor) -> None:
    if isinstance(tensor, LazyLogits):
        _cut_off_hidden(tensor)
    with suppress(RuntimeError), torch._C.DisableTorchFunctionSubclass():  # a view, of which more is held then
        tensor.detach_()


def _cut_off_hidden(logits: LazyLogits) -> None:
    """They can be computed still, until the weights change."""
    call, deferred = logits.deferred.call, logits.deferred
    object.__setattr__(call, "hidden", call.hidden.detach())
    while deferred is not None:
        deferred.rows = deferred.rows.detach()
        deferred._value = None if deferred._value is None else deferred._value.detach()
        deferred = deferred._parent  # type: ignore[assignment]  # None ends it


def _all_in(output: Any) -> Iterator[Tensor]:
    yield from tensors_in(output)
    parts: Iterable[Any] = output.values() if isinstance(output, dict) else output if type(output) is tuple else ()
    for cache in filter(is_cache, parts):
        yield from _keys_and_values(cache)


def _keys_and_values(cache: Any) -> Iterator[Tensor]:
    for inner in filter(is_cache, vars(cache).values()):  # of an encoder and a decoder
        yield from _keys_and_values(inner)
    for layer in getattr(cache, "layers", ()):
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))


def _is_graph_view(value: object) -> bool:
    return type(value) is Tensor and value.requires_grad and value._is_view()


class _Unviewed(torch.autograd.Function):
    """The same memory, as no view."""

    @staticmethod
    def forward(_ctx: Any, viewed: Tensor) -> Tensor:
        return viewed.detach()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad
