"""Logits that are not there: a tensor with a shape and a history, but no memory, until somebody looks inside.

Between its head and its loss a model reshapes, slices, casts, scales or caps its logits. Here what moves rows is done
to the hidden states instead (they have the same rows), what changes each logit is queued, and `cross_entropy` is
computed in chunks. Whatever else is done to lazy logits is done to the true ones, which are then computed, once, with
autograd, as the head would have done: the same result, and no memory saved. `Uses` counts both.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from math import prod
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from memplan.errors import ModelError
from memplan.levers.chunked_loss import Cast, Loss, Step, chunked_loss, logits_of
from memplan.levers.uses import Silence, Uses


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a head: its tensors, the type it computes in, and what it would do by itself."""

    head: Callable[[Tensor], Tensor]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: int
    uses: Uses
    silence: Silence = field(default_factory=Silence, init=False)
    dtype: torch.dtype = field(init=False)
    autocast: AbstractContextManager[object] = field(init=False)
    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        kind = self.hidden.device.type
        enabled, lower = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        object.__setattr__(self, "dtype", lower if enabled else self.weight.dtype)
        object.__setattr__(self, "autocast", torch.autocast(kind, lower, enabled))
        object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> tuple[int, ...]:
        return tuple(t._version for t in (self.hidden, self.weight, self.bias) if t is not None)

    def check(self) -> None:
        """Raise ModelError if the logits could not be what they were when the head was called."""
        if self._versions() != self.versions:
            raise ModelError(
                "The logits of a training step are read after the weights or the hidden states they are made of were "
                "changed, and a chunked loss head has not kept them. Read them before the optimizer's step, or plan "
                "without the chunked loss head."
            )

    def read(self) -> None:
        """What comes before the logits as a whole: the check, the count, and in a real step a word to who reads."""
        self.check()
        self.uses.reads += 1
        if not isinstance(self.hidden, FakeTensor) and _get_current_dispatch_mode() is None:  # else it is a trace
            self.uses.tell(prod(self.hidden.shape[:-1]) * self.weight.shape[0] * self.dtype.itemsize)


class Deferred:
    """Logits to be: rows of hidden states through a head, then through steps; or the same operation on its parent."""

    def __init__(
        self,
        call: Call,
        rows: Tensor,
        steps: tuple[Step, ...] = (),
        parent: "Deferred | None" = None,
        again: Step | None = None,
    ) -> None:
        self.call, self.rows, self.steps = call, rows, steps
        self._parent, self._again = parent, again
        self._value: Tensor | None = None

    def is_known(self) -> bool:
        """Whether somebody has looked, so that from now on there are true logits, which can also be written to."""
        return self._value is not None or (self._parent is not None and self._parent.is_known())

    def value(self) -> Tensor:
        """The true logits, with their autograd history; views among them are views of the same memory."""
        if self._value is None:
            with torch.enable_grad():  # it was on when the head was called
                self._value = self.call.silence.heard(self._computed())
        return self._value

    def _computed(self) -> Tensor:
        if self._parent is not None and self._again is not None:
            return self._again(self._parent.value())
        self.call.read()
        with self.call.autocast:
            return self.call.head(self.call.hidden)

    def send_back_nothing(self) -> None:
        """Gradients of what is made of them are zeros: those of a mean over nothing by hand are no numbers."""
        self.call.silence.is_on = True

    def plain(self) -> Tensor:
        """Their values alone, for operators below autograd."""
        if self.is_known():
            return self.value().detach()
        self.call.read()
        call, bias = self.call, self.call.bias
        with torch.no_grad(), torch.autocast(self.rows.device.type, enabled=False):
            return logits_of(self.rows, call.weight, bias, call.dtype, self.steps)

    def loss(self, target: Tensor, result: torch.dtype, ignore_index: int, smoothing: float, mean: bool) -> Tensor:
        """Their cross-entropy in chunks."""
        call = self.call
        call.check()
        call.uses.losses += 1
        how = Loss(call.rows, call.dtype, self.steps, result, ignore_index, smoothing, mean)
        return call.silence.heard(chunked_loss(self.rows, call.weight, call.bias, target, how))


class LazyLogits(Tensor):
    """See the module. Made by `lazy`."""

    deferred: Deferred

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not args and func in _HANDLERS and "input" in kwargs:  # in all of these it is the first
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        if func is Tensor.register_hook and _passes_on(args[1]) and args[0].deferred.rows.requires_grad:
            return args[0].deferred.rows.register_hook(args[1])
        result = _understood(func, args, kwargs)
        if result is None:
            args, kwargs = tree_map_only(LazyLogits, lambda lazy: lazy.deferred.value(), (args, kwargs))
            return func(*args, **kwargs)
        if isinstance(result, Tensor):
            return result
        return _derived(args[0], *result, lambda value: func(value, *args[1:], **kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out the function
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What reaches an operator past `__torch_function__`, as in an autograd function of somebody's own."""
        if func._schema.is_mutable:
            return NotImplemented  # the write would be lost
        args, kwargs = tree_map_only(LazyLogits, lambda lazy: lazy.deferred.plain(), (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy(call: Call) -> LazyLogits:
    """The logits of a head's call, not computed."""
    return _made(Deferred(call, call.hidden), call.dtype)


def _made(deferred: Deferred, dtype: torch.dtype) -> LazyLogits:
    call = deferred.call
    apply: Callable[..., LazyLogits] = _Logits.apply
    return apply(deferred.rows, call.weight, call.bias, deferred, dtype)


class _Logits(torch.autograd.Function):
    """Gives lazy logits their place in the graph, so that gradients of all that is made of them find their way."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,  # noqa: ARG004  # an input of the node
        deferred: Deferred,
        dtype: torch.dtype,
    ) -> LazyLogits:
        ctx.deferred = deferred
        shape = (*rows.shape[:-1], weight.shape[0])
        made: LazyLogits = Tensor._make_wrapper_subclass(
            LazyLogits, shape, dtype=dtype, device=rows.device, storage_size=0
        )
        made.deferred = deferred
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        deferred, wanted = ctx.deferred, ctx.needs_input_grad[:3]
        call = deferred.call
        call.check()
        rows, weight = deferred.rows.detach().requires_grad_(wanted[0]), call.weight.detach().requires_grad_(wanted[1])
        bias = None if call.bias is None else call.bias.detach().requires_grad_(wanted[2])
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            logits = logits_of(rows, weight, bias, call.dtype, deferred.steps)
        inputs = [t for t in (rows, weight, bias) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(logits, inputs, grad))
        return (*(next(found) if needed else None for needed in wanted), None, None)


def _passes_on(hook: Any) -> bool:
    """Whether a hook hands on the gradient that it gets, as that by which FSDP2 waits for the backward of an output."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


# -- what is understood ----------------------------------------------------------------------------------------------

# Of a handler: the moved rows, the steps to add and the new type; the logits themselves; or None: compute them.
Handled = tuple[Tensor, tuple[Step, ...], torch.dtype] | Tensor | None


def _understood(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handled:
    """What a function makes of lazy logits without computing them."""
    handle = _HANDLERS.get(func)
    if handle is None or not (torch.is_grad_enabled() or handle is _cross_entropy):  # without autograd they are cut off
        return None
    try:
        call = _signature(handle).bind(*args, **kwargs)
    except TypeError:  # an option that is not among the handler's arguments, which are named as torch's
        return None
    logits = call.args[0]
    if not isinstance(logits, LazyLogits) or logits.deferred.is_known():
        return None
    return handle(*call.args, **call.kwargs)


_signature = cache(signature)


def _derived(parent: LazyLogits, rows: Tensor, steps: tuple[Step, ...], dtype: torch.dtype, again: Step) -> LazyLogits:
    deferred = parent.deferred
    return _made(Deferred(deferred.call, rows, (*deferred.steps, *steps), deferred, again), dtype)


def _moved(logits: LazyLogits, rows: Tensor) -> Handled:
    return rows, (), logits.dtype


def _reshape(logits: LazyLogits, *shape: Any) -> Handled:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None  # a view as another type
    known = prod(size for size in sizes if size != -1)
    if -1 in sizes and not known:
        return None
    sizes = [logits.numel() // known if size == -1 else size for size in sizes]
    if sizes[-1] != logits.shape[-1] or prod(sizes) != logits.numel():
        return None
    rows = logits.deferred.rows
    return _moved(logits, rows.reshape(*sizes[:-1], rows.shape[-1]))


def _flatten(logits: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Handled:
    if end_dim % logits.dim() == logits.dim() - 1:
        return None
    return _moved(logits, logits.deferred.rows.flatten(start_dim, end_dim))


def _contiguous(logits: LazyLogits) -> Handled:
    return _moved(logits, logits.deferred.rows.contiguous())


def _getitem(logits: LazyLogits, index: Any) -> Handled:
    items = index if isinstance(index, tuple) else (index,)
    if not _keeps_last(items, logits.dim()):
        return None
    return _moved(logits, logits.deferred.rows[index])


def _keeps_last(items: tuple[Any, ...], dim: int) -> bool:
    """Whether an index leaves the last dimension as it is."""
    if not all(isinstance(item, int | slice | EllipsisType | Tensor | None) for item in items):
        return False
    whole = bool(items) and (items[-1] is Ellipsis or _is_all(items[-1]))
    return whole if any(item is Ellipsis for item in items) else sum(map(_consumed, items)) < dim or whole


def _is_all(item: object) -> bool:
    return isinstance(item, slice) and item == slice(None)


def _consumed(item: object) -> int:
    """Dimensions that a part of an index is for."""
    if isinstance(item, Tensor):
        return item.dim() if item.dtype in (torch.bool, torch.uint8) else 1
    return 0 if item is None or isinstance(item, bool) else 1


def _to(logits: LazyLogits, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Handled:  # noqa: ARG001  # no copy
    if len(args) > 2 or kwargs.keys() - {"device", "dtype"}:
        return None
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if not _is_on(logits, device):
        return None
    return _cast(dtype or logits.dtype)(logits)


def _is_on(logits: LazyLogits, device: torch.device | None) -> bool:
    here = logits.device
    return device is None or (device.type == here.type and device.index in (None, here.index))


def _cast(dtype: torch.dtype) -> Callable[[LazyLogits], Handled]:
    def handle(logits: LazyLogits) -> Handled:
        if dtype == logits.dtype:
            return logits
        return (logits.deferred.rows, (Cast(dtype),), dtype) if dtype.is_floating_point else None

    return handle


def _by(function: Callable[[Tensor, Any], Tensor]) -> Callable[[LazyLogits, Any], Handled]:
    """Arithmetic with a number, or with a constant that is the same for every row."""

    def handle(input: LazyLogits, other: Any) -> Handled:  # noqa: A002  # torch's own name
        logits, dtype = input, input.dtype
        if isinstance(other, Tensor):
            if other.requires_grad or other.dim() > logits.dim() or other.numel() not in (1, logits.shape[-1]):
                return None
            if any(size != 1 for size in other.shape[:-1]) or not other.is_floating_point():
                return None
            dtype = torch.promote_types(dtype, other.dtype) if other.dim() else dtype
            other = other.reshape(other.shape[-1:])
        elif not isinstance(other, int | float):
            return None
        return logits.deferred.rows, (lambda chunk: function(chunk, other),), dtype

    return handle


def _tanh(logits: LazyLogits) -> Handled:
    return logits.deferred.rows, (torch.tanh,), logits.dtype


def _cross_entropy(
    input: LazyLogits,  # noqa: A002  # torch's own name
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """In chunks, if it is over class numbers, unweighted, and gives one number; else None. Arguments as torch's."""
    logits = input
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum")
    if not plain or not isinstance(target, Tensor) or target.dtype != torch.int64:
        return None
    if logits.dim() != 2 or target.shape != logits.shape[:1] or target.device != logits.device:
        return None
    if not 0.0 <= label_smoothing <= 1.0:
        return None  # torch says what is wrong
    widened = torch.is_autocast_enabled(logits.device.type)  # there cross-entropy runs in float32
    result = torch.promote_types(logits.dtype, torch.float32) if widened else logits.dtype
    return logits.deferred.loss(target, result, ignore_index, label_smoothing, reduction == "mean")


_HANDLERS: dict[Any, Callable[..., Handled]] = {
    functional.cross_entropy: _cross_entropy,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    Tensor.contiguous: _contiguous,
    Tensor.__getitem__: _getitem,
    Tensor.to: _to,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.half: _cast(torch.float16),
    Tensor.bfloat16: _cast(torch.bfloat16),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _by(torch.mul)),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), _by(torch.div)),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _by(torch.add)),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
}

# What a tensor is, as opposed to what is in it.
_ATTRIBUTES = """
    _base shape dtype device layout ndim requires_grad is_leaf grad_fn retains_grad output_nr itemsize nbytes _version
    is_cuda is_cpu is_meta is_sparse is_quantized is_nested
"""
_METHODS = """
    size dim ndimension numel nelement stride storage_offset is_contiguous is_floating_point is_complex element_size
    get_device untyped_storage __len__
"""
_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
