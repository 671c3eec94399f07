"""`Settings` of the caching allocator: what `PYTORCH_ALLOC_CONF` can change, with torch's defaults.

Source: c10/core/AllocatorConfig.{h,cpp} and c10/cuda/CUDAAllocatorConfig.h (torch 2.13). What a version does not have
yet (`large_segment_size_mb`) was a constant there, with the default's value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from memplan.errors import BadAllocatorSetting
from memplan.units import format_bytes

MIB: Final = 2**20
BLOCK_BYTES: Final = 512  # kMinBlockSize: sizes are multiples of it
SMALL_BYTES: Final = MIB  # kSmallSize: up to here a request is served from the small pool
SMALL_SEGMENT_BYTES: Final = 2 * MIB  # kSmallBuffer
OWN_SEGMENT_BYTES: Final = 10 * MIB  # kMinLargeAlloc: from here a request gets a segment of its size
SEGMENT_STEP_BYTES: Final = 2 * MIB  # kRoundLarge: to a multiple of this
INTERVALS: Final = 16  # of round-up: powers of two from 1 MiB to 64 GiB

# They change how the host or the driver is used, not which block serves a request.
_HARMLESS: Final = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "throw_on_cudamalloc_oom",
    }
)
_MODELLED: Final = (
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "roundup_power2_divisions",
)
_NO_LIMIT: Final = -1  # how a snapshot writes the largest unsigned number
_TEXTS: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_PAIR: Final = re.compile(r"([^:,\[\]]+):(\[[^\]]*\]|[^:,\[\]]+)(?:,|$)")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that decide which block serves a request. Sizes in bytes.

    Raises `BadAllocatorSetting` for a value that torch refuses too.
    """

    max_split_bytes: int | None = None  # blocks from this size on are never split; None: all may be
    max_non_split_rounding_bytes: int = 20 * MIB  # by this much a block that is not split may exceed its request
    large_segment_bytes: int = 20 * MIB  # the segment for requests over 1 and under 10 MiB; the page of expandable ones
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS  # of requests from 1, 2, 4 MiB ... on; 0 and 1: none
    expandable_segments: bool = False
    garbage_collection_threshold: float = 0.0  # share of the cap from which unused segments are given back; 0: never

    def __post_init__(self) -> None:
        if self.large_segment_bytes <= OWN_SEGMENT_BYTES or self.large_segment_bytes % MIB:
            raise BadAllocatorSetting(
                f"large_segment_size has to be whole MiB above 10 MiB, got {format_bytes(self.large_segment_bytes)}"
            )
        for name, size in (
            ("max_split_size", self.max_split_bytes),
            ("max_non_split_rounding", self.max_non_split_rounding_bytes),
        ):
            if size is not None and size < self.large_segment_bytes:
                raise BadAllocatorSetting(
                    f"{name} has to be at least large_segment_size, {format_bytes(self.large_segment_bytes)}, "
                    f"got {format_bytes(size)}"
                )
        divisions = self.roundup_power2_divisions
        if len(divisions) != INTERVALS or any(d < 0 or d & (d - 1) for d in divisions):
            raise BadAllocatorSetting(
                f"roundup_power2_divisions has to be {INTERVALS} powers of two or zeros, one for each interval from "
                f"1 MiB to 64 GiB, got {divisions}"
            )
        if not 0 <= self.garbage_collection_threshold < 1:
            raise BadAllocatorSetting(
                f"garbage_collection_threshold has to be in [0, 1), got {self.garbage_collection_threshold}"
            )

    @classmethod
    def from_conf(cls, text: str) -> Self:
        """From the text of `PYTORCH_ALLOC_CONF`, such as "expandable_segments:True,max_split_size_mb:512".

        Raises `BadAllocatorSetting` for what cannot be read, is unknown, or is not modelled.
        """
        pairs = _pairs(text)
        large = _mib(pairs, "large_segment_size_mb", 20 * MIB)
        return cls(
            max_split_bytes=_mib(pairs, "max_split_size_mb", 0) if "max_split_size_mb" in pairs else None,
            max_non_split_rounding_bytes=_mib(pairs, "max_non_split_rounding_mb", large),
            large_segment_bytes=large,
            roundup_power2_divisions=_divisions(pairs.get("roundup_power2_divisions", "0")),
            expandable_segments=_truth(pairs.get("expandable_segments", "False"), "expandable_segments"),
            garbage_collection_threshold=_share(pairs.get("garbage_collection_threshold", "0")),
        )

    @classmethod
    def from_snapshot(cls, mapping: Mapping[str, object]) -> Self:
        """From the `allocator_settings` of a `torch.cuda.memory._snapshot()`.

        Values given there are in force and win; the sizes that a snapshot does not list are read from the text of the
        environment variable that it keeps. Raises `BadAllocatorSetting` for a key that is unknown or not modelled.
        """
        known = {"expandable_segments", "garbage_collection_threshold", "max_split_size", "roundup_power2_divisions"}
        for key in mapping:
            if key not in known and key not in _HARMLESS and key not in _TEXTS:
                raise _unknown(key)
        texts = [str(mapping[key]) for key in _TEXTS if mapping.get(key)]
        written = cls.from_conf(texts[0] if texts else "")
        split = written.max_split_bytes
        if "max_split_size" in mapping:
            split = _whole(mapping["max_split_size"], "max_split_size")
        return cls(
            max_split_bytes=None if split == _NO_LIMIT else split,
            max_non_split_rounding_bytes=written.max_non_split_rounding_bytes,
            large_segment_bytes=written.large_segment_bytes,
            roundup_power2_divisions=_listed(mapping.get("roundup_power2_divisions", written.roundup_power2_divisions)),
            expandable_segments=_truth(
                mapping.get("expandable_segments", written.expandable_segments), "expandable_segments"
            ),
            garbage_collection_threshold=_share(
                mapping.get("garbage_collection_threshold", written.garbage_collection_threshold)
            ),
        )

    def rounded(self, size: int) -> int:
        """Bytes of the block that `size` bytes are rounded up to, before any unsplit remainder."""
        if size < BLOCK_BYTES:
            return BLOCK_BYTES
        # Intervals are powers of two; all below 1 MiB share the first, all from 32 GiB the last.
        divisions = self.roundup_power2_divisions[min(max(size.bit_length() - 21, 0), INTERVALS - 1)]
        if divisions > 1 and size > BLOCK_BYTES * divisions:
            step = (1 << (size.bit_length() - 1)) // divisions
            return -(-size // step) * step
        return -(-size // BLOCK_BYTES) * BLOCK_BYTES

    def segment_bytes(self, rounded: int) -> int:
        """Bytes asked of the driver when no free block serves a request of `rounded` bytes."""
        if rounded <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if rounded < OWN_SEGMENT_BYTES:
            return self.large_segment_bytes
        return -(-rounded // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES


def _unknown(key: str) -> BadAllocatorSetting:
    way_out = f"Modelled are {', '.join(_MODELLED)}; take it out, or measure on the device instead"
    if key == "per_process_memory_fraction":
        way_out = "It is a cap, not a setting of blocks: take it out and give the cap in bytes"
    return BadAllocatorSetting(
        f"the allocator setting {key!r} is not modelled and may change what is reserved. {way_out}."
    )


def _pairs(text: str) -> dict[str, str]:
    """Key and value of what is modelled, without blanks; a key that is written twice counts as last written."""
    bare = re.sub(r"\s", "", text)
    found, at = {}, 0
    while at < len(bare):
        match = _PAIR.match(bare, at)
        if match is None:
            raise BadAllocatorSetting(f"{text!r} cannot be read from {bare[at:]!r} on: write key:value,key:value")
        key, value = match.groups()
        if key == "backend":
            if value != "native":
                raise BadAllocatorSetting(
                    f"the allocator backend {value!r} is not modelled, only 'native' is: take `backend:{value}` out"
                )
        elif key in _MODELLED:
            found[key] = value
        elif key not in _HARMLESS:
            raise _unknown(key)
        at = match.end()
    return found


def _whole(value: object, name: str) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise BadAllocatorSetting(f"{name} has to be a whole number, got {value!r}") from None


def _mib(pairs: Mapping[str, str], name: str, default_bytes: int) -> int:
    return _whole(pairs[name], name) * MIB if name in pairs else default_bytes


def _truth(value: object, name: str) -> bool:
    if str(value) not in {"True", "False"}:
        raise BadAllocatorSetting(f"{name} has to be True or False, got {value!r}")
    return str(value) == "True"


def _share(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise BadAllocatorSetting(f"garbage_collection_threshold has to be a number, got {value!r}") from None


def _listed(value: object) -> tuple[int, ...]:
    """Divisions as a snapshot lists them: {"1": d, "2": d, "4": d, ...}, keys in MiB."""
    name = "roundup_power2_divisions"
    if isinstance(value, Mapping):
        return tuple(_whole(d, name) for _, d in sorted(value.items(), key=lambda item: _whole(item[0], name)))
    if isinstance(value, tuple):
        return tuple(_whole(d, name) for d in value)
    raise BadAllocatorSetting(f"{name} of a snapshot has to be a mapping from MiB to divisions, got {value!r}")


def _divisions(text: str) -> tuple[int, ...]:
    """Divisions of each interval from "4" or "[256:1,512:2,>:4]", in MiB.

    Intervals before the first that is named are as that one; by ">" those after the last; one in between has none.
    """
    name = "roundup_power2_divisions"
    if not text.startswith("["):
        return (_whole(text, name),) * INTERVALS
    found, last, first = [0] * INTERVALS, -1, True
    for pair in filter(None, text[1:-1].split(",")):
        start, _, value = pair.partition(":")
        divisions = _whole(value, name)
        if start == ">":
            found[last + 1 :] = [divisions] * (INTERVALS - last - 1)
            continue
        mib = _whole(start, name)
        if mib <= 0 or mib & (mib - 1):
            raise BadAllocatorSetting(f"the intervals of {name} have to be powers of two in MiB, got {start!r}")
        last = min(mib.bit_length() - 1, INTERVALS - 1)
        if first:
            found[:last] = [divisions] * last
            first = False
        found[last] = divisions
    return tuple(found)
