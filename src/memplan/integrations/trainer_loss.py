"""The loss as a trainer computes it, for planning: `trainer.compute_loss`, and nothing that it keeps account of.

That is the true path of the loss: label smoothing, a function of the user's own, TRL's fused head without logits, the
division by the items of the whole step.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from memplan.abstract import contents, preserved, put_back
from memplan.integrations.parts import full_precision_outputs
from memplan.integrations.trainer_data import Rows, joined
from memplan.means import IGNORED, as_exactly_as_it_runs, averages_routes, without_dropout
from memplan.recipe import Recipe

_TOLERANCE: Final = 1e-4  # relative; by rounding alone sums over two rows differ by 1e-7
_TOLERANCE_HALF: Final = 2e-2


class TrainerLoss:
    """`loss(model, batch)` for `memplan.plan`, by a trainer. It leaves the trainer as it was."""

    is_tried: Final = True  # how its rows may be divided is asked of `coupling`

    def __init__(self, trainer: Any, rows: Rows) -> None:
        self.trainer, self.rows = trainer, rows
        self.items = _items(trainer, rows.pair[0])

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        inputs = joined(batch, self.rows.pair[1]) if self.rows.is_joined else dict(batch)
        with account_aside(self.trainer), _prepared(self.trainer, model):
            loss: Tensor = self.trainer.compute_loss(model, inputs, num_items_in_batch=self.items)
        return loss


def coupling(trainer: Any, rows: Rows, recipe: Recipe) -> str | None:
    """Why a step's rows cannot be divided otherwise into micro-batches without another result; None if they can.

    The loss of two rows has to be the sum of their losses, each divided by the items of both. It is computed without
    dropout and without gradients. The model and the trainer stay as they were.
    """
    loss = TrainerLoss(trainer, rows)
    if not _is_scaled(trainer, loss.items):
        return "its loss is a mean over each micro-batch, and the mean of such means depends on how rows are divided"
    model, device = trainer.model, trainer.args.device
    try:
        with preserved(model), torch.no_grad(), account_aside(trainer):
            without_dropout(model)
            (whole, *parts), is_coarse = as_exactly_as_it_runs(
                model,
                recipe,
                lambda: [_value(trainer, dict(batch), loss.items, device) for batch in rows.pair],
            )
    except torch.OutOfMemoryError:  # the very reason for a plan
        return None
    if is_coarse and averages_routes(model):
        return "its router's loss is a mean over each micro-batch (output_router_logits), beside the loss of the rows"
    tolerance = (_TOLERANCE_HALF if is_coarse else _TOLERANCE) * abs(whole)
    if abs(sum(parts) - whole) <= tolerance:
        return None
    counts = [_labels_in(batch) for batch in rows.pair[1:]]
    over_labels = sum(count * part for count, part in zip(counts, parts, strict=True)) / max(sum(counts), 1)
    if min(abs(sum(parts) / 2 - whole), abs(over_labels - whole)) <= tolerance:
        return (
            "its loss is a mean over each micro-batch, although the model takes the number of items to divide by, so "
            "that transformers adds those means up instead of averaging them"
        )
    return (
        f"its loss couples the rows of a batch: two rows have {whole:.6g}, and by themselves {sum(parts):.6g} together"
    )


def _labels_in(batch: dict[str, Any]) -> int:
    """Labels that count; none where the batch has none."""
    labels = batch.get("labels")
    return int((labels != IGNORED).sum()) if isinstance(labels, Tensor) else 0


def _value(trainer: Any, batch: dict[str, Any], items: Any, device: torch.device) -> float:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return float(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items))


def _items(trainer: Any, batch: dict[str, Any]) -> Any:
    """What the trainer divides the loss by, as it counts it on one rank; None if it does not."""
    with account_aside(trainer):
        return trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))[1]


def _is_scaled(trainer: Any, items: Any) -> bool:
    """Whether the loss is divided by the items of the whole step. The rule is that of transformers' `training_step`."""
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)
    if stated is not None:
        return bool(stated)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


@contextmanager
def account_aside(trainer: Any) -> Iterator[None]:
    """What is counted, averaged and logged meanwhile is forgotten, and not read: a trace has no values.

    TRL's metrics go through `gather_for_metrics`; it hands out zeros. `gather` hands out what is this rank's own: none
    waits for another one.
    """
    before, accelerator = contents(vars(trainer)), trainer.accelerator
    instead = {"gather_for_metrics": lambda data, *_: torch.zeros(data.shape), "gather": lambda data: data}
    own = {name: vars(accelerator)[name] for name in instead if name in vars(accelerator)}
    if hasattr(trainer, "_metrics"):
        trainer._metrics = copy.deepcopy(trainer._metrics)
    trainer.log = _unlogged
    vars(accelerator).update(instead)
    try:
        yield
    finally:
        put_back(vars(trainer), before)
        for name in instead:
            del vars(accelerator)[name]
        vars(accelerator).update(own)


def _unlogged(*_: object, **__: object) -> None:
    """What becomes of a record that a loss logs while it is planned for."""


@contextmanager
def account_of_success(trainer: Any) -> Iterator[None]:
    """What is counted and averaged for logging meanwhile is forgotten if an error ends it."""
    before, metrics = dict(vars(trainer)), getattr(trainer, "_metrics", {})
    counts = {(mode, name): len(found) for mode, by_name in metrics.items() for name, found in by_name.items()}
    try:
        yield
    except BaseException:
        vars(trainer).clear()
        vars(trainer).update(before)
        for mode, by_name in metrics.items():
            for name, found in by_name.items():
                del found[counts.get((mode, name), 0) :]
        raise


@contextmanager
def metrics_aside(trainer: Any) -> Iterator[None]:
    """What TRL averages for its own next record is not in a record that is logged meanwhile, nor lost by it."""
    kept = getattr(trainer, "_metrics", None)
    if kept is None:
        yield
        return
    trainer._metrics = {mode: type(values)(list) for mode, values in kept.items()}
    try:
        yield
    finally:
        trainer._metrics = kept


def _prepared(trainer: Any, model: nn.Module) -> AbstractContextManager[None]:
    """As the model is when training begins, if that has not come yet."""
    waits = trainer.accelerator.native_amp and not hasattr(model, "_original_forward")
    return full_precision_outputs(model) if waits else nullcontext()
