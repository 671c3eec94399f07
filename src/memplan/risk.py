"""How far predictions of a card's memory were off, and what has to be kept free for that at a given risk.

`residuals.toml` holds measured over predicted, minus 1, of real training runs; `benchmarks/real_cards.py --write` makes
it. With n of them, mean m and standard deviation s, the next one lies below

    m + t(p, n - 1) s sqrt(1 + 1/n)

with probability p, if they are drawn from one normal distribution (the prediction interval of a single observation;
Hahn and Meeker, Statistical Intervals, 1991, section 4.8). A plan that "fits" runs out of memory with a probability of
`risk` at most, one that "does not fit" with 1 - `risk` at least, and "uncertain" lies between.
"""

import statistics
import tomllib
from functools import cache
from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).with_name("residuals.toml")


def excess_share(probability: float) -> float:
    """By what share of the prediction a run needs more, at most, with this probability; below 0: it needs less."""
    residuals = measured_residuals()
    count = len(residuals)
    spread: float = statistics.stdev(residuals) * (1 + 1 / count) ** 0.5
    return statistics.fmean(residuals) + student_t(probability, count - 1) * spread


def student_t(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, to 3 digits from 10 degrees of freedom on.

    From that of the normal distribution, by Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def usable_bytes(room_bytes: int, risk: float) -> tuple[int, int]:
    """Of the room on a card: the most a prediction may be so that the plan fits, and so that it is not ruled out."""
    fits = int(room_bytes / (1 + excess_share(1 - risk)))
    return min(fits, room_bytes), max(fits, int(room_bytes / (1 + excess_share(risk))))


@cache
def measured_residuals() -> tuple[float, ...]:
    """Measured / predicted - 1, of each run."""
    found: list[float] = tomllib.loads(_FILE.read_text(encoding="utf-8"))["residuals"]
    return tuple(found)
