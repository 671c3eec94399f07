"""The measured peak of a real step, beside the predicted one."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, ClassVar, Final
from weakref import ReferenceType, ref

import torch
from torch import nn

from memplan.allocator import Settings
from memplan.fitting import Fit
from memplan.meter import Allocations, allocator_record
from memplan.units import format_budget, format_bytes

_MEASURES: Final = hasattr(torch.accelerator, "max_memory_allocated")  # not before torch 2.9

_log = logging.getLogger("memplan")


class SecondStep:
    """Measures the second step of a run, which has the optimizer's state already.

    Args:
        fit: the model and its plan.
        say: is given the measured peak and the plan as flat numbers.
    """

    _latest: ClassVar["ReferenceType[SecondStep] | None"] = None

    def __init__(self, fit: Fit, say: Callable[[dict[str, float]], None]) -> None:
        self._fit, self._say = fit, say
        self._watch: Watch | None = None

    def begin(self, done: int, model: nn.Module, optimizers: Sequence[Any], device: torch.device) -> None:
        """A step begins after so many, or goes on."""
        if done > 1:  # an optimizer has left out the second step
            self.stop()
            return
        if self._watch is None:
            self._give_way()
            self._watch = Watch(device, model, optimizers)
        if done == 1 and not self._watch.counts:
            self._watch.count()

    def _give_way(self) -> None:
        """One run is watched at a time: what is left of one that has failed, and is kept by its traceback, ends."""
        latest = None if SecondStep._latest is None else SecondStep._latest()
        if latest is not None:
            latest.stop()
        SecondStep._latest = ref(self)

    def end(self) -> None:
        """The optimizer has stepped."""
        if self._watch is None or not self._watch.counts:
            return
        peak_bytes = self._watch.stop()
        if peak_bytes is not None:
            self._say(_reported(self._fit, peak_bytes))

    def stop(self) -> None:
        """The run is over, or goes on by another plan."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


def _reported(fit: Fit, peak_bytes: int) -> dict[str, float]:
    """Say in the log what was measured, and keep it for the next plan on this machine."""
    plan = fit.plan
    fit.remember(peak_bytes)
    text = (
        f"peak of the second step {format_bytes(peak_bytes)}, predicted {format_bytes(plan.peak_bytes)} for the "
        f"worst batch, budget {format_budget(plan.budget_bytes)}"
    )
    if peak_bytes > plan.budget_bytes:
        _log.warning("%s: more than the budget", text)
    else:
        _log.info("%s", text)
    return {"memplan/peak_bytes": peak_bytes, **plan.record()}


class Watch:
    """The most that tensors need from `count` to `stop`, weights, gradients and optimizer state included.

    On a card that is the allocator's own figure. On the CPU it is read from the record of torch's allocator, as in
    `CpuDevice`. It tells of a free only if it was there at the allocation, so it is to be made a step before, for the
    gradients of that one. What else is there when counting begins is left out, such as averaged weights, another model,
    what a loop holds of the step before, and buckets of DistributedDataParallel. On a card that is what was there when
    this was made as well, since what a loop holds of the step before it lets go of in the next.

    Args:
        model, optimizers: the step's own.
    """

    def __init__(self, device: torch.device, model: nn.Module, optimizers: Sequence[Any]) -> None:
        self.counts = self._is_over = False
        self._device, self._open = device, ExitStack()
        self._step = model, optimizers
        self._alive: dict[int, int] = {}  # when counting began: bytes by address
        self._others_bytes = self._others_on_card()
        self._record = self._recording()

    def count(self) -> None:
        """From here on."""
        self.counts = True
        self._open.close()
        if self._device.type == "cpu":
            self._alive = _own(*self._step, self._device)
        elif _MEASURES:
            self._others_bytes = min(self._others_bytes, self._others_on_card())
            torch.accelerator.reset_peak_memory_stats(self._device)
        self._record = self._recording()

    def _others_on_card(self) -> int:
        """What is there now and no weight, gradient or state, in blocks of torch's allocator."""
        if self._device.type == "cpu" or not _MEASURES:
            return 0
        blocks = map(Settings().rounded, _own(*self._step, self._device).values())
        return max(0, int(torch.accelerator.memory_allocated(self._device)) - sum(blocks))

    def stop(self) -> int | None:
        """The peak in bytes; None where nothing was counted or could be, and by a second call."""
        self._open.close()
        if self._is_over or not self.counts:
            return None
        self._is_over = True
        if self._device.type != "cpu":
            return int(torch.accelerator.max_memory_allocated(self._device)) - self._others_bytes if _MEASURES else None
        now = peak = sum(self._alive.values())
        for address, change in self._record:
            # What else the loop has kept since the first step is not the step's; an address given out again was freed,
            # if on a thread of which nothing is recorded.
            now -= self._alive.pop(address, 0)
            if change > 0:
                self._alive[address] = change
                now, peak = now + change, max(peak, now + change)
        return peak if self._record else None

    def _recording(self) -> Allocations:
        if self._device.type == "cpu":
            with suppress(RuntimeError):  # the user's own profiler is running
                return self._open.enter_context(allocator_record())
        return []


def _own(model: nn.Module, optimizers: Sequence[Any], device: torch.device) -> dict[int, int]:
    """Bytes by address of weights, buffers, gradients and optimizer states, on a kind of device."""
    kept = [state for optimizer in optimizers for state in optimizer.state.values()]
    states = [value for state in kept for value in state.values() if isinstance(value, torch.Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    tensors = (*model.parameters(), *model.buffers(), *states, *gradients)
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
