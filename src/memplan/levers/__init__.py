"""The levers: what memplan can do to a module of a model. One file each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from memplan.errors import PlanMismatch
from memplan.levers import eight_bit, loss_head, offload, recompute, select
from memplan.levers.host_pool import HostPool
from memplan.levers.undo import Undo
from memplan.problem import KEEP, RECOMPUTE

OPTIONS = (KEEP, RECOMPUTE)

_NOTHING: Mapping[str, Sequence[str]] = {}


@contextmanager
def decided(
    model: nn.Module,
    decisions: Mapping[str, str],
    selections: Mapping[str, Sequence[str]] = _NOTHING,
    pool: HostPool | None = None,
) -> Iterator[None]:
    """The model with each module run by its option, for as long as the `with` block lasts."""
    undo = install(model, decisions, selections, pool)
    try:
        yield
    finally:
        undo()


def tried(model: nn.Module, decisions: Mapping[str, str]) -> AbstractContextManager[None]:
    """As `decided`, where nobody is to be warned of what a step does with the levers."""
    return loss_head.unheard(decided(model, decisions))


@contextmanager
def noting_writes(model: nn.Module, decisions: Mapping[str, str], written: list[str]) -> Iterator[None]:
    """As `decided`; into `written` come the buffers of those modules that a run inside the `with` block has changed."""
    with decided(model, decisions):
        before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
        yield
        after = dict(model.named_buffers())
        changed = [name for name, (b, version) in before.items() if after.get(name) is not b or b._version != version]
        inside = tuple(f"{path}." for path in decisions)
        written += [name for name in changed if name.startswith(inside) and name not in written]


def install(
    model: nn.Module,
    decisions: Mapping[str, str],
    selections: Mapping[str, Sequence[str]] = _NOTHING,
    pool: HostPool | None = None,
) -> Undo:
    """Run each module by its option. If one cannot be installed, none is. What is returned undoes all, last first.

    Args:
        decisions: module path -> "keep", "recompute", a key of `selections`; for the loss head "chunked-<rows>".
        selections: option -> the values that it drops, by their names in the block's graph.
        pool: host memory for what is offloaded.

    Raises:
        PlanMismatch: an option that no lever has, or to offload without a pool.
    """
    known = (*OPTIONS, *selections, *(offload.OPTIONS if pool is not None else ()))
    for path, option in decisions.items():
        if option not in known and not loss_head.is_option(option):
            raise PlanMismatch(f"{path} is to {option!r}, but the options are {', '.join(known)}: plan again.")
    undos: list[Undo] = []
    proved: set[object] = set()
    head = None if pool is None else loss_head.find_head(model)  # as it is before a lever is in it

    def undo() -> None:
        while undos:
            undos.pop()()

    try:
        for path, option in decisions.items():
            undos.extend(_installed(model.get_submodule(path), path, option, selections, pool, proved))
        if pool is not None and not set(decisions.values()).isdisjoint(offload.OPTIONS):
            last = [path for path, option in decisions.items() if not _is_head(path, option, head)][-1]
            undos.append(offload.install_end(model.get_submodule(last), pool))
    except BaseException:
        undo()
        raise
    return undo


def _is_head(path: str, option: str, head: str | None) -> bool:
    """Whether it is the loss head, also where that one is kept: copies end with the blocks."""
    return path == head or loss_head.rows_of(option) is not None


def _installed(
    module: nn.Module,
    path: str,
    option: str,
    selections: Mapping[str, Sequence[str]],
    pool: HostPool | None,
    proved: set[object],
) -> Iterator[Undo]:
    """Each part of a lever as it is pulled, and what undoes it."""
    yield eight_bit.install(module)
    if loss_head.rows_of(option) is not None:
        yield loss_head.install(module, option)
    elif pool is not None and offload.is_option(option):
        yield offload.install(module, path, option, pool)
    elif option in selections:
        yield recompute.install(module, KEEP)
        yield select.install(module, path, selections[option], proved)
    else:
        yield recompute.install(module, option)
