import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from request_streams import STEPS, columns, events_of

from memplan.allocator import FREE, REQUEST_FREE, Events
from memplan.errors import BadHistory

MIB = 2**20
SEGMENT = {"action": "segment_alloc", "addr": 4096, "size": 2 * MIB, "stream": 0}


def entry(action: str, address: int = 4096, size: int = 100, stream: int = 0) -> dict[str, object]:
    return {"action": action, "addr": address, "size": size, "stream": stream}


def rows(events: Events) -> list[tuple[int, int, int]]:
    assert events.streams is not None
    return list(zip(events.ids.tolist(), events.sizes.tolist(), events.streams.tolist(), strict=True))


def test_requests_and_completed_frees_are_kept() -> None:
    history = [
        SEGMENT,
        entry("alloc"),
        entry("snapshot", 0, 0),
        entry("alloc", 4608, 700, 3),
        entry("free_requested"),
        entry("free_completed"),
        {"action": "oom", "device_free": 17, "size": 99, "stream": 0},
        {**entry("alloc"), "pool_id": (0, 0), "frames": [], "time_us": 5},
    ]
    assert rows(Events.from_history(history)) == [(4096, 100, 0), (4608, 700, 3), (4096, FREE, 0), (4096, 100, 0)]


def test_a_free_that_waits_for_another_stream_is_two_events() -> None:
    history = [SEGMENT, entry("alloc"), entry("alloc", 8192), entry("free_requested"), entry("snapshot", 0)]
    history += [entry("free_completed"), entry("free_requested", 8192)]
    assert rows(Events.from_history(history))[2:] == [(4096, REQUEST_FREE, 0), (4096, FREE, 0), (8192, REQUEST_FREE, 0)]


@pytest.mark.parametrize(
    ("history", "says"),
    [
        ([entry("alloc")], "entry 0 allocates at 0x1000, which is in no segment"),
        ([entry("free_requested")], "entry 0 frees 0x1000"),
        ([SEGMENT, entry("free_completed")], "entry 1 frees 0x1000"),
        ([entry("segment_free")], "entry 0 gives back a segment at 0x1000"),
        ([SEGMENT, entry("alloc"), entry("alloc")], "entry 2 allocates at 0x1000, where an earlier"),
        ([SEGMENT, entry("alloc", 4096 + 2 * MIB)], "in no segment"),
        ([SEGMENT, entry("segment_free", size=2 * MIB), entry("alloc")], "in no segment"),
    ],
)
def test_an_overflowed_ring_is_refused(history: list[dict[str, object]], says: str) -> None:
    with pytest.raises(BadHistory, match=f"{says}.*max_entries"):
        Events.from_history(history)


def test_a_suffix_of_a_history_is_refused_wherever_memory_was_in_use() -> None:
    history = [SEGMENT, *(entry("alloc", 4096 + 512 * i) for i in range(5))]
    for i in range(5):
        history += [entry("free_requested", 4096 + 512 * i), entry("free_completed", 4096 + 512 * i)]
    assert len(Events.from_history(history).ids) == 10
    for start in range(1, len(history)):
        with pytest.raises(BadHistory, match="ring buffer"):
            Events.from_history(history[start:])


def test_pages_of_expandable_segments_come_and_go_in_other_portions() -> None:
    history = [entry("segment_map", 0, 40), entry("segment_map", 80, 40), entry("segment_map", 40, 40)]
    history += [entry("segment_unmap", 20, 60), entry("alloc", 10), entry("alloc", 80), entry("segment_unmap", 0, 10)]
    Events.from_history(history)
    for address in (5, 20, 79, 120):
        with pytest.raises(BadHistory, match="in no segment"):
            Events.from_history([*history, entry("alloc", address)])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({**entry("alloc"), "pool_id": (1, 0)}, "private pool"),
        (entry("teleport"), "'teleport'"),
        ({}, "action None"),
        ({"action": "alloc", "addr": "4096"}, "'addr'"),
        (entry("alloc", size=0), "allocates 0 bytes"),
    ],
)
def test_what_is_no_history(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(BadHistory, match=says):
        Events.from_history([SEGMENT, wrong])


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([(1, 5, 0), (1, 5, 0)], "event 1 requests memory under id 1"),
        ([(1, 5, 0), (2, FREE, 0)], "event 1 gives back id 2"),
        ([(1, 5, 0), (1, FREE, 0), (1, FREE, 0)], "event 2 gives back id 1"),
        ([(1, 5, 0), (1, REQUEST_FREE, 0), (1, REQUEST_FREE, 0)], "event 2 gives back id 1"),
        ([(1, 5, 0), (1, REQUEST_FREE, 0), (1, 5, 0)], "event 2 requests memory under id 1"),
        ([(1, REQUEST_FREE, 0)], "event 0 gives back id 1"),
        ([(1, -7, 0)], "event 0 has the size -7"),
    ],
)
def test_events_that_do_not_go_together(events: list[tuple[int, int, int]], says: str) -> None:
    with pytest.raises(BadHistory, match=says):
        columns(events)


def test_columns_of_other_lengths() -> None:
    with pytest.raises(BadHistory, match="one length"):
        Events(np.zeros(2, dtype=np.int64), np.ones(3, dtype=np.int64))


@given(st.lists(STEPS, max_size=60))
def test_the_peak_of_what_is_requested(steps: list) -> None:
    events = events_of(steps)
    live: dict[int, int] = {}
    peak = 0
    for identity, size, _ in rows(events):
        if size > 0:
            live[identity] = size
        elif size == FREE:
            del live[identity]
        peak = max(peak, sum(live.values()))
    assert events.peak_requested_bytes == peak
