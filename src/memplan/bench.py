"""`Bench`: runs a model by one plan after the other to measure them, and leaves it as it was, whatever happens.

On the CPU that is done in this process, with the weights, the optimizer's state, the buffers and the random states
copied before and compared bit by bit behind each run. On a card it is done in a process of its own, which shares the
weights by CUDA's handles: what crashes there, or leaves the card fragmented, is gone with it. A card's plan has to find
room beside the context of this process, some half a GiB, and beside the optimizer's state if it is on the card already.
"""

import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pickle import PicklingError
from typing import Any, Final

import torch
from torch import Tensor, multiprocessing, nn

from memplan import optimizers
from memplan.device import Device, memory_parts, resolve_gpu
from memplan.errors import MemoryTaken, UsageError
from memplan.fitting import Live, apply
from memplan.optimizer_step import tensors_in
from memplan.out_of_memory import diagnose
from memplan.plan_record import Measured, Plan
from memplan.recipe import Recipe
from memplan.rewind import Before, forget
from memplan.samples import Sample

STEPS: Final = 3
"""Timed after two that warm up and give the peak; their median counts."""

_ENDS_S: Final = 10.0  # in which a process that was told so has to end


@dataclass(frozen=True, slots=True)
class Failure:
    """A plan that could not be measured: why, and whether for want of memory."""

    why: str
    memory: bool


class Bench:
    """A model on its device, ready to be measured by any plan. Use it in a `with` block.

    Raises:
        UsageError: on a card, a model or a loss that cannot be handed to another process.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, sample: Sample, device: Device) -> None:
        self._live, self._device = Live(recipe, sample), device
        self._kept = _Kept(model, recipe.optimizer)
        self._model, self._apart = model, _Apart(model, self._live) if device.torch_device.type == "cuda" else None

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        if self._apart is not None:
            self._apart.end()

    def run(self, plan: Plan, *, remembered: bool = True) -> Measured | Failure:
        """Measure a plan. The model, its optimizer and the random states are afterwards what they were before.

        Args:
            plan: also one that was made on another card like this one.
            remembered: whether the run is to correct later plans. Only so many are kept (`cache.RUNS_KEPT`), so that
                laps of one plan would push out what others have taught.
        """
        plan = at_home(plan, self._device)
        self._kept.note()
        try:
            if self._apart is None:
                return _run(self._model, self._live, plan, remembered)
            return self._apart.run(plan, remembered)
        finally:
            self._kept.put_back()


def at_home(plan: Plan, device: Device) -> Plan:
    """The plan as one for this card, where it was made on another one like it: a plan names the card of its maker."""
    place = str(device.torch_device)
    if device.torch_device.type != "cuda" or plan.budget.gpu == place:
        return plan
    return plan.model_copy(update={"budget": plan.budget.model_copy(update={"gpu": place})})


def _run(model: nn.Module, live: Live, plan: Plan, remembered: bool) -> Measured | Failure:
    plan = plan.model_copy()
    plan._live = live
    try:
        with apply(model, plan) as fit:
            if remembered:
                return fit.measure(STEPS)
            return fit.measure(STEPS, optimizer=live.recipe.optimizer)  # its own, but given: such runs are not kept
    except Exception as error:  # the step is the user's code
        found = diagnose(error)
        failure = Failure(f"{type(error).__name__}: {error}", found is not None or isinstance(error, MemoryTaken))
        forget(error)
        return failure


class _Kept:
    """What a run must not change: copied, on the host, once; compared and, where it differs, put back after each."""

    def __init__(self, model: nn.Module, optimizer: str | torch.optim.Optimizer) -> None:
        self._before = Before(model)
        state = () if isinstance(optimizer, str) else optimizers.unwrapped(optimizer).state.values()
        tensors = [*model.parameters(), *tensors_in(state)]
        self._copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]

    def note(self) -> None:
        self._before.note()

    def put_back(self) -> None:
        self._before.put_back()
        with torch.no_grad():
            for tensor, copy in self._copies:
                if not _same_bits(tensor.detach().cpu(), copy):
                    tensor.copy_(copy)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where a value is not a number, which equals nothing, and where zeros differ in sign."""
    flat, other_flat = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return torch.equal(flat.view(torch.uint8), other_flat.view(torch.uint8))


class _Apart:
    """A process that measures, and that another takes the place of when it has failed."""

    def __init__(self, model: nn.Module, live: Live) -> None:
        self._work = model, live
        self._process: Any = None

    def run(self, plan: Plan, remembered: bool = True) -> Measured | Failure:
        if self._process is not None and not self._process.is_alive():
            self.end()  # it was killed since the last run, which is no fault of this plan
        try:
            answer = self._answer((plan.model_dump_json(), remembered))
        except (EOFError, OSError) as error:
            answer = Failure(self._how_it_ended(error), memory=False)
        except BaseException:  # Ctrl-C: the weights, which both share, are put back next, so nobody may go on with them
            self.end(0.0)
            raise
        if isinstance(answer, Failure):
            self.end()
        return answer

    def end(self, patience_s: float = _ENDS_S) -> None:
        if self._process is None:
            return
        with suppress(OSError):  # it is gone already
            self._pipe.send(None)
        self._process.join(patience_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None

    def _answer(self, asked: tuple[str, bool]) -> Measured | Failure:
        if self._process is None:
            self._start()
        self._pipe.send(asked)
        answer: Measured | Failure = self._pipe.recv()
        return answer

    def _how_it_ended(self, error: Exception) -> str:
        if self._process is None:
            return f"no process could be started for it ({type(error).__name__}: {error})"
        self._process.join(_ENDS_S)
        return f"its process ended by itself, with exit code {self._process.exitcode}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._work), daemon=True)
        try:
            process.start()
        except (AttributeError, TypeError, PicklingError) as error:
            raise UsageError(
                f"on a card each trial runs in a process of its own, and model, loss and optimizer cannot be handed to "
                f"it ({error}): make the loss a function of a module, no lambda, and take hooks off the model"
            ) from error
        theirs.close()
        self._process = process


def _serve(pipe: Connection, model: nn.Module, live: Live) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to answer
    while (asked := pipe.recv()) is not None:
        text, remembered = asked
        pipe.send(_run(model, live, _beside_others(Plan.model_validate_json(text)), remembered))


def _beside_others(plan: Plan) -> Plan:
    """The plan as this process may apply it: what it finds taken is the weights and the context of the other one."""
    budget = plan.budget
    others_bytes = memory_parts(*resolve_gpu(budget.gpu))[1]
    total_bytes = budget.total_bytes + others_bytes - budget.others_bytes
    here = budget.model_copy(update={"others_bytes": others_bytes, "total_bytes": total_bytes})
    return plan.model_copy(update={"budget": here})
