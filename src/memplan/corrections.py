"""What measured runs say about predictions: a factor on the seconds of each lever, and bytes to keep free.

A step was predicted to take s_c seconds of each lever c (`seconds_by_lever`), p in all, and took m. The factors

    1 + d + e_c    on the seconds of lever c beyond keeping everything
    1 + d          on all others

are those with the least

    sum over runs of ((m - (1 + d) p - sum_c e_c s_c) / m)^2  +  DOUBT (d^2 + sum_c e_c^2)

which is ridge regression (Hoerl and Kennard, Technometrics 12, 1970). What a single run is off by is laid on the whole
step, so that no plan gains on another by it; runs of other plans tell the levers apart. The seconds are always those
before any correction, so that corrections do not learn from themselves.

Peaks are only ever corrected upwards, by what is kept free: a plan that is over its budget without corrections is so
with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from pydantic import Field

from memplan.problem import KEEP, lever_of
from memplan.profile import Times
from memplan.records import Record
from memplan.roofline import StepTimes
from memplan.units import format_bytes

BOUNDS: Final = (0.5, 2.0)
"""Of a factor, and of what a run took over what was predicted: one that is off by more was disturbed."""

DOUBT: Final = 0.25
"""(noise of a run / spread of what predictions are off by)^2. In docs/frontier.md steps vary by some 10 % from round to
round and predictions are off by some 20 %. So one run moves a factor by four fifths of what it is off by."""

LARGEST_EXCESS: Final = 0.1
"""Of the predicted peak. No run of residuals.toml is off by a third of that; beyond it something else was measured."""


class Run(Record):
    """One measured run beside what was predicted of it, before corrections."""

    seconds: dict[str, float] = Field(description="as `Plan.seconds`; empty if the plan does not say")
    times: str = Field(description='what they come from: "measured" blocks or "estimate"')
    step_s: float | None = Field(None, ge=0, description="measured; None if only the peak was")
    predicted_bytes: int = Field(gt=0)
    peak_bytes: int

    @property
    def time_ratio(self) -> float | None:
        """Measured over predicted seconds; None where one of them is not known."""
        predicted_s = sum(self.seconds.values())
        return self.step_s / predicted_s if self.step_s is not None and predicted_s > 0 else None

    @property
    def excess_bytes(self) -> int:
        """What it needed beyond its prediction; below 0: less."""
        return self.peak_bytes - self.predicted_bytes


@dataclass(frozen=True, slots=True)
class Corrections:
    """What the runs of one model on one machine teach."""

    runs: tuple[Run, ...] = ()

    @property
    def excess_bytes(self) -> int:
        """To be kept free of what a plan is predicted to need: the most that a run needed beyond its prediction."""
        return max((min(r.excess_bytes, int(LARGEST_EXCESS * r.predicted_bytes)) for r in self._above), default=0)

    @property
    def _above(self) -> list[Run]:
        return [run for run in self.runs if run.excess_bytes > 0]

    def timed(self, how: str) -> list[tuple[Run, float]]:
        """The runs that say something about times that come from `how`, with measured over predicted seconds."""
        ratios = ((run, run.time_ratio) for run in self.runs if run.times == how)
        return [(run, _bounded(ratio)) for run, ratio in ratios if ratio is not None]

    def factors(self, how: str) -> dict[str, float]:
        """`KEEP` and every lever of the runs -> factor on its seconds; empty without runs.

        Args:
            how: what the seconds come from, "measured" or "estimate". Only runs of the same count.
        """
        runs = self.timed(how)
        if not runs:
            return {}
        levers = sorted({lever for run, _ in runs for lever in run.seconds} - {KEEP})
        rows = []
        for run, ratio in runs:
            measured_s = ratio * sum(run.seconds.values())
            rows.append([1 / ratio, *(run.seconds.get(lever, 0.0) / measured_s for lever in levers)])
        shares = np.array(rows)
        ridge = shares.T @ shares + DOUBT * np.eye(len(levers) + 1)
        whole, *own = np.linalg.solve(ridge, shares.T @ (1 - shares[:, 0])).tolist()
        factors = {lever: _bounded(1 + whole + more) for lever, more in zip(levers, own, strict=True)}
        return {KEEP: _bounded(1 + whole), **factors}

    def applied(self, times: StepTimes) -> StepTimes:
        """The times, corrected; the same ones without runs. An option that took longer than keeping still does."""
        factors = self.factors(times.how)
        if not factors:
            return times
        whole = factors[KEEP]

        def seconds(own: Mapping[int, float], kept: Mapping[int, float], name: str) -> dict[int, float]:
            beyond = factors.get(lever_of(name) or KEEP, whole)
            return {at: whole * min(own[at], kept[at]) + beyond * max(0.0, own[at] - kept[at]) for at in own}

        blocks = {key: seconds(own, times.blocks[key[0], KEEP], key[1]) for key, own in times.blocks.items()}
        rest = {name: seconds(own, times.rest[KEEP], _first(name)) for name, own in times.rest.items()}
        stepping = {variant: whole * extra_s for variant, extra_s in times.stepping.items()}
        return replace(times, blocks=blocks, rest=rest, optimizer_s=whole * times.optimizer_s, stepping=stepping)

    def describe(self, how: str) -> tuple[str, ...]:
        """What a plan has to say of it; nothing without runs."""
        lines, runs = [], self.timed(how)
        if runs:
            lines.append(f"times corrected by {_count(len(runs))} on this machine: {factors_text(self.factors(how))}")
        if self.excess_bytes:
            lines.append(
                f"{format_bytes(self.excess_bytes)} at least are kept free: {_count(len(self._above))} on this machine "
                "needed more than predicted"
            )
        return tuple(lines)


def seconds_by_lever(
    times: Times, decisions: Mapping[str, str], variant: str, micro_batch: int, accumulation: int
) -> dict[str, float]:
    """Seconds of a step by what they are for: `KEEP`, the step without levers, and what each lever takes beyond it.

    The variant's are laid on its first lever, what another way to step takes on its last. What a lever saves is taken
    off the step. Waits for the link to the host are not in it.
    """
    found = {KEEP: accumulation * times.rest_s(micro_batch, KEEP) + times.optimizer_s}
    beyond_s = [(_first(variant), times.rest_s(micro_batch, variant) - times.rest_s(micro_batch, KEEP))]
    for path, option in decisions.items():
        kept_s = times.block_s(path, KEEP, micro_batch)
        found[KEEP] += accumulation * kept_s
        beyond_s.append((option, times.block_s(path, option, micro_batch) - kept_s))
    every = [(name, accumulation * seconds) for name, seconds in beyond_s]
    for name, seconds in (*every, (variant.rpartition("+")[2], times.stepping_s(variant))):
        key = lever_of(name) or KEEP if seconds > 0 else KEEP
        found[key] = found.get(key, 0.0) + seconds
    return found


def factors_text(factors: Mapping[str, float]) -> str:
    """Factors as "x1.04, recompute x1.08"."""
    return ", ".join(f"x{factor:.2f}" if name == KEEP else f"{name} x{factor:.2f}" for name, factor in factors.items())


def _bounded(factor: float) -> float:
    return min(max(factor, BOUNDS[0]), BOUNDS[1])


def _first(variant: str) -> str:
    return variant.partition("+")[0]


def _count(runs: int) -> str:
    return f"{runs} measured run{'s' if runs > 1 else ''}"
