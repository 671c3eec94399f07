"""What a training step changes, and how it is taken back: `Before` for forward and backward, `CarefulStep` for weights.

Taken back are gradients, buffers, and the random states of torch (of every device), Python, NumPy and given generators.
Not taken back, since nobody can know of it: other attributes that a forward changes, and what the loop does beside it.

An optimizer's step changes weights and state in place and needs memory for its temporaries meanwhile. To keep copies of
all would take twice the memory of both. So it is taken in parts, each copied before it is stepped: where memory runs
out, the part at hand is put back, and the step is *finished*, one parameter after the other, rather than repeated. One
for whose copy there is no room even so is stepped without.
"""

import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from memplan import optimizers
from memplan.device import Device, resolve_gpu
from memplan.errors import UsageError
from memplan.levers import stepping
from memplan.optimizer_step import SINGLE, tensors_in
from memplan.out_of_memory import Diagnosis, Where, diagnose, inside
from memplan.recipe import Recipe

_Result = TypeVar("_Result")

PART_BYTES: Final = 64 * 2**20
"""Weights that are stepped together; with Adam's states copied, that takes 192 MiB for a moment. Chosen by hand: large
enough for foreach, and little beside the activations, which are gone by then."""

_SCHEDULED: Final = "_wrapped_by_lr_sched"  # by which torch's schedulers know a `step` that notes its calls for them


class Chance:
    """The random states of torch (on the CPU and on cards), Python, NumPy and given generators, as they are now.

    Args:
        cards: whose generators count, beside the CPU's.
        generators: of the user's own, beside the global ones.
    """

    def __init__(self, cards: Sequence[torch.device], generators: Sequence[torch.Generator] = ()) -> None:
        # As bytes: a tensor of 5 KiB would be held through the step, and no plan knows of it.
        self._global = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes()
        self._on_cards = [(card, torch.get_device_module(card).get_rng_state(card)) for card in cards]
        self._of_generators = [(generator, generator.get_state()) for generator in generators]

    def put_back(self) -> None:
        """Make them what they were."""
        python, numpy, torch_state = self._global
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch.frombuffer(bytearray(torch_state), dtype=torch.uint8))
        for card, state in self._on_cards:
            torch.get_device_module(card).set_rng_state(state, card)
        for generator, state in self._of_generators:
            generator.set_state(state)


def cards_of(model: nn.Module) -> list[torch.device]:
    """That hold parameters."""
    return sorted({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}, key=str)


class Before:
    """What a model and the sources of chance were before a step.

    Args:
        generators: of the user's own, beside the global ones.
    """

    def __init__(self, model: nn.Module, generators: Sequence[torch.Generator] = ()) -> None:
        self._parameters = list(model.parameters())
        self._owners = [module._buffers for module in model.modules() if module._buffers]
        self._cards, self._generators = cards_of(model), tuple(generators)
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._copies: list[Tensor] = []

    def note(self) -> None:
        """Remember them as they are now. Gradients are none: see `gradients`.

        Buffers are copied whole: batch norms write theirs without raising the version that torch keeps of a tensor.
        """
        self._buffers = [
            (owner, name, buffer) for owner in self._owners for name, buffer in owner.items() if buffer is not None
        ]
        now = [buffer.detach() for _, _, buffer in self._buffers]
        if [(t.shape, t.dtype, t.device) for t in now] != [(t.shape, t.dtype, t.device) for t in self._copies]:
            self._copies = [buffer.clone() for buffer in now]
        else:
            for copy, buffer in zip(self._copies, now, strict=True):
                copy.copy_(buffer)
        self._chance = Chance(self._cards, self._generators)

    def gradients(self) -> int:
        """How many parameters hold one."""
        return sum(parameter.grad is not None for parameter in self._parameters)

    def drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def put_back(self) -> None:
        """Make buffers and random states what they were at `note`."""
        with torch.no_grad():
            for (owner, name, buffer), copy in zip(self._buffers, self._copies, strict=True):
                owner[name] = buffer
                buffer.copy_(copy)
        self._chance.put_back()


def outcome(run: Callable[[], _Result]) -> tuple[tuple[_Result] | None, Exception | None]:
    """What it returns, or what it raises: recovery must not run while an error is handled, which holds its tensors."""
    try:
        return (run(),), None
    except Exception as error:
        return None, error


def ran_out(error: Exception, device: Device) -> Diagnosis | None:
    """What ran out, if it is what plans are about: the memory of the device where the model is."""
    found = diagnose(error)
    here = Where.HOST if device.torch_device.type == "cpu" else Where.DEVICE
    return found if found is not None and found.where in (here, Where.DEVICE) else None


def forget(error: BaseException) -> None:
    """Let go of what an error's frames hold: the tensors of the step that it ended. Its lines can still be read."""
    for one in inside(error):
        traceback.clear_frames(one.__traceback__)


def steps_in_parts(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step can be guarded without a copy of all that it changes."""
    return _is_foreign(optimizer) or stepping.refusal(Recipe(optimizer=optimizer), 1) is None


def _is_foreign(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "bitsandbytes"  # kernels without temporaries


def device_of(model: nn.Module) -> Device:
    """That the weights are on. Raises UsageError for one that no guard knows."""
    place = str(next(model.parameters()).device)
    device = resolve_gpu(place)[1]
    if device is None:
        raise UsageError(f"the weights are on {place}: the guard is for a model on a CPU or a CUDA device")
    return device


class CarefulStep:
    """Stands in for an optimizer's `step`: it is taken whole, or in part and said so, whatever memory does.

    Args:
        before: is called before each step.
        peak_bytes: that the plan in force has at its peak, beyond which copies are not to go.

    Attributes:
        begun: whether it was called since `reset`.
        taken: parameters stepped since, or perhaps stepped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: Device,
        before: Callable[[], None],
        peak_bytes: Callable[[], int],
    ) -> None:
        self.begun, self.taken = False, 0
        self._peak_bytes = peak_bytes
        self._model, self._optimizer, self._device, self._before = model, optimizer, device, before
        self._own: Any = optimizer.step
        self._shadowed = vars(optimizer).get("step")
        self._foreign = _is_foreign(optimizer)
        self._parts = steps_in_parts(optimizer)

        def step(optimizer: Optimizer, closure: Callable[[], float] | None = None) -> None:
            self._step(optimizer, closure)

        if hasattr(self._own, _SCHEDULED):
            setattr(step, _SCHEDULED, True)
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]  # schedulers take methods apart

    def reset(self) -> None:
        self.begun, self.taken = False, 0

    def undo(self) -> None:
        """Give the optimizer its own `step` back."""
        del self._optimizer.step
        if self._shadowed is not None:
            self._optimizer.step = self._shadowed  # type: ignore[method-assign]

    def _step(self, optimizer: Optimizer, closure: Callable[[], float] | None = None) -> None:
        """What `optimizer.step()` does. Hooks are called once; global ones of torch for each part."""
        if closure is not None:
            raise UsageError("the guard cannot take back what a closure does: step without one, after the backward")
        self._before()
        self.begun = True
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._foreign or _takes_no_memory(optimizer, params):
            self.taken = len(params)  # should memory run out nevertheless, nobody knows which
            self._own()
            return
        for hook in list(optimizer._optimizer_step_pre_hooks.values()):
            hook(optimizer, (), {})
        room_bytes = self._peak_bytes() - _held_bytes(self._model, optimizer)
        for part in _in_parts(optimizer, params, room_bytes) if self._parts else [params]:
            failure = self._took(part)
            if failure is not None:
                self._finish(part, len(params))
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            hook(optimizer, (), {})
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at

    def _took(self, part: Sequence[Parameter]) -> "_Failed | None":
        """Step these. Where memory runs out they are put back, and its error is returned."""
        copies = None
        try:
            copies = _Copies(self._optimizer, part)
            _step_these(self._optimizer, part)
        except Exception as error:  # what raises is the optimizer's own code
            if diagnose(error) is None:
                raise
            failed = _Failed(error, copied=copies is not None)
        else:
            self.taken += len(part)
            return None
        if copies is not None:
            copies.put_back()
            del copies
        forget(failed.error)
        self._device.release()
        return failed

    def _finish(self, part: Sequence[Parameter], of: int) -> None:
        """Once more, with what was freed; one after the other, if the optimizer can."""
        unset = stepping.install(self._model, self._optimizer, SINGLE)
        try:
            for some in [[parameter] for parameter in part] if self._parts else [part]:
                failed = self._took(some)
                if failed is not None and failed.copied:
                    failed.error.add_note(_left(self.taken, of, some))
                    raise failed.error
                if failed is not None:
                    self._step_uncopied(some, of)
        finally:
            unset()

    def _step_uncopied(self, some: Sequence[Parameter], of: int) -> None:
        """As it would have been stepped without memplan."""
        before, self.taken = self.taken, self.taken + len(some)
        try:
            _step_these(self._optimizer, some)
        except Exception as error:  # what raises is the optimizer's own code
            if diagnose(error) is not None:
                error.add_note(f"{_left(before, of, some)} It may be half changed: load the last checkpoint.")
            raise


@dataclass(frozen=True, slots=True)
class _Failed:
    """How parameters were not stepped, and whether there was room for their copy."""

    error: Exception
    copied: bool


class _Copies:
    """Some parameters of an optimizer with all that its step may change of them."""

    def __init__(self, optimizer: Optimizer, params: Sequence[Parameter]) -> None:
        self._optimizer, self._params = optimizer, params
        self._state: dict[Tensor, Any] = {p: dict(optimizer.state[p]) for p in params if p in optimizer.state}
        own = {id(p) for p in params}
        self._groups = [
            (group, {name: value for name, value in group.items() if name != "params"})
            for group in optimizer.param_groups
            if not own.isdisjoint(map(id, group["params"]))
        ]
        tensors = [*(p.detach() for p in params), *tensors_in(self._state.values())]
        self._pairs = [(tensor, tensor.clone()) for tensor in tensors]

    def put_back(self) -> None:
        with torch.no_grad():
            for tensor, copy in self._pairs:
                tensor.copy_(copy)
        for parameter in self._params:
            self._optimizer.state.pop(parameter, None)
        self._optimizer.state.update(self._state)
        for group, settings in self._groups:
            group.update(settings)


def _takes_no_memory(optimizer: Optimizer, params: Sequence[Parameter]) -> bool:
    """Fused kernels have no temporaries, once the state is there. Source: _fused_adam in torch/optim/adam.py."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and all(parameter in optimizer.state for parameter in params)


def _held_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Of weights, buffers, gradients and states: what is there when an optimizer steps, but for what a loop keeps."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    tensors = (*model.parameters(), *model.buffers(), *gradients, *tensors_in(optimizer.state.values()))
    return sum(tensor.nbytes for tensor in tensors)


def _in_parts(optimizer: Optimizer, params: Sequence[Parameter], room_bytes: int) -> Iterator[list[Parameter]]:
    """In order, of `PART_BYTES` at most, with copies that take half of the room: the other half is for temporaries.

    What is larger by itself is alone.
    """
    part: list[Parameter] = []
    size = copied = 0
    for parameter in params:
        copy_bytes = parameter.nbytes + sum(t.nbytes for t in tensors_in([optimizer.state.get(parameter, {})]))
        if part and (size + parameter.nbytes > PART_BYTES or copied + copy_bytes > room_bytes // 2):
            yield part
            part, size, copied = [], 0, 0
        part.append(parameter)
        size, copied = size + parameter.nbytes, copied + copy_bytes
    if part:
        yield part


def _step_these(optimizer: Optimizer, params: Sequence[Parameter]) -> None:
    """By the optimizer's own arithmetic, groups and state; hooks belong to the whole step."""
    with optimizers.narrowed(optimizer, params), _without_hooks(optimizer):
        type(optimizer).step(optimizer)


@contextmanager
def _without_hooks(optimizer: Optimizer) -> Iterator[None]:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: vars(optimizer)[name] for name in names}
    vars(optimizer).update({name: type(hooks[name])() for name in names})
    try:
        yield
    finally:
        vars(optimizer).update(hooks)


def _left(taken: int, of: int, failed: Sequence[Parameter]) -> str:
    shape = tuple(failed[0].shape)
    if not taken:
        return f"memplan: no parameter was stepped; the first, of shape {shape}, found no room even alone."
    return (
        f"memplan: the optimizer had stepped {taken} of {of} parameters, and the next, of shape {shape}, found no room "
        "even alone. That cannot be taken back: load the last checkpoint."
    )
