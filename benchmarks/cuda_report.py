"""What the measurements of `cuda.py` say: the table, and verdicts against the targets. Pure: results in, text out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from cuda_runs import NOT_YET, gib

Result = Mapping[str, Any]
Results = Mapping[str, Result]  # "task / setting" -> what its process answered

NONE, FULL = "none", "full checkpointing"
AT_FULL, CAPPED, FULL_CAPPED = "memplan at full's peak", "memplan under the cap", "full checkpointing under the cap"
LAPS, LAPS_CAPPED = "laps", "laps under the cap"

# Claimed by the notebooks that these three trainings are known from: (share of memory saved, time on top).
CLAIMED = {"mistral-7b int8": (0.54, 0.25), "llama-3-8b nf4": (0.35, 0.20), "qwen-14b int8": (0.53, 0.25)}
MOST_SLOWDOWN = 0.08
LEAST_GAIN = 1.2

HEAD = (
    "| training | setting | batch | peak allocated GiB | peak reserved GiB | retries | ms per step | samples/s "
    "| predicted GiB | error | predicted reserved GiB | error | predicted ms | options |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
)
COLUMNS = 14


def named(task: str, setting: str) -> str:
    return f"{task} / {setting}"


def is_measured(result: Result | None) -> bool:
    return result is not None and "allocated" in result


def seconds_of(results: Results, task: str, setting: str) -> float | None:
    """Of one step: the median over interleaved laps, else over the setting's own steps; None if it never ran."""
    for laps in (LAPS, LAPS_CAPPED):
        rounds = results.get(named(task, laps), {}).get("rounds", [])
        seconds = [s for done in rounds for name, s in done if name == setting]
        if seconds:
            return float(median(seconds))
    alone: list[float] = results.get(named(task, setting), {}).get("seconds", [])
    return float(median(alone)) if alone else None


def samples_s(results: Results, task: str, setting: str) -> float | None:
    result, seconds = results.get(named(task, setting), {}), seconds_of(results, task, setting)
    if seconds is None or not is_measured(result):
        return None
    return float(result["micro_batch"] * result["accumulation"] / seconds)


def table(results: Results, asked: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """One line for each task and setting that is asked for, measured or not."""
    yield from HEAD
    for task, settings in asked.items():
        for setting in settings:
            yield _row(results, task, setting)


def _row(results: Results, task: str, setting: str) -> str:
    result, start = results.get(named(task, setting)), f"| {task} | {setting} "
    if result is None or not is_measured(result):
        words = NOT_YET if result is None else _words(result)
        return f"{start}| {words} {'| ' * (COLUMNS - 3)}|"
    predicted, plan = result.get("predicted", {}), result.get("plan")
    seconds, rate = seconds_of(results, task, setting), samples_s(results, task, setting)
    cells = (
        f"{result['micro_batch']} x {result['accumulation']}",
        gib(result["allocated"]),
        gib(result["reserved"]),
        str(result["retries"]),
        "" if seconds is None else f"{seconds * 1e3:.0f}",
        "" if rate is None else f"{rate:.2f}",
        gib(predicted.get("peak")),
        _error(predicted.get("peak"), result["allocated"]),
        gib(predicted.get("reserved")),
        _error(predicted.get("reserved"), result["reserved"]),
        "" if plan is None else f"{plan['step_s'] * 1e3:.0f}",
        _options(result),
    )
    return start + "".join(f"| {cell} " for cell in cells) + "|"


def _words(result: Result) -> str:
    """Why there are no numbers."""
    if result.get("oom"):
        return "out of memory"
    if result.get("kind") == "BitsandbytesMissing":
        return f"{NOT_YET}: bitsandbytes is not installed there"
    return f"not measured: {result.get('error', 'no answer')}".replace("|", "/")


def _error(predicted: int | None, measured: int) -> str:
    return "" if predicted is None else f"{predicted / measured - 1:+.2%}"


def _options(result: Result) -> str:
    if "tries" in result:
        return "batches tried: " + ", ".join(
            f"{n} {'runs' if w == 'runs' else 'fails'}" for n, w in result["tries"].items()
        )
    plan = result.get("plan")
    if plan is None:
        return ""
    parts = [f"{count} {option}" for option, count in sorted(plan["options"].items())]
    parts += [f"optimizer {plan['stepping']}"] if plan["stepping"] != "plain" else []
    parts += [f"{gib(plan['host_bytes'])} GiB on the host"] if plan["host_bytes"] else []
    return ", ".join(parts)


# --- verdicts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    task: str
    what: str
    passed: bool | None  # None: not yet measured
    numbers: str

    @property
    def word(self) -> str:
        return NOT_YET if self.passed is None else "pass" if self.passed else "**fail**"


def verdicts(results: Results, task: str) -> list[Verdict]:
    """Of a known training: against its claimed savings, and against full checkpointing under the same cap."""
    if task not in CLAIMED:
        return []
    return [_saving(results, task, *CLAIMED[task]), _slowdown(results, task), _gain(results, task)]


def _saving(results: Results, task: str, share: float, slower: float) -> Verdict:
    what = f"at least {share:.0%} less memory than no checkpointing (claimed: at {slower:+.0%} time)"
    none, ours = (results.get(named(task, setting)) for setting in (NONE, AT_FULL))
    if none is None or ours is None or not (is_measured(none) and is_measured(ours)):
        return Verdict(task, what, None, "")
    saved = 1 - ours["allocated"] / none["allocated"]
    return Verdict(task, what, saved >= share, f"{saved:.1%} less, {gib(ours['allocated'])} GiB")


def _slowdown(results: Results, task: str) -> Verdict:
    what = f"at most {MOST_SLOWDOWN:+.0%} time for it"
    times = [seconds_of(results, task, setting) for setting in (NONE, AT_FULL, FULL)]
    none_s, ours_s, full_s = times
    if none_s is None or ours_s is None:
        return Verdict(task, what, None, "")
    beside = "" if full_s is None else f"; full checkpointing {full_s / none_s - 1:+.1%}"
    slower = ours_s / none_s - 1
    return Verdict(task, what, slower <= MOST_SLOWDOWN, f"{slower:+.1%}{beside}")


def _gain(results: Results, task: str) -> Verdict:
    what = f"at least {LEAST_GAIN} x the samples per second of full checkpointing under the same cap"
    ours, theirs = (samples_s(results, task, setting) for setting in (CAPPED, FULL_CAPPED))
    if ours is None or theirs is None:
        return Verdict(task, what, None, "")
    return Verdict(task, what, ours / theirs >= LEAST_GAIN, f"{ours:.2f} against {theirs:.2f}, {ours / theirs:.2f} x")
