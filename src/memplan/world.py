"""`World`: how many cards train together, and what each of them holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from memplan.blocks import signature
from memplan.errors import MemplanError, ModelFailed, PlanMismatch, UsageError
from memplan.plan_record import Plan

_Said = TypeVar("_Said")


@dataclass(frozen=True, slots=True)
class World:
    """Cards that train one model: replicas of it, each spread over so many shards.

    Attributes:
        replicas: each with samples of its own (DistributedDataParallel; with shards, FSDP2's hybrid).
        shards: cards that share one replica's weights, gradients and optimizer state (FSDP2, each block by itself).

    Raises:
        UsageError: a number below 1.
    """

    replicas: int = 1
    shards: int = 1

    def __post_init__(self) -> None:
        for name in ("replicas", "shards"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"World({name}={value!r}) has to be a whole number and at least 1")

    @property
    def cards(self) -> int:
        """Of all replicas and shards; each trains on samples of its own."""
        return self.replicas * self.shards

    def agreed(self, make: Callable[[], Plan], model: nn.Module | None = None) -> Plan:
        """The plan that `make` makes on the first rank, on all of them: what is timed differs from rank to rank.

        To be called on every rank, once the process group is up: `world.agreed(lambda: memplan.plan(...))`. An error
        on the first rank is raised on all, so that nobody waits.

        Args:
            model: what it is for; it has to be the same one on all ranks.

        Raises:
            UsageError: so many cards are not what the process group has.
            PlanMismatch: ranks have other models.
        """
        if _ranks() != self.cards:
            raise UsageError(
                f"{self} is {self.cards} cards, but the process group has {_ranks()} ranks. Start one process for each "
                "(torchrun) and call this on all of them, after init_process_group; to plan for cards that are "
                "elsewhere, call memplan.plan."
            )
        plan = _made_on_first(make)
        odd = [] if model is None else odd_ranks(signature(model))
        if odd:
            raise PlanMismatch(
                f"ranks {', '.join(map(str, odd))} have another model than rank 0 (parameter names, shapes, types or "
                "requires_grad differ), and one plan is for all. Build the same model on every rank."
            )
        return plan


def odd_ranks(text: str, group: "dist.ProcessGroup | None" = None) -> list[int]:
    """The ranks with another text than the first one's; on all of them the same answer."""
    first, *others = _gathered(text, group)
    return [rank for rank, other in enumerate(others, 1) if other != first]


def on_all(make: Callable[[], _Said]) -> _Said:
    """What `make` gives on this rank. An error on one of them is an error on all, so that nobody waits for it.

    To be called on every rank; `make` itself waits for none.

    Raises:
        ModelFailed: another rank failed; its words are in the message. Of what fails here, that itself.
    """
    made: list[_Said] = []
    failure: Exception | None = None
    try:
        made = [make()]
    except Exception as error:  # anything: the others wait for a word
        failure = error
    said = _gathered("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, words in enumerate(said):
        if words:
            raise ModelFailed(f"rank {rank} failed, and the others cannot go on without it. {words}")
    return made[0]


def of_first(own: _Said) -> _Said:
    """What the first rank has, on all of them."""
    return _gathered(own)[0]


def least_share(room_bytes: Callable[[], int]) -> float:
    """Of the room that the first rank has, what the rank with the least has. To be asked on every rank."""
    rooms = _gathered(on_all(room_bytes))
    return min(1.0, min(rooms) / rooms[0])


def said_of(share: float) -> tuple[str, ...]:
    """What a plan has to say of a share of the first rank's memory; nothing of all of it."""
    if share == 1.0:
        return ()
    return (f"planned for {share:.1%} of the first rank's memory, which is what the rank with the least has",)


def _gathered(own: _Said, group: "dist.ProcessGroup | None" = None) -> list[_Said]:
    if _ranks() == 1:
        return [own]
    found = [own] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _made_on_first(make: Callable[[], Plan]) -> Plan:
    if _ranks() == 1:
        return make()
    said: list[str | MemplanError | None] = [None]
    if dist.get_rank() == 0:
        try:
            said = [make().model_dump_json()]
        except MemplanError as error:
            said = [error]
        except Exception as error:  # anything: the others wait for a word
            said = [ModelFailed(f"planning failed on rank 0: {error}")]
    dist.broadcast_object_list(said)
    if isinstance(said[0], MemplanError):
        raise said[0]
    return Plan.model_validate_json(str(said[0]))
