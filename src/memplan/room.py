"""What there is of a device's memory, and how much of it a plan may be predicted to need."""

from dataclasses import dataclass

from torch import nn

from memplan import packed
from memplan.device import CudaDevice, Device, memory_parts
from memplan.gpus import Gpu
from memplan.plan_record import Budget
from memplan.risk import usable_bytes
from memplan.strategy import Strategy
from memplan.summary import unseen_bytes
from memplan.trace import Trace

# Handles and kernels that CUDA loads when they are first used: 14 to 18 MiB beyond the context of an idle process, on
# the cards of docs/real_cards.md.
LOADED_LATER_BYTES = 18 * 2**20

# Share of main memory that is left to the Python heap, oneDNN and the system where no budget is given.
CPU_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Room:
    """A device's memory for a model.

    Attributes:
        device: the device itself, where it is here.
        learned_bytes: what earlier runs needed beyond their predictions.
    """

    model: nn.Module
    gpu: Gpu
    device: Device | None
    learned_bytes: int

    def budget(self, strategy: Strategy, trace: Trace) -> Budget:
        """The total, and what is taken off it."""
        total, others, context = memory_parts(self.gpu, self.device)
        live = self.device is not None and self.gpu.kind == "cuda"
        return Budget(
            gpu=str(self.device.torch_device) if self.device is not None and live else self.gpu.name,
            total_bytes=total,
            others_bytes=others,
            context_bytes=context,
            margin_bytes=total - others - context - self.most(strategy, trace)[0],
        )

    def most(self, strategy: Strategy, trace: Trace) -> tuple[int, int]:
        """What a plan may be predicted to need, to fit and not to be ruled out: the room less what is kept free of it.

        That is on a card for the error of predictions, on a CPU for small tensors that no trace shows, and where no
        budget is given for everything but tensors; and on both at least what earlier runs needed beyond theirs.
        """
        total, others, context = memory_parts(self.gpu, self.device)
        room = total - others - context
        if isinstance(self.device, CudaDevice):
            room = min(room - LOADED_LATER_BYTES, self.device.cap_bytes)
        if self.gpu.kind != "cpu":
            fits, possible = usable_bytes(room, strategy.risk)
        elif self.gpu.total_bytes is not None:
            fits, possible = room - unseen_bytes(trace) - packed.kept_bytes(self.model), room
        else:
            fits, possible = room - int(total * CPU_MARGIN), room
        fits = min(fits, room - self.learned_bytes)
        return int(fits * strategy.budget_share), int(possible * strategy.budget_share)
