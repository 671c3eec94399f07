"""One forward of a block, captured: its `BlockGraph` and, beside it, the calls that run its nodes again.

A dispatch mode sees the operators below autograd and autocast, so casts are operators and nothing is left implicit; the
hooks on saved tensors see which results autograd keeps. Storages are told apart while they live, never held: capturing
a forward takes no more memory than running it.

What cannot be run again is marked so, and then kept: operators that write to what the block was given or to what
autograd has saved, read data that comes from elsewhere, have data-dependent shapes, or view one storage as two types.
So is all that comes after Python has asked what a tensor holds, for then it may run something else the next time.
Random operators can: they are run again in their order, from the random state in which the block began.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

from memplan import packed
from memplan.graph import BlockGraph, Node, Value
from memplan.kernels import quantised
from memplan.kernels.flops import flops_of
from memplan.levers.operators import is_function, is_random, tells_data, without_statistics, written_by

RANDOM_STATE = "random state"  # the name of the values that stand for it


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor lies in a value's storage."""

    value: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements behind the start of the tensor by which the value became known

    def on(self, base: Tensor) -> Tensor:
        if not self.offset and base.shape == self.size and base.stride() == self.stride:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """What is seen of a tensor that autograd saves, without reading it."""

    view: View | None  # None: not of the block's own making, or held come what may
    shape: torch.Size
    dtype: torch.dtype
    grad_fn: str | None  # of the operator that made it; None: not in the block

    def is_like(self, tensor: Tensor) -> bool:
        return (
            tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and (self.grad_fn is None or _maker(tensor) == self.grad_fn)
        )


def _maker(tensor: Tensor) -> str:
    """The node that made a tensor; a `reshape` that is a view has another name where no dispatch mode runs."""
    return type(tensor.grad_fn).__name__.replace("ReshapeAlias", "View")


@dataclass(frozen=True, slots=True)
class Call:
    """One operator as it was called; tensors are given as `View`s."""

    func: torch._ops.OpOverload
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    results: tuple[tuple[int, int], ...]  # (position among the tensors that come out, value that it is)

    def run(self, base_of: Callable[[int], Tensor]) -> list[tuple[int, Tensor]]:
        """Run it again. Returns (value, tensor) for what it makes anew."""
        args = [_filled(argument, base_of) for argument in self.args]
        out = self.func(*args, **{name: _filled(argument, base_of) for name, argument in self.kwargs.items()})
        tensors = [out] if isinstance(out, Tensor) else [t for t in tree_iter(out) if isinstance(t, Tensor)]
        return [(value, tensors[position]) for position, value in self.results]


def _filled(argument: object, base_of: Callable[[int], Tensor]) -> object:
    """An operator's arguments are at most lists of tensors."""
    if type(argument) is View:
        return argument.on(base_of(argument.value))
    if type(argument) is list:
        return [_filled(item, base_of) for item in argument]
    return argument


@dataclass(frozen=True, slots=True)
class Captured:
    """What one forward of a block did.

    Attributes:
        calls: per node of the graph, its operators in order.
        inputs: per given value that is no parameter or buffer, its position among the call's tensors.
        owned: per given value that is one, its dotted name in the block.
        saved: what autograd saved, in order; only the first `steady` ones are alike in each forward, None: all.
        states: random node -> the values of the generator's state before it and after it; see `RANDOM_STATE`.
        node_s: seconds of each node when it was captured; only true on a device, with `clock`.
    """

    graph: BlockGraph
    calls: tuple[tuple[Call, ...], ...]
    inputs: Mapping[int, int]
    owned: Mapping[int, str]
    saved: tuple[SavedTensor, ...]
    steady: int | None
    states: Mapping[int, tuple[int, int]]
    device: torch.device
    node_s: tuple[float, ...]


@dataclass(slots=True)
class _Draft:
    """A node as it grows."""

    name: str
    reads: list[int]
    writes: list[int]
    calls: list[Call]
    repeatable: bool = True
    flops: int = 0
    bytes: int = 0
    dtype: str = ""
    seconds: float = 0.0
    last: int = 0  # when its last operator ran


@dataclass(slots=True)
class _ValueDraft:
    name: str
    bytes: int
    dtype: torch.dtype
    offset: int
    node: int | None
    saved: bool = False
    unsteady: bool = False  # written to when others had read it, or though it is not the block's own
    read_by: list[int] = field(default_factory=list)


class Capture(TorchDispatchMode):
    """Capture what runs while it is entered; `captured()` afterwards.

    Args:
        block: whose parameters and buffers are given.
        inputs: the tensors that the block was called with.
        clock: called after each operator to wait for the device, so that operators can be timed.
    """

    def __init__(self, block: nn.Module, inputs: Sequence[Tensor], clock: Callable[[], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._values: list[_ValueDraft] = []
        self._nodes: list[_Draft] = []
        self._saved: list[SavedTensor] = []
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storage address -> value
        self._inputs: dict[int, int] = {}
        self._owned: dict[int, str] = {}
        self._clock = clock
        self._device = torch.device("cpu")
        self._count = 0  # of operators
        self._drawn: list[int] = []  # nodes that drew from the generator
        self._told_at: int | None = None  # saved tensors when Python began to know what some tensor holds
        self._cast = quantised.cast_in_force(inputs[0].device.type) if inputs else None
        for name, tensor in (*block.named_parameters(), *block.named_buffers(), *packed.named_scales(block)):
            self._give(tensor, self._owned, name, name)
        for position, tensor in enumerate(inputs):
            self._give(tensor, self._inputs, position, f"input {position}")
        self._paths = {id(module): path for path, module in block.named_modules()}
        self._stack = [""]
        self._hooks: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def _give(self, tensor: Tensor, table: "dict[int, Any]", place: object, name: str) -> None:
        if tensor.untyped_storage()._cdata not in self._live:
            table[self._value(tensor, name, None)] = place

    # -- modules, for names --------------------------------------------------------------------------------------

    def __enter__(self) -> "Capture":
        hooks = nn.modules.module
        self._hooks = [
            hooks.register_module_forward_pre_hook(self._entered),
            hooks.register_module_forward_hook(self._left, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's
        for hook in self._hooks:
            hook.remove()

    def _entered(self, module: nn.Module, _args: object) -> None:
        self._stack.append(self._paths.get(id(module), self._stack[-1]))

    def _left(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._stack.pop()

    # -- operators -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        begin = perf_counter()
        out = quantised.called(func, args, kwargs, self._cast)
        if self._clock is not None:
            self._clock()
        if self._told_at is None and tells_data(func, args):
            self._told_at = len(self._saved)
        if func.namespace != "prim":
            self._note(func, args, kwargs, out, perf_counter() - begin)
        return out

    def saves(self, tensor: Tensor) -> None:
        """Autograd saves a tensor for the backward."""
        value, view, grad_fn = self._value_of(tensor), None, None
        if value is not None:
            found = self._values[value]
            grad_fn = None if found.node is None else _maker(tensor)
            if found.dtype == tensor.dtype and self._told_at is None:
                found.saved, view = True, self._view(value, tensor)
            elif found.node is not None:
                self._nodes[found.node].repeatable = False  # held through this, so it cannot be dropped
        self._saved.append(SavedTensor(view, tensor.shape, tensor.dtype, grad_fn))

    def _note(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, seconds: float
    ) -> None:
        passed = without_statistics(func, args), dict(kwargs)
        leaves = tree_leaves(passed)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        results = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        written = written_by(func, args, kwargs)
        fresh = [(i, t) for i, t in enumerate(results) if self._value_of(t) is None]
        if not fresh and not written:
            return  # a view, or a question
        reads = [self._value_of(tensor) for tensor in tensors]
        known = [value for value in reads if value is not None]
        repeatable = (
            self._told_at is None
            and len(known) == len(reads)
            and not any(isinstance(leaf, torch.Generator) for leaf in leaves)
            and all(self._values[v].dtype == t.dtype for v, t in zip(known, tensors, strict=True))
            and not any(self._values[v].unsteady for v in known)
            and is_function(func)
            and quantised.repeats(func, args, self._cast)
        )
        again_args, again_kwargs = tree_map(self._template, passed)
        node = self._node_for(func, {self._value_of(tensor) for tensor in written})
        draft = self._nodes[node]
        made = []
        for position, tensor in fresh:
            if self._value_of(tensor) is None:  # not so where two results share a storage
                made.append((position, self._value(tensor, self._name(func), node)))
        draft.calls.append(Call(func, again_args, again_kwargs, tuple(made)))
        draft.writes += [value for _, value in made]
        draft.repeatable &= repeatable
        if node in self._drawn and self._drawn[-1] != node:
            for other in self._drawn[self._drawn.index(node) :]:  # it moves behind these, and the order is lost
                self._nodes[other].repeatable = False
        if is_random(func, args, kwargs) and node not in self._drawn:
            self._drawn.append(node)
        draft.flops += flops_of(func, args, dict(kwargs), out)
        draft.bytes += sum(t.nbytes for t in (*tensors, *results))
        draft.seconds += seconds
        draft.dtype = draft.dtype or (str(results[0].dtype).removeprefix("torch.") if results else "")
        draft.last = self._count = self._count + 1
        for value in dict.fromkeys(known):
            self._values[value].read_by.append(node)
            if value not in draft.writes and value not in draft.reads:
                draft.reads.append(value)
        if results:
            self._device = results[0].device

    def _node_for(self, func: torch._ops.OpOverload, targets: "set[int | None]") -> int:
        """A new node, or the one whose own and yet unread result is written to."""
        makers = {self._values[v].node if v is not None else None for v in targets}
        if len(makers) == 1 and None not in makers:
            (maker,) = makers
            assert maker is not None
            readers = {reader for v in self._nodes[maker].writes for reader in self._values[v].read_by}
            if readers <= {maker}:
                if any(v is not None and self._values[v].saved for v in targets):
                    self._nodes[maker].repeatable = False  # what was saved is not what the node ends with
                return maker
        self._nodes.append(_Draft(func._schema.name, [], [], [], repeatable=not targets))
        for value in targets:
            if value is None:
                continue
            target = self._values[value]
            target.unsteady = True
            for node in (*target.read_by, target.node):  # what they read or made is there no more
                if node is not None:
                    self._nodes[node].repeatable = False
        return len(self._nodes) - 1

    def _template(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        value = self._value_of(leaf)
        return self._view(value, leaf) if value is not None else None

    # -- values --------------------------------------------------------------------------------------------------

    def _value(self, tensor: Tensor, name: str, node: int | None) -> int:
        storage = tensor.untyped_storage()
        key, value = storage._cdata, len(self._values)
        self._live[key] = value, weakref.ref(storage, lambda _: self._live.pop(key, None))
        size = 0 if node is None else storage.nbytes()
        self._values.append(_ValueDraft(name, size, tensor.dtype, int(tensor.storage_offset()), node))
        return value

    def _view(self, value: int, tensor: Tensor) -> View:
        offset = int(tensor.storage_offset()) - self._values[value].offset
        return View(value, tuple(tensor.shape), tensor.stride(), offset)

    def _value_of(self, tensor: Tensor) -> int | None:
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else None

    def _name(self, func: torch._ops.OpOverload) -> str:
        name = func._schema.name.removeprefix("aten::").strip("_")
        return f"{self._stack[-1]}/{name}" if self._stack[-1] else name

    def captured(self, *, is_fixed: bool = True) -> Captured:
        """All of it. A node stands where its last operator ran; none is made again if its plain numbers change."""
        order = sorted(range(len(self._nodes)), key=lambda n: self._nodes[n].last)
        place = {n: i for i, n in enumerate(order)}
        nodes = [self._nodes[n] for n in order]
        for value in self._values:
            value.node = None if value.node is None else place[value.node]
        states = self._random_states(nodes, {place[n] for n in self._drawn})
        names = _unique(value.name for value in self._values)
        values = (Value(name, v.bytes, v.node, v.saved) for name, v in zip(names, self._values, strict=True))
        return Captured(
            graph=BlockGraph(
                tuple(values),
                tuple(
                    Node(d.name, tuple(d.reads), tuple(d.writes), d.repeatable and is_fixed, d.flops, d.bytes, d.dtype)
                    for d in nodes
                ),
            ),
            calls=tuple(tuple(draft.calls) for draft in nodes),
            inputs=self._inputs,
            owned=self._owned,
            saved=tuple(self._saved),
            steady=self._told_at,
            states=states,
            device=self._device,
            node_s=tuple(draft.seconds for draft in nodes),
        )

    def _random_states(self, nodes: Sequence[_Draft], drawn: set[int]) -> dict[int, tuple[int, int]]:
        """Random operators depend on each other through the generator's state: a value that each reads and makes."""
        states: dict[int, tuple[int, int]] = {}
        before = None
        for n, draft in enumerate(nodes):
            if n not in drawn:
                continue
            if before is None:
                before = self._state(None)
            states[n] = before, self._state(n)
            draft.reads.append(before)
            draft.writes.append(states[n][1])
            before = states[n][1]
        return states

    def _state(self, node: int | None) -> int:
        self._values.append(_ValueDraft(RANDOM_STATE, 0, torch.uint8, 0, node))
        return len(self._values) - 1


def _unique(names: Iterable[str]) -> list[str]:
    """The second of a name gets "#2"."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
