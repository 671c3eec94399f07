"""Allocation histories in files, and whether memplan's allocator repeats them.

A file has `origin` (where it is from), `cap_bytes` (what the process could reserve; None: all) and, as in a snapshot of
torch's, `allocator_settings`, the one device's `device_traces` from its first allocation on, and the `segments` at the
end.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from memplan.allocator import FREE, CachingAllocator, Events, Settings

STATES = {"allocated": "active_allocated", "awaiting_free": "active_awaiting_free", "free": "inactive"}


def run(events: Events, settings_: Settings, cap_bytes: int | None = None) -> CachingAllocator:
    allocator = CachingAllocator(settings_, cap_bytes)
    streams = np.zeros_like(events.ids) if events.streams is None else events.streams
    for identity, size, stream in zip(events.ids.tolist(), events.sizes.tolist(), streams.tolist(), strict=True):
        step(allocator, identity, size, stream)
    return allocator


def step(allocator: Any, identity: int, size: int, stream: int) -> None:
    """One event, to an allocator or an oracle of one."""
    if size > FREE:
        allocator.allocate(identity, size, stream)
    elif size == FREE:
        allocator.free(identity)
    else:
        allocator.request_free(identity)


def check_repeated(path: Path) -> None:
    """Same segments taken and given back in the same order, same blocks in the end."""
    snapshot = json.loads(path.read_text(encoding="utf-8"))
    assert snapshot["origin"]
    (history,) = snapshot["device_traces"]
    allocator = run(
        Events.from_history(history), Settings.from_snapshot(snapshot["allocator_settings"]), snapshot["cap_bytes"]
    )
    assert allocator.segment_events == [
        (entry["action"], entry["size"], entry["stream"]) for entry in history if entry["action"].startswith("segment")
    ]
    assert Counter(
        (segment.stream, segment.is_small, segment.total_bytes, tuple((size, STATES[s]) for size, s in segment.blocks))
        for segment in allocator.segments()
    ) == Counter(
        (
            segment["stream"],
            segment["segment_type"] == "small",
            segment["total_size"],
            tuple((block["size"], block["state"]) for block in segment["blocks"]),
        )
        for segment in snapshot["segments"]
    )
