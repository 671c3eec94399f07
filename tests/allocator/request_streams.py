"""Streams of requests for the tests of the allocator: drawn by hypothesis, or from a seed."""

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from memplan.allocator import FREE, REQUEST_FREE, Events, Settings

MIB = 2**20

# Boundaries of pools, segments and the split rule, and what lies between.
SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 2 * MIB),
    st.integers(1, 64).map(lambda n: n * MIB // 2),
    st.sampled_from([512, 513, MIB - 512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 11 * MIB, 20 * MIB, 32 * MIB]),
)
# Which of the live ones is freed (modulo their count), or None for a request; its size; its stream; whether it waits.
STEPS = st.tuples(st.none() | st.integers(0, 99), SIZES, st.integers(0, 5).map(lambda s: max(0, s - 4)), st.booleans())

SETTINGS = {
    "default": Settings(),
    "expandable": Settings(expandable_segments=True),
    "expandable, no split above": Settings(expandable_segments=True, max_split_bytes=24 * MIB),
    "no split above": Settings(max_split_bytes=20 * MIB),
    "rounded up": Settings(roundup_power2_divisions=(4,) * 16),
    "larger segments": Settings(large_segment_bytes=33 * MIB, max_non_split_rounding_bytes=40 * MIB),
    "garbage collected": Settings(garbage_collection_threshold=0.6),
}


def events_of(steps: Sequence[tuple[int | None, int, int, bool]]) -> Events:
    """Requests and frees from steps as drawn; a free that waits is completed a few events later."""
    rows: list[tuple[int, int, int]] = []
    live: list[int] = []
    waiting: list[int] = []
    for i, (freed, size, stream, waits) in enumerate(steps):
        if freed is None or not live:
            live.append(i)
            rows.append((i, size, stream))
        else:
            identity = live.pop(freed % len(live))
            rows.append((identity, REQUEST_FREE if waits else FREE, stream))
            if waits:
                waiting.append(identity)
        if len(waiting) > 2:
            rows.append((waiting.pop(0), FREE, 0))
    return columns(rows)


def columns(rows: Sequence[tuple[int, int, int]]) -> Events:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Events(table[:, 0], table[:, 1], table[:, 2])


def seeded(seed: int, count: int) -> Events:
    rng = random.Random(seed)
    sizes = (
        lambda: rng.randint(1, 4096),
        lambda: rng.randint(1, 2 * MIB),
        lambda: rng.randint(1, 64) * MIB // 2,
        lambda: rng.choice([20, 20, 40]) * MIB,  # whole pages
        lambda: rng.choice([512, MIB - 512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 11 * MIB, 32 * MIB]),
    )
    return events_of(
        [
            (rng.choice([None, rng.randrange(99)]), rng.choice(sizes)(), rng.choice([0, 0, 0, 1]), rng.random() < 0.2)
            for _ in range(count)
        ]
    )
