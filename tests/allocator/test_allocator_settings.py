from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.allocator import Settings
from memplan.errors import BadAllocatorSetting

MIB = 2**20
SNAPSHOT = {
    "PYTORCH_CUDA_ALLOC_CONF": "",
    "max_split_size": -1,
    "garbage_collection_threshold": 0.0,
    "expandable_segments": False,
    "pinned_num_register_threads": 1,
    "release_lock_on_cudamalloc": False,
    "pinned_use_cuda_host_register": False,
    "graph_capture_record_stream_reuse": False,
    "roundup_power2_divisions": {str(2**k): 0 for k in range(16)},
}


def test_nothing_said_is_torch_s_default() -> None:
    assert Settings.from_conf("") == Settings() == Settings.from_snapshot(SNAPSHOT) == Settings.from_snapshot({})


def test_what_is_said_in_words() -> None:
    text = (
        "max_split_size_mb:512, expandable_segments:True,garbage_collection_threshold: 0.8,large_segment_size_mb:32,"
        "roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1],pinned_use_background_threads:True,backend:native"
    )
    assert Settings.from_conf(text) == Settings(
        max_split_bytes=512 * MIB,
        max_non_split_rounding_bytes=32 * MIB,  # not less than a large segment
        large_segment_bytes=32 * MIB,
        roundup_power2_divisions=(8, 8, 8, 8, 8, 8, 8, 2, 4, 2, 4, 1, 1, 1, 1, 1),
        expandable_segments=True,
        garbage_collection_threshold=0.8,
    )


def test_one_number_of_divisions_is_for_all_sizes() -> None:
    assert Settings.from_conf("roundup_power2_divisions:4").roundup_power2_divisions == (4,) * 16


def test_a_snapshot_says_what_is_in_force() -> None:
    snapshot = {
        **SNAPSHOT,
        "PYTORCH_CUDA_ALLOC_CONF": "max_non_split_rounding_mb:64,max_split_size_mb:100,expandable_segments:True",
        "max_split_size": 200 * MIB,
        "roundup_power2_divisions": {str(2**k): k % 2 * 2 for k in reversed(range(16))},
    }
    assert Settings.from_snapshot(snapshot) == Settings(
        max_split_bytes=200 * MIB,
        max_non_split_rounding_bytes=64 * MIB,
        roundup_power2_divisions=(0, 2) * 8,
    )


@pytest.mark.parametrize(
    ("snapshot", "says"),
    [
        ({"stream_ordered_recycling": True}, "'stream_ordered_recycling' is not modelled"),
        ({"max_split_size": "lots"}, "whole number"),
        ({"expandable_segments": 2}, "True or False"),
        ({"roundup_power2_divisions": [1, 2]}, "mapping"),
        ({"roundup_power2_divisions": {"1": 3}}, "16 powers of two"),
        ({"garbage_collection_threshold": None}, "number"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "'cudaMallocAsync' is not modelled"),
    ],
)
def test_a_snapshot_with_what_is_not_modelled(snapshot: dict[str, object], says: str) -> None:
    with pytest.raises(BadAllocatorSetting, match=says):
        Settings.from_snapshot({**SNAPSHOT, **snapshot})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expandable_segment:True", "'expandable_segment' is not modelled.* Modelled are expandable_segments"),
        ("expandable_segments_reserve:8G", "not modelled"),
        ("per_process_memory_fraction:0.5", "a cap"),
        ("expandable_segments:yes", "True or False"),
        ("max_split_size_mb:10", "at least large_segment_size, 20.00 MiB, got 10.00 MiB"),
        ("max_non_split_rounding_mb:10", "at least large_segment_size"),
        ("large_segment_size_mb:10", "above 10 MiB"),
        ("large_segment_size_mb:0", "above 10 MiB"),
        ("max_split_size_mb:ten", "whole number"),
        ("garbage_collection_threshold:1.5", r"\[0, 1\)"),
        ("garbage_collection_threshold:much", "number"),
        ("roundup_power2_divisions:3", "powers of two"),
        ("roundup_power2_divisions:[100:2]", "powers of two in MiB"),
        ("roundup_power2_divisions:[0:2]", "powers of two in MiB"),
        ("expandable_segments", "cannot be read from 'expandable_segments' on"),
        ("max_split_size_mb:512;expandable_segments:True", "whole number|cannot be read"),
    ],
)
def test_words_that_torch_or_we_do_not_take(text: str, says: str) -> None:
    with pytest.raises(BadAllocatorSetting, match=says):
        Settings.from_conf(text)


@pytest.mark.parametrize(
    ("size", "rounded"),
    [(1, 512), (511, 512), (512, 512), (1200, 1536), (2048, 2048), (2049, 2560), (5 * MIB // 4 + 1, 3 * MIB // 2)],
)
def test_rounding_to_four_divisions(size: int, rounded: int) -> None:
    """Torch's own example, 1200 to 1280, is under 4 x 512 bytes, from where on divisions apply."""
    assert Settings(roundup_power2_divisions=(4,) * 16).rounded(size) == rounded


@given(st.integers(1, 2**38), st.sampled_from([0, 1, 2, 4, 16]))
def test_rounding(size: int, divisions: int) -> None:
    rounded = Settings(roundup_power2_divisions=(divisions,) * 16).rounded(size)
    assert rounded >= size
    assert rounded % 512 == 0
    if divisions <= 1:
        assert rounded == 512 * ceil(size / 512)
    else:
        assert rounded - size < max(512, size // divisions + 1)


def test_divisions_go_by_the_size_of_the_request() -> None:
    settings = Settings(roundup_power2_divisions=(0, 2, *(0,) * 13, 4))
    assert settings.rounded(MIB + 1) == MIB + 512
    assert settings.rounded(2 * MIB + 1) == 3 * MIB
    assert settings.rounded(4 * MIB + 1) == 4 * MIB + 512
    assert settings.rounded(2**40 + 1) == 2**40 + 2**38
