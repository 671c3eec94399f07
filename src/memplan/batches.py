"""How the samples of one optimizer step may be cut into micro-batches."""

from collections.abc import Sequence
from typing import Final

from memplan.errors import BadBatch

# Micro-batches between which sizes are taken as affine; at 1, strides degenerate and copies vanish.
POINTS: Final = (2, 4)


def splits(effective_batch: int | None, micro_batch: int | None, can_split: bool) -> list[tuple[int, int]]:
    """The (micro-batch, accumulation) pairs that the caller's batch sizes leave, smallest micro-batch first.

    Args:
        effective_batch: samples per optimizer step; None: one micro-batch per step.
        micro_batch: samples per forward; None: any that divides the effective batch, or 1 where there is none.
        can_split: False where layers couple the samples of a batch, so that it must stay whole.

    Raises:
        BadBatch: a size below 1, a micro-batch that does not divide the effective batch, or a batch that must not be.
    """
    for name, value in (("effective_batch", effective_batch), ("micro_batch", micro_batch)):
        if value is not None and not (type(value) is int and value >= 1):
            raise BadBatch(f"{name} = {value!r} has to be a whole number and at least 1")
    if effective_batch is None:
        return [(micro_batch or 1, 1)]
    divisors = [n for n in range(1, effective_batch + 1) if effective_batch % n == 0]
    if micro_batch is not None and micro_batch not in divisors:
        near = [n for n in divisors if n < micro_batch][-1:] + [n for n in divisors if n > micro_batch][:1]
        raise BadBatch(
            f"effective_batch = {effective_batch} is not a multiple of micro_batch = {micro_batch}; "
            f"the nearest that divide it: {' and '.join(map(str, near))}"
        )
    pairs = [(n, effective_batch // n) for n in divisors if micro_batch in (None, n)]
    if can_split:
        return pairs
    whole = [(n, k) for n, k in pairs if k == 1]
    if not whole:
        raise BadBatch(
            f"micro_batch = {micro_batch} would split effective_batch = {effective_batch}, but this model has "
            "layers that couple the samples of a batch (such as BatchNorm in training); leave micro_batch out"
        )
    return whole


def profiled(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Micro-batches to profile at, of what `splits` gives: the only one, else two between which sizes are affine."""
    sizes = sorted(micro_batch for micro_batch, _ in pairs)
    if len(sizes) == 1 or sizes[-1] < POINTS[1]:
        return tuple(sorted({sizes[0], sizes[-1]}))
    return POINTS
