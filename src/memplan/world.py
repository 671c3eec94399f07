"""`World`: how many cards train together, and what each of them holds."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor, nn

from memplan.blocks import signature
from memplan.errors import BadSample, MemplanError, ModelFailed, PlanMismatch, UsageError
from memplan.mixed_precision import check_policy
from memplan.plan_record import Plan
from memplan.samples import Sample
from memplan.units import format_bytes

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

_Said = TypeVar("_Said")
_Made = TypeVar("_Made", Plan, list[Plan])

_MIXED: Final = 1.02  # of the first rank's memory: more is another card, or one that others use less


@dataclass(frozen=True, slots=True)
class World:
    """Cards that train one model: replicas of it, each spread over so many shards.

    Attributes:
        replicas: each with samples of its own (DistributedDataParallel; with shards, FSDP2's hybrid).
        shards: cards that share one replica's weights, gradients and optimizer state (FSDP2, each block by itself).
        mp_policy: FSDP2's mixed precision, as `fully_shard` is given it: the model's own types are those in which the
            ranks keep their parts.

    Raises:
        UsageError: a number below 1; a policy that is none, or without shards.
    """

    replicas: int = 1
    shards: int = 1
    mp_policy: "MixedPrecisionPolicy | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("replicas", "shards"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"World({name}={value!r}) has to be a whole number and at least 1")
        check_policy(self.mp_policy)
        if self.mp_policy is not None and self.shards == 1:
            raise UsageError("mp_policy is FSDP2's, for weights that several cards share; this World has shards=1")

    @property
    def cards(self) -> int:
        """Of all replicas and shards; each trains on samples of its own."""
        return self.replicas * self.shards

    def check_here(self) -> None:
        """Before a model runs by a plan for so many cards. Ranks that are beside them, in other groups, may be there.

        Raises PlanMismatch where this process is none of so many: it holds more, or less, than was planned for.
        """
        if self.cards == 1:
            return
        ranks = _ranks()
        if ranks % self.cards:
            has = f"the process group has {ranks} ranks" if dist.is_initialized() else "this process trains alone"
            raise PlanMismatch(
                f"the plan is for one of {self.cards} cards, {self}, and {has}. Apply it on every rank, after "
                "init_process_group, or plan again with the world that is here."
            )

    def agreed(self, make: Callable[[], _Made], model: nn.Module | None = None) -> _Made:
        """The plan that `make` makes on the first rank, on all of them: what is timed differs from rank to rank.

        To be called on every rank, once the process group is up: `world.agreed(lambda: memplan.plan(...))`. An error
        on the first rank is raised on all, so that nobody waits.

        Args:
            make: makes a plan, or a list of them, such as a guard's `list(memplan.ladder(...))`. What it plans for is
                its own affair: the sample and the memory of the first rank, unless it asks the others before.
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


def on_all(make: Callable[[], _Said], undo: Callable[[_Said], None] = lambda _: None) -> _Said:
    """What `make` gives on this rank. An error on one of them is an error on all, so that nobody waits for it.

    To be called on every rank; `make` itself waits for none.

    Args:
        undo: what is called with it here, if another rank failed.

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
            undo(made[0])
            raise ModelFailed(f"rank {rank} failed, and the others cannot go on without it. {words}")
    return made[0]


def on_any(own: bool) -> bool:
    """Whether it is so on any rank."""
    return any(_gathered(own))


def of_first(own: _Said) -> _Said:
    """What the first rank has, on all of them."""
    return _gathered(own)[0]


@dataclass(frozen=True, slots=True)
class Rooms:
    """The memory that the ranks with the least and with the most have, as shares of what the first one has."""

    least: float = 1.0
    most: float = 1.0

    @property
    def share(self) -> float:
        """Of its own, what the first rank may plan for."""
        return min(1.0, self.least)

    def said(self) -> tuple[str, ...]:
        """What a plan for the least has to say; nothing where all have about as much."""
        if self.least < 1.0:
            whose = "which is what the rank with the least has"
            return (f"planned for {self.least:.1%} of the first rank's memory, {whose}",)
        if self.most > _MIXED:
            return (f"planned for the first rank's memory, which is the least; another rank has {self.most:.1%} of it",)
        return ()


ALONE: Final = Rooms()


def rooms_of_all(room_bytes: Callable[[], int]) -> Rooms:
    """Of the memory that is here, and on the other ranks. To be asked on every rank."""
    rooms = _gathered(on_all(room_bytes))
    return Rooms(min(rooms) / rooms[0], max(rooms) / rooms[0])


def largest(own: Sample, *said: str) -> tuple[Sample, tuple[str, ...]]:
    """What is to be planned for: the first rank's own sample, or that of the rank whose rows have the most bytes.

    To be called on every rank. Rows count, not how many there are: a sample's batch size binds nothing.

    Args:
        own: the sample of this rank.
        said: what has to be assumed about it.

    Returns:
        The sample, on the CPU if it was sent, on all ranks; where the first rank's is the one, each keeps its own. With
        it, on all ranks, what its rank says of it, and if that is not the first, that it is not.

    Raises:
        BadSample: it would have to be sent, and holds what cannot be. ModelFailed: so on another rank.
    """
    found = _gathered((own.row_bytes, said))
    rank = max(range(len(found)), key=lambda at: found[at][0])  # of equal ones the first
    row_bytes, words = found[rank]
    if rank == 0:
        return own, words
    sent = [on_all(lambda: _packed(own) if dist.get_rank() == rank else b"")]
    dist.broadcast_object_list(sent, src=rank)
    sample: Sample = on_all(lambda: pickle.loads(sent[0]))
    than = f"{format_bytes(row_bytes)} each, on the first rank {format_bytes(found[0][0])}"
    return sample, (*words, f"planned for the batch of rank {rank}, whose rows are the largest: {than}")


def _packed(sample: Sample) -> bytes:
    """Copies, since a view would take all of its storage along."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)

    try:
        return pickle.dumps(sample.map(copied))
    except Exception as error:  # whatever the user's objects raise
        raise BadSample(
            f"the sample of this rank is the largest, and cannot be sent to the first, which plans for it: {error}. "
            "Pass tensors and plain values only."
        ) from error


def _gathered(own: _Said, group: "dist.ProcessGroup | None" = None) -> list[_Said]:
    if _ranks() == 1:
        return [own]
    found = [own] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _made_on_first(make: Callable[[], _Made]) -> _Made:
    if _ranks() == 1:
        return make()
    kind: TypeAdapter[Any] = TypeAdapter(Plan | list[Plan])
    said: list[str | MemplanError | None] = [None]
    if dist.get_rank() == 0:
        try:
            said = [kind.dump_json(make()).decode()]
        except MemplanError as error:
            said = [error]
        except Exception as error:  # anything: the others wait for a word
            said = [ModelFailed(f"planning failed on rank 0: {error}")]
    dist.broadcast_object_list(said)
    if isinstance(said[0], MemplanError):
        raise said[0]
    made: _Made = kind.validate_json(str(said[0]))
    return made
