"""What a model's loss is a mean over, as the model itself tells: the loss of a batch and of its parts are computed.

A loss that is a mean over samples is split by samples, one that is a mean over labelled tokens by those tokens. A loss
that is neither, such as one that compares the samples of a batch with each other, is not to be split.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import fields, is_dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memplan.abstract import buffers_kept, preserved
from memplan.errors import UsageError
from memplan.losses import loss_of
from memplan.packed import bits_of
from memplan.recipe import Recipe
from memplan.samples import Sample

Count = Callable[[Any], "Tensor | int"]
"""How much of the batch a micro-batch holds."""

SAMPLES: Final = "samples"
TOKENS: Final = "tokens"  # labels that count
SHIFTED: Final = "shifted-tokens"  # those, but for the first of each row, which nothing predicts
SUM: Final = "sum"  # no mean: the losses of parts add up

IGNORED = -100
"""`torch.nn.functional.cross_entropy` leaves labels of this value out by default."""

_QUICK: Final = 10**12  # weights x tokens of a row: eight rows of it in a forward take a processor some 16 seconds
_ROWS = 4
_TOLERANCES: Final = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative; of lower precisions:
_COARSE = 2e-2
_ALIKE: Final = 1e-6  # share of a loss: parts that are nearer show nothing


def counter(name: str) -> Count:
    """What counts by that name. Raises UsageError for another name."""
    if name not in _COUNTS:
        raise UsageError(f"normalise = {name!r} is not one of auto, {', '.join(_COUNTS)}")
    return _COUNTS[name]


def rows_in(batch: Any) -> int:
    """Samples: the first dimension of the first tensor that has one. Raises UsageError if none has."""
    found = next((int(tensor.shape[0]) for tensor in tensors_in(batch) if tensor.dim()), None)
    if found is None:
        raise UsageError(
            f"a batch of the loader is a {type(batch).__name__} in which no tensor is found, so its samples cannot be "
            "counted. Have the collate function return a dict, a tuple or a dataclass of tensors."
        )
    return found


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """All of a structure, also inside what torch does not look into, such as transformers' BatchEncoding."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, field.name, None) for field in fields(leaf)])


def tokens_in(batch: Any) -> Tensor:
    """Labels that count, a whole number in a tensor on their device."""
    return (_labels(batch) != IGNORED).sum()


def shifted_tokens_in(batch: Any) -> Tensor:
    """Labels that count and have a token before them, from which a causal model predicts them."""
    return (_labels(batch)[..., 1:] != IGNORED).sum()


_LOSSES: Final = {
    "ForCausalLM": SHIFTED,
    "ForMaskedLM": TOKENS,
    "ForTokenClassification": TOKENS,
    "ForSequenceClassification": SAMPLES,
    "ForImageClassification": SAMPLES,
    "ForVideoClassification": SAMPLES,
    "ForAudioClassification": SAMPLES,
}
_COUNTS: Final[dict[str, Count]] = {SHIFTED: shifted_tokens_in, TOKENS: tokens_in, SAMPLES: rows_in}


def _labels(batch: Any) -> Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        raise UsageError(
            'losses are to be weighted by label tokens, but the batch has no "labels" of rows and tokens. Pass '
            "normalise='samples', or a function that counts what a batch's loss is a mean over."
        )
    return labels


def has_tokens(batch: Any) -> bool:
    """Whether a batch has labels for tokens."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


class Undecided(Exception):
    """What a loss is a mean over cannot be found out by trying."""


def divisible_by(model: nn.Module, recipe: Recipe, sample: Sample) -> str | None:
    """By which count a batch may be divided, its loss being a mean over that; None if by none, or nothing tells."""
    with suppress(Undecided):
        found = mean_over(model, recipe, sample)
        return None if found == SUM else found
    return None


def mean_over(model: nn.Module, recipe: Recipe, sample: Sample) -> str | None:
    """By which count the losses of parts make the loss of the whole, or `SUM`; None if by none of them.

    Four rows of the sample, of which the first has half of its labels left out, are computed as one batch and as parts
    of one and three, without dropout and with nothing kept for a backward. Where all weights are whole it is without
    autocast, whose rounding would hide a small part of the loss. The model stays as it was.

    Raises:
        Undecided: the loss is another one when it is computed again, of a part it cannot be computed, or all parts have
            the same.
    """
    parameter = next(model.parameters())
    batch = _uneven(sample.resized(_ROWS).to(parameter.device))
    parts = [_rows(batch, slice(0, 1)), _rows(batch, slice(1, _ROWS))]
    with preserved(model), _nothing_saved():
        without_dropout(model)

        def values(*of: Sample) -> tuple[list[float], bool]:
            return as_exactly_as_it_runs(model, recipe, lambda: [_value(model, recipe, part) for part in of])

        try:
            (whole, *pieces), is_coarse = values(batch, *parts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model's own, which pairs rows or knows another label for "none"
            raise Undecided(f"the loss of a part cannot be computed ({type(error).__name__}: {error})") from error
        if is_coarse and averages_routes(model):
            return None
        tolerance = (_COARSE if is_coarse else _TOLERANCES.get(parameter.dtype, _COARSE)) * abs(whole)
        if max(pieces) - min(pieces) <= _ALIKE * abs(whole):
            raise Undecided("all parts have the same loss, as with a head of zeros, and so has any mean of them")
        errors = {}
        for name in _COUNTS if has_tokens(batch.content) else (SAMPLES,):
            counts = [float(_COUNTS[name](part.content)) for part in parts]
            mean = sum(c * p for c, p in zip(counts, pieces, strict=True)) / sum(counts)
            errors[name] = abs(mean - whole)
        best = min(errors, key=errors.__getitem__)
        if errors[best] <= tolerance:
            return best
        if abs(sum(pieces) - whole) <= tolerance:
            return SUM
        if abs(values(batch)[0][0] - whole) > tolerance:
            raise Undecided("the loss is another one each time, as one that draws random numbers")
        return None


def by_name(model: nn.Module) -> str | None:
    """By which count the loss of one of transformers' own models is a mean, as the name of its class tells; else None.

    For where it cannot be tried. Models for generation under a condition are left out, since some of them shift their
    labels and some do not, and so are causal ones that do not call transformers' `loss_function`, which shifts.
    """
    unwrapped = getattr(model, "get_base_model", None)  # PEFT's
    kind = type(unwrapped() if callable(unwrapped) else model)
    if kind.__module__.partition(".")[0] != "transformers" or getattr(model, "_loss_function", None) is not None:
        return None
    found = next((count for name, count in _LOSSES.items() if kind.__name__.endswith(name)), None)
    calls = inspect.unwrap(kind.forward).__code__.co_names
    return None if found == SHIFTED and "loss_function" not in calls else found


def averages_routes(model: nn.Module) -> bool:
    """Whether a mean over the micro-batch is in a model's loss that is too small to be seen where it is rounded
    coarsely: that of its experts' router, as transformers names it."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "output_router_logits", False) for config in configs)


def as_exactly_as_it_runs(
    model: nn.Module, recipe: Recipe, values: Callable[[], list[float]]
) -> tuple[list[float], bool]:
    """Some losses, and whether they are rounded coarsely: in half precision, or by autocast.

    Where all weights are whole they are computed without autocast, whose rounding would hide a small part of a loss,
    unless the model cannot do without it.
    """
    whole = all(p.dtype not in (torch.bfloat16, torch.float16) for p in model.parameters())
    if whole:
        try:
            return values(), False
        except torch.OutOfMemoryError:
            raise
        except Exception:  # anything: of kernels that take halves only
            if recipe.autocast is None:
                raise
    with recipe.casting(next(model.parameters()).device.type):
        return values(), recipe.autocast is not None or not whole


def without_dropout(model: nn.Module) -> None:
    """In eval mode, but for packed weights, which bitsandbytes packs anew, for good, for inference on a CPU."""
    model.eval()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and bits_of(weight) is not None:
            module.training = True


def can_try(model: nn.Module, sample: Sample, device: torch.device | None) -> bool:
    """Whether a loss can be computed where the weights are, which takes a while if that is not the device."""
    parameter = next(model.parameters())
    weights = sum(p.numel() for p in model.parameters())
    is_quick = weights * (sample.tokens or 1) <= _QUICK or parameter.device == device
    return is_quick and not parameter.is_meta


def _uneven(batch: Sample) -> Sample:
    """With half of the first row's labels left out, so that tokens and samples count differently."""
    if has_tokens(batch.content):
        labels = batch.content["labels"] = batch.content["labels"].clone()
        counted = (labels[0] != IGNORED).nonzero()  # of a short row few are
        labels[0][tuple(counted[: len(counted) // 2].T)] = IGNORED
    return batch


def _rows(batch: Sample, rows: slice) -> Sample:
    return Sample.of(batch.map(lambda tensor: tensor[rows] if tensor.dim() else tensor).content)


def _value(model: nn.Module, recipe: Recipe, part: Sample) -> float:
    """Of the model with the buffers that it has, whatever it makes of them: a running mean couples rows too."""
    with buffers_kept(model):
        return float(loss_of(model, part, recipe.loss).detach())


def _nothing_saved() -> AbstractContextManager[None]:
    """A forward that could be differentiated, as a loss has to be, without the memory for it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, _never)


def _never(_: object) -> Tensor:
    raise AssertionError("nothing of this forward is differentiated")
