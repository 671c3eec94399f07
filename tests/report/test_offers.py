"""Tables of offers: what is shown of which cards, in which order, and in a narrow terminal."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from memplan.offer import Offer
from memplan.plan_record import Verdict
from memplan.report.offers import offer_tables, ranked

GIB = 2**30


def an_offer(gpu: str, total_gib: int, **changes: Any) -> Offer:
    how = {
        "micro_batch": 2,
        "blocks": 32,
        "recomputed": 20,
        "chunked": True,
        "samples_per_s": 1.234,
        "band": (1.0, 1.5),
    }
    base = {"method": "lora", "gpu": gpu, "total_bytes": total_gib * GIB, "verdict": Verdict.FITS, "samples": 16}
    return Offer(**{"least_bytes": 18 * GIB, "is_bound": False, **base, **how, **changes})


def refused(gpu: str, total_gib: int, **changes: Any) -> Offer:
    nothing = dict.fromkeys(("micro_batch", "blocks", "recomputed", "chunked", "samples_per_s", "band"))
    return an_offer(gpu, total_gib, verdict=Verdict.DOES_NOT_FIT, **{**nothing, **changes})


def shown(*offers: Offer, width: int = 120) -> str:
    text = StringIO()
    Console(width=width, color_system=None, file=text).print(offer_tables(offers))
    return text.getvalue()


def test_what_they_are_for_is_said_once() -> None:
    text = shown(an_offer("a-24", 24, assumed="weights: 8 billion"), an_offer("b-48", 48, assumed="weights: 8 billion"))
    assert text.count("for weights: 8 billion") == 1


OFFERS = (
    an_offer("slow-48", 48, samples_per_s=1.0, band=(0.8, 1.2)),
    an_offer("fast-48", 48, samples_per_s=123.4, recomputed=0, chunked=False, micro_batch=16),
    an_offer("a-24", 24),
    refused("a-16", 16),
    refused("a-12", 12, is_bound=True, least_bytes=15 * GIB),
)


def test_cards_come_by_memory_and_then_the_fastest_first() -> None:
    assert [offer.gpu for offer in ranked(OFFERS)] == ["a-12", "a-16", "a-24", "fast-48", "slow-48"]


def test_a_row_says_how_a_card_would_be_used_and_how_fast_with_the_band() -> None:
    lines = shown(*OFFERS).splitlines()
    (row,) = [line.split() for line in lines if line.lstrip().startswith("a-24")]
    assert " ".join(row) == "a-24 24.00 GiB 2 x 8 20 of 32 recomputed, chunked loss 1.2 1 to 1.5"
    (row,) = [line.split() for line in lines if line.lstrip().startswith("fast-48")]
    assert " ".join(row[3:]) == "16 x 1 everything kept 123 1 to 1.5"


def test_cards_that_do_not_fit_are_one_line_with_what_it_takes() -> None:
    text = " ".join(shown(*OFFERS).split())
    assert "lora does not fit a-12, a-16: the leanest plan takes 18.00 GiB, beside CUDA's context and a margin" in text
    unlike = refused("a-8", 8, least_bytes=19 * 2**30), refused("a-12", 12, least_bytes=18 * 2**30)
    fitting = an_offer("a-24", 24, least_bytes=17 * 2**30)
    assert "a-8, a-12: the leanest plan takes 18.00 GiB to 19.00 GiB, beside" in " ".join(
        shown(*unlike, fitting).split()
    )
    only_bounds = " ".join(shown(refused("a-12", 12, is_bound=True)).split())
    assert "a-12: weights and optimizer state alone are 18.00 GiB, beside" in only_bounds
    assert "lora: none of these" in only_bounds
    assert "estimates" not in only_bounds


def test_the_smallest_card_is_named_for_each_method_and_is_sure_to_fit() -> None:
    unsure = an_offer("b-16", 16, method="qlora", verdict=Verdict.UNCERTAIN)
    text = shown(*OFFERS, unsure, an_offer("b-32", 32, method="qlora"))
    assert "  lora: a-24, 24.00 GiB" in text
    assert "  qlora: b-32, 32.00 GiB" in text
    assert "uncertain" in text


def test_what_is_an_estimate_is_called_so_and_a_card_without_speed_has_none() -> None:
    unknown = an_offer("dark-192", 192, samples_per_s=None, band=None)
    text = " ".join(shown(unknown).split())
    assert "dark-192: only the memory is known" in text
    assert "samples/s are estimates" not in text
    assert "samples/s are estimates from datasheets, not measurements" in " ".join(shown(*OFFERS, unknown).split())


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_shows_it_all_without_breaking_numbers(width: int) -> None:
    text = shown(*OFFERS, width=width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "a-24 24.00 GiB" in text
    assert "  1.2 samples/s (1 to 1.5)" in text
    assert "20 of 32 recomputed, chunked loss" in " ".join(text.split())
