"""What replicas tell each other around a guarded step, so that none waits for one that has run out of memory.

DistributedDataParallel adds gradients up inside the backward. A rank that fails there, or before, leaves the others in
a collective that never ends. So its exchange is switched off: forward and backward run alone, then all say how it went,
and only if it went well gradients are added up, in place. The price is that nothing is sent while the backward runs.
"""

from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from memplan.errors import PlanMismatch, UsageError
from memplan.world import odd_ranks


class Word(IntEnum):
    """How a step went on a rank; of several, the greatest counts."""

    WELL = 0
    NEARLY = 1  # the next one like it may run out
    RAN_OUT = 2
    FAILED = 3  # of something else: nobody can go on


class Replicas:
    """A replica among its like.

    Args:
        replica: the model, wrapped.
        patience_s: how long a rank waits for the others' word. Has to be longer than a step may take.
    """

    def __init__(self, replica: DistributedDataParallel, patience_s: float) -> None:
        if replica.static_graph:
            raise UsageError("DistributedDataParallel(static_graph=True) exchanges in every backward: leave it out")
        self._replica, self._patience = replica, timedelta(seconds=patience_s)
        self._group = replica.process_group
        ranks = dist.get_process_group_ranks(self._group)
        # On the host: what it takes of a card is nothing, and no queue of a card is waited for.
        self._side = dist.new_group(ranks, timeout=self._patience, backend="gloo", use_local_synchronization=True)
        self._rank, self._count = dist.get_rank(self._group), len(ranks)
        self._parameters = [p for p in replica.module.parameters() if p.requires_grad]
        self._was = replica.require_backward_grad_sync, replica.require_forward_param_sync
        replica.require_backward_grad_sync = replica.require_forward_param_sync = False

    def undo(self) -> None:
        """The replica exchanges inside its backwards again."""
        self._replica.require_backward_grad_sync, self._replica.require_forward_param_sync = self._was
        dist.destroy_process_group(self._side)

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
