"""What `memplan.tune` finds beside an exhaustive sweep: `python benchmarks/tune.py --write`.

    python benchmarks/tune.py --only tiny --rows 2 --write     # the tests' own Llama, for a machine with little time

For each workload on the CPU, at a budget half way between the smallest plan and the whole batch at once: the plans that
`tune` chooses from are all run in turn, several times, each in the same process on the same model, and each counts by
its least lap. By that clock the plan that `tune` took may be at most 2 % slower than the best one, and `tune` may have
run a third of them. Results are kept in docs/tune.json, so that workloads can be run one by one.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import workloads
from torch import nn

import memplan
from memplan.bench import Bench, Failure
from memplan.blocks import find_blocks
from memplan.device import CpuDevice
from memplan.laps import by_turns
from memplan.plan_record import Plan
from memplan.recorder import Recipe
from memplan.samples import Sample
from memplan.units import format_bytes, format_seconds

DOCS = Path(__file__).resolve().parents[1] / "docs"
NAMES = ("W1", "W2", "W3", "W4")
TINY = "tiny"  # for trying the benchmark itself
MOST_SLOWER, MOST_RUN = 0.02, 1 / 3

HEAD = """# Tuning

```python
found = memplan.tune(model, "cuda", sample=batch, effective_batch=64, storage="shared/tune.log")
fit = found.apply(model)  # the fastest plan that was measured within the budget
print(found.describe())
```

`tune` asks the planner for a plan for every micro-batch, share of the budget and strategy, with and without the loss
head's lever. It runs the most promising for a few real steps each, which train nothing, and lets go what cannot win any
more. Where two are close, they are run again in turn.

Started again with the same storage it goes on. Started on several machines, or cards of one kind, it shares the work:
each process runs plans on the card that its model is on, and gets the plan that is found as one for that card. The
trial of a process that was killed is taken up by the others. The storage is Optuna's: a journal on a shared file system
("tune.log"), a database ("postgresql://...", "sqlite:///tune.db") or a proxy ("grpc://host:13000"). A journal whose
last line was cut short, by a full disk or a killed process, is gone on with; only what that line was to say is lost.

The plan can be looked at like any other, beside what it took:

```sh
memplan tune MODEL --gpu cuda --effective-batch 64 --save plan.json --measured measured.json
memplan report plan.json measured.json
```

## Beside an exhaustive sweep

Made by `python benchmarks/tune.py --write`, on the CPU. Every plan of a workload is run in turn with all others (the
sweep). By that clock the plan that `memplan.tune` took may be at most 2 % slower than the best, for at most a third of
the runs. The doubt is how far apart the two least laps of one plan lay: smaller differences mean nothing, and a plan
that is slower by more than 2 % and by less than that is an open case: the machine was too busy to tell. On a card,
where trials run in a process of their own, this is not yet measured.
"""

Answer = dict[str, Any]


def build(name: str, blocks: int | None, rows: int | None, tokens: int | None) -> tuple[nn.Module, workloads.Batch]:
    """A workload, with fewer blocks, samples or tokens where that is asked for."""
    model, batch = workloads.build(name) if name != TINY else tiny()
    if blocks is not None:
        stack = model.get_submodule(find_blocks(model)[0].rpartition(".")[0])
        assert isinstance(stack, nn.ModuleList)
        del stack[blocks:]
    shorter = {key: tensor[:, :tokens] if tensor.dim() == 2 else tensor for key, tensor in batch.items()}
    return model, {key: tensor[:rows].clone() for key, tensor in shorter.items()}


def tiny() -> tuple[nn.Module, workloads.Batch]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny as models  # type: ignore[import-not-found]  # beside the tests

    made: tuple[nn.Module, workloads.Batch] = models.llama(rows=4, length=64, use_cache=False)
    return made


def compare(name: str, reduced: dict[str, int | None]) -> Answer:
    """`tune`, and then the sweep over all that it chose from."""
    model, batch = build(name, **reduced)
    samples = next(iter(batch.values())).shape[0]
    asked: Answer = {"sample": batch, "effective_batch": samples}
    whole_bytes = memplan.predict(model, batch).peak_bytes
    budget_bytes = (memplan.plan(model, "cpu", **asked).smallest_bytes + whole_bytes) // 2
    tuned = memplan.tune(model, f"cpu:{budget_bytes}B", **asked)
    with Bench(model, Recipe(), Sample.of(batch), CpuDevice()) as bench:

        def lap(plan: Plan) -> float:
            found = bench.run(plan)
            if isinstance(found, Failure):
                raise RuntimeError(found.why)
            return found.step_s

        plans = {str(trial.number): trial.plan for trial in tuned.trials}
        swept = by_turns({number: lambda plan=plan: lap(plan) for number, plan in plans.items()})  # type: ignore[misc]
    taken = next(trial for trial in tuned.trials if trial.measured == tuned.measured)
    return {
        "about": "the tests' 4-layer Llama, 4 x 64 tokens" if name == TINY else workloads.SMALL[name].about,
        "reduced": reduced,
        "threads": torch.get_num_threads(),
        "budget_bytes": budget_bytes,
        "taken": str(taken.number),
        "gap": tuned.gap,
        "doubt": swept.doubt,
        "plans": {
            str(trial.number): {
                "micro_batch": trial.micro_batch,
                "budget_share": trial.budget_share,
                "strategy": trial.strategy,
                "loss_head": trial.loss_head,
                "predicted_s": trial.plan.step_s,
                "tuned_s": None if trial.measured is None else trial.measured.step_s,
                "swept_s": swept.seconds[str(trial.number)],
            }
            for trial in tuned.trials
        },
    }


def page(results: dict[str, Answer]) -> str:
    lines = [
        HEAD,
        "| workload | sizes | budget | plans | run | slower than the best | doubt | |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, result in sorted(results.items()):
        plans = result["plans"]
        ran = sum(plan["tuned_s"] is not None for plan in plans.values())
        least = min(plan["swept_s"] for plan in plans.values())
        slower = plans[result["taken"]]["swept_s"] / least - 1
        fails = ran > MOST_RUN * len(plans) or slower > max(MOST_SLOWER, result["doubt"])
        verdict = "**fail**" if fails else "pass" if slower <= MOST_SLOWER else "open"
        cut = ", ".join(f"{count} {what}" for what, count in result["reduced"].items() if count is not None)
        lines.append(
            f"| {name}: {result['about']} | {cut or 'whole'} | {format_bytes(result['budget_bytes'])} | {len(plans)} |"
            f" {ran} | {slower:.1%} | {result['doubt']:.1%} | {verdict} |"
        )
    missing = [name for name in NAMES if name not in results]
    lines += ["", f"Not yet measured: {', '.join(missing)}."] if missing else []
    for name, result in sorted(results.items()):
        lines += [
            "",
            f"## {name}",
            "",
            f"torch threads: {result['threads']}. Taken: plan {result['taken']}. By `tune`'s own account no other "
            f"could be more than {result['gap']:.1%} faster.",
            "",
            "| plan | micro-batch | share | strategy | loss head | predicted | by tune | in the sweep |",
            "|--:|--:|--:|---|---|--:|--:|--:|",
        ]
        for number, plan in result["plans"].items():
            tuned = "let go" if plan["tuned_s"] is None else format_seconds(plan["tuned_s"])
            settings = [plan[name] for name in ("micro_batch", "budget_share", "strategy", "loss_head")]
            seconds = [format_seconds(plan["predicted_s"]), tuned, format_seconds(plan["swept_s"])]
            lines.append(f"| {' | '.join(map(str, [number, *settings, *seconds]))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=(*NAMES, TINY), default=NAMES)
    parser.add_argument("--blocks", type=int, help="keep so many blocks of each model")
    parser.add_argument("--rows", type=int, help="keep so many samples of each batch")
    parser.add_argument("--tokens", type=int, help="keep so many tokens of each sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/tune.json and docs/tune.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["MEMPLAN_CACHE"] = "off"  # as on a machine that has learned nothing yet
    kept = DOCS / "tune.json"
    results: dict[str, Answer] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for name in args.only:
        results[name] = compare(name, {"blocks": args.blocks, "rows": args.rows, "tokens": args.tokens})
        if args.write:
            kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (DOCS / "tune.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
