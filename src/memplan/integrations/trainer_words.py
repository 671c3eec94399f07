"""What a planned trainer tells people beside its plan: what evaluation may need, what to do out of memory."""

from typing import Any

from memplan.levers.loss_head import find_head
from memplan.out_of_memory import Diagnosis, Where
from memplan.plan_record import Plan
from memplan.samples import Sample
from memplan.units import format_budget, format_bytes

_NEGLIGIBLE = 1000  # a thousandth of the budget
_LOGITS = 3  # of float32: as the head makes them, cast for the loss, and their log-softmax


def evaluation(trainer: Any, plan: Plan) -> tuple[str, ...]:
    """A word on evaluation, where it may need more than training. A bound: one block and the logits, nothing kept.

    The logits are taken to be made as a whole, whatever the training loss does, and rows as long as in training.
    """
    if trainer.eval_dataset is None:
        return ()
    rows, parts = trainer.args.per_device_eval_batch_size, plan.breakdown
    room = plan.peak_bytes - sum(parts.get(name, 0) for name in ("params", "buffers", "optimizer"))
    path = find_head(trainer.model)
    classes = 0 if path is None else int(trainer.model.get_submodule(path).out_features)
    tokens = next((f.shape[0] for f in plan.sample if f.shape), 1)
    logits = 4 * _LOGITS * rows * tokens * classes
    block = max((layer.keep_bytes for layer in plan.layers), default=0) * rows // plan.micro_batch
    if logits + block <= room:
        return ()
    return (
        f"evaluation with per_device_eval_batch_size={rows} may need up to {format_bytes(logits + block - room)} more "
        "than training does, which no plan changes",
    )


def fetched(plan: Plan, sample: Sample) -> tuple[str, ...]:
    """A word on the inputs of a step's other micro-batches, which the trainer fetches at once, where they count."""
    others = (plan.accumulation - 1) * plan.micro_batch * sample.row_bytes
    if others * _NEGLIGIBLE < plan.budget_bytes:
        return ()
    return (
        f"the trainer fetches the {plan.accumulation} micro-batches of a step at once: {format_bytes(others)} of "
        "inputs come on top",
    )


def filled_up(trainer: Any, own_rows: int, plan: Plan) -> tuple[str, ...]:
    """A word on the rows that Accelerate repeats for several ranks, where these are others by the plan.

    At the end of an epoch the first rows come again, until every rank has as many whole micro-batches (`even_batches`).
    """
    ranks, data = trainer.args.world_size, trainer.train_dataset
    if ranks == 1 or trainer.args.dataloader_drop_last or not hasattr(data, "__len__"):
        return ()
    repeated, own = (-len(data) % (ranks * rows) for rows in (plan.micro_batch, own_rows))
    if repeated == own:
        return ()
    return (
        f"{ranks} ranks fill up the last step of an epoch with {repeated} rows that come again; without the plan it "
        f"would be {own}. A data set of a multiple of {ranks * own_rows} rows needs none",
    )


def out_of_memory(plan: Plan, found: Diagnosis, planned_for: Where) -> str:
    """The way out, for the error that says that memory ran out."""
    if found.where not in (planned_for, Where.DEVICE):
        return f"memplan: {found.where} ran out, which no plan helps: {found.helps}."
    smaller = f"micro_batch={plan.micro_batch // 2}, " if plan.micro_batch > 1 else ""
    return (
        f"memplan: this run was planned to need {format_bytes(plan.peak_bytes)} of {format_budget(plan.budget_bytes)} "
        f"on {plan.budget.gpu}, with {plan.micro_batch} x {plan.accumulation} per step. What came on top was not in "
        "the plan: longer rows, evaluation, tensors of your own, another process. Call fit.undo() and plan again with "
        f"more to spare: memplan.autofit(trainer, {smaller}strategy='smallest-memory'), or a lower risk=0.001; "
        "fit.plan.assumptions has what was assumed."
    )
