"""What holding memory costs in time, where what a step gives back is made anew in the next one.

The C library returns to the system what is freed at the end of the heap, and the system hands out zeroed pages again,
one fault at a time. A block that is timed by itself pays that for its own work alone. In a step it is paid for all that
the blocks hold, and so not for what a plan does not hold. A card's caching allocator gives nothing back.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Final

import torch

from memplan.device import CpuDevice, Device
from memplan.laps import by_turns
from memplan.problem import KEEP
from memplan.profile import ChainSizes, Level
from memplan.roofline import StepTimes
from memplan.timing import LEAST_SLOWDOWN

_PIECE: Final = 2**20  # elements of a float32 tensor: 4 MiB, as large as many that blocks save
_PIECES: Final = 64


def seconds_per_byte(device: Device) -> float:
    """Of memory that is held, beyond those of memory that is used again at once; 0 where nothing is given back."""
    return _of_processor(torch.get_num_threads()) if isinstance(device, CpuDevice) else 0.0


@cache
def _of_processor(_threads: int) -> float:
    """Once in a process: it takes a second, and is the machine's."""
    seconds = by_turns({held: partial(_lap, held) for held in ("held", "reused")}).seconds
    return max(0.0, seconds["held"] - seconds["reused"]) / (4 * _PIECE * _PIECES)


def _lap(way: str) -> float:
    begin = time.perf_counter()
    pieces = []
    for _ in range(_PIECES):
        piece = torch.ones(_PIECE)
        if way == "held":
            pieces.append(piece)
    pieces.clear()
    return time.perf_counter() - begin


def relieved(
    times: StepTimes,
    levels: Mapping[int, Mapping[str, Sequence[Level]]],
    paths: Collection[str],
    held_s_per_byte: float,
) -> StepTimes:
    """Times of blocks that were run by themselves, less what each option spares a whole step by holding less.

    Args:
        levels: micro-batch -> variant -> levels, as in `Profile.of`; all micro-batches of the times are there.
        paths: of the blocks.
        held_s_per_byte: see `seconds_per_byte`.
    """
    if not held_s_per_byte:
        return times
    blocks = {key: dict(points) for key, points in times.blocks.items()}
    for size, by_variant in levels.items():
        sizes = ChainSizes.of(by_variant[KEEP], -1, paths)
        for path, rows in zip(sizes.paths, sizes.options, strict=True):
            kept_s, kept_bytes = times.blocks[path, KEEP][size], rows[KEEP][0]
            for option in rows.keys() - {KEEP}:
                own_s = times.blocks[path, option][size]
                spared_s = held_s_per_byte * (kept_bytes - rows[option][0])
                blocks[path, option][size] = max(own_s - spared_s, min(own_s, LEAST_SLOWDOWN * kept_s))
    return replace(times, blocks=blocks)
