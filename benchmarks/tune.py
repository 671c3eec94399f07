"""What `memplan.tune` finds beside an exhaustive sweep: `python benchmarks/tune.py --write`.

    python benchmarks/tune.py --only tiny     # the tests' own Llama, to try the benchmark itself

For each workload on the CPU, at a budget half way between the smallest plan and the whole batch at once: `tune` takes a
plan; then all that it chose from are run in rounds on one live model, as in `frontier.py`, and each counts by its
median. By that clock the plan that `tune` took may be at most 2 % slower than the best one, and `tune` may have run a
third of them. Results are kept in docs/tune.json, so that workloads can be run one by one.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch
import workloads
from frontier_measure import NONE, TINY, build, laps, plan_file
from frontier_report import ratios, spread

import memplan
from memplan.units import format_bytes, format_seconds

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NAMES = ("W1", "W2", "W3", "W4")
MOST_SLOWER, MOST_RUN = 0.02, 1 / 3

HEAD = """# Tuning

```python
found = memplan.tune(model, "cuda", sample=batch, effective_batch=64, storage="shared/tune.log")
fit = found.apply(model)  # the fastest plan that was measured within the budget
print(found.describe())
```

`tune` asks the planner for a plan for every micro-batch, share of the budget and strategy, with and without the loss
head's lever; where the loss compares the rows of a batch, the whole batch is the only one. It runs the most promising
for a few real steps each, which train nothing, and lets go what cannot win any more. Where two are close, they are run
again in turn.

Started again with the same storage (`--storage tune.log` on the command line) it goes on; another batch of the same
shapes belongs to the same study. Started on several machines, or cards of one kind, it shares the work: each process
runs plans on the card that its model is on, and gets the plan that is found as one for that card. The trial of a
process that was killed is taken up by the others, at once on the same machine, elsewhere when it has said nothing for
longer than its steps should take. The storage is Optuna's: a journal on a shared file system
("tune.log"), a database ("postgresql://...", "sqlite:///tune.db") or a proxy ("grpc://host:13000"). A journal whose
last line was cut short, by a full disk or a killed process, is gone on with; only what that line was to say is lost.

The plan can be looked at like any other, beside what it took:

```sh
memplan tune MODEL --gpu cuda --effective-batch 64 --save plan.json --measured measured.json
memplan report plan.json measured.json
```

## Beside an exhaustive sweep

Made by `python benchmarks/tune.py --write`, on the CPU. Every plan of a workload is run in rounds with all others on
one live model (the sweep), each lap beside one of no plan; the median of these ratios counts. By that clock the plan
that `memplan.tune` took may be at most 2 % slower than the best, when it has run at most a third of the plans (those
that are close to each other more than once). The noise is twice the median deviation of no plan against itself:
smaller differences mean nothing, and a plan that is slower by more than 2 % and by less than the noise is an open case;
one that passes beside more noise than 2 % has passed by its median. On a card, where trials run in a process of their
own, this is not yet measured.
"""

Answer = dict[str, Any]


def compare(name: str, rounds: int) -> Answer:
    """`tune`, and then the sweep over all that it chose from."""
    model, batch = build(name)
    samples = next(iter(batch.values())).shape[0]
    asked: Answer = {"sample": batch, "effective_batch": samples}
    whole_bytes = memplan.predict(model, batch).peak_bytes
    budget_bytes = (memplan.plan(model, "cpu", **asked).smallest_bytes + whole_bytes) // 2
    tuned = memplan.tune(model, f"cpu:{budget_bytes}B", **asked)
    return {
        "about": "the tests' 4-layer Llama, 4 x 64 tokens" if name == TINY else workloads.SMALL[name].about,
        "threads": torch.get_num_threads(),
        "budget_bytes": budget_bytes,
        "taken": str(tuned.number),
        "gap": tuned.gap,
        **swept(name, {str(trial.number): trial.plan for trial in tuned.trials}, rounds),
        "plans": {
            str(trial.number): {
                "micro_batch": trial.micro_batch,
                "budget_share": trial.budget_share,
                "strategy": trial.strategy,
                "loss_head": trial.loss_head,
                "predicted_s": trial.plan.step_s,
                "tuned_s": None if trial.measured is None else trial.measured.step_s,
            }
            for trial in tuned.trials
        },
    }


def swept(name: str, plans: dict[str, memplan.Plan], rounds: int) -> Answer:
    """Each plan's step over one of the whole batch without a plan: median, and that of no plan against itself."""
    kept = ROOT / "build" / "tune"
    for number, plan in plans.items():
        path = plan_file(str(kept), name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)
    answers = list(laps(name, [NONE, *plans], rounds, str(kept)))
    if errors := [answer["error"] for answer in answers if "error" in answer]:
        raise RuntimeError(errors[0])
    runs = [answer["round"] for answer in answers]
    paired = ratios(runs)
    return {
        "rounds": rounds,
        "unit_s": median(seconds for run in runs for setting, seconds in run if setting == NONE),
        "noise": 2 * spread(paired.pop(NONE)),
        "swept": {number: median(found) for number, found in paired.items()},
    }


def page(results: dict[str, Answer]) -> str:
    lines = [
        HEAD,
        "| workload | budget | plans | run | slower than the best | noise | |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, result in sorted(results.items()):
        plans = result["plans"]
        ran = sum(plan["tuned_s"] is not None for plan in plans.values())
        slower = result["swept"][result["taken"]] / min(result["swept"].values()) - 1
        fails = ran > MOST_RUN * len(plans) or slower > max(MOST_SLOWER, result["noise"])
        verdict = "**fail**" if fails else "pass" if slower <= MOST_SLOWER else "open"
        lines.append(
            f"| {name}: {result['about']} | {format_bytes(result['budget_bytes'])} | {len(plans)} | {ran} |"
            f" {slower:.1%} | {result['noise']:.1%} | {verdict} |"
        )
    missing = [name for name in NAMES if name not in results]
    lines += ["", f"Not yet measured: {', '.join(missing)}."] if missing else []
    for name, result in sorted(results.items()):
        lines += [
            "",
            f"## {name}",
            "",
            f"torch threads: {result['threads']}. Taken: plan {result['taken']}. By `tune`'s own account no other "
            f"could be more than {result['gap']:.1%} faster. {result['rounds']} rounds, in which a step without a plan "
            f"took {format_seconds(result['unit_s'])}.",
            "",
            "| plan | micro-batch | share | strategy | loss head | predicted | by tune | in the sweep |",
            "|--:|--:|--:|---|---|--:|--:|--:|",
        ]
        for number, plan in result["plans"].items():
            tuned = "let go" if plan["tuned_s"] is None else format_seconds(plan["tuned_s"])
            settings = [plan[name] for name in ("micro_batch", "budget_share", "strategy", "loss_head")]
            seconds = [format_seconds(plan["predicted_s"]), tuned, f"{result['swept'][number] - 1:+.1%}"]
            lines.append(f"| {' | '.join(map(str, [number, *settings, *seconds]))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=(*NAMES, TINY), default=NAMES)
    parser.add_argument("--rounds", type=int, default=7, help="laps of each plan, beside one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/tune.json and docs/tune.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["MEMPLAN_CACHE"] = "off"  # as on a machine that has learned nothing yet
    kept = DOCS / "tune.json"
    results: dict[str, Answer] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for name in args.only:
        results[name] = compare(name, args.rounds)
        if args.write:
            kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (DOCS / "tune.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
