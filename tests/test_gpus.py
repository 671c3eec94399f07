import copy
import datetime
import math
import pickle

import pytest

from memplan.errors import BadBudget, UnknownGpu
from memplan.gpus import Gpu, all_gpus, find_gpu, with_like_kernels

GIB = 2**30
CARDS = pytest.mark.parametrize("card", all_gpus(), ids=lambda card: card.name)


@pytest.mark.parametrize(
    "text",
    ["rtx-4090", "RTX 4090", " rtx4090 ", "NVIDIA GeForce RTX 4090", "nvidia geforce rtx 4090"],
)
def test_a_card_is_found_by_its_short_and_its_driver_name(text: str) -> None:
    card = find_gpu(text)
    assert (card.name, card.kind, card.compute_capability) == ("rtx-4090", "cuda", (8, 9))
    assert card.total_bytes is not None
    assert 23 * GIB < card.total_bytes < 24 * GIB


def test_cards_with_like_names_are_not_mixed_up() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3").name == "h100-sxm"
    assert find_gpu("NVIDIA H100 PCIe").name == "h100-pcie"
    assert find_gpu("NVIDIA L40S").name == "l40s"
    assert find_gpu("NVIDIA L4").name == "l4"
    assert find_gpu("NVIDIA A10G").name == "a10g"


def test_a_name_that_two_sizes_share_means_the_smaller() -> None:
    shared, larger = find_gpu("NVIDIA GeForce RTX 4060 Ti"), find_gpu("rtx-4060-ti-16gb")
    assert shared.total_bytes is not None
    assert larger.total_bytes is not None
    assert shared.total_bytes < 8 * GIB < larger.total_bytes


def test_sizes_and_the_cpu() -> None:
    assert find_gpu("24GiB") == Gpu(name="24GiB", kind="size", total_bytes=24 * GIB)
    assert find_gpu("24 GB").total_bytes == 24 * 10**9
    assert find_gpu("123456789B").total_bytes == 123456789
    assert find_gpu("CPU") == Gpu(name="cpu", kind="cpu", total_bytes=None)
    assert find_gpu("cpu:2GiB") == Gpu(name="cpu:2GiB", kind="cpu", total_bytes=2 * GIB)


@pytest.mark.parametrize(
    "text",
    ["0GiB", "-3GB", "nanGiB", "nan", "infGB", "-inf", "24", "24Gx", "cpu:", "cpu:0B", "cpu:nanGiB", "cpu:much"],
)
def test_an_impossible_size_is_a_bad_budget(text: str) -> None:
    with pytest.raises(BadBudget, match="24GiB"):
        find_gpu(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("rtx-4091", "rtx-4090"),
        ("NVIDIA GeForce RTX 3095", "rtx-3090"),
        ("H100", "h100-.*, h100-.*, h100-"),  # before h200, which is as alike
        ("A100", "a100-.*, a100-.*, a100-"),
    ],
)
def test_an_unknown_card_names_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(UnknownGpu, match=nearest) as caught:
        find_gpu(text)
    assert repr(text) in str(caught.value)
    assert "'24GiB'" in str(caught.value)


@pytest.mark.parametrize("text", ["", "mps", "xyz"])
def test_what_is_like_no_card_has_no_nearest(text: str) -> None:
    with pytest.raises(UnknownGpu, match="`memplan gpus` lists") as caught:
        find_gpu(text)
    assert "nearest" not in str(caught.value)


def test_a_number_that_is_in_cards_names_is_no_size() -> None:
    with pytest.raises(UnknownGpu, match=r"the nearest names are rtx-4090\. "):
        find_gpu("4090")
    with pytest.raises(BadBudget, match="no unit"):
        find_gpu("123456789")


@pytest.mark.parametrize("text", ["", "auto", "cuda", "cuda:1", "Infinity Card", "nano"])
def test_what_names_no_card_is_unknown(text: str) -> None:
    with pytest.raises(UnknownGpu):
        find_gpu(text)


def test_the_catalogue_is_large_and_every_name_in_it_leads_to_its_own_card() -> None:
    cards = all_gpus()
    assert len(cards) >= 25
    assert all(find_gpu(name) is card for card in cards for name in (card.name, *card.driver_names))


def test_the_cards_that_people_train_on_are_there() -> None:
    consumer = "rtx-3060 rtx-3090 rtx-4060 rtx-4060-ti rtx-4070-ti rtx-4080 rtx-4090 rtx-5080 rtx-5090"
    workstation = "rtx-a4000 rtx-a5000 rtx-a6000 rtx-6000-ada rtx-pro-6000"
    centre = "t4 l4 a10 a10g l40s a100-pcie-40gb a100-sxm-40gb a100-pcie-80gb a100-sxm-80gb"
    large = "h100-pcie h100-sxm h100-nvl h200 b200 mi300x"
    for name in f"{consumer} {workstation} {centre} {large}".split():
        card = find_gpu(name)
        assert card.driver_names
        assert bool(card.flops) == (name != "mi300x")  # of that its memory alone is known


@CARDS
def test_a_card_is_complete_and_sane(card: Gpu) -> None:
    assert card.kind == "cuda"
    assert card.name == card.name.lower()
    assert card.total_bytes is not None
    assert 4 * GIB < card.total_bytes < 512 * GIB
    assert card.source is not None
    assert "rates: " in card.source
    assert "memory: " in card.source
    assert isinstance(card.date, datetime.date)


@CARDS
def test_its_rates_fit_together(card: Gpu) -> None:
    if not card.flops:  # a card known for its memory only
        assert card.bandwidth_bytes_s is None
        assert card.host_link_bytes_s is None
        return
    assert card.bandwidth_bytes_s is not None
    assert card.host_link_bytes_s is not None
    assert card.compute_capability is not None
    assert card.host_link_bytes_s < 1e11 < card.bandwidth_bytes_s < 1e13
    assert set(card.flops) <= {"float32", "tf32", "bfloat16", "float16"}
    assert {"float32", "float16"} <= set(card.flops)
    assert all(math.isfinite(rate) and 1e12 < rate < 1e16 for rate in card.flops.values())
    # Tensor cores arrived at TF32 and bfloat16 with compute capability 8.0, where bfloat16 runs as fast as float16 and
    # TF32 at half that.
    assert ("bfloat16" in card.flops) == ("tf32" in card.flops) == (card.compute_capability >= (8, 0))
    if "bfloat16" in card.flops:
        assert card.flops["bfloat16"] == card.flops["float16"]
        assert card.flops["tf32"] == pytest.approx(card.flops["float16"] / 2, rel=0.02)


def test_a_card_is_a_value() -> None:
    card = find_gpu("a100-sxm-80gb")
    assert pickle.loads(pickle.dumps(card)) == copy.deepcopy(card) == card
    assert hash(card) == hash(copy.deepcopy(card))
    assert all_gpus() is all_gpus()


@pytest.mark.parametrize(
    ("name", "like", "unlike"),
    [
        ("rtx-5090", {"a100-sxm-40gb", "h100-sxm", "24GiB"}, {"v100-32gb", "t4"}),
        ("cuda:0", {"a100-sxm-40gb", "t4"}, set()),
        ("t4", {"v100-32gb"}, {"rtx-5090"}),
    ],
)
def test_a_plan_holds_for_cards_with_like_kernels_only(name: str, like: set[str], unlike: set[str]) -> None:
    found = {gpu.name for gpu in with_like_kernels(name, (*all_gpus(), find_gpu("24GiB")))}
    assert like <= found
    assert not unlike & found
    assert ("mi300x" in found) is (name == "cuda:0")
