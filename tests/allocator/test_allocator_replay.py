from pathlib import Path

import pytest
from histories import check_repeated, run
from hypothesis import given, settings
from hypothesis import strategies as st
from request_streams import MIB, SETTINGS, STEPS, columns, events_of

from memplan.allocator import FREE, Events, OutOfMemory, Settings, Usage, replayed

HISTORIES = sorted((Path(__file__).parents[1] / "data" / "allocator").glob("*.json"))
UNCOLLECTED = pytest.mark.parametrize("name", [name for name in SETTINGS if name != "garbage collected"])


def completes(events: Events, settings_: Settings, cap_bytes: int) -> bool:
    try:
        run(events, settings_, cap_bytes)
    except OutOfMemory:
        return False
    return True


# --- histories ---


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_history_is_repeated(path: Path) -> None:
    """Same segments taken and given back, same blocks in the end. Each file says where it is from."""
    check_repeated(path)


def test_there_are_histories() -> None:
    assert len(HISTORIES) >= 3


# --- what a stream needs ---


def test_the_five_figures() -> None:
    """12 + 14 MiB come and go, then 30: kept, they fill 56 MiB; given back, 30 MiB do."""
    events = columns([(0, 11 * MIB, 0), (1, 14 * MIB, 0), (0, FREE, 0), (1, FREE, 0), (2, 30 * MIB, 0)])
    assert replayed(events, Settings()) == Usage(
        peak_requested_bytes=30 * MIB,
        peak_allocated_bytes=30 * MIB,
        peak_reserved_bytes=56 * MIB,
        completes_bytes=30 * MIB,
        fits_bytes=56 * MIB,
    )


def test_expandable_segments_ask_for_more_than_they_take() -> None:
    """One page of 20 MiB has 19 MiB free at its end, so 39 MiB need one more; under a cap torch asks for 40 at once."""
    usage = replayed(columns([(0, MIB + 1, 0), (1, 39 * MIB - 512, 0)]), Settings(expandable_segments=True))
    assert (usage.peak_reserved_bytes, usage.fits_bytes) == (40 * MIB, 60 * MIB)


def test_an_unsplit_remainder_is_allocated() -> None:
    usage = replayed(columns([(0, 11 * MIB, 0)]), Settings())
    assert (usage.peak_requested_bytes, usage.peak_allocated_bytes) == (11 * MIB, 12 * MIB)


def test_no_events_need_nothing() -> None:
    assert replayed(columns([]), Settings()) == Usage(0, 0, 0, 0, 0)


@UNCOLLECTED
@given(st.lists(STEPS, min_size=1, max_size=25))
@settings(max_examples=25, deadline=None)
def test_fits_is_the_smallest_cap_under_which_nothing_is_refused(name: str, steps: list) -> None:
    events, usage = events_of(steps), replayed(events_of(steps), SETTINGS[name])
    for cap_bytes in (usage.fits_bytes, usage.fits_bytes + 1, 2 * usage.fits_bytes):
        allocator = run(events, SETTINGS[name], cap_bytes)
        assert (allocator.retries, allocator.smallest_refused) == (0, None)
        assert allocator.reserved <= cap_bytes
    for cap_bytes in (*range(0, usage.fits_bytes, 8 * MIB), usage.fits_bytes - 1):
        try:
            allocator = run(events, SETTINGS[name], cap_bytes)
        except OutOfMemory:
            continue
        assert allocator.smallest_refused is not None
        assert allocator.retries or SETTINGS[name].max_split_bytes


@pytest.mark.parametrize("name", SETTINGS)
@given(st.lists(STEPS, min_size=1, max_size=25))
@settings(max_examples=25, deadline=None)
def test_completes_is_on_the_edge(name: str, steps: list) -> None:
    events, usage = events_of(steps), replayed(events_of(steps), SETTINGS[name])
    assert usage.completes_bytes <= usage.fits_bytes
    assert usage.peak_requested_bytes <= run(events, SETTINGS[name]).peak_active
    assert usage.peak_allocated_bytes <= usage.peak_reserved_bytes
    assert completes(events, SETTINGS[name], usage.completes_bytes)
    step = 2 * MIB if SETTINGS[name].garbage_collection_threshold else 1
    assert not completes(events, SETTINGS[name], usage.completes_bytes - step)


def test_a_larger_cap_can_fail_where_a_smaller_one_completes() -> None:
    """46 MiB force the first two segments out early; 56 MiB keep them until one of them is in use."""
    rows = [(0, 12), (1, 14), (1, FREE), (0, FREE), (2, 30), (2, FREE), (3, 4), (4, 24), (5, 16)]
    events = columns([(identity, size * MIB, 0) for identity, size in rows])
    assert [completes(events, Settings(), cap * MIB) for cap in (45, 46, 55, 56, 57, 58)] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    assert replayed(events, Settings()).fits_bytes == 72 * MIB


def test_garbage_collection_lowers_the_cap_without_a_retry() -> None:
    rows = [(0, 40), (0, FREE), (1, 60), (1, FREE), (2, 80)]
    events = columns([(identity, size * MIB, 0) for identity, size in rows])
    collected = Settings(garbage_collection_threshold=0.5)
    assert replayed(events, Settings()).fits_bytes == 180 * MIB
    usage = replayed(events, collected)
    assert usage.fits_bytes < 180 * MIB
    assert run(events, collected, usage.fits_bytes).retries == 0
    with_less = run(events, collected, usage.fits_bytes - 2 * MIB)
    assert with_less.retries


def test_the_same_answer_twice() -> None:
    events = events_of([(None, 3 * MIB * (i % 7 + 1), 0, False) if i % 3 else (i, 1, 0, False) for i in range(60)])
    assert replayed(events, Settings()) == replayed(events, Settings())
