"""memplan's plans beside what people set by hand, time against memory: `python benchmarks/frontier.py --write`.

For each workload: the peaks of no checkpointing and of the peers (`peers.py`), each in a process of its own; plans at
the peak that full checkpointing reaches, at the middle between that and none, and at budgets evenly from the smallest
feasible one up; their peaks; then rounds of whole steps of all of them in one process. A second pair of plans may split
the batch. Runs for hours, so everything goes to docs/frontier.json as soon as it is measured, and what is in there is
not measured again: start it again after an interruption. Two runs of different workloads may share the file.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import workloads
from frontier_measure import COMPILED, NONE, TINY, plan_file
from frontier_report import AT_FULL, AT_MIDDLE, SPLIT_AT_FULL, SPLIT_AT_MIDDLE, document, verdicts
from peers import FULL, PEERS

ROOT = Path(__file__).resolve().parents[1]
MEASURE = Path(__file__).with_name("frontier_measure.py")
ORDER = ("W1", "W6", "W2", "W4", "W3", "W5")  # the most telling first
COMPILES = ("W1", "W4", "W5")

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Store:
    """The file of all results, one record a workload. Safe for several runs, each with workloads of its own."""

    path: Path

    def load(self) -> dict[str, Record]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def save(self, workload: str, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            everything = self.load() | {workload: record}
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as fresh:
                fresh.write(_text(everything))
            Path(fresh.name).chmod(0o644)
            Path(fresh.name).replace(self.path)  # at once: a killed run leaves the old file or the new one
        finally:
            os.close(folder)


def _text(everything: dict[str, Record]) -> str:
    """JSON with one line per entry of a record's tables, so that changes can be read."""
    texts = []
    for workload, record in sorted(everything.items()):
        lines = []
        for key, value in record.items():
            if isinstance(value, dict) and value:
                rows = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                lines.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
            elif isinstance(value, list) and value:
                lines.append(f"  {json.dumps(key)}: [\n" + ",\n".join(f"   {json.dumps(v)}" for v in value) + "\n  ]")
            else:
                lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        texts.append(f" {json.dumps(workload)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(texts) + "\n}\n"


@dataclass(frozen=True, slots=True)
class Run:
    """One workload: what is asked for, and the record that is filled."""

    workload: str
    store: Store
    record: Record
    plans: Path
    rounds: int
    budgets: int
    compile_budgets: tuple[str, ...]

    def everything(self) -> None:
        compiled = [COMPILED + budget for budget in self.compile_budgets]
        self._forget_lost_plans()
        self._peaks([NONE, *PEERS, *compiled])
        if FULL in self.record["peaks"]:
            self._plan(self._named_budgets())
            self._plan(self._even_budgets())
        self._peaks([setting for setting, plan in self.record["plans"].items() if not plan["same_as"]])
        usable = [setting for setting in self.record["peaks"] if not setting.startswith(COMPILED)]
        self._laps(usable)
        for setting in compiled:  # alone: what is compiled stays with the process
            if setting in self.record["peaks"]:
                self._laps([NONE, setting])

    def _ask(self, do: str, **request: Any) -> Iterator[Record]:
        """The answers of one measuring process, each saved by the caller as it comes."""
        threads = self.record["threads"]
        request |= {"do": do, "workload": self.workload, "threads": threads, "plans": str(self.plans)}
        # Waiting threads must sleep: those that spin would count as CPU time.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        environment["KINETO_LOG_LEVEL"] = "6"  # the profiler library writes to stderr otherwise
        command = [sys.executable, "-W", "ignore", str(MEASURE), json.dumps(request)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        if process.returncode:
            raise SystemExit(f"measuring {do} of {self.workload} ended with {process.returncode}; its words are above")

    def _save(self, what: str) -> None:
        self.store.save(self.workload, self.record)
        print(f"{self.workload} {what}", flush=True)

    def _note(self, answer: Record) -> None:
        """An error takes the place of whatever else is known of the setting."""
        setting = answer["setting"]
        if "error" in answer:
            self.record["errors"][setting] = answer["error"]
            self.record["peaks"].pop(setting, None)
            self._save(f"{setting}: {answer['error']}")
            return
        if "peak" in answer:
            self.record["peaks"][setting] = answer["peak"]
            self.record["static"] = answer["static"] if setting == NONE else self.record["static"]
            self._save(f"{setting}: peak {answer['peak']:,}")
        if "plan" in answer:
            plan = answer["plan"]
            twins = (name for name, other in self.record["plans"].items() if _same(plan, other))
            plan["same_as"] = next(twins, None)
            self.record["plans"][setting] = plan
            self._save(f"{setting}: planned in {plan['planning_s']} s, {plan['options']}")

    def _peaks(self, settings: list[str]) -> None:
        for setting in settings:
            if setting not in self.record["peaks"] | self.record["errors"]:
                for answer in self._ask("peak", setting=setting):
                    self._note(answer)

    def _plan(self, budgets: dict[str, tuple[int, bool]]) -> None:
        missing = {s: b for s, b in budgets.items() if s not in self.record["plans"] | self.record["errors"]}
        if missing:
            for answer in self._ask("plan", budgets=missing):
                self._note(answer)

    def _named_budgets(self) -> dict[str, tuple[int, bool]]:
        """(bytes, whether the batch may be split)."""
        full, none = self.record["peaks"][FULL], self.record["peaks"][NONE]
        middle = (full + none) // 2
        fixed = {AT_FULL: (full, False), AT_MIDDLE: (middle, False)}
        return fixed | {SPLIT_AT_FULL: (full, True), SPLIT_AT_MIDDLE: (middle, True)}

    def _even_budgets(self) -> dict[str, tuple[int, bool]]:
        """From the smallest that is feasible, in even steps; the last of them would end at no checkpointing."""
        known = [self.record["plans"][name] for name in (AT_FULL, AT_MIDDLE) if name in self.record["plans"]]
        if not known:
            return {}
        low, high = min(plan["smallest_bytes"] for plan in known), self.record["peaks"][NONE]
        at = {k: low + (high - low) * k // self.budgets for k in range(self.budgets)}
        return {f"memplan {k}/{self.budgets}": (budget, False) for k, budget in at.items()}

    def _laps(self, settings: list[str]) -> None:
        done = sum(set(settings) <= {setting for setting, _ in laps} for laps in self.record["rounds"])
        if done >= self.rounds:
            return
        for answer in self._ask("laps", settings=settings, rounds=self.rounds - done):
            if "round" in answer:
                self.record["rounds"].append(answer["round"])
                done += 1
                self._save(f"round {done} of {self.rounds}, {len(answer['round'])} laps")
            else:
                self._note(answer)

    def _forget_lost_plans(self) -> None:
        """Rounds that are still to come need the plans as files; one made anew may be another plan."""
        lost = [s for s in self.record["plans"] if not plan_file(str(self.plans), self.workload, s).exists()]
        if lost and len(self.record["rounds"]) < self.rounds:
            forget_plans(self.record)


def _same(plan: Record, other: Record) -> bool:
    return not other["same_as"] and all(plan[n] == other[n] for n in ("decisions", "micro_batch", "accumulation"))


def fresh(workload: str, threads: int) -> Record:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = {"batch": 4} if workload == TINY else {"batch": _rows(workload)}
    tables: Record = {"peaks": {}, "plans": {}, "errors": {}, "rounds": []}
    return {"threads": threads, "versions": versions, **rows, "static": 0, **tables}


def _rows(workload: str) -> int:
    return int(next(iter(workloads.SMALL[workload].make_batch().values())).shape[0])


def forget_plans(record: Record) -> None:
    """Keep only what is known of the peers' memory; times count only if all were taken together."""
    for setting in record["plans"]:
        record["peaks"].pop(setting, None)
    record["errors"] = {s: e for s, e in record["errors"].items() if s in PEERS or s.startswith(COMPILED)}
    record["plans"], record["rounds"] = {}, []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(ORDER), help="which ones, in this order")
    parser.add_argument("--rounds", type=int, default=7, help="laps of each setting, beside one that warms up")
    parser.add_argument("--budgets", type=int, default=8, help="even budgets, beside the two named ones")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with 1, CPU and wall time are the same")
    parser.add_argument("--compile", default="", help="activation memory budgets such as 0.75,0.5, for W1, W4 and W5")
    parser.add_argument("--replan", action="store_true", help="make plans and times anew, keep the peers' peaks")
    parser.add_argument("--write", action="store_true", help="write docs/frontier.md")
    parser.add_argument("--render", action="store_true", help="measure nothing, only render what is measured")
    parser.add_argument("--cache", type=Path, default=ROOT / "docs" / "frontier.json", help="where results are kept")
    parser.add_argument(
        "--plans", type=Path, default=ROOT / "build" / "frontier", help="where plans are kept meanwhile"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 budgets, 2 rounds, a cache of its own")
    args = parser.parse_args()
    if args.quick:
        args.workloads, args.rounds, args.budgets = TINY, 2, 2
        args.cache = ROOT / "build" / "frontier.json"
    store = Store(args.cache)
    for workload in [] if args.render else args.workloads.split(","):
        record = store.load().get(workload) or fresh(workload, args.threads)
        if record["threads"] != args.threads:
            raise SystemExit(
                f"{workload} was measured with --threads {record['threads']}: take that, or another --cache"
            )
        if args.replan:
            forget_plans(record)
        compiles = tuple(filter(None, args.compile.split(","))) if workload in (*COMPILES, TINY) else ()
        Run(workload, store, record, args.plans, args.rounds, args.budgets, compiles).everything()
        for verdict in verdicts(workload, record):
            print(f"{workload} {'pass' if verdict.passed else 'FAIL'} {verdict.what}: {verdict.numbers}", flush=True)
    about = {name: workloads.SMALL[name].about for name in ORDER} | ({TINY: "a tiny Llama"} if args.quick else {})
    text = document({name: record for name, record in store.load().items() if name in about}, about)
    if args.write and not args.quick:
        (ROOT / "docs" / "frontier.md").write_text(text)
    elif args.render or args.quick:
        print(text)


if __name__ == "__main__":
    main()
