"""The lever `select`: a block holds a part of what autograd saves, and makes the rest again when it is asked for.

What a norm or an activation function gives out is as large as what went in, and costs next to nothing to make again;
attention in the middle costs some; the matrix products cost most. A selection says which saved values of a block are
dropped (`BlockGraph`); in the backward, the few operators that lead to them run again, from what is held anyway.

No dispatch mode runs in training, and no second forward: the first forward of a block is captured (`capture.py`), and
proved there, bit by bit, on the tensors that it has just computed. Later forwards only pass the hooks of saved
tensors. They are compared with the captured one: the call's tensors and plain arguments, the modules, their plain
attributes and hooks, autocast, and the sequence of what autograd saves and by which operators it was made. A new kind
of call is captured anew; where a block does not do what it did, everything is held, as if there were no plan, and a
warning says so.

What nobody can see is a number that changes between steps though it is no attribute of a module, nor in a list, tuple,
set or dict that is one: in another object that a module refers to, in a closure, or read from a tensor through NumPy or
`tolist`.
"""

import logging
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_iter

from memplan.errors import PlanNotFollowed
from memplan.graph import BlockGraph
from memplan.levers.capture import Capture, Captured
from memplan.levers.replay import Part, Saved, leave, parts_of, random_state, unlike
from memplan.levers.undo import StandIn, Undo, plain_forward, set_attributes
from memplan.tape import prepares

_PLAIN = (bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)
_NUMBERS = frozenset(kind for kind in np.sctypeDict.values() if issubclass(kind, np.number | np.bool_))
_PLAIN_TYPES = frozenset(_PLAIN) | _NUMBERS
_CONTAINERS = (list, tuple, set, frozenset, dict)
_LONGEST = 64  # entries of one that is looked into: more are no settings
_OF_MODULES = frozenset(vars(nn.Module()))  # what torch keeps in each, and is looked at by itself
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_MOST_KINDS = 64  # of calls of one block that are remembered
_MOST_MISSES = 3  # captures with nothing to drop before one is remembered
_OFTEN = 100  # forwards in a row that were new, beyond what lengths bring about
_TOLD = "told of captures"  # among what blocks share

_log = logging.getLogger(__name__)


def install(block: nn.Module, path: str, dropped: Sequence[str], proved: set[object] | None = None) -> Undo:
    """Run a block so that it drops these values, by their names in its `BlockGraph`.

    Args:
        proved: shared by the blocks of a model. What one of them has proved, others that run the same operators need
            not: the first does it while little is held, and the last would do it at the peak of the first step.
    """
    return set_attributes(
        block, {"forward": Selected(block, path, tuple(dropped), set() if proved is None else proved)}
    )


def refusals(graphs: Mapping[str, BlockGraph], traced: Sequence[BlockGraph], offered: bool) -> list[str]:
    """What of blocks cannot be dropped and why, in lines.

    Args:
        graphs: of blocks by their paths, what they are planned by.
        traced: those that a trace of the model has shown. Of a block without autograd, which saves nothing, there is
            none.
        offered: whether there is a part that can be dropped.
    """
    lines = [
        f"{len(graph.unlike)} of the values that {path} saves are held, since they come out differently when they are "
        f"computed again here: {', '.join(graph.unlike[:3])}{', ...' if len(graph.unlike) > 3 else ''}"
        for path, graph in graphs.items()
        if graph.unlike
    ]
    if offered or lines or all(node.repeatable for graph in traced for node in graph.nodes):
        return lines
    return [
        "no part of a block can be recomputed: nothing that autograd saves there can be made again, since it is "
        "written to in place, or comes of random numbers from a generator of its own or from Python's or NumPy's, or "
        "after Python has asked what a tensor holds"
    ]


def proved(
    block: nn.Module, captured: Captured, saved: Sequence[Saved], inputs: Sequence[Tensor], state: Tensor
) -> BlockGraph:
    """The graph of a forward that was just captured, in which only that is run again which then gives the same.

    Args:
        saved, inputs: what `capturing` gave back, and the tensors that the block was called with.
        state: the random state before.
    """
    alone = {v: parts_of(captured, frozenset({v})) for v in captured.graph.droppable}
    return captured.graph.without([v for v, parts in alone.items() if unlike(parts, saved, block, inputs, state)])


class Selected(StandIn):
    """A forward that leaves less behind."""

    def __init__(self, block: nn.Module, path: str, dropped: tuple[str, ...], proved: set[object]) -> None:
        super().__init__(block, f"select {dropped}")
        self._proved = proved
        self.path = path
        self.dropped = dropped
        self.found = dropped  # those of them that the last kind of call had
        self._forget()

    def _forget(self) -> None:
        self._anew = 0  # calls in a row that were captured
        self._misses = 0  # captures in which there was nothing to drop
        self._known: dict[object, tuple[Captured, tuple[Part, ...]]] = {}
        self._look()

    def _look(self) -> None:
        """At the block's modules."""
        self._attributes = [vars(module) for module in self.block.modules()]
        self._contained = [
            (own, name)
            for own in self._attributes
            for name, value in own.items()
            if isinstance(value, _CONTAINERS) and name not in _OF_MODULES
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_") or name[:2] == "__"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._known, self._proved = {}, set()  # the block may not be whole yet
        self._attributes, self._contained, self._anew, self._misses = [], [], 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)
        if not self._attributes:
            self._forget()
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = str(spec), self._kind(leaves, inputs)
        known = self._known.get(kind)
        if known is None:
            self._anew += 1
            if self._anew == _OFTEN and _TOLD not in self._proved:
                self._tell_of_captures()
            self._look()  # there may be other modules now
            kind = str(spec), self._kind(leaves, inputs)
            return self._captured(kind, inputs, args, kwargs)
        self._anew, self._known[kind] = 0, self._known.pop(kind)  # the latest, which is the last to be forgotten
        captured, parts = known
        expected, sources = captured.saved, _sources_of(captured, parts, inputs)
        steady = len(expected) if captured.steady is None else captured.steady
        saved: list[Saved] = []
        alike = True

        def pack(tensor: Tensor) -> Saved:
            nonlocal alike
            n = len(saved)
            alike = alike and (expected[n].is_like(tensor) if n < steady else captured.steady is not None)
            saved.append(Saved(tensor))
            return saved[-1]

        state = random_state(captured.device) if any(part.draws for part in parts) else None
        with saved_tensors_hooks(pack, Saved.give):
            out = self.__wrapped__(*args, **kwargs)
        if alike and len(saved) >= steady and all(tensor._version == before for tensor, before in sources):
            leave(parts, saved, self.block, inputs, state)
        else:
            del self._known[kind]
            self._warn("saves other tensors than in its last forward, on a call that looks the same")
        return out

    def _tell_of_captures(self) -> None:
        self._proved.add(_TOLD)  # by one block for all
        _log.warning(
            "memplan: %s is captured anew in every forward, which takes about the time of that forward again: its "
            "calls, or an attribute of its modules (a number, or one in a list or dict), are others each time. Keep "
            "what changes in a tensor, pad to fewer lengths, or plan without 'select'",
            self.path,
        )

    def _captured(self, kind: object, inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward for the first time on this kind of call."""
        device = inputs[0].device if inputs else torch.device("cpu")
        is_traced = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        # A trace is of a steady step, which takes the state only if a part draws: past the tape, until that is known.
        state = torch.default_generator.get_state() if is_traced else random_state(device)
        captured, saved, out = capturing(self.block, self.__wrapped__, args, kwargs)
        parts = self._parts(captured, saved, inputs, state)
        if is_traced and any(part.draws for part in parts):
            state = random_state(device)
        leave(parts, saved, self.block, inputs, state)
        is_fixed = any(node.repeatable for node in captured.graph.nodes)
        if self.dropped and not is_fixed and self._misses < _MOST_MISSES:
            self._misses += 1  # another thread may have drawn from Python's generator meanwhile: it is tried again
            return out
        while len(self._known) >= _MOST_KINDS:
            self._known.pop(next(iter(self._known)))
        self._known[kind] = captured, parts
        return out

    def _parts(
        self, captured: Captured, saved: Sequence[Saved], inputs: Sequence[Tensor], state: Tensor
    ) -> tuple[Part, ...]:
        """For those of the plan's values that this forward has, and that turn out the same when they are made again."""
        graph = captured.graph
        droppable = set(graph.droppable)
        by_name = {value.name: v for v, value in enumerate(graph.values) if v in droppable}
        missing = [name for name in self.dropped if name not in by_name]
        dropped = frozenset(by_name[name] for name in self.dropped if name in by_name)
        self.found = tuple(name for name in self.dropped if name in by_name)
        parts = parts_of(captured, dropped)
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):  # what is there is about to be planned with
            return parts
        if missing:
            self._warn(f"has no {', '.join(missing[:3])} to be dropped ({len(missing)} of {len(self.dropped)})")
        structure = type(self.block), self.dropped, *(node.name for node in graph.nodes), *self._types(inputs)
        if structure in self._proved:
            return parts
        other = unlike(parts, saved, self.block, inputs, state)
        if not other:
            self._proved.add(structure)  # which the blocks that are like this one go by
        else:
            names = ", ".join(graph.values[v].name for v in sorted(other)[:3])
            self._warn(f"computes {names} differently when it is run again")
        return tuple(part for part in parts if part.gives.isdisjoint(other))

    def _kind(self, leaves: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[object, ...]:
        """What a captured forward depends on, beside the values in tensors."""
        storages = [tensor.untyped_storage()._cdata for tensor in inputs]
        shown: list[object] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                shown.append((leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.requires_grad))
            else:
                shown.append(leaf if isinstance(leaf, _PLAIN) else type(leaf))
        device = inputs[0].device if inputs else torch.device("cpu")
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        shared = tuple(storages.index(storage) for storage in storages)
        return *shown, shared, device, cast, *self._state()

    def _state(self) -> tuple[object, ...]:
        """Of the modules: what they consist of, their plain attributes, their hooks, and what is trained."""
        owns = self._attributes
        return (
            tuple(module for own in owns for module in own["_modules"].values()),
            tuple(map(len, owns)),
            tuple(value for own in owns for value in own.values() if type(value) in _PLAIN_TYPES),
            tuple(_told(own.get(name)) for own, name in self._contained),
            tuple(key for own in owns for hooks in _HOOKS for key in own[hooks]),
            tuple(p.requires_grad for own in owns for p in own["_parameters"].values() if p is not None),
        )

    def _types(self, inputs: Sequence[Tensor]) -> tuple[object, ...]:
        """What kernels are chosen by: type, device and sizes of what goes in and of the weights."""
        tensors = (*inputs, *self.block.parameters())
        return tuple((tensor.dtype, tensor.device, tensor.shape) for tensor in tensors)

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"{self.path} {what}. What autograd saves there is held instead, so the step takes more memory than "
            "planned. Plan again for the model as it is trained.",
            PlanNotFollowed,
            stacklevel=4,
        )


def _told(value: object) -> object:
    """A container's plain entries, those of containers in it as well, in a form that can be compared."""
    if isinstance(value, dict) and len(value) <= _LONGEST:
        return type(value), tuple((key, _told(entry)) for key, entry in value.items() if type(key) in _PLAIN_TYPES)
    if isinstance(value, set | frozenset) and len(value) <= _LONGEST:
        return type(value), frozenset(entry for entry in value if type(entry) in _PLAIN_TYPES)
    if isinstance(value, list | tuple) and len(value) <= _LONGEST:
        return type(value), tuple(map(_told, value))
    return value if type(value) in _PLAIN_TYPES else type(value)


def capturing(
    block: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    clock: Callable[[], None] | None = None,
) -> tuple[Captured, list[Saved], Any]:
    """Run a block's forward and capture it. Returns what was captured, what autograd saved, and the output.

    Args:
        clock: waits for the device, if operators are to be timed.
    """
    prepares()
    saved: list[Saved] = []
    capture = Capture(block, [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)], clock)

    def pack(tensor: Tensor) -> Saved:
        capture.saves(tensor)
        saved.append(Saved(tensor))
        return saved[-1]

    before = _chances()
    with saved_tensors_hooks(pack, Saved.give), capture:
        out = forward(*args, **kwargs)
    return capture.captured(is_fixed=_chances() == before), saved, out


def _sources_of(captured: Captured, parts: Sequence[Part], inputs: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """What is made again takes of the call's tensors, with their versions: where Python looks at values, a later
    forward may write to them, which the captured one did not."""
    if captured.steady is None:
        return []
    read = {value for part in parts for value, _ in part.sources}
    return [(inputs[at], inputs[at]._version) for value, at in captured.inputs.items() if value in read]


def _chances() -> tuple[object, ...]:
    """Where the generators of Python and NumPy are, whose numbers are in the calls as if they were constants."""
    return random.getstate(), pickle.dumps(np.random.get_state())


def found_in(model: nn.Module, decisions: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Option -> which of its values the blocks that run by it have, after a forward."""
    found: dict[str, tuple[str, ...]] = {}
    for path, option in decisions.items():
        forward = model.get_submodule(path).forward
        if isinstance(forward, Selected):
            found[option] = tuple(dict.fromkeys((*found.get(option, ()), *forward.found)))
    return found


@contextmanager
def watched(model: nn.Module, paths: Sequence[str], found: dict[str, Captured]) -> Iterator[None]:
    """Capture the first forward of some modules while the `with` block lasts, into `found` by their paths."""
    undos = [set_attributes(model.get_submodule(path), {"forward": _watching(model, path, found)}) for path in paths]
    try:
        yield
    finally:
        for undo in undos:
            undo()


def _watching(model: nn.Module, path: str, found: dict[str, Captured]) -> Callable[..., Any]:
    block = model.get_submodule(path)
    plain = plain_forward(block)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if path in found or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        found[path], _, out = capturing(block, plain, args, kwargs)
        return out

    return forward
