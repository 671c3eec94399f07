"""The lever `stepping`: when and how an optimizer steps. Weights come out the same, to the bit.

"in-backward" steps each parameter as soon as its gradient is complete and drops the gradient, so that gradients are
freed layer by layer; the training loop stays as it is, and its `optimizer.step()` finds nothing left to step. "single"
takes one parameter after the other where the optimizer would take many at once (foreach), with temporaries for all.

What a step inside the backward excludes. Seen, and refused: several micro-steps, clipping by the norm where the recipe
says so, autocast to float16, replicas, optimizers that look at more than one parameter, a second backward before
`optimizer.step()`. Not seen: whatever else works on gradients between the backward and the step finds none.
`clip_grad_norm_` then returns 0 and clips nothing; a `GradScaler` of which the recipe's autocast does not tell raises
by itself in its `step` ("No inf checks were recorded"), but the first step was taken by then, with scaled gradients.
Hooks before the step run once a step, after the weights have changed. A backward that ends half way has stepped some
parameters, which nothing takes back.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from memplan import optimizers
from memplan.errors import NoStepInBackward
from memplan.levers.undo import Undo
from memplan.optimizer_step import IN_BACKWARD, PLAIN, SINGLE, check_stepping, set_single
from memplan.recipe import Recipe

ASSUMPTION: Final = (
    "gradients are dropped inside the backward: no clipping by their norm (it would find none), no GradScaler, one "
    "backward per optimizer step"
)
"""What a plan that steps in the backward has to say."""

_PROOF_STEPS = 2
_PROOF_PARAMETERS = 2  # of each group


@dataclass(frozen=True, slots=True)
class Alternative:
    """A way to step that may be tried, by its short name."""

    name: str
    recipe: Recipe


def alternatives(recipe: Recipe, accumulation: int, foreach: bool | None = None) -> tuple[Alternative, ...]:
    """The ways to step that this recipe's optimizer has; "plain" comes first.

    Args:
        foreach: what the device does where the optimizer leaves it open (`Backend.foreach`).

    Raises:
        BadOptimizer: an unknown name, or not an optimizer.
    """
    names = [PLAIN]
    if optimizers.batches_parameters(recipe.optimizer, foreach):
        names.append(SINGLE)
    if refusal(recipe, accumulation) is None:
        names.append(IN_BACKWARD)
    return tuple(Alternative(name, replace(recipe, stepping=name)) for name in names)


def refusal(recipe: Recipe, accumulation: int) -> str | None:
    """Why parameters cannot be stepped inside the backward, in a sentence; None if they can."""
    why = recipe.not_in_backward(accumulation)
    if why is not None:
        return why
    if isinstance(recipe.optimizer, str):
        optimizers.name_of(recipe.optimizer)
        return None
    live = optimizers.unwrapped(recipe.optimizer)
    if type(live).__module__.partition(".")[0] == "bitsandbytes":
        return (
            f"bitsandbytes' {type(live).__name__} keeps settings by the place of a parameter in its group, which is "
            "another one when it is stepped alone. Step plainly, or use an optimizer of torch.optim."
        )
    return _why_not_alone(live)


def refusal_of(recipe: Recipe, accumulation: int) -> str | None:
    """Why a step cannot be planned to be made inside the backward, with the way out; nobody asks where it can."""
    if accumulation > 1:
        return "the micro-steps of a split batch are to add up their gradients. Give the whole batch as micro_batch."
    if isinstance(recipe.optimizer, str) and recipe.not_in_backward(accumulation) is None:
        return f"{recipe.optimizer!r} is only a name. Pass the optimizer itself, which can be made to."
    return refusal(recipe, accumulation)


def install(model: nn.Module, optimizer: Optimizer, stepping: str = IN_BACKWARD, accumulation: int = 1) -> Undo:
    """Make a live optimizer step in one of the ways `optimizer_step.STEPPINGS`. What is returned takes it back.

    Parameters of the optimizer that are not the model's, or are frozen now, are stepped by `optimizer.step()` as ever.

    Args:
        accumulation: backwards per optimizer step.

    Raises:
        BadOptimizer: not an optimizer.
        NoStepInBackward: it cannot be stepped inside the backward; see `refusal`.
        UsageError: another word for a stepping.
    """
    check_stepping(stepping)
    live = optimizers.unwrapped(optimizer)
    if stepping == IN_BACKWARD:
        if (why := refusal(Recipe(optimizer=live), accumulation)) is not None:
            raise NoStepInBackward(why)
        return _install_in_backward(model, live)
    before = [group.get("foreach") for group in live.param_groups]
    if stepping != SINGLE:
        return lambda: None
    set_single(live)
    # A checkpoint brings groups of its own, and one that is saved has the user's.
    hooks = [
        live.register_load_state_dict_post_hook(lambda loaded: set_single(loaded)),
        live.register_state_dict_post_hook(lambda _, state: _with_foreach(state["param_groups"], before)),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        _with_foreach(live.param_groups, before)

    return undo


def _with_foreach(groups: Sequence[dict[str, Any]], values: Sequence[bool | None]) -> None:
    for group, foreach in zip(groups, values, strict=False):
        if "foreach" in group:
            group["foreach"] = foreach


def _install_in_backward(model: nn.Module, optimizer: Optimizer) -> Undo:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    chosen = [p for p in model.parameters() if p.requires_grad and id(p) in held]
    waiting = [p for p in chosen if p.grad is not None]
    if waiting:
        raise NoStepInBackward(
            f"{len(waiting)} of {len(chosen)} parameters hold a gradient already, to which the next backward adds. "
            "Call optimizer.step() and optimizer.zero_grad() before."
        )
    stepped: set[int] = set()
    lock = Lock()  # the engine has a thread for each device, and one optimizer is narrowed at a time

    def step(parameter: Tensor) -> None:
        assert isinstance(parameter, Parameter)
        with lock:
            if id(parameter) in stepped:
                raise NoStepInBackward(
                    f"a parameter of shape {tuple(parameter.shape)} got a second gradient before optimizer.step(), but "
                    "was stepped by the first. One backward per step: add up the losses, or undo the step in backward. "
                    "If a backward failed half way before, weights are between two steps: load a checkpoint."
                )
            stepped.add(id(parameter))
            optimizers.step_alone(optimizer, parameter)
            parameter.grad = None

    # To be counted as stepped again, they wait for the loop's own step.
    handles = [optimizer.register_step_post_hook(lambda *_: stepped.clear())]
    handles += [parameter.register_post_accumulate_grad_hook(step) for parameter in chosen]

    def undo() -> None:
        while handles:
            handles.pop().remove()
        for parameter in chosen:
            if not parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # as it is at first
        stepped.clear()

    return undo


def _why_not_alone(optimizer: Optimizer) -> str | None:
    """Two copies of a few small parameters: stepped together and one by one, do they come out the same?"""
    some: list[Parameter] = []
    for group in optimizer.param_groups:
        some += sorted((p for p in group["params"] if p.requires_grad), key=Tensor.numel)[:_PROOF_PARAMETERS]
    name = type(optimizer).__name__
    way_out = "Step plainly, or use an optimizer that looks at one parameter at a time, such as AdamW."
    try:
        together = _ends(_copy_of(optimizer, some), lambda copy, _: copy.step())
        alone = _ends(_copy_of(optimizer, some), _step_each)
    except Exception as error:  # anything: it is the optimizer's own code that runs
        return f"{name} raised {type(error).__name__} when a few parameters were stepped alone: {error} {way_out}"
    if any(not torch.equal(one, other) for one, other in zip(together, alone, strict=True)):
        return f"{name} moves parameters otherwise when it steps them one by one. {way_out}"
    return None


def _copy_of(optimizer: Optimizer, params: list[Parameter]) -> Optimizer:
    """A copy over real copies of some of its parameters."""
    copies = {id(p): Parameter(_real(p)) for p in params}
    state = optimizer.state
    with optimizers.narrowed(optimizer, params):
        optimizer.state = defaultdict(dict, {p: state[p] for p in params if p in state})
        try:
            return optimizers.build(optimizer, params, copies, _real)
        finally:
            optimizer.state = state


def _real(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().clone()


def _ends(copy: Optimizer, step: Callable[[Optimizer, list[Parameter]], object]) -> list[Parameter]:
    """The parameters after a few steps with the same gradients each time this is called."""
    params = [parameter for group in copy.param_groups for parameter in group["params"]]
    source = torch.Generator().manual_seed(0)
    for _ in range(_PROOF_STEPS):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=source).to(parameter)
        step(copy, params)
    return params


def _step_each(optimizer: Optimizer, params: list[Parameter]) -> None:
    for parameter in params:
        optimizers.step_alone(optimizer, parameter)
