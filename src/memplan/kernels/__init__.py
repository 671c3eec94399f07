"""What a backend does behind an operator: which kernels run, and what they allocate beside their results."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from memplan.gpus import Gpu
from memplan.kernels.cpu import CpuBackend
from memplan.kernels.cuda import CudaBackend
from memplan.kernels.cuda_attention import Capability

# A bare size names no card; of what people train on, sm80 is the plainest that has every fused attention kernel.
_CAPABILITY_OF_A_SIZE = (8, 0)


class Backend(Protocol):
    """The device a step is recorded for, as far as its operators depend on it."""

    @property
    def name(self) -> str:
        """The device's type, as torch calls it."""

    @property
    def foreach(self) -> bool | None:
        """What an optimizer's `foreach` is there unless the user gives it; None: as torch decides on this machine."""

    def kernels(self) -> AbstractContextManager[object]:
        """A context in which functions run the device's operators."""

    def workspace_bytes(self, func: torch._ops.OpOverload, args: Sequence[object], outputs: Sequence[Tensor]) -> int:
        """Bytes an operator takes and gives back while it runs, on top of its outputs; `args` are flat."""

    def wants_probe(self, func: torch._ops.OpOverload, args: Sequence[object]) -> bool:
        """Whether only running the operator tells its workspace."""

    def rounded(self, size: int) -> int:
        """Bytes that the device's allocator hands out for a request."""

    def fixed_bytes(self) -> tuple[int, ...]:
        """What stays allocated beside a step's tensors: libraries' workspaces, the forward's, then the backward's."""


def backend_for(gpu: Gpu) -> Backend:
    """The backend of a card, of a bare size (taken as a card of compute capability 8.0) or of the CPU."""
    if gpu.kind == "cpu":
        return CpuBackend()
    return CudaBackend(capability_of(gpu))


def capability_of(gpu: Gpu) -> Capability:
    """The compute capability by which a card's kernels are chosen; one that has none is taken as the plainest."""
    return gpu.compute_capability or _CAPABILITY_OF_A_SIZE
