"""Runs of alike blocks, and a model without most of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from memplan.blocks import alike

FEWEST, ENOUGH = 5, 7  # blocks of a run that are traced; see `repeat`


@dataclass(frozen=True, slots=True)
class Run:
    """A run of alike blocks in one container, and how much of it is traced."""

    container: str
    blocks: tuple[str, ...]
    kept: int

    @property
    def ends(self) -> int:
        """How many are traced before the template, and how many behind the omitted ones."""
        return self.kept // 2

    @property
    def template(self) -> str:
        """The one that is copied; its neighbours are compared with it."""
        return self.blocks[self.ends]

    @property
    def omitted(self) -> tuple[str, ...]:
        """What is not traced; in forward order right behind the template."""
        return self.blocks[self.ends + 1 : len(self.blocks) - self.ends]

    @property
    def traced(self) -> tuple[str, ...]:
        return (*self.blocks[: self.ends + 1], *self.blocks[-self.ends :])


def long_runs(model: nn.Module, blocks: Sequence[str], kept: int) -> list[Run]:
    """Runs that are worth shortening: more alike blocks than are kept, in a ModuleList, indifferent to the config."""
    runs = []
    for paths in alike(model, blocks):
        container = paths[0].rpartition(".")[0]
        inside = isinstance(model.get_submodule(container), nn.ModuleList)
        if len(paths) > kept and inside and _uniform(model, len(model.get_submodule(container)._modules)):
            runs.append(Run(container, paths, kept))
    return runs


def _uniform(model: nn.Module, count: int) -> bool:
    """No per-layer list in a config says that layers differ (layer_types and the like)."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in {id(c): c for c in configs if c is not None}.values():
        for value in vars(config).values():
            if isinstance(value, list | tuple) and len(value) == count and len({str(v) for v in value}) > 1:
                return False
    return True


@contextmanager
def shortened(model: nn.Module, runs: Sequence[Run]) -> Iterator[None]:
    """The model without the runs' omitted blocks, for as long as the `with` block lasts."""
    containers = {run.container: model.get_submodule(run.container) for run in runs}
    before = {path: dict(container._modules) for path, container in containers.items()}
    try:
        for run in runs:
            for path in run.omitted:
                del containers[run.container]._modules[path.rpartition(".")[2]]
        yield
    finally:
        for path, container in containers.items():
            container._modules.clear()
            container._modules.update(before[path])
