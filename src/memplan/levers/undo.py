"""How levers change a module: by instance attributes, which are taken away again."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Undo = Callable[[], None]


class StandIn:
    """What stands in for a module's `forward`. An object and no closure, so that a copied module has its own.

    Hooks, names and state-dict keys of the module stay what they are.
    """

    def __init__(self, block: nn.Module, lever: str) -> None:
        self.block = block
        self.__wrapped__ = plain_forward(block)  # the name by which `inspect.signature` sees through
        self.__qualname__ = f"{lever} {getattr(self.__wrapped__, '__qualname__', id(self.__wrapped__))}"  # see `alike`


def plain_forward(block: nn.Module) -> Callable[..., Any]:
    """The module's forward without a lever."""
    return block.forward.__wrapped__ if isinstance(block.forward, StandIn) else block.forward


def set_attributes(module: nn.Module, values: Mapping[str, object]) -> Undo:
    """Set instance attributes. The class's own (or an older instance attribute) comes back on undo."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)

    def undo() -> None:
        for name in values:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)

    return undo
