"""Collectives that take no memory of their own, as NCCL's do not, so that what a rank needs can be measured over gloo.

gloo copies what it gathers, and its thread may be the last to let go of a tensor, which profilers of the training
thread do not see: peaks would differ from run to run by the size of a block.
"""

import time
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

_SETTLE_S = 0.002  # in which gloo's thread lets go


def without_copies() -> AbstractContextManager[object]:
    """Have what FSDP2 calls in this process work in place."""
    own = {"all_gather_single": _all_gather, "reduce_scatter_single": _reduce_scatter}
    before = {"all_gather_into_tensor": _all_gather, "reduce_scatter_tensor": _reduce_scatter}  # torch 2.12
    return patch.multiple(dist, **(own if hasattr(dist, "all_gather_single") else before))


def _all_gather(output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> None:  # noqa: A002
    assert not async_op  # FSDP2 waits on the CPU
    parts = output.chunk(dist.get_world_size(group))
    parts[dist.get_rank(group)].copy_(input)
    for rank, part in enumerate(parts):
        _settled(dist.broadcast(part, group=group, group_src=rank, async_op=True))


def _reduce_scatter(
    output: Tensor,
    input: Tensor,  # noqa: A002
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> None:
    assert not async_op
    _settled(dist.all_reduce(input, op, group, async_op=True))
    output.copy_(input.chunk(dist.get_world_size(group))[dist.get_rank(group)])


def _settled(work: Any) -> None:
    work.wait()
    time.sleep(_SETTLE_S)
