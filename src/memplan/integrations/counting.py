"""What a script counts: its own batches before it trains, and the micro-batches that it is handed from then on.

Scripts make numbers of steps and of epochs out of `len(loader)`, and divide by it what they have added up in an epoch.
The first is done before the loop begins, the second behind it. So a prepared loader has its own length until the first
micro-batch is trained on.
"""

from typing import Any

from memplan.errors import UsageError
from memplan.integrations.parts import Split
from memplan.plan_record import Plan


def length_of(loader: Any) -> int | None:
    """Batches of a loader; None for a stream that does not say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def said_of(plan: Plan, split: Split) -> tuple[str, ...]:
    """What a script that counts batches in its loop has to know."""
    if plan.micro_batch == split.own_rows:
        return ()
    return (
        f"the loop gets micro-batches of {plan.micro_batch}, {plan.accumulation} to a step, and what it counts are "
        "those; len(loader) is of the script's own batches until the first is trained on, and of micro-batches then",
    )


def steps_in(batches: int, plan: Plan, own_rows: int, counted_rows: int | None, taken: int | None) -> int:
    """The optimizer steps in so many batches that a script leaves out when it goes on.

    They are its own, made of numbers of steps or of epochs; or, where the checkpoint tells how many steps there were,
    what the run that saved it had counted in its loop.

    Args:
        own_rows: samples in one of the script's own batches.
        counted_rows: in one of those of the run that saved the checkpoint.
        taken: steps of that run in its epoch, if the checkpoint tells.

    Raises:
        UsageError: it is no whole number of steps, or not the number that was taken.
    """
    sizes = [own_rows] if taken is None else [own_rows, counted_rows or plan.micro_batch]
    for size in sizes:
        steps, rest = divmod(batches * size, plan.effective_batch)
        if rest == 0 and (taken is None or steps in (0, taken)):
            return steps
    if taken is None:
        raise UsageError(
            f"{batches} batches are {batches * own_rows} samples, which is no whole number of optimizer steps of "
            f"{plan.effective_batch} samples: a step cannot be begun in the middle. Save after a step."
        )
    own, counted = (taken * plan.effective_batch // size for size in sizes)
    raise UsageError(
        f"the run that saved the checkpoint had taken {taken} steps in its epoch, and {batches} batches are another "
        f"number: skip {own} batches of {sizes[0]} samples, the script's own, or {counted} of {sizes[1]}, which its "
        "loop had counted."
    )
