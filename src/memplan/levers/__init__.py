"""The levers: what memplan can do to a block. One file each."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from memplan.errors import PlanMismatch
from memplan.levers import recompute
from memplan.problem import KEEP, RECOMPUTE

OPTIONS = (KEEP, RECOMPUTE)


@contextmanager
def decided(model: nn.Module, decisions: Mapping[str, str]) -> Iterator[None]:
    """The model with each block run by its option, for as long as the `with` block lasts."""
    undo = install(model, decisions)
    try:
        yield
    finally:
        undo()


def install(model: nn.Module, decisions: Mapping[str, str]) -> recompute.Undo:
    """Run each block by its option. If one cannot be installed, none is. What is returned undoes all, last first.

    Raises:
        PlanMismatch: an option that no lever has.
    """
    for path, option in decisions.items():
        if option not in OPTIONS:
            raise PlanMismatch(f"{path} is to {option!r}, but the options are {', '.join(OPTIONS)}: plan again.")
    undos: list[recompute.Undo] = []

    def undo() -> None:
        while undos:
            undos.pop()()

    try:
        for path, option in decisions.items():
            undos.append(recompute.install(model.get_submodule(path), option))
    except BaseException:
        undo()
        raise
    return undo
