import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import BadBudget
from memplan.units import (
    format_budget,
    format_bytes,
    format_count,
    format_percent,
    format_rate,
    format_seconds,
    format_within,
    parse_bytes,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("24GiB", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        ("123456789B", 123456789),
        ("512MiB", 512 * 2**20),
        ("512 mb", 512 * 10**6),
        ("  2TiB ", 2 * 2**40),
        (".5KiB", 512),
        ("1.KB", 1000),
        ("+1GiB", GIB),
        ("0.3KiB", 307),  # 307.2: parts of a byte are dropped
        ("8.589934592GB", 8 * GIB),  # exact where a float would be one short or over
    ],
)
def test_a_size_is_read(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    ("text", "what_is_wrong"),
    [
        ("0GiB", "at least one byte"),
        ("0.5B", "at least one byte"),
        ("-3GB", "at least one byte"),
        ("nanGiB", "finite"),
        ("infGB", "finite"),
        ("-inf", "finite"),
        ("24", "no unit"),
        ("24G", "unknown unit 'G'"),
        ("24Gibit", "unknown unit 'Gibit'"),
        ("GiB", "not a memory size"),
        ("", "not a memory size"),
        ("1e3MB", "not a memory size"),
        ("24GiB24GiB", "not a memory size"),
        ("twelve", "not a memory size"),
    ],
)
def test_what_is_no_size_is_refused_with_the_way_out(text: str, what_is_wrong: str) -> None:
    with pytest.raises(BadBudget, match=what_is_wrong) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "for example '24GiB'" in str(caught.value)


@pytest.mark.parametrize(
    ("n_bytes", "need", "budget"),
    [
        (0, "0 B", "0 B"),
        (1023, "1023 B", "1023 B"),
        (1024, "1.00 KiB", "1.00 KiB"),
        (1234567890, "1.15 GiB", "1.14 GiB"),
        (24 * GIB - 1, "24.00 GiB", "23.99 GiB"),
        (GIB - 1, "1.00 GiB", "1023.99 MiB"),
        (-1234567890, "-1.15 GiB", "-1.14 GiB"),
        (3000 * 2**40, "3000.00 TiB", "3000.00 TiB"),
    ],
)
def test_needs_are_rounded_up_and_budgets_down(n_bytes: int, need: str, budget: str) -> None:
    assert format_bytes(n_bytes) == need
    assert format_budget(n_bytes) == budget


@pytest.mark.parametrize(
    ("n_bytes", "budget_bytes", "text"),
    [
        (1_498_700_000, 1_499_000_000, "1.39 GiB"),  # which are 1.3958 and 1.3960
        (1_499_000_001, 1_499_000_000, "1.40 GiB"),
        (1_400_000_000, 1_499_000_000, "1.31 GiB"),
        (1024, 1024, "1.00 KiB"),
        (0, 0, "0 B"),
    ],
)
def test_what_is_within_a_budget_does_not_read_as_above_it(n_bytes: int, budget_bytes: int, text: str) -> None:
    assert format_within(n_bytes, budget_bytes) == text


@given(st.integers(min_value=1, max_value=2**60))
def test_a_printed_need_typed_back_as_a_budget_is_enough(n_bytes: int) -> None:
    assert parse_bytes(format_bytes(n_bytes)) >= n_bytes >= parse_bytes(format_budget(n_bytes))
    assert parse_bytes(format_bytes(n_bytes)) - n_bytes <= max(1, n_bytes // 100)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 us"),
        (38.2e-6, "38.2 us"),
        (0.00407, "4.07 ms"),
        (0.9996, "1.00 s"),
        (1.25, "1.25 s"),
        (59.96, "1 min 00 s"),
        (200.4, "3 min 20 s"),
        (3599.9, "1 h 00 min"),
        (7500.0, "2 h 05 min"),
        (-0.25, "-250 ms"),
        (-75.0, "-1 min 15 s"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_rates_and_shares() -> None:
    assert format_rate(12.345, "samples") == "12.3 samples/s"
    assert format_rate(0.5, "samples") == "0.50 samples/s"
    assert format_rate(123456.7, "tokens") == "123457 tokens/s"
    assert format_percent(0.0712) == "7.1 %"
    assert format_percent(-0.2) == "-20.0 %"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (4096, "4,096"),
        (999_499, "999,499"),
        (999_500, "1.00 million"),
        (41_943_040, "41.9 million"),
        (999_500_000, "1.00 billion"),
        (8_030_261_248, "8.03 billion"),
        (405_000_000_000, "405 billion"),
    ],
)
def test_counts_have_three_digits(count: int, text: str) -> None:
    assert format_count(count) == text
