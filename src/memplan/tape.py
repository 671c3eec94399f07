"""The tape: a dispatch mode that notes every storage's birth and death, and which module and operator caused it.

It sees operators below autograd, so saved tensors need no hooks: a tensor kept for backward is simply one that lives.
Modules are followed by global forward hooks (none is put on the user's modules). A backward operator belongs to the
module whose forward created its autograd node: nodes carry a sequence number that rises in creation order, so noting
the number at each module entry and exit is enough to look the module up.
"""

import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.errors import CannotTrace
from memplan.inplace import sole_owner_counts, would_write
from memplan.kernels import Backend, cpu, forms, probes, quantised
from memplan.kernels.fakes import on_fakes
from memplan.kernels.flops import flops_of
from memplan.kernels.forms import leaves
from memplan.notes import Notes
from memplan.trace import CHECKPOINT

# What is made of known values is computed for real up to a size, since models read it: is this mask full, which
# position is last, is this layer dropped? Known are integers and booleans of the sample and the buffers, and constants.
# Weights, floating inputs and all that comes of them are only shapes.
_REAL_LIMIT_BYTES = 64 * 2**20
_REAL_LIMIT_FLOATING_BYTES = 2**20

# Nodes that add up parameter gradients carry the largest number (accumulate_grad.cpp); they belong to whoever ran last.
_GRADIENT_ACCUMULATION = 2**63

# By which they are filled for the first time: a gradient is taken over as it is, or copied.
_GIVING = frozenset(
    {
        torch.ops.aten.detach.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.new_empty_strided.default,
        torch.ops.aten.copy_.default,
    }
)

_CPU = cpu.CpuBackend()

_ITEM = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_RAND = torch.ops.aten.rand.default
_CONSTANTS = {torch.ops.aten.ones_like.default: 1, torch.ops.aten.zeros_like.default: 0}

_ON_HOST: ContextVar[bool] = ContextVar("on_host", default=False)
_PREPARED: ContextVar[int] = ContextVar("prepared", default=0)  # how often


@contextmanager
def on_host() -> Iterator[None]:
    """What is made while the `with` block lasts is host memory, and operators there copy to it or from it.

    A tape gives such storages no row and such operators no work: neither is the device's. Without a tape, nothing.
    """
    prepares()  # a pool learns in a step what the next one will want
    token = _ON_HOST.set(True)
    try:
        yield
    finally:
        _ON_HOST.reset(token)


def prepares() -> None:
    """What runs now prepares for those to come, so a tape on which it is cannot tell what the next one will hold."""
    _PREPARED.set(_PREPARED.get() + 1)


class Tape(TorchDispatchMode):
    """Record one step. With `fake`, floating-point work is abstract; without, everything runs for real.

    `answer` is what a value is taken for that an abstract tensor has not. An optimizer only scales by such values
    (norms, step counts); in a model they may decide what runs, so there the question is an error.
    """

    def __init__(
        self, model: nn.Module, fake: FakeTensorMode | None, backend: Backend = _CPU, answer: float | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.fake = fake
        self.backend = backend
        self.answer = answer
        named = list(model.named_modules())  # the model itself comes first, as ""
        self.notes = Notes(tuple(path for path, _ in named))
        self._index = {id(module): i for i, (_, module) in enumerate(named)}
        # storages
        self._live: dict[int, tuple[int | None, weakref.ref[Any]]] = {}  # storage address -> row
        self._overwritten: set[int] = set()  # addresses of real storages whose values are not known any more
        # modules
        self.stack: list[int] = [0]
        self._last_entered = 0
        self._entered: list[tuple[int, int]] = []
        self._switches: list[int] = [0]  # autograd sequence numbers at which the running module changes ...
        self._switched_to: list[int] = [0]  # ... and what it changes to
        self._last_module = 0
        self.backward = False
        self._hooks: list[Any] = []
        self._route = quantised.routed(backend.name)
        self._cast: torch.dtype | None = None  # of the autocast region, which cannot be seen in a dispatch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; without torch's guard around every dispatch an operator is cheaper."""
        return False

    # -- life cycle ----------------------------------------------------------------------------------------------

    def __enter__(self) -> "Tape":
        sole_owner_counts()  # needs autograd, which is out of reach inside a dispatch
        hooks = nn.modules.module
        self._random_state = torch.get_rng_state
        torch.get_rng_state = self._followed_random_state  # checkpoints stash it without passing the dispatcher
        self._hooks = [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._exit_module, always_call=True),
        ]
        self._route.__enter__()
        self._prepared = _PREPARED.get()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's
        self._route.__exit__(None, None, None)
        torch.get_rng_state = self._random_state
        for hook in self._hooks:
            hook.remove()

    def _followed_random_state(self) -> Tensor:
        state, module = self._random_state(), self.running()
        self.notes.op_ticks.append(self.notes.now)
        self._follow(state, module, None)
        is_checkpoint = sys._getframe(1).f_code.co_filename == checkpoint.__file__
        self.notes.operator(CHECKPOINT if is_checkpoint else "torch::get_rng_state", module, 0, state.nbytes, "uint8")
        return state

    @property
    def prepares(self) -> bool:
        """Whether anything since it was entered prepares for another run."""
        return _PREPARED.get() != self._prepared

    def forget(self) -> None:
        """Stop following storages; what dies later does not belong to the step."""
        self._live.clear()

    # -- modules -------------------------------------------------------------------------------------------------

    def _enter_module(self, module: nn.Module, _args: object) -> None:
        self._cast = quantised.cast_in_force()
        index = self._index.get(id(module))
        if index is None:
            return
        self.stack.append(index)
        self._last_entered = index
        self._entered.append((self.notes.now, len(self.notes.op_columns)))
        self._switch(index)

    def _exit_module(self, module: nn.Module, _args: object, _output: object) -> None:
        index = self._index.get(id(module))
        if index is None:
            return
        while self.stack[-1] != index:  # a child left by an exception (checkpoint's early stop) has no exit of its own
            self._leave()
        self._leave()

    @property
    def last_entered(self) -> str:
        """Path of the module whose forward began last; where an error comes from, most likely."""
        path: str = self.notes.modules[self._last_entered]
        return path

    def _leave(self) -> None:
        index = self.stack.pop()
        tick, op = self._entered.pop()
        self.notes.visits.append((index, tick, self.notes.now, op, len(self.notes.op_columns)))
        self._switch(self.stack[-1])

    def _switch(self, index: int) -> None:
        self._switches.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]  # no stub
        self._switched_to.append(index)

    def running(self) -> int:
        """Index of the module that the current operator belongs to."""
        if not self.backward:
            return self.stack[-1]
        if len(self.stack) > 1:  # a forward inside the backward: recomputation
            return self.stack[-1]
        node = _node()
        if node is None:
            return 0
        number = node._sequence_nr()
        if number >= _GRADIENT_ACCUMULATION:
            return self._last_module
        return self._switched_to[bisect_right(self._switches, number) - 1]

    # -- operators -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE:  # autograd asks every fake where it is; no operator
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        steps = quantised.expansion(func, self.fake is not None)
        if steps is not None:
            with quantised.watching(self):
                return steps(quantised.Place(self.backend.name, self._cast), *args, **kwargs)
        with nullcontext() if self.fake is None else torch._C.DisableTorchFunction():  # kernels were chosen above
            flat = [*leaves(args), *leaves(kwargs.values())]
            in_place = self.backward and would_write(func, args)
            out = func(*args, **kwargs) if self.fake is None else self._abstractly(func, flat, args, kwargs)
            self._note(func, args, kwargs, flat, out, args[0] if in_place else None)
        return out

    def _abstractly(
        self, func: torch._ops.OpOverload, flat: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        assert self.fake is not None
        written = _written_by(func, args)
        if any(isinstance(t, Tensor) and self._is_unknown(t) for t in flat):
            if func is _ITEM and self.answer is not None:
                return self.answer
            self._overwritten.update(map(_key_of, written))
            out = forms.results(self.fake, on_fakes, func, args, kwargs)
            if written and isinstance(args[0], Tensor):
                return args[0]
            return _constant(out, _CONSTANTS[func]) if func in _CONSTANTS else out
        if written:
            return self._write(func, args, kwargs, written)
        try:
            with nullcontext() if func is _ITEM else self.fake:  # a known value; the mode takes its time to refuse it
                out = func(*args, **kwargs)
        except torch._subclasses.fake_tensor.DynamicOutputShapeException:
            return func(*args, **kwargs)
        except torch._subclasses.fake_tensor.DataDependentOutputException:
            return func(*args, **kwargs)
        results = [t for t in leaves((out,)) if isinstance(t, Tensor)]
        if not results or any(t.nbytes > _real_limit(t) for t in results):
            return out
        real = func(*args, **kwargs)
        return real.fill_(1) if func is _RAND and real.dim() == 0 else real  # skips no layer: that takes most memory

    def _write(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: list[Tensor]
    ) -> Any:
        """In place, by known values: for real, unless these are many or the tensor is the user's own, by no buffer."""
        if all(_key_of(t) in self._live and t.nbytes <= _real_limit(t) for t in written):
            return func(*args, **kwargs)
        self._overwritten.update(map(_key_of, written))
        return args[0]

    def _is_unknown(self, tensor: Tensor) -> bool:
        """Whether a tensor has no values, or some that were written over by values which nobody knows."""
        return isinstance(tensor, FakeTensor) or _key_of(tensor) in self._overwritten

    def _note(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        flat: list[Any],
        out: Any,
        written: Tensor | None,
    ) -> None:
        module = self.running()
        self._last_module = module
        self.notes.op_ticks.append(self.notes.now)
        outputs = [t for t in leaves((out,)) if isinstance(t, Tensor)]
        fresh = [t for t in outputs if self._follow(t, module, written)]
        flops = moved = 0
        worked = bool(fresh) or written is not None or func._schema.is_mutable
        # No work: `_unsafe_view`, and a `contiguous` of what is contiguous.
        if worked and not func.is_view and not _ON_HOST.get():
            inputs = [t for t in flat if isinstance(t, Tensor)]
            flops = flops_of(func, args, kwargs, out)
            moved = sum(t.numel() * t.element_size() for t in (*inputs, *(fresh or outputs)))
            workspace = self.backend.workspace_bytes(func, flat, outputs)
            if self.backend.wants_probe(func, flat):
                self._ask(func, args, kwargs)
            elif workspace:
                self._add(workspace, module, briefly=True)
        dtype = str(outputs[0].dtype).removeprefix("torch.") if outputs else ""
        if func in _GIVING and self._gives():
            self.notes.additions.append((len(self.notes.op_columns), self.row_of(outputs[0]), outputs[0].nbytes))
        self.notes.operator(func._schema.name, module, flops, moved, dtype)

    def _gives(self) -> bool:
        """Whether what runs is autograd's, giving a parameter its gradient."""
        node = _node() if self.backward and len(self.stack) == 1 else None
        return node is not None and node._sequence_nr() >= _GRADIENT_ACCUMULATION

    # -- storages ------------------------------------------------------------------------------------------------

    def pass_over(self, tensor: Tensor) -> None:
        """Know a tensor that is there before the step begins; it gets no row."""
        storage = tensor.untyped_storage()
        self._live[storage._cdata] = (None, weakref.ref(storage, self._death_of(storage._cdata)))

    def row_of(self, tensor: Tensor) -> int | None:
        """The row of a tensor's storage, if it is being followed."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else None

    def _follow(self, tensor: Tensor, module: int, written: Tensor | None) -> bool:
        if tensor.layout != torch.strided:  # as the gradient of an embedding with sparse=True
            raise CannotTrace(
                f"the step makes a tensor of layout {str(tensor.layout).removeprefix('torch.')}, whose memory memplan "
                "does not follow. Use dense ones (an embedding: sparse=False)."
            )
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return False
        if _ON_HOST.get():
            self.pass_over(tensor)
            return False
        if written is not None:
            inherited = self._live.pop(_key_of(written), None)
            if inherited is not None:  # without a mode it would have been written in place: the old storage lives on
                self._live[key] = (inherited[0], weakref.ref(storage, self._death_of(key)))
                return False
        row = self._add(storage.nbytes(), module)
        self._live[key] = (row, weakref.ref(storage, self._death_of(key)))
        return True

    def _add(self, size: int, module: int, *, briefly: bool = False) -> int:
        recomputed = self.backward and torch.is_grad_enabled() and _node() is not None
        return self.notes.storage(self.backend.rounded(size), module, briefly=briefly, recomputed=recomputed)

    def _death_of(self, key: int) -> Callable[[object], None]:
        def die(_: object) -> None:
            self._overwritten.discard(key)
            row, _ = self._live.pop(key, (None, None))
            if row is not None:
                self.notes.death(row)

        return die

    def _ask(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Leave a place for a workspace that only running the operator tells; see `probes.probed_bytes`."""
        probe = probes.Probe.of(func, args, kwargs)
        self.notes.probes.setdefault(probe, []).append(self._add(0, self._last_module, briefly=True))


def _node() -> Any:
    """The node that autograd is evaluating; None outside of it, as where the loss gets its own gradient of one."""
    return torch._C._current_autograd_node()


def _constant(imagined: Tensor, value: int) -> Tensor:
    """A mask that has the shape of an abstract tensor has known values all the same."""
    if imagined.is_floating_point() or imagined.nbytes > _REAL_LIMIT_BYTES:
        return imagined
    return torch.full(imagined.shape, value, dtype=imagined.dtype)


def _written_by(func: torch._ops.OpOverload, args: Sequence[Any]) -> list[Tensor]:
    """The tensors that an operator writes to, out of those with values."""
    if not func._schema.is_mutable:
        return []
    written = [arg for arg, known in zip(args, func._schema.arguments, strict=False) if known.is_write]
    return [t for t in leaves(written) if isinstance(t, Tensor) and not isinstance(t, FakeTensor)]


def _key_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _real_limit(tensor: Tensor) -> int:
    return _REAL_LIMIT_FLOATING_BYTES if tensor.is_floating_point() else _REAL_LIMIT_BYTES
