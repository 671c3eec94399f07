"""`CachingAllocator`: the caching allocator itself, one request at a time, in exact integers.

Blocks have addresses in one line of numbers. Each pair of pool and stream keeps its free blocks as sorted integers
``size << 64 | address``, so the best fit (smallest, then lowest) is one bisection; two dictionaries, from a free
block's start to its size and from its end to its start, find the neighbours to merge with. Segments never touch one
another, so nothing merges across them.

New segments get rising addresses. A driver may hand out others, which matters only for which of several free blocks of
one size is taken. An expandable segment's range of addresses has no end here (torch's is 1.125 times the card's
memory). Private pools of CUDA graphs are not modelled.
"""

from bisect import bisect_left, insort
from typing import Literal

from memplan.allocator.pools import ADDRESS, SHIFT, Block, Pool, Pools, Segment, SegmentEvent, listed
from memplan.allocator.settings import BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, Settings
from memplan.units import format_budget, format_bytes


class OutOfMemory(Exception):
    """The cap does not hold a request, even with all unused segments given back. Never leaves the allocator's room."""


class CachingAllocator:
    """The allocator of one device, under a cap on what it reserves if one is given. Counts are bytes, but `retries`.

    The cap stands for both what `set_per_process_memory_fraction` allows and what the card has left: a segment is
    refused if the reserved bytes and its own are more. In expandable mode torch holds the size that a plain segment
    would have against the fraction, and the card has to hold the pages that are mapped; here both have to be within.
    """

    __slots__ = (
        "_ages",
        "_awaiting",
        "_awaiting_bytes",
        "_completed",
        "_ends",
        "_is_plain",
        "_large",
        "_live",
        "_rounds_plainly",
        "_searches",
        "_small",
        "_starts",
        "allocated",
        "cap_bytes",
        "largest_granted",
        "peak_active",
        "peak_allocated",
        "peak_reserved",
        "reserved",
        "retries",
        "segment_events",
        "settings",
        "smallest_refused",
    )

    def __init__(self, settings: Settings, cap_bytes: int | None = None) -> None:
        self.settings = settings
        self.cap_bytes = cap_bytes
        self.allocated = self.peak_allocated = 0  # blocks in use, remainders that are not split off included
        self.peak_active = 0
        self.reserved = self.peak_reserved = 0
        self.retries = 0  # as num_alloc_retries: all unused segments were given back and the driver asked again
        self.segment_events: list[SegmentEvent] = []
        # The totals that were held against the cap. Under every cap from the largest that was granted up to, but
        # without, the smallest that was refused, all would happen alike (if there is no garbage collection).
        self.largest_granted = 0
        self.smallest_refused: int | None = None
        self._live: dict[int, tuple[int, int, Pool]] = {}  # id -> address, bytes, pool
        self._awaiting: dict[int, None] = {}  # ids whose free is requested, in order
        self._awaiting_bytes = 0
        self._completed: set[int] = set()  # of those: already free, because a retry waited for them
        self._starts: dict[int, int] = {}  # free blocks: start -> bytes
        self._ends: dict[int, int] = {}  # free blocks: end -> start
        self._small = Pools(True, settings)
        self._large = Pools(False, settings)
        # Garbage collection only: start of a free block -> searches of the large pool when it became free.
        collects = cap_bytes is not None and settings.garbage_collection_threshold > 0
        self._ages: dict[int, int] | None = {} if collects else None
        self._searches = 0
        self._rounds_plainly = max(settings.roundup_power2_divisions) <= 1
        self._is_plain = not (settings.expandable_segments or settings.max_split_bytes or self._ages is not None)

    @property
    def active(self) -> int:
        """Blocks in use, and those that only another stream still uses."""
        return self.allocated + self._awaiting_bytes

    def allocate(self, identity: int, size: int, stream: int = 0) -> None:
        """Serve a request of `size` bytes. Raises `OutOfMemory`, after which everything unused has been given back."""
        if size <= 0 or identity in self._live:
            raise ValueError(f"id {identity} is in use, or asks for {size} bytes; ask for one or more under a free id")
        rounded = (size + BLOCK_BYTES - 1) & -BLOCK_BYTES if self._rounds_plainly else self.settings.rounded(size)
        pool = (self._small if rounded <= SMALL_BYTES else self._large)[stream]
        free = pool.free
        i = bisect_left(free, rounded << SHIFT)
        if not self._is_plain:
            i = self._fit(pool, rounded, i)
        if i < len(free):
            key = free.pop(i)
            start, taken = key & ADDRESS, key >> SHIFT
            del self._starts[start]
        else:
            start, taken = self._new_block(pool, rounded)
        end = start + taken
        rest = taken - rounded
        if rest >= pool.split_from and rounded < pool.split_below:
            taken = rounded
            middle = start + rounded
            self._starts[middle] = rest
            self._ends[end] = middle
            insort(free, rest << SHIFT | middle)
            if self._ages is not None:
                self._ages[middle] = self._searches
        else:
            self._ends.pop(end, None)
        self._live[identity] = (start, taken, pool)
        self.allocated = allocated = self.allocated + taken
        if allocated > self.peak_allocated:
            self.peak_allocated = allocated
        if allocated + self._awaiting_bytes > self.peak_active:
            self.peak_active = allocated + self._awaiting_bytes

    def request_free(self, identity: int) -> None:
        """The owner gives a block back that another stream still uses: no longer allocated, and active until `free`."""
        size = self._live[identity][1]
        self._awaiting[identity] = None
        self._awaiting_bytes += size
        self.allocated -= size

    def free(self, identity: int) -> None:
        """Give a block back; it merges with free neighbours. Raises `KeyError` for an id that is not in use."""
        if self._completed and identity in self._completed:
            self._completed.remove(identity)
            return
        start, size, pool = self._live.pop(identity)
        if self._awaiting and identity in self._awaiting:
            del self._awaiting[identity]
            self._awaiting_bytes -= size
        else:
            self.allocated -= size
        starts, ends, free = self._starts, self._ends, pool.free
        end = start + size
        after = starts.pop(end, 0)
        if after:
            del free[bisect_left(free, after << SHIFT | end)]
            end += after
        before = ends.pop(start, -1)
        if before >= 0:
            del free[bisect_left(free, (start - before) << SHIFT | before)]
            start = before
        size = end - start
        starts[start] = size
        ends[end] = start
        insort(free, size << SHIFT | start)
        if self._ages is not None:
            self._ages[start] = self._searches

    def empty_cache(self) -> None:
        """Wait for other streams and give back what is unused: whole segments, or whole pages of expandable ones."""
        for identity in list(self._awaiting):
            self.free(identity)
            self._completed.add(identity)
        for pools in (self._large, self._small):
            for pool in pools.in_order():
                if self.settings.expandable_segments:
                    for key in list(pool.free):
                        self._unmap(pool, key)
                else:
                    for key in [key for key in pool.free if self._is_segment(pool, key)]:
                        self._release(pool, key)

    def segments(self) -> tuple[Segment, ...]:
        """All that is reserved, as a snapshot lists it: mapped ranges of expandable segments count as one each."""
        blocks = [
            Block(start, size, "awaiting_free" if identity in self._awaiting else "allocated", pool)
            for identity, (start, size, pool) in self._live.items()
        ]
        for pool in (*self._small.values(), *self._large.values()):
            blocks += (Block(key & ADDRESS, key >> SHIFT, "free", pool) for key in pool.free)
        return listed(blocks)

    def free_blocks(self) -> tuple[tuple[int, ...], ...]:
        """What is reserved and not in use, in comparable form."""
        return tuple(tuple(pool.free) for pools in (self._small, self._large) for pool in pools.in_order())

    def _fit(self, pool: Pool, rounded: int, i: int) -> int:
        """Which free block to take if the best fit is number `i`; their count if none."""
        if self._ages is not None and not pool.is_small:
            self._searches += 1
        free, none = pool.free, len(pool.free)
        if i == none:
            return none
        if self.settings.expandable_segments:
            # A block counts with the room that it could grow into, so the one at the end is the last to be taken.
            while i + 1 < none and self._room(pool, free[i + 1]) < self._room(pool, free[i]):
                i += 1
        limit = self.settings.max_split_bytes
        if limit is not None:
            size = free[i] >> SHIFT
            most = rounded + self.settings.max_non_split_rounding_bytes if rounded >= limit else limit
            if size >= most:
                return none
        return i

    @staticmethod
    def _room(pool: Pool, key: int) -> int:
        size = key >> SHIFT
        end = (key & ADDRESS) + size
        return size + pool.holes.get(end, end) - end

    def _new_block(self, pool: Pool, rounded: int) -> tuple[int, int]:
        """Start and bytes of a block from the driver, by all means in torch's order."""
        if self._ages is not None:
            self._collect_garbage(self._ages)
        asked = self.settings.segment_bytes(rounded)
        block = self._from_driver(pool, rounded, asked)
        if block is None and self._release_oversize(pool, rounded):
            block = self._from_driver(pool, rounded, asked)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._from_driver(pool, rounded, asked)
        if block is None:
            assert self.cap_bytes is not None
            raise OutOfMemory(
                f"{format_bytes(asked)} on top of {format_bytes(self.reserved)} that cannot be given back are over "
                f"the cap of {format_budget(self.cap_bytes)}"
            )
        return block

    def _from_driver(self, pool: Pool, rounded: int, asked: int) -> tuple[int, int] | None:
        if not self._is_granted(self.reserved + asked):
            return None
        if self.settings.expandable_segments:
            return self._grow(pool, rounded)
        start = pool.fresh
        pool.fresh += asked + BLOCK_BYTES  # a gap, so that segments do not touch
        pool.segments[start] = asked
        self._reserve("segment_alloc", asked, pool)
        return start, asked

    def _is_granted(self, total: int) -> bool:
        if self.cap_bytes is None or total <= self.cap_bytes:
            self.largest_granted = max(self.largest_granted, total)
            return True
        self.smallest_refused = total if self.smallest_refused is None else min(self.smallest_refused, total)
        return False

    def _reserve(self, action: Literal["segment_alloc", "segment_map"], size: int, pool: Pool) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.segment_events.append(SegmentEvent(action, size, pool.stream))

    def _grow(self, pool: Pool, rounded: int) -> tuple[int, int] | None:
        """A block at the lowest address where free blocks and holes have the room; pages are mapped into the holes."""
        page = SMALL_SEGMENT_BYTES if pool.is_small else self.settings.large_segment_bytes
        starts, holes = self._starts, pool.holes
        start = end = self._lowest_room(pool, rounded)
        mapped, merged = [], []
        while end < start + rounded:
            if end in starts:
                merged.append(end)
                end += starts[end]
            else:
                size = -(-(min(holes[end], start + rounded) - end) // page) * page
                mapped.append((end, size))
                end += size
        if end in starts:
            merged.append(end)
            end += starts[end]
        if not self._is_granted(self.reserved + sum(size for _, size in mapped)):
            return None
        for at, size in mapped:
            stop = holes.pop(at)
            if at + size < stop:
                holes[at + size] = stop
            self._reserve("segment_map", size, pool)
        for at in merged:
            self._forget(pool, starts[at] << SHIFT | at)
        return start, end - start

    def _lowest_room(self, pool: Pool, rounded: int) -> int:
        """The first hole, with the free block before it, from which free blocks and holes have the room; its start."""
        for hole in sorted(pool.holes):
            start = stop = self._ends.get(hole, hole)
            while stop - start < rounded and (stop in pool.holes or stop in self._starts):
                stop = pool.holes[stop] if stop in pool.holes else stop + self._starts[stop]
            if stop - start >= rounded:
                return start
        raise AssertionError(f"{rounded} bytes are more than the range of addresses has left")

    def _forget(self, pool: Pool, key: int) -> int:
        """Take a block off the lists of free ones; its bytes."""
        start, size = key & ADDRESS, key >> SHIFT
        del pool.free[bisect_left(pool.free, key)]
        del self._starts[start]
        del self._ends[start + size]
        return size

    def _is_segment(self, pool: Pool, key: int) -> bool:
        return pool.segments.get(key & ADDRESS) == key >> SHIFT

    def _release(self, pool: Pool, key: int) -> int:
        """Give a segment back that is one free block; its bytes."""
        size = self._forget(pool, key)
        del pool.segments[key & ADDRESS]
        self.reserved -= size
        self.segment_events.append(SegmentEvent("segment_free", size, pool.stream))
        return size

    def _unmap(self, pool: Pool, key: int) -> None:
        """Give the whole pages inside a free block back; what is left at its ends stays free."""
        page = SMALL_SEGMENT_BYTES if pool.is_small else self.settings.large_segment_bytes
        start, size = key & ADDRESS, key >> SHIFT
        first = start + (pool.base - start) % page
        last = start + size - (start + size - pool.base) % page
        if first >= last:
            return
        self._forget(pool, key)
        for rest_start, rest_end in ((start, first), (last, start + size)):
            if rest_start < rest_end:
                self._starts[rest_start] = rest_end - rest_start
                self._ends[rest_end] = rest_start
                insort(pool.free, (rest_end - rest_start) << SHIFT | rest_start)
        hole_start = next((at for at, end in pool.holes.items() if end == first), first)
        pool.holes[hole_start] = pool.holes.pop(last, last)
        self.reserved -= last - first
        self.segment_events.append(SegmentEvent("segment_unmap", last - first, pool.stream))

    def _release_oversize(self, pool: Pool, rounded: int) -> bool:
        """With `max_split_bytes`, give back as few blocks of that size and more as may do; whether that was enough."""
        limit = self.settings.max_split_bytes
        if limit is None or self.settings.expandable_segments:
            return False
        wanted = max(rounded, limit)
        i = bisect_left(pool.free, wanted << SHIFT)
        if i < len(pool.free):
            self._release(pool, pool.free[i])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1] >> SHIFT >= limit:
            released += self._release(pool, pool.free[-1])
        return released >= wanted

    def _collect_garbage(self, ages: dict[int, int]) -> None:
        """Over the threshold, give back unused large segments, those first that no search has taken for longest."""
        assert self.cap_bytes is not None
        excess = self.reserved - int(self.settings.garbage_collection_threshold * self.cap_bytes)
        unused = [(pool, key) for pool in self._large.in_order() for key in pool.free if self._is_segment(pool, key)]
        freed = 0
        while freed < excess and unused:  # each pass frees at least the oldest
            idle = [self._searches - ages[key & ADDRESS] for _, key in unused]
            oldest = [age * len(idle) >= sum(idle) for age in idle]
            freed += sum(self._release(*row) for row, is_old in zip(unused, oldest, strict=True) if is_old)
            unused = [row for row, is_old in zip(unused, oldest, strict=True) if not is_old]
