"""What replicas tell each other around a guarded step, so that none waits for one that has run out of memory.

DistributedDataParallel adds gradients up inside the backward. A rank that fails there, or before, leaves the others in
a collective that never ends. So its exchange is switched off: forward and backward run alone, then all say how it went,
and only if it went well gradients are added up, in place. The price is that nothing is sent while the backward runs.
"""

from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memplan.errors import ModelFailed, PlanMismatch, UsageError
from memplan.world import odd_ranks


class Word(IntEnum):
    """How a step went on a rank; of several, the greatest counts."""

    WELL = 0
    NEARLY = 1  # the next one like it may run out
    RAN_OUT = 2
    FAILED = 3  # of something else: nobody can go on


class OthersRanOut(Exception):
    """Ends what a rank does that had memory enough."""


def check_whole(model: nn.Module, replica: DistributedDataParallel | None, replicas: int) -> None:
    """That each rank has the whole model, and the replica, if there is one, is of it and one of so many.

    Raises UsageError, and PlanMismatch for another number.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UsageError(
            "sharded parameters are gathered inside every forward, where a rank that has run out would leave the "
            "others waiting: the guard is for whole models on each rank"
        )
    if replica is not None and replica.module is not model:
        raise UsageError("the replica wraps another model than the fit's: apply the plan, then wrap fit.model")
    ranks = 1 if replica is None else dist.get_world_size(replica.process_group)
    if replica is not None and ranks != replicas:
        raise PlanMismatch(
            f"the plan is for {replicas} replicas and this is one of {ranks}, whose buckets it has to count. Plan with "
            f"world=memplan.World(replicas={ranks})."
        )


def refusal(replica: DistributedDataParallel) -> str | None:
    """Why the exchange of a replica cannot be left to a guard; None if it can."""
    if replica.static_graph:
        return "with static_graph=True it exchanges in every backward; leave that out"
    if replica.gradient_as_bucket_view:
        return "with gradient_as_bucket_view=True its gradients would be there twice, in its buckets and by themselves"
    if replica._comm_hooks:
        return "it has a communication hook, which the guard's own exchange would pass by"
    if replica.parameters_to_ignore:
        return "it leaves out some parameters or buffers, which the guard's own exchange would not"
    if any(isinstance(module, nn.SyncBatchNorm) for module in replica.modules()):
        return "its SyncBatchNorm layers wait for other ranks in the forward, also for one that has run out"
    return None


class Replicas:
    """A replica among its like.

    Args:
        replica: the model, wrapped.
        patience_s: how long a rank waits for the others' word. Has to be longer than a step may take.
    """

    def __init__(self, replica: DistributedDataParallel, patience_s: float) -> None:
        if why := refusal(replica):
            raise UsageError(f"this DistributedDataParallel cannot be guarded: {why}")
        self._replica, self._patience = replica, timedelta(seconds=patience_s)
        self._group = replica.process_group
        self._side = _beside(self._group, self._patience)
        self._rank, self._count = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._parameters = [p for p in replica.module.parameters() if p.requires_grad]

    def keep_apart(self) -> None:
        """No exchange inside of backwards. To be said again where a loop uses `no_sync`, which puts back what was."""
        self._replica.require_backward_grad_sync = self._replica.require_forward_param_sync = False

    def undo(self) -> None:
        """The replica exchanges inside its backwards again, as it was made: what it did before may be `no_sync`'s."""
        self._replica.require_backward_grad_sync = self._replica.require_forward_param_sync = True

    def check_same(self, plans: str) -> None:
        """Raises PlanMismatch on every rank, if the text is not the same on all."""
        if odd := odd_ranks(plans, self._side):
            raise PlanMismatch(
                f"ranks {', '.join(map(str, odd))} have other plans than rank 0, and all have to fall together. Make "
                "them on one rank, and send them to the others (Plan.model_dump_json)."
            )

    def agree(self, word: Word, bucket: int) -> list[tuple[Word, int]]:
        """Every rank's word, with the bucket that it is about. Raises RuntimeError after `patience_s` without one."""
        said = torch.zeros(self._count, dtype=torch.int64)
        said[self._rank] = word + len(Word) * bucket
        dist.all_reduce(said, group=self._side)
        return [(Word(value % len(Word)), value // len(Word)) for value in said.tolist()]

    def all_well(self, well: bool) -> bool:
        """Whether it went well on every rank."""
        return all(word is Word.WELL for word, _ in self.agree(Word.WELL if well else Word.RAN_OUT, 0))

    def least(self, value: float) -> float:
        """Of what every rank has."""
        said = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(said, op=dist.ReduceOp.MIN, group=self._side)
        return said.item()

    def exchange(self) -> None:
        """Gradients become their mean over the ranks, and buffers those of rank 0.

        What has a gradient on one rank and none here counts as zero here.
        """
        holds = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.int32)
        dist.all_reduce(holds, group=self._side)
        waiting = []
        for parameter, anywhere in zip(self._parameters, holds.tolist(), strict=True):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.div_(self._count)
                waiting.append(dist.all_reduce(parameter.grad, group=self._group, async_op=True))
        if self._replica.broadcast_buffers:
            source = dist.get_global_rank(self._group, 0)
            waiting += [dist.broadcast(b, source, group=self._group, async_op=True) for b in self._replica.buffers()]
        for work in waiting:
            assert work is not None  # it is none only for a process outside of the group
            work.wait(self._patience)


class Words:
    """What the ranks have said of a step; where there are no replicas, what this one has.

    Attributes:
        said: of each rank, with the bucket of lengths that it is about.
    """

    def __init__(self, replicas: Replicas | None) -> None:
        self.said: list[tuple[Word, int]] = []
        self._replicas, self._over = replicas, False

    def tell(self, word: Word, bucket: int) -> None:
        """Say it to the other ranks, and hear theirs. Raises ModelFailed if one has failed of something else."""
        self.said = [(word, bucket)]
        if self._replicas is None or self._over:
            return
        self.said = self._replicas.agree(word, bucket)
        if failed := self.ranks(Word.FAILED):
            self._over = True
            raise ModelFailed(f"rank {failed} failed, and the others cannot go on: its own error says why")

    def give_up(self, bucket: int) -> None:
        """Tell the others not to wait. Where they do not listen any more, their patience ends it."""
        with suppress(RuntimeError):
            self.tell(Word.FAILED, bucket)
        self._over = True

    def ranks(self, word: Word) -> str:
        """Those that said it."""
        return ", ".join(str(rank) for rank, (said, _) in enumerate(self.said) if said is word)

    def buckets(self, word: Word) -> list[int]:
        """Of which it was said."""
        return sorted({bucket for said, bucket in self.said if said is word})


_sides: "WeakKeyDictionary[dist.ProcessGroup, dict[timedelta, dist.ProcessGroup]]" = WeakKeyDictionary()


def _beside(group: dist.ProcessGroup, patience: timedelta) -> dist.ProcessGroup:
    """The same ranks on the host: what it takes of a card is nothing, and no queue of a card is waited for.

    It is kept as long as the group. Destroyed and made anew it would have the name of the first one, under which ranks
    would look for each other where they are no more.
    """
    sides = _sides.setdefault(group, {})
    if patience not in sides:
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(ranks, timeout=patience, backend="gloo", use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        sides[patience] = made
    return sides[patience]
