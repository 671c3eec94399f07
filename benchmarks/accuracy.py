"""Predicted against measured peaks of whole training steps on the CPU: `python benchmarks/accuracy.py --write`.

Every case is run for real, in a process of its own, and predicted by `memplan.predict` (for plans: `Plan.peak_bytes`).
Real runs take long, so results are kept in docs/accuracy.json: what is in there is not measured again. `--again`
predicts it anew with today's memplan, `--cases W1/adamw` limits what is done to names that contain the text.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import workloads
from steps import make_step

import memplan
from memplan import levers
from memplan.device import CpuDevice

DOCS = Path(__file__).resolve().parents[1] / "docs"
YARDSTICK = Path(__file__).resolve().parents[2] / "shared" / "tools"

OPTIMIZERS = {"adamw": "adamw", "adamw-foreach-false": "adamw-single", "sgd-momentum": "sgd-momentum"}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
MODES = ("plain", "checkpointed", "planned", "selected")
STRATEGIES = {"planned": memplan.Strategy("whole blocks", levers=("recompute",)), "selected": "balanced"}


@dataclass(frozen=True, slots=True)
class Case:
    workload: str
    optimizer: str
    dtype: str
    mode: str
    accumulation: int

    @property
    def name(self) -> str:
        return f"{self.workload}/{self.optimizer}/{self.dtype}/{self.mode}/{self.accumulation}"

    @property
    def options(self) -> dict[str, Any]:
        return {"optimizer": OPTIMIZERS[self.optimizer], "autocast": DTYPES[self.dtype]}


def every_case() -> Iterator[Case]:
    """The most varied first."""
    for optimizer in OPTIMIZERS:
        for accumulation in (1, 2):
            for mode in MODES:
                for workload in ("W1", "W4", "W5", "W6", "W2", "W3"):
                    if (workload, mode) == ("W5", "checkpointed"):
                        continue  # transformers has no checkpointing for it
                    if mode == "selected" and optimizer != "adamw":
                        continue  # what is inside the blocks does not depend on it
                    for dtype in DTYPES if workload in ("W1", "W2", "W3") else ("fp32",):
                        yield Case(workload, optimizer, dtype, mode, accumulation)


def run(case: Case) -> dict[str, Any]:
    """Measure and predict one case."""
    model, batch = workloads.build(case.workload)
    decisions, selections = _decide(case, model, batch)
    undo = levers.install(model, decisions, selections)
    predicted = _predict(case, model, batch)
    step = make_step(
        model,
        batch,
        optimizer=case.optimizer,  # type: ignore[arg-type]  # one of OPTIMIZERS
        autocast=DTYPES[case.dtype],
        accumulation=case.accumulation,
    )
    measured = meter()(step)
    undo()
    return {"measured": measured, "predicted": predicted, "decisions": decisions, "selections": selections}


def predict_again(case: Case, decisions: dict[str, str], selections: dict[str, list[str]]) -> int:
    """Today's prediction of a case that was measured before, with the decisions it was measured with."""
    model, batch = workloads.build(case.workload)
    if case.mode == "checkpointed":
        model.gradient_checkpointing_enable()
    with levers.decided(model, decisions, selections):
        return _predict(case, model, batch)


def _again(case: Case, result: dict[str, Any]) -> dict[str, int]:
    return {"predicted": predict_again(case, result["decisions"], result.get("selections", {}))}


def _predict(case: Case, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    return memplan.predict(model, batch, accumulation=case.accumulation, **case.options).peak_bytes


def _decide(
    case: Case, model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """For a plan: halfway between keeping and recomputing everything. Made without weights, so nothing is timed."""
    if case.mode == "checkpointed":
        model.gradient_checkpointing_enable()
    if case.mode not in STRATEGIES:
        return {}, {}
    rows = next(iter(batch.values())).shape[0]
    bare = copy.deepcopy(model).to("meta")
    asked = {"sample": batch, "micro_batch": rows, **case.options}
    if case.workload != "W5":  # batch norm: a plan never splits its batch; the same decisions are run accumulated
        asked["effective_batch"] = rows * case.accumulation
    full = memplan.plan(bare, "cpu:1TiB", strategy="huggingface", **asked)
    budget = f"cpu:{(full.peak_bytes + full.unplanned_bytes) // 2}B"
    half = memplan.plan(bare, budget, strategy=STRATEGIES[case.mode], **asked)
    return half.decisions, half.selections


def meter() -> Callable[[Callable[[], None]], int]:
    """An independent meter where there is one beside the checkout, else memplan's own (both read allocator events)."""
    if not YARDSTICK.is_dir():
        return CpuDevice().peak_of
    sys.path.insert(0, str(YARDSTICK))
    from true_peak import true_peak  # type: ignore[import-not-found]  # beside the project

    return lambda step: int(true_peak(step, warmup=0))  # its own first run creates the optimizer state


def table(results: dict[str, dict[str, Any]]) -> str:
    errors = {name: r["predicted"] / r["measured"] - 1 for name, r in results.items()}
    worst = max(errors, key=lambda name: abs(errors[name]))
    whole = sum(1 for _ in every_case())
    exact = sum(r["predicted"] == r["measured"] for r in results.values())
    lines = [
        "# Accuracy on the CPU",
        "",
        f"{len(results)} of {whole} cases measured; {exact} predicted to the byte. "
        f"Median error {median(map(abs, errors.values())):.5%}, worst {errors[worst]:+.5%} ({worst}).",
        "",
        "Peak bytes of one whole steady-state training step, counted by torch's own CPU allocator events. Made by",
        "`python benchmarks/accuracy.py --write`; the workloads are those of `benchmarks/workloads.py`. Plans aim",
        "halfway between the peak with every block kept and with every block recomputed: *planned* ones recompute",
        "whole blocks, *selected* ones use every lever of the strategy `balanced`.",
        "",
        "Not in the predictions: 0-dim tensors of 4 to 12 bytes that wrap Python numbers inside operators. Not in the",
        "measurement: scratch memory that does not come from torch's allocator, the Python heap.",
        "",
        "| workload | optimizer | precision | blocks | accumulation | measured | predicted | difference | error |",
        "|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    for case in sorted(every_case(), key=lambda case: case.name):
        if case.name in results:
            r = results[case.name]
            lines.append(
                f"| {case.workload} | {case.optimizer} | {case.dtype} | {case.mode} | {case.accumulation} "
                f"| {r['measured']:,} | {r['predicted']:,} | {r['predicted'] - r['measured']:+,} "
                f"| {errors[case.name]:+.5%} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--again", action="store_true", help="predict what is measured already anew; measure nothing")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy.md")
    parser.add_argument("--cache", type=Path, default=DOCS / "accuracy.json", help="where results are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = {case.name: case for case in every_case() if args.cases in case.name}
    results = json.loads(args.cache.read_text()) if args.cache.exists() else {}
    if args.one:
        case = cases[args.one]
        again = _again(case, results[args.one]) if args.again else None
        print(json.dumps(again or run(case)))
        return
    for name in cases:
        if (name in results) == args.again:
            command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--cache", str(args.cache)]
            command += ["--again"] if args.again else []
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            results[name] = results.get(name, {}) | json.loads(answer.stdout.splitlines()[-1])
            args.cache.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            r = results[name]
            error = r["predicted"] / r["measured"] - 1
            print(f"{name:44} {r['measured']:>13,} {r['predicted']:>13,} {error:+.5%}", flush=True)
    if args.write:
        (DOCS / "accuracy.md").write_text(table(results))


if __name__ == "__main__":
    main()
