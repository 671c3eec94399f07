"""Gradient buckets: the flat buffers in which DistributedDataParallel adds up the gradients of its replicas.

They are always there, beside the gradients. With `gradient_as_bucket_view` a gradient is copied into its bucket as soon
as it is complete and is a view of it from then on, so that its own memory is freed inside the backward. Micro-steps but
the last one exchange nothing (`no_sync`, as accelerate and Trainer have it); their gradients are no views.

Not counted: the copies of the buffers that are sent to the replicas before a forward, and what NCCL takes of a card,
which is outside of torch's allocator.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter

from memplan.optimizer_step import Dropped
from memplan.tape import Tape

FIRST_BYTES: Final = 2**20  # dist._DEFAULT_FIRST_BUCKET_BYTES
CAP_BYTES: Final = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb


def bucket_bytes(parameters: Iterable[Tensor]) -> list[int]:
    """Bytes of the buckets for these parameters' gradients, which come in the opposite order.

    A bucket holds gradients of one dtype; it is full with the one that brings it to its limit, which is 1 MiB for the
    first and 25 MiB for the others. Source: compute_bucket_assignment_by_size, torch/csrc/distributed/c10d/reducer.cpp.
    These are the buckets from the second step on; the first step has a single one, of the same size in all. They are
    made in the order in which gradients are complete, which the order of the parameters is close to.
    """
    full: list[int] = []
    filling: dict[torch.dtype, int] = {}
    limits: dict[torch.dtype, int] = defaultdict(lambda: FIRST_BYTES)
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        dtype = parameter.dtype
        size = filling.pop(dtype, 0) + parameter.numel() * parameter.element_size()
        if size < limits[dtype]:
            filling[dtype] = size
        else:
            full.append(size)
            limits[dtype] = CAP_BYTES
    return [*full, *filling.values()]


def views_for(parameters: Iterable[Parameter], tape: Tape) -> dict[Parameter, Tensor]:
    """What stands for each parameter's place in a bucket; a tape gives it no row. To be made before the tape begins."""
    views = {parameter: torch.zeros_like(parameter) for parameter in parameters if parameter.requires_grad}
    for view in views.values():
        tape.pass_over(view)
    return views


@contextmanager
def filled(views: Mapping[Parameter, Tensor], tape: Tape, dropped: Dropped) -> Iterator[None]:
    """Each gradient that is complete inside the backwards that `tape` records is replaced by its place in a bucket."""

    def move(parameter: Tensor) -> None:
        assert isinstance(parameter, Parameter)
        row = tape.row_of(parameter.grad) if parameter.grad is not None else None
        dropped.rows += [] if row is None else [row]
        parameter.grad = views[parameter]

    hooks = [parameter.register_post_accumulate_grad_hook(move) for parameter in views]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
