"""Operators whose workspace on the CPU only running them tells, and how they are run: once, at shapes that suffice.

oneDNN decides by shape, data type and instruction set: convolutions reorder into blocked layouts, low-precision
products and attention pack blocks of their operands, LSTM layers keep gates and states of every step. Its scratch goes
through torch's allocator, so `meter` sees it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_iter, tree_map_only

from memplan.kernels import rnn
from memplan.meter import workspaces_of

_CONVOLUTIONS: Final = frozenset({"aten::convolution", "aten::convolution_backward"})
_PRODUCTS: Final = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
_TRILINEAR: Final = "aten::_trilinear"  # of nn.Bilinear: two products for each of its outputs
_ATTENTION: Final = frozenset({"aten::_scaled_dot_product_flash_attention_for_cpu_backward"})

# Larger convolutions are run on fewer samples: the workspace grows by the same with each, from a few on.
_CONVOLUTION_LIMIT_BYTES: Final = 64 * 2**20

# Blocks decide, not operands: beyond these sides the workspace of a product or of attention moves by 3 MiB at most.
_PRODUCT_LIMIT_BYTES: Final = 16 * 2**20
_PRODUCT_SIDE: Final = 2048
_PRODUCT_BATCH: Final = 8
_ATTENTION_LENGTH: Final = 1024  # two blocks of keys, four of queries


def wants_probe(func: torch._ops.OpOverload, args: Iterable[object]) -> bool:
    """Whether only running the operator tells its workspace."""
    name = func._schema.name
    if name in _CONVOLUTIONS | rnn.LAYERS or name == _TRILINEAR:
        return True
    return name in _PRODUCTS | _ATTENTION and _first_tensor(args).element_size() < 4


def _first_tensor(args: Iterable[object]) -> Tensor:
    return next(arg for arg in args if isinstance(arg, Tensor))


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor argument without its tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype).fill_(1)

    def cut(self, sides: Iterable[int]) -> "_Shape":
        """No dimension longer than its side; dense, in the same order of strides. What fits stays as it is."""
        size = tuple(map(min, self.size, sides))
        if size == self.size:
            return self
        stride, step = [0] * len(size), 1
        for dim in sorted(range(len(size)), key=lambda d: (self.stride[d], -d)):
            if self.stride[dim]:
                stride[dim], step = step, step * size[dim]
        return _Shape(size, tuple(stride), self.dtype)


class Probe:
    """An operator at given shapes, to be run once for the workspace that it takes; equal probes hash alike."""

    def __init__(self, func: torch._ops.OpOverload, args: Any, kwargs: Any, *, keeps: bool = False) -> None:
        """`keeps`: run the forward of an LSTM layer so that it keeps what its backward needs."""
        self.func, self.args, self.kwargs, self.keeps = func, args, kwargs, keeps
        self._key = (func, keeps, *map(str, tree_iter((args, kwargs))))

    @classmethod
    def of(cls, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Probe":
        """For arguments of which only shapes, strides and types are kept, in the present grad mode."""

        def shape(tensor: Tensor) -> _Shape:
            return _Shape(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

        keeps = func._schema.name == rnn.FORWARD and torch.is_grad_enabled()
        return cls(func, *tree_map_only(Tensor, shape, (args, dict(kwargs))), keeps=keeps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def prepare(self) -> Callable[[], object]:
        """Make the operands; what is returned runs the operator on them."""
        args, kwargs = tree_map_only(_Shape, _Shape.make, (self.args, self.kwargs))

        def run() -> object:
            with torch.set_grad_enabled(self.keeps):  # no operand requires a gradient
                return self.func(*args, **kwargs)

        return run

    # -- at a smaller size ---------------------------------------------------------------------------------------

    def runs(self) -> "dict[Probe, float]":
        """What to run instead, with weights: their workspaces sum up to this one's. Nothing, if all are too large."""
        name = self.func._schema.name
        if name in _PRODUCTS:
            if self.operand_bytes <= _PRODUCT_LIMIT_BYTES:
                return {self: 1.0}
            return {self._map(lambda shape: shape.cut(_product_sides(shape))): 1.0}
        if name in _ATTENTION:
            return {self._map(lambda shape: shape.cut(_attention_sides(shape))): 1.0}
        if name == _TRILINEAR:
            return {self: 1.0} if self.operand_bytes <= _PRODUCT_LIMIT_BYTES else {}
        if name in rnn.LAYERS:
            return {self._of_steps(count): weight for count, weight in self._lengths().items()}
        samples = self._samples
        few = samples * _CONVOLUTION_LIMIT_BYTES // self.operand_bytes
        if few >= samples:
            return {self: 1.0}
        if few < 2:
            return {self._of_samples(1): samples} if few else {}
        more = (samples - few) / (few - few // 2)
        return {self._of_samples(few): 1 + more, self._of_samples(few // 2): -more}

    @property
    def operand_bytes(self) -> int:
        return sum(shape.nbytes for shape in tree_iter((self.args, self.kwargs)) if isinstance(shape, _Shape))

    def _map(self, change: Callable[[_Shape], _Shape]) -> "Probe":
        return Probe(self.func, *tree_map_only(_Shape, change, (self.args, self.kwargs)))

    @property
    def _samples(self) -> int:
        first: _Shape = self.args[0]
        return first.size[0]

    def _of_samples(self, count: int) -> "Probe":
        """A convolution of fewer samples: its input and its output's gradient, which come before the weight."""
        batched = 2 if self.func._schema.name == "aten::convolution_backward" else 1
        front = (_Shape((count, *shape.size[1:]), shape.stride, shape.dtype) for shape in self.args[:batched])
        return Probe(self.func, (*front, *self.args[batched:]), self.kwargs)

    def kept_bytes(self) -> int:
        """Of the forward of an LSTM layer: bytes of the buffer that it keeps for its backward."""
        if not self.keeps:
            return 0
        runs = {self._of_steps(count): weight for count, weight in self._lengths().items()}
        return round(sum(weight * run._kept_bytes() for run, weight in runs.items()))

    def _kept_bytes(self) -> int:
        if self not in _kept:
            with no_dispatch():
                outputs: Any = self.prepare()()
                _kept[self] = outputs[-1].numel()
        return _kept[self]

    def _lengths(self) -> dict[int, float]:
        (steps, rows, _), state = self.args[0].size, self.args[rnn.STATE]
        return rnn.lengths(steps, rows, state.size[-1])

    def _of_steps(self, count: int) -> "Probe":
        """An LSTM layer over fewer steps. What its backward is given as kept may be longer, but is large: it is cut."""
        args, whole = list(self.args), self.args[0].size[0]
        if count == whole:
            return self
        for at in rnn.OVER_TIME[self.func._schema.name]:
            if args[at] is not None:
                args[at] = _Shape((count, *args[at].size[1:]), args[at].stride, args[at].dtype)
        if self.func._schema.name == rnn.BACKWARD:
            # One more step stands for the states before the first, one page in each for the rounding.
            kept = -(-args[-1].size[0] * (count + 1) // whole) + 64 * 4096
            args[-1] = _Shape((kept,), (1,), args[-1].dtype)
        return Probe(self.func, tuple(args), self.kwargs, keeps=self.keeps)


def _product_sides(shape: _Shape) -> tuple[int, ...]:
    return (_PRODUCT_BATCH, _PRODUCT_SIDE, _PRODUCT_SIDE)[-len(shape.size) :]


def _attention_sides(shape: _Shape) -> tuple[int, ...]:
    """Of [batch, heads, length, width] as of the normalisers [batch, heads, length]; a mask may be [length, length]."""
    sides = (1, 1, _ATTENTION_LENGTH, _ATTENTION_LENGTH)
    return sides[2:] if len(shape.size) == 2 else sides[: len(shape.size)]


_kept: dict[Probe, int] = {}  # by the forward of an LSTM layer
_probed: dict[Probe, int] = {}  # what was run once in this process is not run again


def probed_bytes(probes: Iterable[Probe]) -> dict[Probe, int]:
    """Workspaces as operators run on this machine, or extrapolated from smaller runs; else the size of the operands."""
    plans = {probe: probe.runs() for probe in probes}
    fresh = {run for runs in plans.values() for run in runs} - set(_probed)
    if fresh:
        order = list(fresh)
        _probed.update(zip(order, workspaces_of(probe.prepare for probe in order), strict=True))

    def size(probe: Probe, runs: dict[Probe, float]) -> int:
        if not runs:
            return probe.operand_bytes
        return max(0, round(sum(weight * _probed[run] for run, weight in runs.items())))

    return {probe: size(probe, runs) for probe, runs in plans.items()}
