"""How fast the simulated allocator is: events per second over a million events, and the time of all five figures.

    python benchmarks/allocator.py --write    and puts it into docs/allocator.md

The stream is like that of training a language model of 24 blocks with batches of ever other lengths: weights and
optimizer state stay, activations live from forward to backward, temporaries come and go, gradients leave at the end of
a step. It is seeded. Times are CPU time of one process, the best of three runs; the five figures are timed once.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from memplan.allocator import FREE, CachingAllocator, Events, Settings, replayed
from memplan.units import format_bytes, format_seconds

DOC = Path(__file__).resolve().parents[1] / "docs" / "allocator.md"
WANTED = 200_000  # events per second, with torch's own settings

BLOCKS, HIDDEN, BATCH = 24, 1024, 4
SETTINGS = {
    "default": Settings(),
    "expandable_segments": Settings(expandable_segments=True),
    "max_split_size_mb:64": Settings(max_split_bytes=64 * 2**20),
    "roundup_power2_divisions:8": Settings(roundup_power2_divisions=(8,) * 16),
}


class Stream:
    """Requests and frees as they are made."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []

    def new(self, size: int) -> int:
        self.rows.append((len(self.rows), size))
        return len(self.rows) - 1

    def free(self, *ids: int) -> None:
        self.rows.extend((identity, FREE) for identity in ids)


def training(count: int, seed: int = 0) -> Events:
    """At least `count` events of whole steps."""
    rng, stream = random.Random(seed), Stream()
    square = HIDDEN * HIDDEN * 2
    weights = (3 * square, square, 4 * square, 4 * square, 4 * HIDDEN)
    for size in weights * BLOCKS:
        for copy in (size, 2 * size, 2 * size):  # the weight and Adam's two moments in twice its width
            stream.new(copy)
    while len(stream.rows) < count:
        step(stream, tokens=BATCH * rng.randrange(256, 1024, 8), weights=weights)
    table = np.array(stream.rows, dtype=np.int64)
    return Events(table[:, 0], table[:, 1])


def step(stream: Stream, tokens: int, weights: tuple[int, ...]) -> None:
    new, free = stream.new, stream.free
    wide = tokens * HIDDEN * 2
    saved = []
    for _ in range(BLOCKS):
        kept = [new(wide), new(4 * tokens), new(4 * tokens)]
        for factor in (1, 3, 1, 1, 4, 4, 1):
            free(new(tokens * 8), new(factor * wide))
            kept.append(new(factor * wide))
        saved.append(kept)
    gradients = []
    for kept in reversed(saved):
        for identity in reversed(kept):
            free(new(wide), identity, new(4 * wide))
        gradients += [new(size) for size in weights]
    for identity in gradients:
        free(new(2 * max(weights)), identity)


def played(events: Events, settings: Settings) -> CachingAllocator:
    allocator = CachingAllocator(settings)
    for identity, size in zip(events.ids.tolist(), events.sizes.tolist(), strict=True):
        if size:
            allocator.allocate(identity, size)
        else:
            allocator.free(identity)
    return allocator


def best_s(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def table(events: Events) -> Iterator[str]:
    """A line of the table for each of `SETTINGS`."""
    yield "| settings | events/s | five figures | peak allocated | peak reserved | fits |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name, settings in SETTINGS.items():
        run_s = best_s(lambda settings=settings: played(events, settings), repeats=3)
        usage = replayed(events, settings)
        all_s = best_s(lambda settings=settings: replayed(events, settings), repeats=1)
        figures = (usage.peak_allocated_bytes, usage.peak_reserved_bytes, usage.fits_bytes)
        sizes = "".join(f"| {format_bytes(size)} " for size in figures)
        yield f"| {name} | {len(events.ids) / run_s:,.0f} | {format_seconds(all_s)} {sizes}|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--write", action="store_true", help="write docs/allocator.md")
    args = parser.parse_args()
    events = training(args.events)
    lines = [
        "# The simulated allocator's speed",
        "",
        "How many requests and frees `memplan.allocator` plays in a second of CPU time on one core, best of three,",
        "and how long all five figures of a stream take: what is allocated and reserved, and the smallest caps.",
        f"Made by `python benchmarks/allocator.py --write`; wanted are {WANTED:,} with torch's own settings.",
        "",
        f"{len(events.ids):,} events, like those of training a language model of {BLOCKS} blocks with batches of ever",
        "other lengths. Sizes are the simulation's, of that stream: nothing here was measured on a card.",
        "",
    ]
    for line in table(events):
        lines.append(line)
        print(line, flush=True)
    if args.write:
        DOC.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
