"""The allocator's pools, and how what they hold is listed."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from memplan.allocator.settings import BLOCK_BYTES, SMALL_BYTES, Settings

SHIFT: Final = 64  # free blocks are sorted by size, then by address
ADDRESS: Final = (1 << SHIFT) - 1
_RANGE_BYTES: Final = 1 << 52  # addresses for one pool and stream: room for a million retries
_ANY_SIZE: Final = 1 << 62

State = Literal["allocated", "awaiting_free", "free"]


class SegmentEvent(NamedTuple):
    """What was asked of the driver, or given back to it; named as in a torch history."""

    action: Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]
    size: int
    stream: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory taken from the driver in one piece, with its blocks by address: (bytes, state)."""

    stream: int
    is_small: bool
    total_bytes: int
    blocks: tuple[tuple[int, State], ...]


class Pool:
    """What the small or the large pool has on one stream."""

    __slots__ = ("base", "free", "fresh", "holes", "is_small", "segments", "split_below", "split_from", "stream")

    def __init__(self, stream: int, number: int, is_small: bool, settings: Settings) -> None:
        self.stream = stream
        self.is_small = is_small
        self.base = (2 * number + is_small) * 2 * _RANGE_BYTES
        # A block is split if the remainder is at least the one and the request less than the other.
        splits_all = is_small or settings.expandable_segments
        self.split_from = BLOCK_BYTES if splits_all else SMALL_BYTES + BLOCK_BYTES
        self.split_below = _ANY_SIZE if splits_all or settings.max_split_bytes is None else settings.max_split_bytes
        self.free: list[int] = []  # size << SHIFT | address
        self.segments: dict[int, int] = {}  # start -> bytes; empty in expandable mode
        self.fresh = self.base  # where the next segment goes
        self.holes = {self.base: self.base + _RANGE_BYTES}  # without memory behind it: start -> end; expandable mode


class Pools(dict[int, Pool]):
    """Pools by stream, made when first asked for."""

    def __init__(self, is_small: bool, settings: Settings) -> None:
        super().__init__()
        self._is_small = is_small
        self._settings = settings

    def __missing__(self, stream: int) -> Pool:
        pool = self[stream] = Pool(stream, len(self), self._is_small, self._settings)
        return pool

    def in_order(self) -> list[Pool]:
        return [self[stream] for stream in sorted(self)]


class Block(NamedTuple):
    """One block, in use or free."""

    start: int
    size: int
    state: State
    pool: Pool


def listed(blocks: Iterable[Block]) -> tuple[Segment, ...]:
    """Blocks as segments: those that touch are of one segment."""
    rows = sorted(blocks, key=lambda block: block.start)
    cuts = [i for i, (one, two) in enumerate(pairwise(rows), start=1) if one.start + one.size != two.start]
    groups = (rows[i:j] for i, j in pairwise((0, *cuts, len(rows))) if i < j)
    return tuple(
        Segment(
            stream=group[0].pool.stream,
            is_small=group[0].pool.is_small,
            total_bytes=sum(block.size for block in group),
            blocks=tuple((block.size, block.state) for block in group),
        )
        for group in groups
    )
