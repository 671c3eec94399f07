"""What traces and outcomes say, in the terms of the records: pure sums over their tables."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memplan.allocator import Usage
from memplan.plan_record import Budget, FrontierPoint, Layer
from memplan.planner import Outcome
from memplan.prediction import Timeline
from memplan.problem import KEEP, Problem, lever_of
from memplan.trace import CATEGORIES, Trace
from memplan.units import format_budget

_TIMELINE_POINTS = 400

# Where a model multiplies or divides by a Python number, autograd saves it as a tensor of 8 bytes: torch's formulas
# that keep `other` (tools/autograd/derivatives.yaml). The dispatcher hands on the bare number, so no trace shows it.
_SAVE_NUMBERS = {f"aten::{name}{suffix}" for name in ("mul", "div", "remainder", "fmod") for suffix in ("", "_")}
_NUMBER_BYTES = 8
_PASSING = 3  # numbers of the operator that runs, saved or not: none takes more (addcmul, clamp, threshold)


def decisions_of(outcome: Outcome) -> dict[str, str]:
    choice = outcome.solution.choice or ()
    return {block.path: block.options[k].name for block, k in zip(outcome.problem.blocks, choice, strict=True)}


def layers_of(problem: Problem, decisions: Mapping[str, str], frontier: Sequence[FrontierPoint]) -> tuple[Layer, ...]:
    """The table of the blocks, each with what its options of the frontier cost. The problem has all of its options."""
    rows = []
    for i, block in enumerate(problem.blocks):
        options = {option.name: option for option in block.options}
        held = {name: option.hold_bytes for name, option in options.items()}
        extra = {name: max(0.0, option.step_s - options[KEEP].step_s) for name, option in options.items()}
        chosen = decisions[block.path]
        named = {chosen, *(point.options[i] for point in frontier)}
        rows.append(
            Layer(
                path=block.path,
                option=chosen,
                keep_bytes=held[KEEP],
                held_bytes=held[chosen],
                extra_s=extra[chosen],
                held={name: held[name] for name in options if name in named},
                extra={name: extra[name] for name in options if name in named},
            )
        )
    return tuple(rows)


def frontier_of(outcome: Outcome, stepping: Callable[[str], str], above_bytes: int) -> tuple[FrontierPoint, ...]:
    """The frontier as it stands in a plan.

    Args:
        outcome: the planner's answer.
        stepping: how the optimizer steps in a variant.
        above_bytes: what the plan turned out to need above the profile; the others are taken to need it too.
    """
    own = (outcome.variant, tuple(decisions_of(outcome).values()))
    return tuple(
        FrontierPoint(
            peak_bytes=point.peak_bytes + above_bytes,
            step_s=point.step_s,
            options=point.options,
            head=next((part for part in point.variant.split("+") if lever_of(part) == "loss-head"), KEEP),
            stepping=stepping(point.variant),
            chosen=(point.variant, point.options) == own,
        )
        for point in outcome.frontier
    )


def reason_for(decisions: Mapping[str, str], needs_bytes: int, budget: Budget) -> str:
    pulled: Counter[str | None] = Counter(lever_of(option) for option in decisions.values())
    blocks = len(decisions) - pulled["loss-head"]
    texts = {
        "recompute": "{} of {} blocks are recomputed",
        "select": "{} of {} blocks drop a part of what they save",
        "offload": "{} of {} blocks keep theirs on the host",
        "loss-head": "the loss is computed in chunks",
    }
    counts = [text.format(pulled[lever], blocks) for lever, text in texts.items() if pulled[lever]]
    nothing = "nothing is recomputed" if blocks else "no repeated blocks, so only the batch is planned"
    what = ", ".join(counts) or nothing
    spare = budget.usable_bytes - needs_bytes
    if spare >= 0:
        return f"{what}, {format_budget(spare)} to spare"
    return f"{what}, {budget.beyond(-spare)}"


def peak_of(trace: Trace, usage: Usage | None) -> tuple[int, dict[str, int]]:
    """The peak of a step, and what it is made of; on a card by the blocks of its allocator."""
    breakdown = trace.breakdown(trace.peak_tick)
    if usage is None:
        return trace.peak_bytes, breakdown
    return usage.peak_allocated_bytes, {**breakdown, "allocator": usage.peak_allocated_bytes - trace.peak_bytes}


def unseen_bytes(trace: Trace) -> int:
    """At most so many bytes of a real step on a CPU are Python numbers that torch wraps in tensors."""
    saving = np.isin(trace.op_name, [code for code, name in enumerate(trace.op_names) if name in _SAVE_NUMBERS])
    counts = (int(saving[s.forward_ops.start : s.loss_ops.stop].sum()) for s in trace.steps)
    return _NUMBER_BYTES * (max(counts) + _PASSING)


def module_at(trace: Trace, tick: int) -> str:
    born = int(trace.born[trace.alive(tick)].argmax())
    return trace.modules[int(trace.storage_module[trace.alive(tick)][born])]


def saved_of(trace: Trace) -> dict[str, int]:
    """Bytes by module that its forward leaves behind for its backward."""
    step = trace.steps[-1]
    first = max(step.forward.start, 1)  # at 0 is what is there all the time
    kept = (trace.born >= first) & (trace.born < step.backward.start) & (trace.died > step.backward.start)
    totals: dict[str, int] = {}
    for module, size in zip(trace.storage_module[kept], trace.storage_bytes[kept], strict=True):
        path = trace.modules[int(module)]
        totals[path] = totals.get(path, 0) + int(size)
    return totals


def timeline_of(trace: Trace) -> Timeline:
    """At most a few hundred ticks: of each stretch of a long step the one at which most is alive, and the last."""
    live, stretch = trace.live, max(1, trace.ticks // _TIMELINE_POINTS)
    highest = [at + int(live[at : at + stretch].argmax()) for at in range(0, trace.ticks, stretch)]
    ticks = sorted({*highest, trace.ticks - 1})
    columns: dict[str, list[int]] = {name: [] for name in CATEGORIES}
    by_category = {code: trace.of_category(code) for code in range(len(CATEGORIES))}
    for tick in ticks:
        for code, name in enumerate(CATEGORIES):
            columns[name].append(int(by_category[code][tick]))
    return Timeline(
        phase=tuple(trace.phase_of(tick) for tick in ticks), bytes={k: tuple(v) for k, v in columns.items()}
    )
