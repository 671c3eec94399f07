"""`World`: how many cards train together, and what each of them holds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from memplan.errors import MemplanError, ModelFailed, UsageError
from memplan.plan_record import Plan


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

    def agreed(self, make: Callable[[], Plan]) -> Plan:
        """The plan that `make` makes on the first rank, on all of them: what is timed differs from rank to rank.

        To be called on every rank, once the process group is up: `world.agreed(lambda: memplan.plan(...))`. An error
        on the first rank is raised on all, so that nobody waits.

        Raises:
            UsageError: so many cards are not what the process group has.
        """
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks != self.cards:
            raise UsageError(f"{self} is {self.cards} cards, but the process group has {ranks} ranks")
        return made_on_first(make)


def made_on_first(make: Callable[[], Plan]) -> Plan:
    """A plan for all ranks of the process group, where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
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
