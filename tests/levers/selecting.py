"""Models and blocks with a selection installed, and the results of their steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import tiny
import torch
from test_recompute import MODELS, differences, run
from torch import Tensor, nn

from memplan import levers
from memplan.blocks import find_blocks
from memplan.graph import BlockGraph
from memplan.levers import select
from memplan.levers.capture import Captured
from memplan.levers.undo import Undo
from memplan.selection import frontier, thinned

__all__ = ["MODELS", "differences", "run"]

POINTS = 4  # of each block's frontier

Choose = Callable[[BlockGraph], Sequence[int]]


def captured_of(model: nn.Module, batch: tiny.Batch) -> dict[str, Captured]:
    """What the blocks of a model do in one forward."""
    found: dict[str, Captured] = {}
    with torch.random.fork_rng(), select.watched(model, find_blocks(model), found):
        model(**batch)
    return found


def point(graph: BlockGraph, number: int) -> tuple[int, ...]:
    """What is dropped at one of `POINTS` of the frontier; by rough times, which do not matter here."""
    seconds = [1e-6 + 1e-11 * node.flops + 1e-10 * node.bytes for node in graph.nodes]
    found = thinned(frontier(graph, seconds), POINTS + 1)[1:]
    return found[min(number, len(found) - 1)].dropped if found else ()


def everything(graph: BlockGraph) -> tuple[int, ...]:
    return graph.droppable


@cache
def names(model: str, number: int | None = None) -> dict[str, tuple[str, ...]]:
    """Block path -> what it drops: at a point of its frontier, or everything."""
    graphs = {path: captured.graph for path, captured in captured_of(*MODELS[model]()).items()}
    chosen = {p: everything(g) if number is None else point(g, number) for p, g in graphs.items()}
    return {path: tuple(graphs[path].values[v].name for v in dropped) for path, dropped in chosen.items()}


@contextmanager
def selected(name: str, number: int | None = None) -> Iterator[tiny.Made]:
    """A model all of whose blocks drop what is at a point of their frontier, or everything."""
    model, batch = MODELS[name]()
    selections = names(name, number)
    with levers.decided(model, {path: path for path in selections}, selections):
        yield model, batch


# --- single blocks --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A little of everything, around a function of one's own."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(0.25)
        self.last = nn.Linear(8, 8)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(self, *args, **kwargs)


def usual(block: Block, x: Tensor) -> Tensor:
    return x + block.last(block.dropout(block.act(block.norm(block.first(x)))))


def made(function: Callable[..., Tensor] = usual) -> Block:
    torch.manual_seed(0)
    return Block(function)


def rows(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def capture(block: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    found: dict[str, Captured] = {}
    with torch.random.fork_rng(), select.watched(nn.ModuleDict({"b": block}), ["b"], found):
        block(*args, **kwargs)
    return found["b"]


def dropped_names(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """All that a block can drop."""
    graph = capture(block, *args, **kwargs).graph
    return tuple(graph.values[v].name for v in graph.droppable)


def install(block: nn.Module, *args: Any, **kwargs: Any) -> Undo:
    """Let a block drop all that it can on such a call."""
    return select.install(block, "b", dropped_names(block, *args, **kwargs))


def gradients(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor | None]:
    """Of the input and the parameters, from one random state; and the output and that state in the end."""
    block.zero_grad()
    x.grad = None
    torch.manual_seed(5)
    out = block(x, *args, **kwargs)
    out.square().sum().backward()
    state = torch.get_rng_state()
    return [out.detach(), x.grad, *(parameter.grad for parameter in block.parameters()), state]


def same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> bool:
    """Whether results are equal to the bit."""
    pairs = list(zip(found, wanted, strict=True))
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def holding(block: nn.Module) -> int:
    """How many values a block with a selection drops on the last kind of call."""
    forward = block.forward
    assert isinstance(forward, select.Selected)
    *_, (_, parts) = forward._known.values()
    return sum(len(part.gives) for part in parts)
