"""A lever proves itself on the model at hand: one small step with it and one without, compared."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from memplan.abstract import preserved, to_training
from memplan.losses import loss_of
from memplan.recipe import Recipe
from memplan.samples import Sample
from memplan.skipping import skipped

# What may differ where sums are added up in another order, as a share of the norm. A lever that changes the mathematics
# (labels off by one, a row left out) is off by far more; what is left in between has no name.
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 3e-2

Step = tuple[dict[str, Tensor], dict[str, Tensor]]  # loss and gradients, and the buffers that are left

_IGNORED = -100  # torch's and transformers' label for a place without one


def difference(
    model: nn.Module, recipe: Recipe, sample: Sample, installed: Callable[[], AbstractContextManager[object]]
) -> str | None:
    """Run a forward and backward without and with a lever, from the same random state. What differs, or None.

    The model, its gradients, buffers and the random state are as before afterwards.

    Args:
        sample: on the model's device; one sample is enough.
        installed: the context in which the lever works.
    """
    return _difference(_step(model, recipe, sample, nullcontext), model, recipe, sample, installed)


def _difference(
    known: Step,
    model: nn.Module,
    recipe: Recipe,
    sample: Sample,
    installed: Callable[[], AbstractContextManager[object]],
) -> str | None:
    """What differs from a step without the lever, whose gradients and buffers are known."""
    plain, buffers = known
    if plain["the loss"].isnan():
        return f"{_why_nan(sample)}, which shows no difference. Plan with a sample from which something is learned."
    other, others_buffers = _step(model, recipe, sample, installed)
    tolerance = _TOLERANCE if recipe.autocast is None and _is_single(model) else _TOLERANCE_HALF
    if plain.keys() != other.keys():
        return f"{len(plain.keys() ^ other.keys())} gradients are in one of the two only"
    sizes = {name: float(value.double().norm()) for name, value in plain.items()}
    noise = torch.finfo(torch.float32).eps * max(sizes.values())  # all there is of gradients that cancel out
    for name, value in plain.items():
        off = float((other[name].double() - value.double()).norm())
        if not off <= tolerance * sizes[name] + noise:
            return f"{name} differs by {off:.3g} from {sizes[name]:.3g}"
    changed = (name for name, buffer in buffers.items() if not _is_same(buffer, others_buffers[name], tolerance))
    return next((f"the buffer {name} is left with other values" for name in changed), None)


def _is_same(buffer: Tensor, other: Tensor, tolerance: float) -> bool:
    """To the bit on a CPU, where sums in a forward are added up in one order."""
    if not buffer.is_floating_point():
        return torch.equal(buffer, other)
    rtol = 0.0 if buffer.device.type == "cpu" else tolerance
    return torch.allclose(buffer.double(), other.double(), rtol=rtol, atol=0.0, equal_nan=True)


def difference_without(
    model: nn.Module,
    idle: Sequence[Sequence[str]],
    recipe: Recipe,
    sample: Sample,
    installed: Callable[[], AbstractContextManager[object]],
    *,
    asks: bool = True,
) -> str | None:
    """As `difference`, while most blocks do nothing. None also where there is no memory or no step for that.

    A model that wants what these blocks compute, such as keys and values that later blocks share, runs whole.

    Args:
        idle: their paths, those together that cannot be told apart. Those that are left work for all like them.
        asks: whether a loss that is not a number, which shows nothing, is told; else it is no difference.
    """

    def against(known: Step) -> str | None:
        if known[0]["the loss"].isnan() and not asks:
            return None
        return _difference(known, model, recipe, sample, installed)

    try:
        with skipped(model, idle):
            _plain_step(model, recipe, sample)  # in which the first blocks run once, for the form
            known = _plain_step(model, recipe, sample)
            if known is not None:
                return against(known)
        known = _plain_step(model, recipe, sample)
        return None if known is None else against(known)
    except torch.OutOfMemoryError:
        return None


def _plain_step(model: nn.Module, recipe: Recipe, sample: Sample) -> Step | None:
    """Without a lever; None where the model raises, which in some may be for want of what skipped blocks compute."""
    try:
        return _step(model, recipe, sample, nullcontext)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model's own
        return None


def gradients(
    model: nn.Module,
    recipe: Recipe,
    sample: Sample,
    installed: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Tensor]:
    """The loss and the gradients, by name, of one forward and backward that leaves nothing else behind."""
    return _step(model, recipe, sample, installed)[0]


def _step(
    model: nn.Module, recipe: Recipe, sample: Sample, installed: Callable[[], AbstractContextManager[object]]
) -> Step:
    """As `gradients`, and the buffers that they leave."""
    with preserved(model), installed():
        to_training(model)
        kind = next(model.parameters()).device.type
        with recipe.casting(kind):
            loss = loss_of(model, sample, recipe.loss)
        loss.backward()
        grads = {f"the gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"the loss": loss.detach(), **grads}, {name: buffer.clone() for name, buffer in model.named_buffers()}


def _why_nan(sample: Sample) -> str:
    """Torch's mean over no label at all is not a number."""
    if any(t.dtype == torch.int64 and bool((t == _IGNORED).all()) for t in sample.tensors()):
        return f"every label of the sample is ignored ({_IGNORED}), so that its loss is nan"
    return "the loss of the sample is nan, also without it"


def _is_single(model: nn.Module) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
