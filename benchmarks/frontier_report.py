"""What the measurements of `frontier.py` say: slowdowns from paired laps, verdicts against the targets, the tables."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from frontier_measure import COMPILED, NONE, UNIT_EVERY
from peers import FULL, PEERS

Record = Mapping[str, Any]  # of one workload, as frontier.json has it
Laps = Iterable[tuple[str, float]]

AT_FULL, AT_MIDDLE = "memplan at full", "memplan at middle"
SPLIT_AT_FULL, SPLIT_AT_MIDDLE = "split at full", "split at middle"

# At the peak of full checkpointing: extra time as a share of full checkpointing's. At the middle: extra time.
TIGHT, EASY = (0.25, 0.02), (0.5, 0.03)
TARGETS = {"W1": TIGHT, "W6": TIGHT, "W2": EASY, "W3": EASY, "W4": EASY}
LEAST_TRANSIENT = {"W1": 0.85, "W2": 0.85}  # of full checkpointing's transient memory, by the smallest plan
PREDICTED_WITHIN = 0.05  # of the unit's step


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of one workload. Bytes; slowdowns are against no checkpointing, minus 1."""

    setting: str
    budget_bytes: int | None
    predicted_bytes: int | None
    peak_bytes: int
    predicted: float | None
    slowdown: float | None  # median of the paired ratios, minus 1; None until it has run
    spread: float | None  # median absolute deviation of the paired ratios
    options: str
    micro_batch: int | None
    accumulation: int | None

    @property
    def is_peer(self) -> bool:
        return self.setting == NONE or self.setting in PEERS

    @property
    def is_fixed(self) -> bool:
        """Planned, with the micro-batch fixed."""
        return self.setting.startswith("memplan")


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    passed: bool
    numbers: str


# --- times ----------------------------------------------------------------------------------------------------------


def ratios(rounds: Iterable[Laps]) -> dict[str, list[float]]:
    """Each lap over the mean of the unit's laps just before and just after it, by setting; the unit's own as well."""
    found: dict[str, list[float]] = defaultdict(list)
    for laps in map(list, rounds):
        units = [at for at, (setting, _) in enumerate(laps) if setting == NONE]
        for at, (setting, seconds) in enumerate(laps):
            before, after = [u for u in units if u < at][-1:], [u for u in units if u > at][:1]
            beside = [laps[u][1] for u in before + after]
            if beside:
                found[setting].append(seconds / (sum(beside) / len(beside)))
    return found


def spread(values: list[float]) -> float:
    """The median absolute deviation."""
    middle = median(values)
    return median(abs(value - middle) for value in values)


def noise_of(record: Record) -> float:
    """What a difference of two slowdowns must exceed to count: twice the spread of the unit against itself.

    The median of 7 ratios has a standard error of about 0.7 spreads, the difference of two of them one spread.
    """
    units = ratios(_main_rounds(record)).get(NONE)
    return 2 * spread(units) if units else 0.0


def unit_s(record: Record) -> float:
    """CPU seconds of a step without checkpointing."""
    return float(median(seconds for laps in _main_rounds(record) for setting, seconds in laps if setting == NONE))


def _main_rounds(record: Record) -> list[Laps]:
    """Without those that compiled models have to themselves."""
    rounds = record.get("rounds", [])
    return [laps for laps in rounds if not any(setting.startswith(COMPILED) for setting, _ in laps)]


def rows_of(record: Record) -> list[Row]:
    """Every setting with a measured peak; a plan that is the same as another one has that one's measurements."""
    plans, paired = record.get("plans", {}), ratios(record.get("rounds", []))
    rows = []
    for setting in [*record["peaks"], *(name for name in plans if name not in record["peaks"])]:
        plan = plans.get(setting, {})
        measured_as = plan.get("same_as") or setting
        if measured_as not in record["peaks"]:
            continue
        timed = [1.0] if setting == NONE else paired.get(measured_as)
        row = Row(
            setting=setting,
            budget_bytes=plan.get("budget_bytes"),
            predicted_bytes=plan.get("peak_bytes"),
            peak_bytes=record["peaks"][measured_as],
            predicted=plan.get("slowdown"),
            slowdown=median(timed) - 1 if timed else None,
            spread=spread(paired.get(measured_as, timed)) if timed else None,
            options=", ".join(f"{n} {name}" for name, n in sorted(plan.get("options", {}).items())),
            micro_batch=plan.get("micro_batch"),
            accumulation=plan.get("accumulation"),
        )
        rows.append(row)
    return sorted(rows, key=lambda row: (row.budget_bytes or row.peak_bytes, row.setting))


# --- verdicts -------------------------------------------------------------------------------------------------------


def verdicts(workload: str, record: Record) -> list[Verdict]:
    """Against every target that applies to the workload and can be judged from what is measured so far."""
    rows, noise = rows_of(record), noise_of(record)
    named = {row.setting: row for row in rows}
    planned = [row for row in rows if row.is_fixed]
    timed = [row for row in planned if row.slowdown is not None]
    found = list(_targets(workload, named))
    found += _within_budget([row for row in rows if row.budget_bytes is not None])
    if timed:
        peers = [row for row in rows if row.is_peer and row.slowdown is not None]
        compiled = [row for row in rows if row.setting.startswith(COMPILED) and row.slowdown is not None]
        found.append(_against("no slower than the fastest peer within the same measured peak", timed, peers, noise))
        found.append(_against("no slower than the fastest peer within the budget", timed, peers, noise, budget=True))
        if compiled:
            found.append(_against("no slower than torch.compile within the same measured peak", timed, compiled, noise))
        worst = max(timed, key=_miss)
        numbers = f"worst {_miss(worst) * 100:.1f} points ({worst.setting}: {_pair(worst)})"
        found.append(Verdict("slowdown predicted within 5 points", _miss(worst) <= PREDICTED_WITHIN, numbers))
    if workload in LEAST_TRANSIENT and planned and FULL in named:
        found.append(_transient(LEAST_TRANSIENT[workload], planned, named[FULL], record["static"]))
    return found


def _targets(workload: str, named: Mapping[str, Row]) -> Iterator[Verdict]:
    if workload not in TARGETS:
        return
    share, most = TARGETS[workload]
    full = named[FULL].slowdown if FULL in named else None
    at_full = named[AT_FULL].slowdown if AT_FULL in named else None
    at_middle = named[AT_MIDDLE].slowdown if AT_MIDDLE in named else None
    if full is not None and at_full is not None:
        numbers = f"{at_full:+.1%} against {share:g} x {full:+.1%} = {share * full:+.1%}"
        what = f"at full checkpointing's peak at most {share:g} of its extra time"
        yield Verdict(what, at_full <= share * full, numbers)
    if at_middle is not None:
        yield Verdict(f"at the middle at most {most:.0%} extra time", at_middle <= most, f"{at_middle:+.1%}")


def _within_budget(rows: list[Row]) -> Iterator[Verdict]:
    if rows:
        over = {row.setting: row.peak_bytes - (row.budget_bytes or 0) for row in rows}
        worst = max(over, key=lambda setting: over[setting])
        passed = over[worst] <= 0
        numbers = f"{len(over)} plans, closest {over[worst]:+,} bytes ({worst})"
        if not passed:
            numbers = f"{sum(v > 0 for v in over.values())} of {len(over)} plans over, worst {over[worst]:+,} ({worst})"
        yield Verdict("measured peak never above the budget", passed, numbers)


def _against(what: str, planned: list[Row], peers: list[Row], noise: float, *, budget: bool = False) -> Verdict:
    """Each plan against the fastest peer that takes no more memory than the plan (or its budget)."""
    behind = {}
    for row in planned:
        room = row.budget_bytes if budget and row.budget_bytes is not None else row.peak_bytes
        rivals = [peer for peer in peers if peer.peak_bytes <= room]
        if rivals:
            fastest = min(rivals, key=lambda peer: peer.slowdown or 0.0)
            behind[row.setting] = ((row.slowdown or 0.0) - (fastest.slowdown or 0.0), fastest.setting)
    if not behind:
        return Verdict(what, True, "no peer takes so little memory")
    worst = max(behind, key=lambda setting: behind[setting][0])
    points, rival = behind[worst]
    numbers = f"{len(behind)} plans have a rival; worst {points * 100:+.1f} points ({worst} against {rival})"
    return Verdict(what, points <= noise, f"{numbers}, noise {noise * 100:.1f}")


def _transient(most: float, planned: list[Row], full: Row, static_bytes: int) -> Verdict:
    smallest = min(planned, key=lambda row: row.peak_bytes)
    share = (smallest.peak_bytes - static_bytes) / (full.peak_bytes - static_bytes)
    sizes = [_mb(peak - static_bytes) for peak in (smallest.peak_bytes, full.peak_bytes)]
    numbers = f"{sizes[0]} against {sizes[1]} MB, {1 - share:.1%} less ({smallest.setting})"
    return Verdict(f"at least {1 - most:.0%} less transient memory than full checkpointing", share <= most, numbers)


def _miss(row: Row) -> float:
    return abs((row.predicted or 0.0) - (row.slowdown or 0.0))


def _pair(row: Row) -> str:
    return f"{row.predicted or 0.0:+.1%} predicted, {row.slowdown or 0.0:+.1%} measured"


# --- the document ---------------------------------------------------------------------------------------------------


def document(records: Mapping[str, Record], about: Mapping[str, str]) -> str:
    """The whole of docs/frontier.md, from what is measured so far."""
    judged = {w: verdicts(w, record) for w, record in records.items()}
    every = [verdict for found in judged.values() for verdict in found]
    lines = [
        "# Time against memory, beside what people set by hand",
        "",
        f"{sum(v.passed for v in every)} of {len(every)} targets are met, on {len(records)} of {len(about)} workloads "
        "measured. Made by `python benchmarks/frontier.py --write`.",
        "",
        "Peak: most bytes in tensors during one steady step (AdamW, fp32), from torch's own CPU allocator events, in a",
        "process of its own; MB are 10^6 bytes. Slowdown: CPU time of a whole training step over that of one without",
        "checkpointing. All settings of a workload run in turn on one live model, in an order drawn anew each round.",
        f"Each lap is divided by the mean of the nearest two without checkpointing (there is one every {UNIT_EVERY}",
        "settings); given is the median over all rounds, ± the median absolute deviation. The noise is twice that",
        "deviation for no checkpointing against itself: smaller differences of two slowdowns mean nothing.",
        "",
        "The micro-batch is fixed to the whole batch: splitting it is another lever, shown in each second table.",
        "Plans may pull every lever, also the step inside the backward (`in-backward`), which has to be asked for",
        "elsewhere, since loops that clip or accumulate have no room for it.",
        "",
        "| workload | target | | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {w} | {v.what} | {'pass' if v.passed else '**fail**'} | {v.numbers} |"
        for w, found in judged.items()
        for v in found
    ]
    for workload, record in records.items():
        lines += ["", f"## {workload}: {about[workload]}", "", *_section(record)]
    return "\n".join([*lines, ""])


def _section(record: Record) -> Iterator[str]:
    rows = rows_of(record)
    rounds = _main_rounds(record)
    if rounds:
        yield (
            f"{unit_s(record):.2f} CPU seconds a step without checkpointing, torch threads: {record['threads']}, "
            f"{len(rounds)} rounds, noise {noise_of(record) * 100:.1f} points; {_mb(record['static'])} MB always there."
        )
        yield ""
    yield "| setting | budget MB | predicted peak | measured peak | predicted slowdown | measured slowdown | options |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    for row in rows:
        if not row.setting.startswith("split"):
            yield (
                f"| {row.setting} | {_mb(row.budget_bytes)} | {_mb(row.predicted_bytes)} | {_mb(row.peak_bytes)} "
                f"| {_percent(row.predicted)} | {_with_spread(row)} | {row.options} |"
            )
    for setting, error in record.get("errors", {}).items():
        yield f"| {setting} | | | | | does not run | {error.replace('|', '/')} |"
    if rounds:
        yield from ["", *_split_table(record, rows)]


def _split_table(record: Record, rows: list[Row]) -> Iterator[str]:
    yield "| the batch may be split | micro-batch | measured peak | samples per CPU second | against full |"
    yield "|---|---|--:|--:|--:|"
    batch, unit = record["batch"], unit_s(record)
    named = {row.setting: row for row in rows if row.slowdown is not None}
    full = named.get(FULL)
    for setting in (NONE, FULL, AT_FULL, SPLIT_AT_FULL, AT_MIDDLE, SPLIT_AT_MIDDLE):
        if setting in named:
            row = named[setting]
            per_s = batch / (unit * (1 + (row.slowdown or 0.0)))
            gain = "" if full is None else f"{(1 + (full.slowdown or 0.0)) / (1 + (row.slowdown or 0.0)) - 1:+.1%}"
            sizes = f"{row.micro_batch or batch} x {row.accumulation or 1}"
            yield f"| {setting} | {sizes} | {_mb(row.peak_bytes)} | {per_s:.3f} | {gain} |"


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:+.1%}"


def _with_spread(row: Row) -> str:
    if row.slowdown is None:
        return ""
    return "unit" if row.setting == NONE else f"{row.slowdown:+.1%} ± {(row.spread or 0.0) * 100:.1f}"
