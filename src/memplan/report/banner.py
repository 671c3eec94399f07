"""What a planned run says once, when it begins: what was chosen, why, and how to turn it off."""

import logging
import sys
from collections.abc import Sequence

from memplan.plan_record import Plan, count_text, pace_text
from memplan.settings import Habits
from memplan.units import format_budget, format_bytes

_log = logging.getLogger("memplan")


def banner(
    plan: Plan, before: tuple[int, int], off: str, *, beside: str = "", said: Sequence[str] = (), alone: str = ""
) -> str:
    """The plan of a run in a few lines.

    Args:
        before: the micro-batch and the accumulation that the run had.
        off: how it is turned off.
        beside: a word on what else was done to the blocks.
        said: what was assumed about the run.
        alone: how to have the same without memplan.
    """
    batch = f"{plan.micro_batch} x {plan.accumulation} accumulated = {plan.effective_batch} per step"
    was = "as before" if before == (plan.micro_batch, plan.accumulation) else f"was {before[0]} x {before[1]}"
    blocks = f"{count_text(plan)}; {plan.reason}" if plan.layers else plan.reason
    rows = [
        (
            "needs",
            f"{plan.beside_budget(plan.needs_bytes)} of {format_budget(plan.budget_bytes)}, with nothing recomputed "
            f"{format_bytes(plan.unplanned_needs_bytes)}",
        ),
        ("batch", f"{batch} ({was}); same steps, same learning rates"),
        ("blocks", f"{blocks}{beside}"),
        ("time", f"{pace_text(plan.slowdown)} than keeping everything ({plan.basis})"),
        *(("assumed", text) for text in said),
        ("off", f"{off}; MEMPLAN_BANNER=off leaves out these lines"),
        *([("alone", alone)] if alone else []),
    ]
    lines = [f"memplan   {plan.model} on {plan.budget.gpu}, {plan.strategy}: {plan.verdict}"]
    return "\n".join([*lines, *(f"  {name:<8}{text}" for name, text in rows)])


def announce(text: str) -> None:
    """Say it in the log "memplan" where that shows INFO, else on stderr; with the setting `banner` off nowhere."""
    if not Habits.found().banner:
        return
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        _log.info("%s", text)
    else:
        print(text, file=sys.stderr)  # noqa: T201  # whoever has memplan plan a run is told what it has done
