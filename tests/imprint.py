"""What must be as it was after memplan has looked at a model: one record before, one list of differences after."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Imprint:
    """A model's attributes (by identity and content), weights, gradients, buffers, and the random state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.attributes = {path: _shallow(module) for path, module in self.modules.items()}
        self.tensors = {name: (tensor, tensor.detach().clone(), tensor._version) for name, tensor in _tensors(model)}
        self.grads = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
        self.random = _random_states()

    def differences(self) -> list[str]:
        """What is not as it was, in words; empty if nothing."""
        found = [] if dict(self.model.named_modules()) == self.modules else ["the modules"]
        for path, module in self.modules.items():
            found += [f"{path}.{name}" for name in _changed(self.attributes[path], _shallow(module))]
        now = dict(_tensors(self.model))
        for name, (tensor, content, _) in self.tensors.items():
            if now.get(name) is not tensor or not _same(tensor, content):
                found.append(f"the tensor {name}")
        for name, parameter in self.model.named_parameters():
            grad, content = self.grads[name]
            if parameter.grad is not grad or not _same(grad, content):
                found.append(f"the gradient of {name}")
        if any(not np.array_equal(a, b) for a, b in zip(self.random, _random_states(), strict=True)):
            found.append("the random state")
        return found


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _shallow(module: nn.Module) -> dict[str, tuple[object, object]]:
    """Each attribute with what it holds, so that both another object and another content are seen."""
    return {
        name: (value, list(value.items()) if isinstance(value, dict) else list(value) if _is_bag(value) else None)
        for name, value in vars(module).items()
    }


def _is_bag(value: object) -> bool:
    return isinstance(value, list | set | tuple)


def _changed(before: dict[str, tuple[object, Any]], now: dict[str, tuple[object, Any]]) -> list[str]:
    changed = sorted(before.keys() ^ now.keys())
    for name in before.keys() & now.keys():
        (old, content), (new, new_content) = before[name], now[name]
        if old is not new or not _identical(content, new_content):
            changed.append(name)
    return changed


def _identical(old: Any, new: Any) -> bool:
    if old is None or new is None:
        return old is new
    flat_old, flat_new = [_parts(entry) for entry in old], [_parts(entry) for entry in new]
    return len(flat_old) == len(flat_new) and all(
        len(a) == len(b) and all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(a, b, strict=True))
        for a, b in zip(flat_old, flat_new, strict=True)
    )


def _parts(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _same(tensor: Tensor | None, content: Tensor | None) -> bool:
    if tensor is None or content is None:
        return tensor is content
    return tensor.is_meta or torch.equal(tensor.detach(), content)


def _random_states() -> list[Any]:
    return [torch.get_rng_state().numpy(), np.array(random.getstate()[1]), np.random.get_state()[1]]
