"""The link to host memory: two queues, one per direction, that copy beside the computation.

A block that offloads hands its tensors to the queue when its forward ends, and its backward waits until they are back.
Both queues are serial. Until a copy is made, its source is still on the device, and what is fetched early is there
early; all of that lives in a staging area of `DEPTH` times the largest copy, so the bytes in flight are bounded:

* forward: a block ends only when what is still to be copied fits the staging area; the head starts when the queue is
  empty, because its own peak counts nothing in flight;
* backward: a copy back starts when the copies back that no block has taken over yet leave room for it.

Where the queue is the slower one the computation waits, and the wait is part of the step. The forward of what lies
outside the blocks hides no copy. Sizes are bytes, times are seconds.
"""

from collections import deque
from collections.abc import Sequence

# Blocks whose copies may be in flight at once: one that is copied while the next one's are got ready, as in the double
# buffers of Unsloth and of torchtune's activation offloading.
DEPTH = 2

# Of a block's time without recomputation: its backward takes two matrix products for each one of its forward.
FORWARD_SHARE = 1 / 3


def staging_bytes(copies: Sequence[int]) -> int:
    """Device memory that the copies of one micro-step need besides the blocks' own, from the first block to the last.

    `copies` has the bytes that each block copies, 0 where it copies nothing.
    """
    return DEPTH * max(copies, default=0)


def waits_s(forward_s: Sequence[float], backward_s: Sequence[float], copies: Sequence[int], bytes_s: float) -> float:
    """Seconds that one micro-step waits for the link; all sequences are per block, in forward order."""
    if not any(copies):
        return 0.0
    staging = staging_bytes(copies)
    return _out_s(forward_s, copies, bytes_s, staging) + _back_s(backward_s, copies, bytes_s, staging)


def _out_s(forward_s: Sequence[float], copies: Sequence[int], bytes_s: float, staging: int) -> float:
    """Seconds that the forward waits."""
    clock = waited = 0.0
    queue: deque[tuple[float, int]] = deque()  # (copied at, bytes), oldest first
    last, in_flight = 0.0, 0  # when the newest is copied; bytes in `queue`
    for block_s, size in zip(forward_s, copies, strict=True):
        clock += block_s
        if size:
            last = max(last, clock) + size / bytes_s
            queue.append((last, size))
            in_flight += size
        while queue and (queue[0][0] <= clock or in_flight > staging):
            copied, freed = queue.popleft()
            waited += max(0.0, copied - clock)
            clock, in_flight = max(clock, copied), in_flight - freed
    return waited + max(0.0, last - clock)


def _back_s(backward_s: Sequence[float], copies: Sequence[int], bytes_s: float, staging: int) -> float:
    """Seconds that the backward waits."""
    fetch = deque(i for i in reversed(range(len(copies))) if copies[i])
    clock = waited = last = 0.0  # `last`: when the newest copy is back
    back: dict[int, float] = {}  # block -> when its tensors are back
    early = 0  # bytes on their way or back, before their block has taken them over

    def fetch_more() -> None:
        nonlocal last, early
        while fetch and early + copies[fetch[0]] <= staging:
            j = fetch.popleft()
            back[j] = last = max(last, clock) + copies[j] / bytes_s
            early += copies[j]

    fetch_more()
    for i in reversed(range(len(copies))):
        if copies[i]:  # it is on its way: copies are fetched in this order, and one alone always has room
            waited += max(0.0, back[i] - clock)
            clock = max(clock, back[i])
            early -= copies[i]
            fetch_more()
        clock += backward_s[i]
    return waited
