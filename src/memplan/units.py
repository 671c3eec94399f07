"""Bytes and seconds to and from text; the only place where a number becomes text.

Text is rounded against ourselves. A need (a peak, the smallest budget that would fit) is written with `format_bytes`,
which rounds up; a budget is written with `format_budget`, which rounds down. So a printed need that is typed back as a
budget is never too small:

    parse_bytes(format_bytes(n)) >= n >= parse_bytes(format_budget(n))

Binary and decimal prefixes are kept apart: 1 GiB is 2**30 bytes, 1 GB is 10**9. Output is always binary.
"""

import math
import re
from decimal import Decimal
from typing import Final

from memplan.errors import BadBudget

_BINARY_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTORS: Final = {
    "b": 1,
    **{f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE: Final = re.compile(r"\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+|nan|inf))\s*(?P<unit>[a-z]*)\s*", re.IGNORECASE)
_WAY_OUT: Final = "write a number and a unit (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB), for example '24GiB'"


def parse_bytes(text: str) -> int:
    """Bytes in a size such as "24GiB", "1.5 GB" or "123456789B"; parts of a byte are dropped.

    Raises:
        BadBudget: the text is not a number with a unit, or the number is zero, negative or not finite.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadBudget(f"{text!r} is not a memory size: {_WAY_OUT}")
    number = Decimal(match["number"])
    unit = match["unit"].lower()
    if not number.is_finite():
        raise BadBudget(f"a memory size has to be finite, got {text!r}: {_WAY_OUT}")
    if not unit:
        raise BadBudget(f"{text!r} has no unit, so it could be bytes or gigabytes: {_WAY_OUT}")
    if unit not in _FACTORS:
        raise BadBudget(f"{text!r} has the unknown unit {match['unit']!r}: {_WAY_OUT}")
    size: int = math.floor(number * _FACTORS[unit])
    if size <= 0:
        raise BadBudget(f"a memory size has to be at least one byte, got {text!r}: {_WAY_OUT}")
    return size


def format_bytes(n_bytes: int) -> str:
    """A need, rounded up (away from zero where negative) to two decimals: 1234567890 -> "1.15 GiB"."""
    return _in_binary_units(n_bytes, round_up=True)


def format_budget(n_bytes: int) -> str:
    """A budget, rounded down (towards zero) to two decimals: 24 GiB less one byte -> "23.99 GiB"."""
    return _in_binary_units(n_bytes, round_up=False)


def format_within(n_bytes: int, budget_bytes: int) -> str:
    """A need beside its budget: as `format_bytes`, but where it is within the budget never above that one's text."""
    text = format_bytes(n_bytes)
    return format_budget(budget_bytes) if 0 < n_bytes <= budget_bytes < parse_bytes(text) else text


def _in_binary_units(n_bytes: int, *, round_up: bool) -> str:
    sign, magnitude = ("-", -n_bytes) if n_bytes < 0 else ("", n_bytes)
    if magnitude < 1024:
        return f"{sign}{magnitude} B"
    for power, unit in enumerate(_BINARY_UNITS[1:], start=1):
        # Integers throughout: a float cannot hold every byte count that has two exact decimals.
        scaled = 100 * magnitude
        hundredths = -(-scaled >> 10 * power) if round_up else scaled >> 10 * power
        if hundredths < 100 * 1024 or unit == _BINARY_UNITS[-1]:
            break
    return f"{sign}{hundredths // 100}.{hundredths % 100:02d} {unit}"


def format_seconds(seconds: float) -> str:
    """A time to three digits in the unit that suits it: "38.2 us", "4.07 ms", "1.25 s", "3 min 20 s", "2 h 05 min"."""
    magnitude = abs(seconds)
    for limit, scale, unit in ((999.5e-6, 1e6, "us"), (0.9995, 1e3, "ms"), (59.95, 1.0, "s")):
        if magnitude < limit:
            return f"{_three_digits(seconds * scale)} {unit}"
    sign = "-" if seconds < 0 else ""
    if magnitude < 3599.5:
        minutes, rest = divmod(round(magnitude), 60)
        return f"{sign}{minutes} min {rest:02d} s"
    hours, rest = divmod(round(magnitude / 60), 60)
    return f"{sign}{hours} h {rest:02d} min"


def format_count(count: int) -> str:
    """A number of things to three digits: 8030261248 -> "8.03 billion", 41943040 -> "41.9 million", 4096 -> "4,096"."""
    for scale, word in ((10**9, "billion"), (10**6, "million")):
        if count >= 0.9995 * scale:
            return f"{_three_digits(count / scale)} {word}"
    return f"{count:,}"


def format_rate(per_second: float, noun: str) -> str:
    """A rate to three digits: (12.345, "samples") -> "12.3 samples/s"."""
    return f"{_three_digits(per_second)} {noun}/s"


def format_percent(share: float) -> str:
    """A share of one as a percentage with one decimal: 0.0712 -> "7.1 %"."""
    return f"{100 * share:.1f} %"


def _three_digits(number: float) -> str:
    magnitude = abs(number)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{number:.{decimals}f}"
