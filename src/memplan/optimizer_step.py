"""The optimizer's part of a recorded step: its state, and its temporaries, behind the micro-steps or inside a backward.

`PrimedOptimizer` stands on a model's abstract parameters with its lazily made state in place, as in a steady run. Real
optimizers skip a parameter without a gradient, and make no state for it; so only what the micro-steps have given a
gradient is stepped and counted, and state that a live optimizer has already.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from memplan import optimizers
from memplan.abstract import AbstractModel
from memplan.errors import UsageError
from memplan.kernels import Backend
from memplan.notes import Notes
from memplan.tape import Tape

PLAIN: Final = "plain"  # as the optimizer does by itself
SINGLE: Final = "single"  # one parameter after the other where it would take many at once (foreach)
IN_BACKWARD: Final = "in-backward"  # each parameter as soon as its gradient is there, which is dropped then
STEPPINGS: Final = (PLAIN, SINGLE, IN_BACKWARD)


def check_stepping(stepping: str) -> None:
    """Raises UsageError for a word that is none of `STEPPINGS`."""
    if stepping not in STEPPINGS:
        raise UsageError(f"a step is one of {', '.join(STEPPINGS)}, got {stepping!r}")


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """What an optimizer adds to the trace of a step."""

    notes: Notes  # of its step behind the micro-steps
    state: list[int]  # bytes of each storage on the device
    before: int  # so many of them, the first, are there before the first step; that step makes the others
    paged_bytes: int  # of state that is on the host between steps


@dataclass(slots=True)
class Dropped:
    """What a backward that steps has seen: gradients that were there, and are gone."""

    parameters: set[int] = field(default_factory=set)  # ids
    rows: list[int] = field(default_factory=list)  # the gradients' rows on the tape
    weights: list[int] = field(default_factory=list)  # rows of what was gathered of weights that are spread over ranks


class PrimedOptimizer:
    """An optimizer over a model's abstract parameters; every parameter was stepped once. Steps have no effect.

    Parameters are stepped in the type in which they are kept, by the ``id`` of the original, where that is another than
    the one in which they compute.

    Raises BadOptimizer as `optimizers.build` does.
    """

    def __init__(
        self,
        abstract: AbstractModel,
        fake: FakeTensorMode,
        backend: Backend,
        optimizer: str | Optimizer,
        stepping: str,
        kept: Mapping[int, torch.dtype] = MappingProxyType({}),
    ) -> None:
        self.model, self.fake, self.backend = abstract.model, fake, backend
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._gradients: dict[int, Tensor] = {}  # by the parameter's id
        self._kept = self._in_kept_types(abstract.stand_in, kept)
        foreach = False if stepping == SINGLE else backend.foreach
        with self._as_kept(), self._tape():
            self.optimizer = optimizers.build(
                optimizer, self._trainable, abstract.stand_in, abstract.imitate, foreach=foreach
            )
            if stepping == SINGLE:
                set_single(self.optimizer)
            self._inherited = {id(key) for key in self.optimizer.state}
            self._give_gradients(self._trainable)
            self.optimizer.step()
            self._drop_gradients()
        self._hosted = set() if backend.name == "cpu" else optimizers.on_host(optimizer, self.optimizer)

    def part(
        self,
        stepped: Sequence[Parameter],
        *,
        done: bool = False,
        clips: bool = False,
        make: Callable[[], Iterator[None]] | None = None,
    ) -> OptimizerPart:
        """The step behind the micro-steps, and the state of those that are stepped there or, if `done`, were before.

        With `clips` the norm of the gradients is clipped first, by what torch takes on the device for it. With `make`
        they are made as a part of the step, and it steps each time that those of some are there.
        """
        with self._as_kept():
            return self._part(stepped, done=done, clips=clips, make=make)

    def _part(
        self, stepped: Sequence[Parameter], *, done: bool, clips: bool, make: Callable[[], Iterator[None]] | None
    ) -> OptimizerPart:
        before, made = self._state_of({id(parameter) for parameter in stepped})
        with self._tape():
            self._give_gradients([] if done or make else stepped)
        tape = self._tape()
        every = tensors_in(self.optimizer.state.values())
        for tensor in (*self.model.parameters(), *(p.grad for p in stepped if p.grad is not None), *every):
            tape.pass_over(tensor)
        with tape:
            if clips:
                clip_grad_norm_(stepped, 1.0, foreach=self.backend.foreach)
            for _ in make() if make else (None,):
                self.optimizer.step()
        tape.forget()
        self._drop_gradients()
        paged = [tensor for tensor in (*before, *made) if optimizers.is_paged(tensor)]
        early = [tensor for tensor in before if not optimizers.is_paged(tensor)]
        here = [*early, *(tensor for tensor in made if not optimizers.is_paged(tensor))]
        return OptimizerPart(tape.notes, sizes_of(here), len(sizes_of(early)), sum(sizes_of(paged)))

    @contextmanager
    def in_backward(self, tape: Tape) -> Iterator[Dropped]:
        """Each parameter is stepped inside the backwards that `tape` records, as the lever for it does."""
        dropped = Dropped()
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for tensor in tensors_in(self.optimizer.state.values()):
            tape.pass_over(tensor)

        def step(parameter: Tensor) -> None:
            assert isinstance(parameter, Parameter)
            row = tape.row_of(parameter.grad) if parameter.grad is not None else None
            dropped.rows += [] if row is None else [row]
            dropped.parameters.add(id(parameter))
            with _optimizer_s_own(tape):
                optimizers.step_alone(self.optimizer, parameter)
            parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(step) for p in self._trainable if id(p) in held]
        try:
            yield dropped
        finally:
            for hook in hooks:
                hook.remove()

    def _in_kept_types(
        self, stand_in: Mapping[int, Parameter], kept: Mapping[int, torch.dtype]
    ) -> list[tuple[Parameter, Tensor]]:
        """The parameters that are kept in another type, each with data of that type."""
        others = [(stand_in[at], dtype) for at, dtype in kept.items() if stand_in[at].dtype != dtype]
        with self.fake:
            return [(parameter, torch.zeros_like(parameter, dtype=dtype).detach()) for parameter, dtype in others]

    @contextmanager
    def _as_kept(self) -> Iterator[None]:
        computing = [(parameter, parameter.data) for parameter, _ in self._kept]
        try:
            for parameter, data in self._kept:
                parameter.data = data
            yield
        finally:
            for parameter, data in computing:
                parameter.data = data

    def _tape(self) -> Tape:
        return Tape(self.model, self.fake, self.backend, answer=1.0)

    def _give_gradients(self, parameters: Iterable[Parameter]) -> None:
        """The same ones every time: nothing can be told of them but their form."""
        for parameter in parameters:
            if id(parameter) not in self._gradients:
                with self.fake:
                    self._gradients[id(parameter)] = torch.zeros_like(parameter)
            parameter.grad = self._gradients[id(parameter)]

    def _drop_gradients(self) -> None:
        for parameter in self._trainable:
            parameter.grad = None

    def _state_of(self, stepped: set[int]) -> tuple[list[Tensor], list[Tensor]]:
        """What is there in a steady run: before the first step, and made by it for what is stepped there.

        Counters that a card's optimizer keeps on the host are left out.
        """
        skipped = {id(parameter) for parameter in self._trainable} - stepped
        state = [(id(key), value) for key, value in self.optimizer.state.items()]
        before = [value for key, value in state if key in self._inherited]
        made = [value for key, value in state if key not in self._inherited and key not in skipped]
        return self._here(before), self._here(made)

    def _here(self, state: Iterable[object]) -> list[Tensor]:
        return [tensor for tensor in tensors_in(state) if id(tensor) not in self._hosted]


@contextmanager
def _optimizer_s_own(tape: Tape) -> Iterator[None]:
    """Operators inside a backward that are not autograd's: values may be asked for, sums are not written in place."""
    module, backward, answer = tape.running(), tape.backward, tape.answer
    tape.stack.append(module)
    tape.backward, tape.answer = False, 1.0
    try:
        yield
    finally:
        tape.stack.pop()
        tape.backward, tape.answer = backward, answer


def set_single(optimizer: Optimizer) -> None:
    """Take one parameter after the other, in all groups that would take many at once."""
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = False


def sizes_of(tensors: Iterable[Tensor]) -> list[int]:
    """Bytes of the distinct storages behind some tensors."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return list(storages.values())


def tensors_in(values: Iterable[object]) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found
