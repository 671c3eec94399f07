"""`World`: how many cards train together, and what each of them holds."""

from dataclasses import dataclass

from memplan.errors import UsageError


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
