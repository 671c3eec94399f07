"""The planning problem: one training step as a chain of blocks, each with a few ways to run it.

Why one prefix sum is the whole state. Call the bytes that block j holds from the end of its forward to the start of
its backward ``hold_j(o_j)``. Every moment of a micro-step then needs

    peak = constant of that moment + sum of hold_j(o_j) over the blocks already run forward and not yet back

because a block's own working set depends on its own option only. So the chain is a multiple-choice knapsack whose
constraint tightens by position, and the state of an exact dynamic programme is one number.

All sizes are bytes (int) and absolute: weights, optimizer state, the batch and, from the second accumulated
micro-batch on, the gradients are already inside the constants. All times are seconds.
"""

from dataclasses import dataclass

KEEP, RECOMPUTE = "keep", "recompute"  # the names of options


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run one block. The three sizes are *above* ``Block.base_bytes`` + the earlier blocks' holds."""

    name: str  # "keep" or "recompute"
    hold_bytes: int  # alive between the block's forward and its backward, its boundary input counted once
    forward_bytes: int  # peak while its forward runs
    backward_bytes: int  # peak while its backward runs: recomputed tensors, gradients (also of later blocks)
    step_s: float  # forward + backward, with any recomputation


@dataclass(frozen=True, slots=True)
class Block:
    """One link of the chain, in forward order."""

    path: str  # dotted module path in the user's model
    base_bytes: int  # alive when its forward starts, the earlier blocks' holds taken off
    options: tuple[Option, ...]  # at least one


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

    def __post_init__(self) -> None:
        if len(self.gaps) != len(self.blocks) + 1:
            raise ValueError(f"{len(self.blocks)} blocks need {len(self.blocks) + 1} gaps, got {len(self.gaps)}")
        if any(not block.options for block in self.blocks):
            raise ValueError("every block needs at least one option")

    def step_s(self, choice: tuple[int, ...]) -> float:
        """Seconds of one whole optimizer step under a choice (an option index per block)."""
        blocks_s = sum(block.options[k].step_s for block, k in zip(self.blocks, choice, strict=True))
        return self.accumulation * (blocks_s + self.rest_s) + self.optimizer_s


Choice = tuple[int, ...]  # an option index per block, in block order
