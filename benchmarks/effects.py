"""What each lever and each strategy does to one training step, on the CPU: `python benchmarks/effects.py --write`.

One Llama in float32 under AdamW. A lever is shown alone: the smallest peak that a plan reaches by nothing else, with
the batch as it is. A strategy is shown at a budget halfway between full checkpointing's peak and the plain step's; what
it does with the batch is its own. Peaks are measured, as are times: CPU seconds of whole steps, of all settings in turn
on one live model, medians.

The pages of the strategies are written whole, those of the levers between their marks.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accuracy import meter
from pages import DOCS, written
from steps import make_optimizer, make_step
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.strategy import LEVERS, Lever, load_strategy, shipped_strategies
from memplan.units import format_bytes

ROWS, LENGTH, VOCABULARY, ROUNDS = 4, 256, 16384, 7
PLAIN = "plain"
NOT_ON_A_CPU = ("offload",)  # its tensors are on the host already
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
        shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
        config = LlamaConfig(**shape, num_hidden_layers=8, vocab_size=VOCABULARY, use_cache=False)
        self.model = LlamaForCausalLM(config).train()
        self.optimizer = make_optimizer(self.model)
        self.steps: dict[tuple[int, int], Callable[[], None]] = {}

    def batch(self, rows: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
        return {"input_ids": tokens, "labels": tokens.clone()}

    def plan(self, budget: str, strategy: memplan.Strategy, micro_batch: int | None) -> memplan.Plan:
        return memplan.plan(
            self.model,
            budget,
            sample=self.batch(ROWS),
            optimizer=self.optimizer,
            micro_batch=micro_batch,
            strategy=strategy,
        )

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
    plain = bench.plan("cpu", memplan.Strategy(name=PLAIN, levers=()), ROWS)
    yield PLAIN, plain
    for lever in LEVERS:
        if lever not in NOT_ON_A_CPU:
            alone = memplan.Strategy(name=lever, levers=(lever,), objective="peak")
            yield f"lever {lever}", bench.plan("cpu", alone, ROWS)
    full = bench.plan("cpu", load_strategy("huggingface"), ROWS)
    budget = f"cpu:{(plain.peak_bytes + full.peak_bytes) // 2}B"
    for name in shipped_strategies():
        yield f"strategy {name}", bench.plan(budget, load_strategy(name), None)


def measured() -> Result:
    bench = Bench()
    made = dict(plans(bench))
    results: Result = {}
    for name, plan in made.items():
        peak = int(bench.run(plan, meter()))
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


def _cpu_seconds(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


# --- pages ----------------------------------------------------------------------------------------------------------

SET_UP = (
    f"Measured on the CPU, one thread: a Llama of 8 layers, hidden size 512, vocabulary {VOCABULARY:,}, {ROWS} x "
    f"{LENGTH} tokens a step, AdamW, float32."
)


def lever_table(results: Result, levers: tuple[Lever, ...]) -> str:
    plain = results[PLAIN]["measured"]
    lines = [
        f"{SET_UP} The smallest peak that this lever reaches alone:",
        "",
        "| | measured peak | predicted | less than the plain step | time per sample |",
        "|---|--:|--:|--:|--:|",
        f"| plain step | {format_bytes(plain)} | {format_bytes(results[PLAIN]['predicted'])} | | |",
    ]
    for lever in levers:
        found = results[f"lever {lever}"]
        saved = 1 - found["measured"] / plain
        lines.append(
            f"| `{lever}` | {format_bytes(found['measured'])} | {format_bytes(found['predicted'])} "
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
    within = "within it" if found["measured"] <= found["budget"] else "above it: this strategy found nothing smaller"
    return f"""# {name}

{strategy.summary}

**When to use it.** {strategy.when_to_use}

```toml title="strategies/{name}.toml"
{file.read_text(encoding="utf-8").strip()}
```

## Measured

{SET_UP} The budget is halfway between full checkpointing's peak and the plain step's, {format_bytes(found["budget"])}:

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
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads((DOCS / "effects.json").read_text(encoding="utf-8")) if asked.render else measured()
    if asked.write or asked.render:
        write(results)


if __name__ == "__main__":
    main()
