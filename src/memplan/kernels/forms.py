"""Results of operators on fake tensors by their form, without asking torch's shape rules again.

A step runs a few hundred different operators on the same shapes over and over: in every block, micro-step and trace.
torch's fake mode has a cache for that, but takes long to look into it, as it is made for symbolic shapes too. Here a
result is known by the operator, the forms of its tensors and its other arguments, wherever these say all about it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Operator = torch._ops.OpOverload
Run = Callable[[Operator, tuple[Any, ...], Mapping[str, Any]], Any]
Make = Callable[[FakeTensorMode, Sequence[Any], Sequence[FakeTensor]], Any]  # (mode, arguments, tensors among them)

_PLAIN: Final = frozenset(
    {int, float, bool, str, NoneType, torch.dtype, torch.device, torch.layout, torch.memory_format}
)

# Of whose operators it is known that nothing but the arguments' forms decides: torch's own (as
# torch._library.utils.is_builtin), and those that `quantised` knows.
_BY_FORM: Final = frozenset({"aten", "prim", "prims", "bitsandbytes"})
_CPU: Final = torch.device("cpu")
_MOST_KNOWN: Final = 50_000  # for processes that plan many models; one model, for all cards, makes 1,600
_FIELDS: dict[torch.device, dict[str, Any]] = {}  # of fakes, but for their mode
_KNOWN: dict[tuple[Any, ...], Make] = {}


def results(mode: FakeTensorMode, run: Run, func: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `run` gives for an operator within the mode; for a form that was seen before, without running it."""
    tensors: list[FakeTensor] = []
    form = _described(func, args, kwargs, tensors)
    make = None if form is None else _KNOWN.get(form)
    if make is not None:
        return make(mode, args, tensors)
    with mode:
        out = run(func, args, kwargs)
    if form is not None and form == _described(func, args, kwargs, []):
        make = _maker(func, out, mode, args, tensors)
        if make is not None:
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[form] = make
    return out


def empty(
    mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
) -> Tensor:
    """A tensor without data on the CPU, as torch makes it within the mode; contiguous if no stride is given."""
    if stride is None:
        return _fake(mode, torch.empty(shape, dtype=dtype, device="meta"), _CPU)
    return _fake(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), _CPU)


def _described(
    func: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[FakeTensor]
) -> tuple[Any, ...] | None:
    """What a result depends on; the tensors are added to theirs. None if there may be more to it."""
    if torch.is_inference_mode_enabled():  # in which a view of a normal tensor is one too, and all else is not
        return None
    form: list[Any] = [func, torch.get_default_dtype(), torch.is_grad_enabled()]  # an LSTM keeps nothing without grad
    return tuple(form) if _describe(args, form, tensors) and _describe(kwargs.items(), form, tensors) else None


def _describe(values: Iterable[Any], form: list[Any], tensors: list[FakeTensor]) -> bool:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.dtype.is_complex or value.is_neg() or value.is_inference():
                return False  # it has values, is to be conjugated or negated, or must not be changed
            form.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device))
            tensors.append(value)
        elif kind in _PLAIN:
            form += kind, value  # 1, 1.0 and True are equal
        elif kind is list or kind is tuple:
            form.append(len(value))
            if not _describe(value, form, tensors):
                return False
        else:
            return False
    return True


def _maker(
    func: Operator, out: Any, mode: FakeTensorMode, args: tuple[Any, ...], tensors: Sequence[FakeTensor]
) -> Make | None:
    """How to make the same of other arguments of the same form; None if that cannot be said."""
    if func.namespace not in _BY_FORM:  # others may look at what they like
        return None
    if func._schema.is_mutable and torch.Tag.inplace_view in func.tags:  # gives a tensor another storage
        return None
    if args and out is args[0]:
        return _first
    places = {tensor.untyped_storage()._cdata: at for at, tensor in enumerate(tensors)}
    if not isinstance(out, list | tuple):
        return _Tensor.like(out, mode, tensors, places)
    made = [None if one is None else _Tensor.like(one, mode, tensors, places) for one in out]
    own = [one.untyped_storage()._cdata for one, make in zip(out, made, strict=True) if make and make.shares is None]
    is_known = all((one is None) == (make is None) for one, make in zip(out, made, strict=True))
    return _Several(type(out), tuple(made)) if is_known and len(set(own)) == len(own) else None


def _first(_mode: FakeTensorMode, args: Sequence[Any], _tensors: Sequence[FakeTensor]) -> Any:
    return args[0]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to be made; `shares` is the place, among those of the arguments, of the one whose storage it has."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    shares: int | None

    def __call__(self, mode: FakeTensorMode, _args: Sequence[Any], tensors: Sequence[FakeTensor]) -> FakeTensor:
        if self.shares is None:
            bare = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        else:
            bare = torch.empty(0, dtype=self.dtype, device="meta")
            bare.set_(tensors[self.shares].untyped_storage(), self.offset, self.shape, self.stride)
        return _fake(mode, bare, self.device)

    @classmethod
    def like(
        cls, out: Any, mode: FakeTensorMode, tensors: Sequence[FakeTensor], places: Mapping[int, int]
    ) -> "_Tensor | None":
        """`places`: storage -> where among the tensors one has it."""
        if type(out) is not FakeTensor or out.constant is not None or out.layout is not torch.strided:
            return None
        storage = out.untyped_storage()
        shares = places.get(storage._cdata)
        found = cls(out.shape, out.stride(), int(out.storage_offset()), out.dtype, out.fake_device, shares)
        again = found(mode, (), tensors)
        is_same = (
            torch._C._dispatch_key_set(again) == torch._C._dispatch_key_set(out)
            and again.untyped_storage().nbytes() == storage.nbytes()
            and again.storage_offset() == out.storage_offset()
            and not out.requires_grad
        )
        return found if is_same else None


def _fake(mode: FakeTensorMode, bare: Tensor, device: torch.device) -> FakeTensor:
    """`FakeTensor(mode, bare, device)` with what its constructor says of every tensor of the device put in at once."""
    if device not in _FIELDS:
        _FIELDS[device] = {
            name: value for name, value in vars(FakeTensor(mode, bare, device)).items() if name != "fake_mode"
        }
    tensor = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    vars(tensor).update(_FIELDS[device], fake_mode=mode)
    return tensor


@dataclass(frozen=True, slots=True)
class _Several:
    kind: type
    tensors: tuple[_Tensor | None, ...]

    def __call__(self, mode: FakeTensorMode, args: Sequence[Any], tensors: Sequence[FakeTensor]) -> Any:
        return self.kind(None if make is None else make(mode, args, tensors) for make in self.tensors)


def leaves(values: Iterable[Any]) -> list[Any]:
    """All that is in an operator's arguments or results, which are nested in lists and tuples at most.

    torch's `tree_iter`, which knows of any container, takes several times as long, at every operator of a trace.
    """
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += leaves(value)
        else:
            found.append(value)
    return found
