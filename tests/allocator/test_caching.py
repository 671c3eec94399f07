import inspect
import math
from itertools import pairwise
from types import ModuleType

import pytest
from allocator_oracle import Oracle
from histories import step
from hypothesis import given, settings
from hypothesis import strategies as st
from request_streams import MIB, SETTINGS, STEPS, events_of, seeded

from memplan.allocator import CachingAllocator, Events, OutOfMemory, Settings, caching

EVERY_SETTING = pytest.mark.parametrize("name", SETTINGS)


def play(events: Events, allocator: CachingAllocator | Oracle) -> list[int]:
    """Play all events; the ids of requests that the cap refused, which are left out."""
    assert events.streams is not None
    refused: list[int] = []
    for row in zip(events.ids.tolist(), events.sizes.tolist(), events.streams.tolist(), strict=True):
        if row[0] not in refused:
            try:
                step(allocator, *row)
            except Exception as error:  # that of a mutant is a class of its own
                if type(error).__name__ not in {"OutOfMemory", "Full"}:
                    raise
                refused.append(row[0])
    return refused


def layout(allocator: CachingAllocator) -> list[tuple[int, bool, tuple[tuple[int, str], ...]]]:
    return sorted((segment.stream, segment.is_small, segment.blocks) for segment in allocator.segments())


def agree(events: Events, settings_: Settings, cap_bytes: int | None, module: ModuleType = caching) -> bool:
    """Whether the allocator of `module` and the oracle do the same, to the last segment and block."""
    oracle = Oracle(settings_, math.inf if cap_bytes is None else cap_bytes)
    allocator = module.CachingAllocator(settings_, cap_bytes)
    try:
        refused = play(events, allocator)
    except (ArithmeticError, AssertionError, LookupError):  # a mutant's own
        return False
    return (
        refused == play(events, oracle)
        and allocator.segment_events == oracle.log
        and layout(allocator) == oracle.segments()
        and allocator.reserved == oracle.reserved
        and allocator.active == oracle.in_state("used", "awaiting")
        and allocator.allocated == oracle.in_state("used")
        and allocator.retries == oracle.retries
    )


# --- single rules ---


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded to the size that has a segment of its own
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the remainder of 1 MiB is not split off
        (32 * MIB, 32 * MIB, 32 * MIB),
    ],
)
def test_boundaries(size: int, block: int, segment: int) -> None:
    allocator = CachingAllocator(Settings())
    allocator.allocate(1, size)
    assert (allocator.allocated, allocator.reserved) == (block, segment)
    assert allocator.segment_events == [("segment_alloc", segment, 0)]


def test_a_large_remainder_is_split_off_if_it_is_over_1_mib() -> None:
    for size, block in ((19 * MIB, 20 * MIB), (19 * MIB - 512, 19 * MIB - 512)):
        allocator = CachingAllocator(Settings())
        allocator.allocate(1, 20 * MIB)
        allocator.free(1)
        allocator.allocate(2, size)
        assert allocator.allocated == block


def test_the_tightest_block_is_taken_and_of_those_the_lowest() -> None:
    allocator = CachingAllocator(Settings())
    for identity, size in enumerate([4096, 512, 2048, 512, 2048, 512]):
        allocator.allocate(identity, size)
    for identity in (0, 4, 2):
        allocator.free(identity)
    allocator.allocate(9, 1500)
    (segment,) = allocator.segments()
    assert segment.blocks[:4] == ((4096, "free"), (512, "allocated"), (1536, "allocated"), (512, "free"))


def test_blocks_of_another_stream_are_not_taken() -> None:
    allocator = CachingAllocator(Settings())
    allocator.allocate(1, 32 * MIB, 0)
    allocator.free(1)
    allocator.allocate(2, 32 * MIB, 7)
    assert allocator.reserved == 64 * MIB


def test_free_neighbours_merge_and_a_segment_is_kept() -> None:
    allocator = CachingAllocator(Settings())
    for identity in range(3):
        allocator.allocate(identity, 5 * MIB)
    for identity in (0, 2, 1):
        allocator.free(identity)
    (segment,) = allocator.segments()
    assert segment.blocks == ((20 * MIB, "free"),)
    assert (allocator.allocated, allocator.reserved) == (0, 20 * MIB)


def test_a_retry_gives_back_unused_segments_but_not_those_in_part_in_use() -> None:
    allocator = CachingAllocator(Settings(), cap_bytes=70 * MIB)
    for identity, size in enumerate([30, 5, 5, 12]):
        allocator.allocate(identity, size * MIB)
    for identity in (0, 1, 3):
        allocator.free(identity)
    allocator.allocate(9, 40 * MIB)
    assert allocator.segment_events[-3:] == [
        ("segment_free", 12 * MIB, 0),
        ("segment_free", 30 * MIB, 0),
        ("segment_alloc", 40 * MIB, 0),
    ]
    assert (allocator.retries, allocator.reserved, allocator.peak_reserved) == (1, 60 * MIB, 62 * MIB)


def test_out_of_memory_says_the_numbers() -> None:
    allocator = CachingAllocator(Settings(), cap_bytes=30 * MIB)
    allocator.allocate(1, 12 * MIB)
    with pytest.raises(OutOfMemory, match=r"20\.00 MiB on top of 12\.00 MiB .* the cap of 30\.00 MiB"):
        allocator.allocate(2, 2 * MIB)
    assert allocator.retries == 1


def test_a_block_that_another_stream_uses_is_active_until_its_event_is_done() -> None:
    allocator = CachingAllocator(Settings())
    allocator.allocate(1, 32 * MIB)
    allocator.request_free(1)
    assert (allocator.allocated, allocator.active) == (0, 32 * MIB)
    allocator.allocate(2, 32 * MIB)
    assert (allocator.reserved, allocator.peak_allocated, allocator.peak_active) == (64 * MIB, 32 * MIB, 64 * MIB)
    allocator.free(1)
    allocator.allocate(3, 32 * MIB)
    assert allocator.reserved == 64 * MIB


def test_a_retry_waits_for_other_streams() -> None:
    allocator = CachingAllocator(Settings(), cap_bytes=40 * MIB)
    allocator.allocate(1, 32 * MIB)
    allocator.request_free(1)
    allocator.allocate(2, 40 * MIB)
    assert (allocator.retries, allocator.active) == (1, 40 * MIB)
    allocator.free(1)  # as the stream of events has it, later
    assert allocator.active == 40 * MIB


def test_oversize_blocks_are_kept_for_oversize_requests() -> None:
    allocator = CachingAllocator(Settings(max_split_bytes=32 * MIB), cap_bytes=120 * MIB)
    allocator.allocate(1, 64 * MIB)
    allocator.free(1)
    allocator.allocate(2, 2 * MIB)  # may not take it
    assert allocator.reserved == 84 * MIB
    allocator.allocate(3, 46 * MIB)  # may, since it is within 20 MiB, and it is not split
    assert (allocator.reserved, allocator.allocated) == (84 * MIB, 66 * MIB)
    allocator.free(3)
    allocator.allocate(4, 40 * MIB)  # is further off, so the oversize block makes room: no retry by torch's count
    assert (allocator.reserved, allocator.retries) == (60 * MIB, 0)


def test_expandable_segments_grow_by_pages_and_shrink_by_whole_ones() -> None:
    allocator = CachingAllocator(Settings(expandable_segments=True), cap_bytes=90 * MIB)
    allocator.allocate(1, 12 * MIB)
    allocator.allocate(2, 30 * MIB)
    assert allocator.segment_events == [("segment_map", 20 * MIB, 0), ("segment_map", 40 * MIB, 0)]
    allocator.allocate(3, 100)
    assert allocator.segment_events[-1] == ("segment_map", 2 * MIB, 0)
    assert allocator.reserved == 62 * MIB
    allocator.free(2)
    allocator.allocate(4, 50 * MIB)  # asks for 50 MiB and maps 20 more; 62 + 50 is over the cap at first
    assert allocator.segment_events[-2:] == [("segment_unmap", 40 * MIB, 0), ("segment_map", 60 * MIB, 0)]
    assert allocator.retries == 1
    assert layout(allocator)[0][2] == ((12 * MIB, "allocated"), (50 * MIB, "allocated"), (18 * MIB, "free"))


def test_garbage_collection_gives_back_what_is_idle_longest() -> None:
    allocator = CachingAllocator(Settings(garbage_collection_threshold=0.5), cap_bytes=200 * MIB)
    for identity, size in enumerate([40, 50, 60]):
        allocator.allocate(identity, size * MIB)
    allocator.free(1)
    allocator.allocate(7, 40 * MIB)  # from the block of 50 MiB; the remainder stays with it
    allocator.free(7)
    allocator.free(0)
    allocator.allocate(8, 38 * MIB)
    allocator.free(8)
    allocator.free(2)
    allocator.allocate(9, 70 * MIB)
    assert allocator.retries == 0
    assert [event[:2] for event in allocator.segment_events[3:]] == [
        ("segment_free", 50 * MIB),
        ("segment_alloc", 70 * MIB),
    ]


@pytest.mark.parametrize(("identity", "size"), [(1, 512), (2, 0), (2, -5)])
def test_an_impossible_request(identity: int, size: int) -> None:
    allocator = CachingAllocator(Settings())
    allocator.allocate(1, 512)
    with pytest.raises(ValueError, match=f"id {identity}"):
        allocator.allocate(identity, size)


# --- properties ---


@EVERY_SETTING
@given(st.lists(STEPS, max_size=40), st.none() | st.integers(20, 200))
@settings(max_examples=40, deadline=None)
def test_it_does_what_the_oracle_does(name: str, steps: list, cap_mib: int | None) -> None:
    assert agree(events_of(steps), SETTINGS[name], None if cap_mib is None else cap_mib * MIB)


@EVERY_SETTING
@pytest.mark.parametrize("cap_mib", [None, 500, 900])
def test_it_does_what_the_oracle_does_for_long(name: str, cap_mib: int | None) -> None:
    assert agree(seeded(3, 600), SETTINGS[name], None if cap_mib is None else cap_mib * MIB)


@EVERY_SETTING
@given(st.lists(STEPS, min_size=1, max_size=30), st.integers(40, 300))
@settings(max_examples=30, deadline=None)
def test_bytes_are_conserved(name: str, steps: list, cap_mib: int) -> None:
    events = events_of(steps)
    assert events.streams is not None
    allocator = CachingAllocator(SETTINGS[name], cap_mib * MIB)
    for row in zip(events.ids.tolist(), events.sizes.tolist(), events.streams.tolist(), strict=True):
        try:
            step(allocator, *row)
        except OutOfMemory:
            break
        sums = dict.fromkeys(("allocated", "awaiting_free", "free"), 0)
        for segment in allocator.segments():
            assert sum(size for size, _ in segment.blocks) == segment.total_bytes
            assert all(size > 0 and size % 512 == 0 for size, _ in segment.blocks)
            states = [state for _, state in segment.blocks]
            assert ("free", "free") not in pairwise(states)
            for size, state in segment.blocks:
                sums[state] += size
        assert sums["allocated"] == allocator.allocated
        assert sums["allocated"] + sums["awaiting_free"] == allocator.active
        assert sum(sums.values()) == allocator.reserved <= min(allocator.peak_reserved, cap_mib * MIB)
        assert allocator.active <= allocator.peak_active <= allocator.peak_reserved


@EVERY_SETTING
@given(st.lists(STEPS, max_size=30))
@settings(max_examples=20, deadline=None)
def test_nothing_is_left_when_all_is_free_and_given_back(name: str, steps: list) -> None:
    events = events_of(steps)
    allocator = CachingAllocator(SETTINGS[name])
    assert not play(events, allocator)
    for identity in sorted({int(i) for i in events.ids} & allocator._live.keys()):
        allocator.free(identity)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.active, allocator.reserved, allocator.segments()) == (0, 0, 0, ())
    assert not allocator._starts
    assert not allocator._ends


@given(st.permutations(range(12)), st.sampled_from(sorted(SETTINGS)), st.integers(1, 40 * MIB))
@settings(max_examples=30, deadline=None)
def test_blocks_of_one_size_are_interchangeable(order: list[int], name: str, size: int) -> None:
    def layout_after(frees: list[int]) -> tuple[int, int, int]:
        allocator = CachingAllocator(SETTINGS[name])
        for identity in range(12):
            allocator.allocate(identity, size)
        for identity in frees:
            allocator.free(identity)
        for identity in range(12):
            allocator.allocate(identity, size)
        return allocator.allocated, allocator.reserved, len(allocator.segment_events)

    assert layout_after(order) == layout_after(list(range(12)))


# --- the tests tested ---

MUTANTS = {
    "splits at 1 MiB": ("rest >= pool.split_from", "rest >= pool.split_from - 512"),
    "splits oversize": (" and rounded < pool.split_below", ""),
    "second best fit": (
        "        if i < len(free):\n            key",
        "        i += i + 1 < len(free)\n        if i < len(free):\n            key",
    ),
    "never merges forwards": ("after = starts.pop(end, 0)", "after = 0"),
    "never merges backwards": ("before = ends.pop(start, -1)", "before = -1"),
    "one pool": ("rounded <= SMALL_BYTES else", "rounded <= 2 * SMALL_BYTES else"),
    "shared among streams": ("else self._large)[stream]", "else self._large)[0]"),
    "retry without giving back": (
        "            self.empty_cache()\n            self.retries",
        "            self.retries",
    ),
    "retry does not wait": ("for identity in list(self._awaiting):", "for identity in ():"),
    "reuses before the event": ("        self._awaiting[identity] = None\n", "        self.free(identity)\n"),
    "cap off by a byte": ("total <= self.cap_bytes", "total < self.cap_bytes"),
    "pages too small": ("// page) * page", "// SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES"),
    "takes the growing end first": ("< self._room(pool, free[i])", "< 0"),
    "unmaps half pages": ("first = start + (pool.base - start) % page", "first = start"),
    "forgets the hole before": ("if end == first), first)", "if end == -1), first)"),
    "frees all oversize": ("while released < wanted and", "while"),
    "collects the young": ("oldest = [age * len(idle) >= sum(idle)", "oldest = [age * len(idle) <= sum(idle)"),
    "collects too late": ("freed < excess and", "freed + 2**21 < excess and"),
}


def mutated(old: str, new: str) -> ModuleType:
    source = inspect.getsource(caching)
    assert source.count(old) == 1, (
        f"{old!r} is {source.count(old)} times in the allocator: say another place to break it"
    )
    module = ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_the_oracle_catches_a_broken_allocator(name: str) -> None:
    module = mutated(*MUTANTS[name])
    assert not all(
        agree(seeded(seed, 150), settings_, cap_bytes, module)
        for seed in range(6)
        for settings_ in SETTINGS.values()
        for cap_bytes in (None, 120 * MIB, 240 * MIB)
    )
