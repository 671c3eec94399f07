"""Predicted against measured memory of training steps on a card: `python benchmarks/cuda_accuracy.py --write`.

For each case of `cuda_cases.py`: peak allocated and peak reserved of a steady step, beside what `memplan.predict` says;
then the cap test on both sides. With the allocator capped to the predicted smallest cap without retries, the case has
to run from its first allocation with none; at 97 % of it, it has to retry or fail. Every run has a process of its own.

Results go to docs/cuda_accuracy.json as soon as they are there, and what is in there is not measured again.
`--histories` also keeps what the allocator did in the small cases, in tests/data/allocator, where the tests have
memplan's allocator repeat it. `--dry-run` does all of it with tiny models on the CPU and a fake device that counts and
has a cap; its results stay in build/cuda-dry.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from cuda_cases import CASES, HISTORY_STEPS, MODELS
from cuda_runs import (
    DRY,
    NOT_YET,
    ROOT,
    Answer,
    Asks,
    Job,
    Store,
    facts,
    gib,
    machine_text,
    run_all,
    run_command,
    time_plan,
)

BELOW = 0.97  # of the predicted cap: there it has to retry or fail
AT, UNDER = "at the cap", f"at {BELOW:.0%} of it"
LIMIT_S = 1500
GUESS_S = {"plain": 12.0, "checkpointed": 12.0, "planned": 35.0}  # no card has run this yet
CAP_GUESS_S = 10.0

MEDIAN, WORST = 0.01, 0.03  # targets for the error of the peak allocated

Results = Mapping[str, Mapping[str, Any]]


def jobs(store: Store, folder: Path, names: Sequence[str], *, dry: bool, histories: bool) -> list[Job]:
    """Each case, and its cap tests right after it."""
    found = []
    for name in names:
        case, plan_file = CASES[name], str(folder / f"accuracy {name}.json".replace(" ", "-").replace("/", "-"))
        common: Answer = {"name": name, "tiny": dry, "plan_file": plan_file}
        measure: Answer = {"do": "case", **common, "history": histories and case.history}
        found.append(Job(name, case.mode, GUESS_S[case.mode], partial(dict, measure)))
        for side, share in ((AT, 1.0), (UNDER, BELOW)):
            found.append(Job(f"{name} {side}", "cap", CAP_GUESS_S, _cap_request(store, common, share)))
    return found


def _cap_request(store: Store, common: Answer, share: float) -> Callable[[], Answer | None]:
    def request() -> Answer | None:
        cap = store.results.get(common["name"], {}).get("smallest_cap")
        planned = CASES[common["name"]].mode == "planned"
        if cap is None or (planned and not Path(common["plan_file"]).exists()):
            return None
        return {"do": "cap", **common, "cap": int(cap * share)}

    return request


# --- what it says ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One case of the table; None where it is not measured, or not predicted."""

    name: str
    allocated: int | None
    reserved: int | None
    retries: int | None
    predicted: int | None
    predicted_reserved: int | None
    cap: int | None
    holds: bool | None  # ran at the cap without a retry
    is_tight: bool | None  # retried or failed below it
    fault: str | None

    @property
    def error(self) -> float | None:
        return _error(self.predicted, self.allocated)

    @property
    def reserved_error(self) -> float | None:
        return _error(self.predicted_reserved, self.reserved)


def line_of(results: Results, name: str) -> Line:
    result = results.get(name, {})
    predicted = result.get("predicted", {})
    fault = result.get("fault", result).get("error")
    return Line(
        name=name,
        allocated=result.get("allocated"),
        reserved=result.get("reserved"),
        retries=result.get("retries"),
        predicted=predicted.get("peak"),
        predicted_reserved=predicted.get("reserved"),
        cap=result.get("smallest_cap"),
        holds=_negated(_suffers(results.get(f"{name} {AT}"))),
        is_tight=_suffers(results.get(f"{name} {UNDER}")),
        fault=fault,
    )


def _suffers(result: Mapping[str, Any] | None) -> bool | None:
    """Whether a run under a cap retried or failed; None if it did not take place."""
    if result is None or "retries" not in result:
        return None
    return bool(result["oom"]) or any(result["retries"].values())


def _negated(value: bool | None) -> bool | None:
    return None if value is None else not value


def _error(predicted: int | None, measured: int | None) -> float | None:
    return None if predicted is None or measured is None else predicted / measured - 1


def document(store: Store) -> str:
    """The part of docs/cuda.md that this command writes."""
    lines = [line_of(store.results, name) for name in CASES]
    text = [machine_text(store.data["machine"]), "", *_verdicts(lines), ""]
    text += ["| case | what |", "|---|---|", *(f"| {name} | {model.about} |" for name, model in MODELS.items()), ""]
    text += [
        "| case | peak allocated GiB | predicted | error | peak reserved GiB | predicted | error | retries | "
        f"cap GiB | no retry {AT} | retries or fails {UNDER} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    return "\n".join([*text, *map(_row, lines), ""])


def _verdicts(lines: Sequence[Line]) -> Iterator[str]:
    yield "| target | | |"
    yield "|---|---|---|"
    for what, errors in (
        ("peak allocated", [line.error for line in lines]),
        ("peak reserved", [line.reserved_error for line in lines]),
    ):
        known = [abs(error) for error in errors if error is not None]
        numbers = (
            f"median {median(known):.2%}, worst {max(known):.2%}, {len(known)} of {len(lines)} cases" if known else ""
        )
        if what == "peak reserved":
            yield f"| error on {what} | {'' if known else NOT_YET} | {numbers} |"
            continue
        good = _word(median(known) <= MEDIAN and max(known) <= WORST if known else None)
        yield f"| error on {what}: median at most {MEDIAN:.0%}, worst at most {WORST:.0%} | {good} | {numbers} |"
    for what, sides in (
        (f"no retry {AT}", [line.holds for line in lines]),
        (f"retries or fails {UNDER}", [line.is_tight for line in lines]),
    ):
        told = [side for side in sides if side is not None]
        numbers = f"{sum(told)} of {len(told)}" if told else ""
        yield f"| {what} | {_word(all(told) if told else None)} | {numbers} |"


def _word(passed: bool | None) -> str:
    return NOT_YET if passed is None else "pass" if passed else "**fail**"


def _row(line: Line) -> str:
    if line.allocated is None:
        missing = line.fault is not None and line.fault.startswith("BitsandbytesMissing")
        words = f"{NOT_YET}: bitsandbytes is not installed there" if missing else line.fault or NOT_YET
        return f"| {line.name} | {words.replace('|', '/')} {'| ' * 9}|"
    cells = (
        line.name,
        gib(line.allocated),
        gib(line.predicted),
        _percent(line.error),
        gib(line.reserved),
        gib(line.predicted_reserved),
        _percent(line.reserved_error),
        str(line.retries),
        gib(line.cap),
        _yes(line.holds),
        _yes(line.is_tight),
    )
    return "".join(f"| {cell} " for cell in cells) + "|"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:+.2%}"


def _yes(value: bool | None) -> str:
    return NOT_YET if value is None else "yes" if value else "**no**"


def keep_histories(store: Store, folder: Path) -> None:
    """Move recorded histories out of the results into files of their own, one event a line. None had a cap."""
    for name, result in store.results.items():
        history = result.pop("history", None)
        if history is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (events,) = history.pop("device_traces")
        lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        origin = (
            f"{name}, from the first allocation through {HISTORY_STEPS} steps. {machine_text(store.data['machine'])}"
        )
        head = json.dumps({"origin": origin, "cap_bytes": None, **history})
        path = folder / f"history {name}.json".replace(" ", "-").replace("/", "-")
        path.write_text(f'{head[:-1]}, "device_traces": [[\n{lines}\n]]}}\n')
        print(f"{name:60} {len(events)} events in {path.name}", flush=True)
    store.save()


def main(argv: Sequence[str] | None = None, asks: Asks | None = None) -> str:
    """Measure, print, and return the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--histories", action="store_true", help="keep what the allocator did in the small cases")
    return run_command(
        parser,
        argv,
        asks,
        limit_s=LIMIT_S,
        dry=DRY / "accuracy",
        name="cuda_accuracy.json",
        part="accuracy",
        measure=_measure,
        document=document,
    )


def _measure(asks: Asks, store: Store, args: argparse.Namespace, begin: float) -> None:
    first = facts(asks, args.limit_s)
    store.on(first["facts"])
    names = [name for name in CASES if args.cases in name]
    if not names:
        raise SystemExit(f"no case's name contains {args.cases!r}; there are {', '.join(CASES)}")
    folder = (DRY / "accuracy" if args.dry_run else ROOT / "build") / "plans"
    todo = jobs(store, folder, names, dry=args.dry_run, histories=args.histories)
    time_plan(todo, store, args.limit_s)
    run_all(todo, asks, store, args.limit_s, begin)
    keep_histories(store, DRY / "accuracy" if args.dry_run else ROOT / "tests" / "data" / "allocator")


if __name__ == "__main__":
    main()
