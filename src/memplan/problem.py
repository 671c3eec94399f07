"""The planning problem: one training step as a chain of blocks, each with a few ways to run it.

Why one prefix sum is the whole state. Call the bytes that block j holds from the end of its forward to the start of
its backward ``hold_j(o_j)``. Every moment of a micro-step then needs

    peak = constant of that moment + sum of hold_j(o_j) over the blocks already run forward and not yet back

because a block's own working set depends on its own option only. So the chain is a multiple-choice knapsack whose
constraint tightens by position, and the state of an exact dynamic programme is one number.

Copies to the host are a second resource. Their bytes in flight live in one staging area that the whole chain shares,
and what the computation waits for them is part of the step (`memplan.link`).

All sizes are bytes (int) and absolute: weights, optimizer state, the batch and, from the second accumulated
micro-batch on, the gradients are already inside the constants. All times are seconds.
"""

from dataclasses import dataclass
from functools import cache
from math import inf, isfinite

from memplan.link import FORWARD_SHARE, staging_bytes, waits_s
from memplan.strategy import Lever

KEEP, RECOMPUTE = "keep", "recompute"  # the names of options that every block knows

# How the names of options and variants begin, and the lever that they pull.
_LEVERS: tuple[tuple[str, Lever], ...] = (
    ("recompute", "recompute"),
    ("select", "select"),  # "select-3": keeps a part of what the block saves
    ("offload", "offload"),  # "offload-boundary": copies to the host
    ("chunked", "loss-head"),  # "chunked-512": the loss in pieces of so many tokens
    ("optimizer", "optimizer"),  # "optimizer-single": one parameter after the other
    ("in-backward", "step-in-backward"),  # each parameter as soon as its gradient is there
)


def lever_of(name: str) -> Lever | None:
    """The lever that an option or a part of a variant pulls; None for "keep", which pulls none.

    Raises:
        ValueError: the name begins like no lever's.
    """
    if name == KEEP:
        return None
    for start, lever in _LEVERS:
        if name.startswith(start):
            return lever
    starts = ", ".join(start for start, _ in _LEVERS)
    raise ValueError(f"{name!r} is no option: names are {KEEP!r} or begin with one of {starts}")


@cache
def levers_of(name: str) -> frozenset[Lever]:
    """The levers of a name whose parts are joined by "+", as in "chunked-512+optimizer-single"."""
    return frozenset(lever for part in name.split("+") if (lever := lever_of(part)) is not None)


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run one block. The three sizes are *above* ``Block.base_bytes`` + the earlier blocks' holds."""

    name: str  # "keep", "recompute", or another that `levers_of` understands
    hold_bytes: int  # alive between the block's forward and its backward, its boundary input counted once
    forward_bytes: int  # peak while its forward runs
    backward_bytes: int  # peak while its backward runs: recomputed tensors, gradients (also of later blocks)
    step_s: float  # forward + backward, with any recomputation
    link_bytes: int = 0  # copied to the host in the forward and back in the backward
    recompute_s: float = 0.0  # the share of step_s that recomputes; it lies in the backward

    @property
    def forward_s(self) -> float:
        """The part of `step_s` that is the forward."""
        return FORWARD_SHARE * max(0.0, self.step_s - self.recompute_s)


@dataclass(frozen=True, slots=True)
class Block:
    """One link of the chain, in forward order."""

    path: str  # dotted module path in the user's model
    base_bytes: int  # alive when its forward starts, the earlier blocks' holds taken off
    options: tuple[Option, ...]  # at least one that copies nothing


@dataclass(frozen=True, slots=True)
class Gap:
    """What runs before block i (gap 0: embeddings) and after the last (gap N: head and loss).

    Peaks are absolute but for the holds of the blocks before it.
    """

    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One step: ``accumulation`` micro-steps over the chain, then the optimizer."""

    budget_bytes: int
    blocks: tuple[Block, ...]
    gaps: tuple[Gap, ...]  # len(blocks) + 1
    optimizer_bytes: int  # peak of the optimizer step; no activation is alive then
    rest_s: float  # per micro-step, everything outside the blocks
    optimizer_s: float  # per step
    accumulation: int = 1
    link_bytes_s: float | None = None  # of the link to the host, each way at once; None: nothing may be copied
    host_bytes: int | None = None  # limit on what lies on the host at once; None: no limit is stated, so nothing may
    at_most_s: float = inf  # a slower step is of no interest: a solver that finds no faster one may stop looking
    enough: float = 0.0  # so may one whose choice misses its bound by no more than this share of the blocks' time

    def __post_init__(self) -> None:
        if len(self.gaps) != len(self.blocks) + 1:
            raise ValueError(f"{len(self.blocks)} blocks need {len(self.blocks) + 1} gaps, got {len(self.gaps)}")
        if not all(any(option.link_bytes == 0 for option in block.options) for block in self.blocks):
            raise ValueError("every block needs at least one option that copies nothing to the host")
        if self.link_bytes_s is not None and not (self.link_bytes_s > 0 and isfinite(self.link_bytes_s)):
            raise ValueError(f"link_bytes_s = {self.link_bytes_s} has to be above 0 and finite")

    def allows(self, option: Option) -> bool:
        """Whether an option may be chosen at all: what copies needs a link and room on the host."""
        if option.link_bytes == 0:
            return True
        return self.link_bytes_s is not None and option.link_bytes <= (self.host_bytes or 0)

    def chosen(self, choice: "Choice") -> list[Option]:
        """The options that a choice names, per block."""
        return [block.options[k] for block, k in zip(self.blocks, choice, strict=True)]

    def step_s(self, choice: "Choice") -> float:
        """Seconds of one whole optimizer step under a choice whose options are all allowed."""
        options = self.chosen(choice)
        return self.whole_s(sum(option.step_s for option in options) + self._waits_s(options))

    def whole_s(self, blocks_s: float) -> float:
        """Seconds of an optimizer step whose blocks take so many in each micro-step."""
        return self.accumulation * (blocks_s + self.rest_s) + self.optimizer_s

    def blocks_s(self, whole_s: float) -> float:
        """What of an optimizer step's seconds its blocks have in each micro-step."""
        return (whole_s - self.optimizer_s) / self.accumulation - self.rest_s

    def _waits_s(self, options: list[Option]) -> float:
        if self.link_bytes_s is None:
            return 0.0
        forward_s = [option.forward_s for option in options]
        backward_s = [option.step_s - option.forward_s for option in options]
        return waits_s(forward_s, backward_s, [option.link_bytes for option in options], self.link_bytes_s)


def staging_of(options: list[Option]) -> int:
    """Bytes that the copies in flight take on the device, from the first block to the last."""
    return staging_bytes([option.link_bytes for option in options])


Choice = tuple[int, ...]  # an option index per block, in block order
