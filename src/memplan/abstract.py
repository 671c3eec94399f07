"""A model with no memory behind it, for as long as a `with` block lasts.

`AbstractModel` puts fake tensors in the place of a model's parameters and buffers and puts everything back on exit,
whatever happened in between: parameters, buffers, gradients, hooks, attributes, modes and the random state.
"""

import gc
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan import packed
from memplan.kernels import forms

_CONTAINERS = (dict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo every change that the block makes to the modules' attributes and to the random state."""
    before = [(module, contents(module.__dict__)) for module in model.modules()]
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, attributes in before:
            put_back(module.__dict__, attributes)


@contextmanager
def _passed_over() -> Iterator[None]:
    """Have the garbage collector leave alone what is there already, unless somebody else has it so.

    A run of fakes makes so many objects that it would look through all others again and again, a fifth of the time.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def contents(attributes: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Each attribute with a copy of its content, if it is a container: identity and content are both kept."""
    return {k: (v, v.copy() if isinstance(v, _CONTAINERS) else None) for k, v in attributes.items()}


def put_back(attributes: dict[str, object], before: dict[str, tuple[object, object]]) -> None:
    attributes.clear()
    for name, (value, content) in before.items():
        attributes[name] = value
        if isinstance(value, dict) and isinstance(content, dict):
            value.clear()
            value.update(content)
        elif isinstance(value, list) and isinstance(content, list):
            value[:] = content
        elif isinstance(value, set) and isinstance(content, set):
            value.clear()
            value.update(content)


class AbstractModel:
    """Swap a model's tensors for fakes; a shared (tied) parameter stays shared.

    Floating tensors become fake CPU tensors, also where they live on `meta` or on a card. Integers and booleans keep
    real values, in copies, since models read them; packed weights are fake too. `stand_in` maps the id of each original
    parameter to its fake. The scales beside packed weights, which are nowhere listed, are listed as buffers meanwhile.

    `known` is filled with pairs of a parameter and its fake, by the former's id; with those of an earlier time, in the
    same mode, a long model is entered at once.
    """

    def __init__(
        self, model: nn.Module, fake: FakeTensorMode, known: dict[int, tuple[nn.Parameter, nn.Parameter]] | None = None
    ) -> None:
        self.model = model
        self.fake = fake
        self.stand_in: dict[int, nn.Parameter] = {}
        self._known = {} if known is None else known
        self._packed = packed.Imitation(fake)
        self._guard = ExitStack()

    def __enter__(self) -> "AbstractModel":
        with ExitStack() as guard:
            guard.enter_context(_passed_over())
            guard.enter_context(untouched(self.model))
            for module in self.model.modules():
                self._swap(module)
            self._guard = guard.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.close()

    def _swap(self, module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in self.stand_in:
                packed_one = self._packed.of(module, name, parameter)
                self.stand_in[id(parameter)] = self._imitated(parameter) if packed_one is None else packed_one
            module._parameters[name] = self.stand_in[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = self.imitate(buffer)
        module._buffers.update(packed.scales_of(module))

    def _imitated(self, parameter: nn.Parameter) -> nn.Parameter:
        original, known = self._known.get(id(parameter), (None, None))
        if known is not None and original is parameter and _form(known) == _form(parameter):
            known.grad = None
            return known
        fresh = nn.Parameter(self.imitate(parameter), requires_grad=parameter.requires_grad)
        if fresh.is_floating_point():  # others have values, which a run may change
            self._known[id(parameter)] = parameter, fresh
        return fresh

    def imitate(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape, strides and type: fake if floating, a real copy on the CPU if not."""
        data = tensor.detach()
        if not (data.is_floating_point() or data.is_complex()):
            return torch.zeros_like(data, device="cpu") if data.is_meta else data.cpu().clone()
        return forms.empty(self.fake, data.shape, data.dtype, data.stride())


def _form(parameter: nn.Parameter) -> tuple[object, ...]:
    return parameter.shape, parameter.stride(), parameter.dtype, parameter.requires_grad


def to_training(model: nn.Module) -> None:
    """Put a model into training mode, unless it is: parts of it that are in eval mode then are so on purpose."""
    if not model.training:
        model.train()


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever a forward makes of the model's buffers, they have their values again afterwards. Copies them."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Undo what a real forward and backward leave behind: gradients, buffers, attributes, modes, random state.

    Gradients are taken off for the while, buffers are copied.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    cards = {parameter.device for parameter, _ in gradients if parameter.is_cuda}  # with a random state of their own
    with untouched(model), torch.random.fork_rng(list(cards)), buffers_kept(model):
        try:
            for module in model.modules():
                module._buffers.update(packed.scales_of(module))  # to be seen
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
