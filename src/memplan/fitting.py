"""`apply(model, plan) -> Fit`: the plan in the user's own model, measured there, and taken out again."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from memplan import __version__, cache, levers, optimizers
from memplan.abstract import preserved, to_training
from memplan.blocks import signature
from memplan.corrections import Run
from memplan.device import Device, memory_parts, resolve_gpu, room_of
from memplan.division import Division
from memplan.driver import driver_version
from memplan.errors import AlreadyApplied, DoesNotFit, MemoryTaken, NoDevice, PlanMismatch, UsageError
from memplan.gpus import Gpu
from memplan.levers import stepping
from memplan.levers.host_memory import pooled_bytes
from memplan.levers.host_pool import HostPool
from memplan.losses import Loss, loss_of
from memplan.optimizer_step import IN_BACKWARD, PLAIN
from memplan.plan_record import Measured, Plan, Verdict
from memplan.recipe import Recipe, dtype_of
from memplan.samples import Sample, sample_for
from memplan.units import format_bytes
from memplan.world import World

_applied: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()  # model -> how many of its modules run by a plan


def check_bare(model: nn.Module, doing: str) -> None:
    """Before something is done with a model as it stands. Raises AlreadyApplied where it runs by a plan."""
    if model in _applied:
        raise AlreadyApplied(
            f"this {type(model).__name__} runs by a plan already ({_applied[model]} modules changed). Call undo() on "
            f"the Fit that memplan.apply returned, then {doing} again."
        )


class Fit:
    """A model that runs by a plan. As a context manager it undoes the plan on exit.

    Attributes:
        model: the user's own model; only how its blocks run has changed.
        plan: what was applied. The training loop takes `plan.micro_batch` and `plan.accumulation` from it.
        measured: what `autofit` measured on the device, if it could.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        undo: Callable[[], None],
        live: "Live | None" = None,
        step: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.measured: Measured | None = None
        self._undo: Callable[[], None] | None = undo
        self._live = live
        self._step = step
        self._unstep = step() if step is not None else None

    def undo(self) -> None:
        """Give every block its own functions back. A second call does nothing."""
        if self._undo is not None:
            if self._unstep is not None:
                self._unstep()
            self._undo()
            self._undo = None
            _applied.pop(self.model, None)

    @contextmanager
    def _optimizer_at_rest(self) -> Iterator[None]:
        """The optimizer in use does not step in other backwards than the user's own."""
        if self._step is None or self._unstep is None or self._undo is None:
            yield
            return
        self._unstep()
        try:
            yield
        finally:
            self._unstep = self._step()

    def __enter__(self) -> "Fit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def measure(
        self,
        steps: int = 3,
        *,
        sample: object = None,
        loss: Loss | None = None,
        optimizer: "str | torch.optim.Optimizer | None" = None,
    ) -> Measured:
        """Run real steps on the plan's device; the peak and the median time, next to the predicted ones.

        The steps train nothing: the optimizer is a copy, at learning rate 0, and weights, gradients, buffers and the
        random state are as before. The peak counts what one step needs; other tensors on the device (gradients that
        were there, the state of the optimizer in use, further batches) are taken off. What is measured corrects later
        plans on this machine, unless a sample, loss or optimizer is given (`remember`).

        Args:
            steps: how many steps are timed.
            sample: as for `memplan.plan`; what the plan was made with, if it is left out.
            loss: likewise.
            optimizer: likewise.

        Raises:
            NoDevice: the plan is for a device that is not here, or the model's weights are not on it.
            UsageError: the plan was undone; BadSample or BadOptimizer, if the plan comes from a file, which keeps
                neither nested samples nor optimizers that have no name: pass `sample` or `optimizer`.
        """
        if self._undo is None:
            raise UsageError("the plan was undone, so there is nothing of it to measure. Apply it again.")
        live = self._live or Live(Recipe(optimizer=self.plan.optimizer, autocast=dtype_of(self.plan.autocast)), None)
        device = _device_of(self.plan, self.model)
        recipe = Recipe(
            loss or live.recipe.loss,
            optimizer or live.recipe.optimizer,
            live.recipe.autocast,
            self.plan.accumulation,
            self.plan.stepping,
            clips=live.recipe.clips,
        )
        shown = self._sample(sample, live)
        with preserved(self.model), self._optimizer_at_rest():
            to_training(self.model)
            others_bytes = device.peak_of(_nothing) - _own_bytes(self.model)
            micro = shown.resized(self.plan.micro_batch).to(device.torch_device)
            with training_step(self.model, micro, recipe, device) as step:
                peaks = device.peaks_of(step)
                seconds = sorted(device.seconds_of(step, steps))
        step_s, peak_bytes = seconds[len(seconds) // 2], peaks.tensor_bytes - others_bytes
        if sample is None and loss is None and optimizer is None:  # else it is no run of this plan
            self.remember(peak_bytes, step_s)
        return Measured(
            peak_bytes=peak_bytes,
            predicted_bytes=self.plan.peak_bytes,
            reserved_bytes=None if device.torch_device.type == "cpu" else peaks.reserved_bytes - others_bytes,
            step_s=step_s,
            predicted_s=self.plan.step_s,
            budget_bytes=self.plan.budget_bytes,
            device=device.name,
            steps=steps,
        )

    def remember(self, peak_bytes: int, step_s: float | None = None) -> None:
        """Keep what a step of this plan was measured to need, so that the next plan on this machine starts from it.

        Args:
            peak_bytes: as `measure` counts them.
            step_s: seconds of a step, if they were measured.
        """
        plan, live = self.plan, self._live
        if live is None or live.recipe.zero or live.recipe.replicas * live.recipe.shards > 1:
            return  # a plan file does not say with what loss, and of several ranks one does not tell what it needs
        try:
            device = _device_of(plan, self.model)
        except NoDevice:  # planned for a card that is elsewhere
            return
        run = Run(
            seconds=plan.seconds,
            times=plan.times,
            step_s=None if plan.host_bytes else step_s,  # the link's share of it is no lever's
            predicted_bytes=plan.peak_bytes,
            peak_bytes=peak_bytes,
        )
        cache.remember(key_of(self.model, live.sample, live.recipe, device), run)

    def _sample(self, sample: object, live: "Live") -> Sample:
        if sample is not None:
            return Sample.of(sample)
        if live.sample is not None:
            return live.sample
        return sample_in(self.plan, self.model)


@dataclass(frozen=True, slots=True)
class Live:
    """What a plan was made with and no file can hold: the loss, the optimizer, the sample."""

    recipe: Recipe
    sample: Sample | None
    division: Division | None = None  # of the batch; None: it was not asked about


def key_of(model: nn.Module, sample: Sample | None, recipe: Recipe, device: Device) -> cache.Key:
    """Under which key the runs of a model on a device are kept."""
    on_card = device.torch_device.type == "cuda"
    fields = () if sample is None else sample.fields()
    return cache.Key(
        card=device.name if on_card else f"{cache.processor()}, {torch.get_num_threads()} threads",
        driver=driver_version() if on_card else "",
        torch=torch.__version__,
        memplan=__version__,
        model=type(model).__name__,
        signature=signature(model),
        sample=", ".join(f"{field.name}{list(field.shape)} {field.dtype}" for field in fields),
        loss="" if recipe.loss is None else getattr(recipe.loss, "__qualname__", type(recipe.loss).__qualname__),
        optimizer=optimizers.name_of(recipe.optimizer),
        autocast=None if recipe.autocast is None else str(recipe.autocast),
        ranks=f"{recipe.replicas} x {recipe.shards}",
    )


def apply(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> Fit:
    """Make the model run by the plan: its blocks keep, drop or recompute as decided. Nothing else changes.

    Args:
        optimizer: the one in use, for a plan that makes it step otherwise and does not hold it: one read from a file.

    Raises:
        DoesNotFit: the plan itself says that it does not fit.
        MemoryTaken: it did, but other processes have taken memory of the card since.
        AlreadyApplied: the model runs by a plan already.
        PlanMismatch: the plan was made for other modules or shapes, or for more cards than train here.
        UsageError: it is no plan, or the model is compiled already.
    """
    if not isinstance(plan, Plan):
        raise UsageError(f"a plan is what memplan.plan returns or Plan.load reads, got {type(plan).__name__}")
    if hasattr(model, "_orig_mod"):
        raise UsageError("the model is compiled already: apply the plan to the module that torch.compile was given.")
    if plan.verdict is Verdict.DOES_NOT_FIT:
        raise DoesNotFit(
            f"this plan does not fit: {plan.reason.rstrip('.')}. {' '.join(plan.ways_out)}", plan.smallest_bytes
        )
    check_bare(model, "apply")
    _check_match(model, plan)
    World(plan.replicas, plan.shards).check_here()
    _check_room(model, plan)
    return reapply(model, plan, optimizer)


def reapply(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> Fit:
    """`apply` for a plan that the model ran by before, or could have: it is not asked whether it fits."""
    live = plan._live if isinstance(plan._live, Live) else None
    pool = HostPool(pooled_bytes(plan.host_bytes)) if plan.host_bytes else None
    undo = levers.install(model, plan.decisions, plan.selections, pool)
    try:
        fit = Fit(model, plan, undo, live, _stepped(model, plan, optimizer or _optimizer_of(live)))
    except BaseException:
        undo()
        raise
    _applied[model] = len(plan.changed)
    return fit


def _optimizer_of(live: "Live | None") -> torch.optim.Optimizer | None:
    optimizer = None if live is None else live.recipe.optimizer
    return None if isinstance(optimizer, str) else optimizer


def _stepped(
    model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None
) -> Callable[[], Callable[[], None]] | None:
    """What makes the optimizer in use step as planned, and returns what takes that back."""
    if plan.stepping == PLAIN:
        return None
    if optimizer is None:
        raise PlanMismatch(
            f"the plan has the optimizer step {plan.stepping!r}, but it was read from a file, which holds no "
            "optimizer. Pass the one in use: memplan.apply(model, plan, optimizer=...)."
        )
    return partial(stepping.install, model, optimizer, plan.stepping, plan.accumulation)


def _check_match(model: nn.Module, plan: Plan) -> None:
    modules = {path for path, _ in model.named_modules()}
    missing = [path for path in plan.decisions if path not in modules]
    if missing:
        raise PlanMismatch(
            f"the plan is for a {plan.model} and decides on {missing[0]!r}; this {type(model).__name__} has no such "
            f"module ({len(missing)} of {len(plan.decisions)} are missing). Plan for this model."
        )
    if signature(model) != plan.signature:
        raise PlanMismatch(
            f"the plan is for a {plan.model} whose parameters have other names, shapes, types or requires_grad than "
            f"this {type(model).__name__}'s, so its sizes are not this model's. Plan for this model."
        )


def _check_room(model: nn.Module, plan: Plan) -> None:
    """That the memory which the plan was made for is still there, on the card that the weights are on.

    With several ranks it only has to be enough: the plan was made on one's card, with a margin for the memory there.
    """
    here = _card_of(model) if plan.budget.gpu.startswith("cuda") else None
    if here is None:
        return
    place, card, device = here
    spare = max(plan.budget.usable_bytes - plan.needs_bytes, 0)
    if place == plan.budget.gpu and plan.replicas * plan.shards == 1:
        taken = memory_parts(card, device)[1] - plan.budget.others_bytes
        odd = f"other processes on {place} hold {format_bytes(taken)} more than when this plan was made"
        has = f"it has {format_bytes(spare)} to spare"
    else:
        room = room_of(card, device)
        taken = spare + plan.needs_bytes - room
        odd = f"{place} has {format_bytes(room)} left beside what other processes hold"
        has = f"the plan, which was made on {plan.budget.gpu}, needs {format_bytes(plan.needs_bytes)}"
    if taken > spare:
        raise MemoryTaken(f"{odd}, and {has}. Plan again: memplan then plans for what is left.", plan.smallest_bytes)


def _card_of(model: nn.Module) -> tuple[str, Gpu, Device | None] | None:
    """The card that all weights are on, if it is one, by torch's name for it."""
    places = {str(parameter.device) for parameter in model.parameters()}
    place = places.pop() if len(places) == 1 else ""
    return (place, *resolve_gpu(place)) if place.startswith("cuda") else None


@contextmanager
def training_step(model: nn.Module, micro: Sample, recipe: Recipe, device: Device) -> Iterator[Callable[[], None]]:
    """One whole step: `accumulation` forwards and backwards, the optimizer at learning rate 0, gradients dropped.

    Gradients that are clipped are so by a norm that leaves them as they are. The optimizer sees none but zeros: one
    that is not finite would reach the weights, 0 times infinity.
    """
    parameters = {id(p): p for p in model.parameters()}
    trainable = [p for p in parameters.values() if p.requires_grad]
    optimizer = optimizers.build(recipe.optimizer, trainable, parameters, torch.clone)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    kind = device.torch_device.type

    def step() -> None:
        for _ in range(recipe.accumulation):
            with recipe.casting(kind):
                loss = loss_of(model, micro, recipe.loss)
            (loss / recipe.accumulation if recipe.accumulation > 1 else loss).backward()
            del loss
        optimizer.zero_grad(set_to_none=False)
        if recipe.clips:
            clip_grad_norm_(trainable, math.inf)
        optimizer.step()
        for parameter in trainable:
            parameter.grad = None

    with ExitStack() as undone:
        if recipe.stepping == IN_BACKWARD:
            for parameter in trainable:
                undone.callback(parameter.register_post_accumulate_grad_hook(_zero_gradient).remove)
        undone.callback(stepping.install(model, optimizer, recipe.stepping, recipe.accumulation))
        yield step


def _zero_gradient(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


def _nothing() -> None:
    """The step of a device that is only asked what is on it."""


def _own_bytes(model: nn.Module) -> int:
    tensors = (*model.parameters(), *model.buffers())
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _device_of(plan: Plan, model: nn.Module) -> Device:
    """The plan's device, if the weights are on it."""
    place, here = plan.budget.gpu, {str(parameter.device) for parameter in model.parameters()}
    device = resolve_gpu(place)[1] if place.startswith(("cpu", "cuda")) else None
    if device is None or here != {str(device.torch_device)}:
        raise NoDevice(
            f"the plan is for {place}, but the weights are on {', '.join(sorted(here))}: a step can be measured on the "
            "plan's own device only. Move the model there, or plan for the device that it is on."
        )
    return device


def sample_in(plan: Plan, model: nn.Module) -> Sample:
    """The micro-batch that a plan was made with; where its file does not say, one made from the model's config."""
    if plan.sample:
        return Sample.from_fields(plan.sample, plan.micro_batch)
    return sample_for(model, plan.micro_batch)
