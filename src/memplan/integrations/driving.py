"""What makes the optimizers that Accelerate has prepared keep to the step under way, as the loader hands it out."""

from types import MethodType
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState

from memplan.errors import UsageError
from memplan.integrations.grouping import Group


def drive(optimizer: AcceleratedOptimizer, group: Group) -> None:
    """Have a prepared optimizer keep the gradients of a step under way, wherever the loop calls `zero_grad`."""
    own_step = optimizer.step

    def step(_: Any, *args: Any, **options: Any) -> Any:
        if group.weight is not None:
            if args or options.get("closure") is not None:
                _by_closure(group)
            group.is_stepping(optimizer)
        stepped = own_step(*args, **options)
        group.has_stepped(optimizer)
        return stepped

    def zero_grad(set_to_none: bool = True) -> None:
        is_whole = group.is_last and group.backwards >= group.handed  # and was not stepped by, so that it is left out
        group.asked_zero |= group.is_last and not group.stepped
        if group.weight is None or group.stepped or is_whole or not group.backwards:
            optimizer.optimizer.zero_grad(set_to_none=set_to_none)

    optimizer.step = MethodType(step, optimizer)  # as a scheduler that is made later takes it to be
    optimizer.zero_grad = zero_grad


def _by_closure(group: Group) -> None:
    """The loop steps by one. Raises UsageError where its batch is split."""
    if group.split.micro_batches > 1:
        raise UsageError(
            "optimizer.step(closure) computes the loss of the batch at hand anew, which is one micro-batch of a step "
            "now. Fix the script's own batch with micro_batch=, or use an optimizer without a closure."
        )
    if group.end_guard is not None:
        group.end_guard("it steps by a closure, of which nothing can be taken back")


def asking(state: GradientState, group: Group) -> GradientState:
    """The accelerator's view of what all share, that notes when the loop asks whether a step ends."""

    class Asked(type(state)):  # type: ignore[misc]  # Accelerate ships no types
        @property
        def sync_gradients(self) -> bool:
            group.asks = True
            return bool(self.__dict__["sync_gradients"])

        @sync_gradients.setter
        def sync_gradients(self, value: bool) -> None:
            self.__dict__["sync_gradients"] = value

    asked: GradientState = object.__new__(Asked)
    asked.__dict__ = state.__dict__
    return asked
