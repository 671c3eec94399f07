"""The judge: walks one training step under a choice and says how many bytes are alive at every moment.

It shares no code with the solvers on purpose. A solver reasons with prefix sums and pruning; the judge only follows the
step, in exact integers, so that a plan is believed because of the walk and never because of the argument that found it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from memplan.problem import Choice, Option, Problem, staging_of

Phase = Literal["forward", "loss", "backward", "optimizer"]


@dataclass(frozen=True, slots=True)
class Moment:
    """One stretch of the step and the most bytes alive during it."""

    phase: Phase
    where: str  # the block's module path, or "" between blocks and in the optimizer
    bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """One micro-step and the optimizer, in the order of execution."""

    moments: tuple[Moment, ...]
    peak_bytes: int
    peak_phase: Phase
    peak_where: str
    step_s: float  # the whole optimizer step, all its micro-steps, with what it waits for the link
    host_bytes: int  # what lies on the host between forward and backward
    fits: bool  # the peak is within the problem's budget, and the host's part within its limit


def simulate(problem: Problem, choice: Choice) -> Timeline:
    """Walk one step of `problem` under `choice` (an option index per block).

    One micro-step stands for all of them: what differs between the first and the later ones (gradients that are already
    there) is inside the problem's constants. When several moments share the peak, the first one is named.

    Bytes that are on their way to or from the host lie in the staging area, which is there from the first block to the
    last but not while the head runs: the queue is empty then.

    Raises `ValueError` when the choice has not one valid option index per block.
    """
    options = _chosen(problem, choice)
    moments = tuple(_walk(problem, options))
    peak = max(moments, key=lambda moment: moment.bytes)
    allowed = all(problem.allows(option) for option in options)
    host_bytes = sum(option.link_bytes for option in options)
    return Timeline(
        moments=moments,
        peak_bytes=peak.bytes,
        peak_phase=peak.phase,
        peak_where=peak.where,
        step_s=problem.step_s(choice),
        host_bytes=host_bytes,
        fits=peak.bytes <= problem.budget_bytes and allowed and host_bytes <= (problem.host_bytes or 0),
    )


def _chosen(problem: Problem, choice: Choice) -> list[Option]:
    if len(choice) != len(problem.blocks):
        raise ValueError(f"{len(problem.blocks)} blocks need {len(problem.blocks)} option indices, got {len(choice)}")
    for block, k in zip(problem.blocks, choice, strict=True):
        if not 0 <= k < len(block.options):
            raise ValueError(f"{block.path} has options 0 to {len(block.options) - 1}, got {k}")
    return [block.options[k] for block, k in zip(problem.blocks, choice, strict=True)]


def _walk(problem: Problem, options: list[Option]) -> Iterator[Moment]:
    steps = list(zip(problem.blocks, problem.gaps[:-1], options, strict=True))
    head = problem.gaps[-1]
    held, staged = 0, staging_of(options)
    for i, (block, gap, option) in enumerate(steps):
        yield Moment("forward", "", held + gap.forward_bytes + (staged if i else 0))
        yield Moment("forward", block.path, held + block.base_bytes + option.forward_bytes + staged)
        held += option.hold_bytes
    yield Moment("loss", "", held + head.forward_bytes)
    yield Moment("backward", "", held + head.backward_bytes)
    for i, (block, gap, option) in reversed(list(enumerate(steps))):
        held -= option.hold_bytes
        yield Moment("backward", block.path, held + block.base_bytes + option.backward_bytes + staged)
        yield Moment("backward", "", held + gap.backward_bytes + (staged if i else 0))
    yield Moment("optimizer", "", problem.optimizer_bytes)
