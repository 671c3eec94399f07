"""What each lever and each strategy does to one training step, on the CPU: `python benchmarks/effects.py --write`.

One Llama in float32 under AdamW with `foreach`, which is torch's default on cards. A lever is shown by the smallest
peak that a plan reaches with nothing else; those about the optimizer's step, which binds where blocks and logits have
been dealt with, with what deals with these. A strategy is shown at a budget halfway between full checkpointing's peak
and the plain step's; what it does with the batch is its own. Peaks are measured, each in a process of its own, as are
times: CPU seconds of whole steps, of all settings in turn on one live model, medians.

The pages of the strategies are written whole, those of the levers between their marks.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accuracy import meter
from pages import DOCS, written
from steps import make_step
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.device import resolve_gpu
from memplan.recipe import Recipe
from memplan.samples import Sample
from memplan.session import Session
from memplan.strategy import LEVERS, Lever, load_strategy, shipped_strategies
from memplan.units import format_bytes

ROWS, LENGTH, LAYERS, VOCABULARY, ROUNDS = 4, 256, 6, 8192, 7
PLAIN = "plain"
NOT_ON_A_CPU = ("offload",)  # its tensors are on the host already
BESIDE: tuple[Lever, ...] = ("recompute", "loss-head")  # what makes the optimizer's part the largest
ABOUT_THE_OPTIMIZER = ("optimizer", "step-in-backward")
NAMES = {
    "recompute": "recompute",
    "select": "select",
    "offload": "offload",
    "loss-head": "loss-head",
    "optimizer": "optimizer",
    "step-in-backward": "optimizer",
}  # lever -> its page

Result = dict[str, Any]


class Bench:
    """One live model that is switched from plan to plan."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2}
        config = LlamaConfig(**shape, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, use_cache=False)
        self.model = LlamaForCausalLM(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)
        self.steps: dict[tuple[int, int], Callable[[], None]] = {}

    @cached_property
    def session(self) -> Session:
        recipe = Recipe(optimizer=self.optimizer)
        return Session(self.model, Sample.of(self.batch(ROWS)), recipe, *resolve_gpu("cpu"))

    def batch(self, rows: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
        return {"input_ids": tokens, "labels": tokens.clone()}

    def run(self, plan: memplan.Plan, measure: Callable[[Callable[[], None]], float]) -> float:
        """What `measure` says of a whole step under a plan. One forward runs before it, in which levers prepare."""
        sizes = (plan.micro_batch, plan.accumulation)
        if sizes not in self.steps:
            batch = self.batch(plan.micro_batch)
            self.steps[sizes] = make_step(self.model, batch, optimizer=self.optimizer, accumulation=plan.accumulation)
        with memplan.apply(self.model, plan, optimizer=self.optimizer):
            self.model(**self.batch(plan.micro_batch))
            gc.collect()
            return measure(self.steps[sizes])


def plans(bench: Bench) -> Iterator[tuple[str, memplan.Plan]]:
    plain = bench.session.plan(memplan.Strategy(name=PLAIN, levers=()), None, ROWS)
    yield PLAIN, plain
    for lever in LEVERS:
        if lever not in NOT_ON_A_CPU:
            used = (*BESIDE, lever) if lever in ABOUT_THE_OPTIMIZER else (lever,)
            yield f"lever {lever}", bench.session.plan(_smallest(*used), None, ROWS)
    yield " + ".join(BESIDE), bench.session.plan(_smallest(*BESIDE), None, ROWS)
    full = bench.session.plan(load_strategy("huggingface"), None, ROWS)
    halfway = bench.session.within((plain.peak_bytes + full.peak_bytes) // 2)
    for name in shipped_strategies():
        yield f"strategy {name}", halfway.plan(load_strategy(name), None, None)


def _smallest(*levers: Lever) -> memplan.Strategy:
    return memplan.Strategy(name=levers[-1], levers=levers, objective="peak")


def measured() -> Result:
    bench = Bench()
    made = dict(plans(bench))
    results: Result = {}
    for name, plan in made.items():
        peak = peak_of(plan)
        results[name] = {
            "budget": plan.budget_bytes,
            "micro_batch": plan.micro_batch,
            "predicted": plan.peak_bytes,
            "measured": peak,
            "predicted_slowdown": plan.slowdown,
        }
        print(f"{name}: {peak:,} bytes, {plan.peak_bytes:,} predicted", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(ROUNDS + 1):
        for name, plan in made.items():
            seconds = bench.run(plan, _cpu_seconds) / (plan.micro_batch * plan.accumulation)
            if turn:
                rates[name].append(seconds)
        print(f"round {turn} of {ROUNDS}", flush=True)
    unit = rates[PLAIN]
    for name, seconds in rates.items():
        results[name]["slowdown"] = median(s / u for s, u in zip(seconds, unit, strict=True)) - 1
    return results


def peak_of(plan: memplan.Plan) -> int:
    """Measured where nothing of another setting is alive: Python imports this file and runs one step."""
    with TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        command = [sys.executable, "-W", "ignore", __file__, "--peak-of", f"{folder}/plan.json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def _cpu_seconds(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


# --- pages ----------------------------------------------------------------------------------------------------------

SET_UP = (
    f"Measured on the CPU, one thread: a Llama of {LAYERS} layers, hidden size 384, vocabulary {VOCABULARY:,}, "
    f"{ROWS} x {LENGTH} tokens a step, AdamW (foreach), float32."
)

NOT_OFFLOADED = (
    "On a CPU nothing is offloaded, since its tensors are on the host already; what the table shows is done by the "
    "levers that join."
)


def lever_table(results: Result, levers: tuple[Lever, ...]) -> str:
    plain = results[PLAIN]["measured"]
    lines = [
        f"{SET_UP} The smallest peak that is reached with no other levers than these:",
        "",
        "| | measured peak | predicted | less than the plain step | time per sample |",
        "|---|--:|--:|--:|--:|",
        f"| plain step | {format_bytes(plain)} | {format_bytes(results[PLAIN]['predicted'])} | | |",
    ]
    beside = " + ".join(BESIDE)
    shown = {f"`{lever}`": f"lever {lever}" for lever in levers if lever not in ABOUT_THE_OPTIMIZER}
    if any(lever in ABOUT_THE_OPTIMIZER for lever in levers):
        shown = {beside: beside} | {f"{beside} + `{lever}`": f"lever {lever}" for lever in levers}
    for what, name in shown.items():
        found = results[name]
        saved = 1 - found["measured"] / plain
        lines.append(
            f"| {what} | {format_bytes(found['measured'])} | {format_bytes(found['predicted'])} "
            f"| {saved:.1%} | {found['slowdown']:+.1%} |"
        )
    return "\n".join([*lines, "", "Made by `python benchmarks/effects.py --write`."])


def strategy_page(name: str, results: Result) -> str:
    strategy, found = load_strategy(name), results[f"strategy {name}"]
    file = Path(__file__).resolve().parents[1] / "strategies" / f"{name}.toml"
    cells = (
        f"{found['micro_batch']}",
        *(format_bytes(found[name]) for name in ("measured", "predicted")),
        f"{found['slowdown']:+.1%}",
    )
    set_up = f"{NOT_OFFLOADED}\n\n{SET_UP}" if set(strategy.levers_first) & set(NOT_ON_A_CPU) else SET_UP
    within = "within it" if found["measured"] <= found["budget"] else "above it: this strategy found nothing smaller"
    return f"""# {name}

{strategy.summary}

**When to use it.** {strategy.when_to_use}

```toml title="strategies/{name}.toml"
{file.read_text(encoding="utf-8").strip()}
```

## Measured

{set_up} The budget is halfway between full checkpointing's peak and the plain step's, {format_bytes(found["budget"])}:

| micro-batch | measured peak | predicted | time per sample against the plain step |
|--:|--:|--:|--:|
| {" | ".join(cells)} |

The peak is {within}. The plain step needs {format_bytes(results[PLAIN]["measured"])}. Made by
`python benchmarks/effects.py --write`; how to write a strategy of your own is told in [the list](index.md).
"""


def write(results: Result) -> None:
    (DOCS / "effects.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for page in dict.fromkeys(NAMES.values()):
        levers = tuple(lever for lever in LEVERS if NAMES[lever] == page and lever not in NOT_ON_A_CPU)
        if levers:
            written("effect", lever_table(results, levers), DOCS / "levers" / f"{page}.md")
    for name in shipped_strategies():
        (DOCS / "strategies" / f"{name}.md").write_text(strategy_page(name, results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="measure, and write docs/effects.json and the pages")
    parser.add_argument("--render", action="store_true", help="write the pages from docs/effects.json")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.peak_of:
        print(int(Bench().run(memplan.Plan.load(asked.peak_of), meter())))
        return
    results = json.loads((DOCS / "effects.json").read_text(encoding="utf-8")) if asked.render else measured()
    if asked.write or asked.render:
        write(results)


if __name__ == "__main__":
    main()
