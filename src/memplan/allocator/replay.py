"""What a stream of requests needs of a card: `replayed(events, settings) -> Usage`, or `usage_after` a run of it.

**Without a retry.** Let F be the largest total that the run without a cap would hold against one: reserved bytes plus a
new segment's. Under a cap of F or more nothing is ever refused, so the run is the same, with no retry. Under a smaller
cap it is the same up to the first total over the cap, which is refused, and everything unused is given back: a retry.
So the smallest cap with no retry is F, without a search. For plain segments F is the peak of reserved bytes. In
expandable mode it can be more, since under a process fraction torch asks for the room of a plain segment even where a
free end only has to grow by a page; on a card without a fraction the peak of reserved bytes is enough. With
`max_split_bytes`, giving back oversize blocks may do instead of a retry, which costs as much but which torch does not
count; F is the smallest cap under which nothing is refused. Only with `garbage_collection_threshold` a cap changes the
run before anything is refused, and caps have to be searched, as for the smallest that completes.

**The search** rests on this: a run tells for which caps it would be the same, namely from the largest total that was
granted up to the smallest that was refused. Each run so decides an interval, and the answer is exact to the byte: a cap
that was tried, while the run under one byte less is known to fail. Strictly speaking it need not be the smallest: what
is given back early can leave less fragmentation later, so a lucky smaller cap may work, and an unlucky larger one fail.
With garbage collection a run says nothing of other caps, and multiples of 2 MiB are tried.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from memplan.allocator.caching import CachingAllocator, OutOfMemory
from memplan.allocator.events import FREE, REQUEST_FREE, Events
from memplan.allocator.settings import MIB, Settings

_GC_STEP_BYTES: Final = 2 * MIB  # with garbage collection a run says nothing of other caps: multiples of this are tried


@dataclass(frozen=True, slots=True)
class Usage:
    """What a stream of requests takes, in bytes."""

    peak_requested_bytes: int  # as asked for
    peak_allocated_bytes: int  # in blocks, rounded and with remainders not split off: torch.cuda.max_memory_allocated
    peak_reserved_bytes: int  # in segments, if memory is never short: torch.cuda.max_memory_reserved
    fits_bytes: int  # the smallest cap under which it runs to its end with nothing refused, hence no retry
    completes_bytes: int | None  # under which it does, however often it has to retry; None: nobody asked, it takes long


def replayed(events: Events, settings: Settings) -> Usage:
    """Play `events` on an empty allocator without a cap, and find the caps that would do. Deterministic."""
    usage = usage_after(_run(events, settings, None)[0], events)
    return replace(usage, completes_bytes=_smallest(events, settings, usage.fits_bytes, lambda _: True))


def usage_after(run: CachingAllocator, events: Events) -> Usage:
    """What `events` need, from an allocator without a cap that has played them; not under which cap they complete."""
    settings, fits = run.settings, run.largest_granted
    if settings.garbage_collection_threshold:
        fits = _up(int(fits / settings.garbage_collection_threshold) + 1)  # it never begins under this cap
        fits = _smallest(events, settings, fits, lambda run: run.retries == 0)
    return Usage(
        peak_requested_bytes=events.peak_requested_bytes,
        peak_allocated_bytes=run.peak_allocated,
        peak_reserved_bytes=run.peak_reserved,
        fits_bytes=fits,
        completes_bytes=None,
    )


def _smallest(events: Events, settings: Settings, enough: int, is_good: Callable[[CachingAllocator], bool]) -> int:
    """The smallest cap whose run comes to its end and is good; `enough` is a cap that is known to be."""
    collects = bool(settings.garbage_collection_threshold)
    # Nothing completes with less than its owners hold; what waits for another stream can be waited for.
    low = 0 if REQUEST_FREE in events.sizes else events.peak_requested_bytes
    low = _up(low) if collects else low
    while low < enough:
        middle = (low + enough) // 2
        cap = middle // _GC_STEP_BYTES * _GC_STEP_BYTES if collects else middle
        run, done = _run(events, settings, cap)
        if done and is_good(run):
            enough = cap if collects else run.largest_granted
        else:
            assert run.smallest_refused is not None  # else it would have come to its end
            low = cap + _GC_STEP_BYTES if collects else run.smallest_refused
    return enough


def _up(size: int) -> int:
    return -(-size // _GC_STEP_BYTES) * _GC_STEP_BYTES


def _run(events: Events, settings: Settings, cap_bytes: int | None) -> tuple[CachingAllocator, bool]:
    """The allocator after the last event, or after the first request that the cap does not hold; whether all ran."""
    allocator = CachingAllocator(settings, cap_bytes)
    allocate, free = allocator.allocate, allocator.free
    ids, sizes = events.ids.tolist(), events.sizes.tolist()
    streams = [0] * len(ids) if events.streams is None else events.streams.tolist()
    try:
        for identity, size, stream in zip(ids, sizes, streams, strict=True):
            if size > FREE:
                allocate(identity, size, stream)
            elif size == FREE:
                free(identity)
            else:
                allocator.request_free(identity)
    except OutOfMemory:
        return allocator, False
    return allocator, True
