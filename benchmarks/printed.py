"""What the commands print, for docs/printed.md: `python benchmarks/printed.py --write`.

A large model from its config alone, and a small one that is run for real. The commands run in an empty folder, with a
cache of their own; nothing is left out of what they print. `memplan fit` is timed, imports and all.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import workloads

from memplan.gpus import all_gpus

DOCS = Path(__file__).resolve().parents[1] / "docs"
COLUMNS = 100

BIG, SMALL = "llama-3-8b", "W1"
OTHERS = ("W2", "W3", "W4", "W5", "mistral-7b", "qwen3-14b", "llama-3-70b", "llama-3.1-405b")

HEAD = f"""# What the commands print

Made by `python benchmarks/printed.py --write`, {COLUMNS} columns wide. `{BIG}` is a folder with the config.json of
Llama-3-8B, and `{SMALL}` one with that of a Llama of 12 layers and width 512; the first is planned for cards that are
not there, the second is run on the CPU. No weights are loaded: the small model has random ones.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A heading, what is worth saying under it, and what is typed there."""

    heading: str
    about: str
    commands: tuple[str, ...]


_TRAINED = "--seq-len 2048 --effective-batch 16 --gpu rtx-4090"
MODEL = f"{BIG} --method lora --dtype bfloat16"
LORA = f"{MODEL} --seq-len 2048 --effective-batch 16"
PARTS = (
    Part(
        "Which card?",
        "More in [Which card do I need?](fit.md).",
        (f"fit --config {BIG} --dtype bfloat16 --seq-len 2048 --tokens-per-step 32768",),
    ),
    Part("A plan for one of them", "", (f"plan {LORA} --gpu rtx-4090 --save lora-24.json",)),
    Part("The plan explained", "With the model, other budgets are solved again.", (f"explain lora-24.json {MODEL}",)),
    Part(
        "Beside another",
        "The same for a card of 40 GB.",
        (f"plan {LORA} --gpu a100-sxm-40gb --save lora-40.json > /dev/null 2>&1", "compare lora-24.json lora-40.json"),
    ),
    Part("As a page", "See [Read a plan](report.md).", ("report lora-24.json --svg pictures",)),
    Part(
        "Other models",
        "The first lines of each: GPT-2, BERT, ViT, ResNet-50 and LoRA on the small Llama for CPUs of little memory, "
        "four large ones for cards. Their folders hold a config.json each.",
        tuple(
            f"plan {asked} 2>&1 | head -20"
            for asked in (
                "W2 --gpu cpu:2.6GB --seq-len 512 --effective-batch 2",
                "W3 --gpu cpu:2.2GB --seq-len 256 --effective-batch 8",
                "W4 --gpu cpu:1.5GB --effective-batch 8",
                "W5 --gpu cpu:800MB --effective-batch 8",
                f"{SMALL} --method lora --gpu cpu:700MB --seq-len 512 --effective-batch 4",
                f"mistral-7b --method lora --dtype bfloat16 {_TRAINED}",
                f"qwen3-14b --method qlora --dtype bfloat16 {_TRAINED}",
                f"llama-3-70b --method qlora --dtype bfloat16 {_TRAINED.replace('rtx-4090', 'h100-sxm')}",
                "llama-3.1-405b --dtype bfloat16 --seq-len 4096 --effective-batch 4 --gpu h100-sxm --shards 1024",
            )
        ),
    ),
    Part(
        "Tuned by measuring",
        "Samples of 256 tokens, so that a step takes seconds. See [Tune by measuring](tune.md).",
        (f"tune {SMALL} --gpu cpu:1.4GB --seq-len 256 --effective-batch 4 --optimizer adamw-fused --save tuned.json",),
    ),
    Part("What was learned from that", "", ("cache show", "cache clear")),
    Part("The machine", "The one that printed this page has no card.", ("doctor",)),
)


def folder(place: Path) -> None:
    """The models' configurations."""
    for name in (BIG, SMALL, *OTHERS):
        if name in workloads.BIG:
            config = workloads.BIG[name].config()
        else:
            model, _ = workloads.build(name)
            config = model.config
            config.architectures = [type(model).__name__]
        config.save_pretrained(place / name)
        file = place / name / "config.json"
        kept = {key: value for key, value in json.loads(file.read_text()).items() if value is not None}
        file.write_text(json.dumps(kept))  # as on the hub, without what is left open


def printed(command: str, place: Path) -> tuple[str, float]:
    """All that a command prints, and how many seconds it took."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1", "MEMPLAN_CACHE_DIR": "cache"}
    line = f"{shlex.quote(sys.executable)} -m memplan {command}"
    start = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", line], cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"memplan {command}: exit code {done.returncode}\n{done.stdout}")
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()), seconds


def lines(place: Path) -> Iterator[str]:
    yield HEAD
    for part in PARTS:
        yield f"\n## {part.heading}\n"
        if part.about:
            yield f"{part.about}\n"
        for command in part.commands:
            text, seconds = printed(command, place)
            print(f"{seconds:6.1f} s  memplan {command}", flush=True)
            shown = f"$ memplan {command}\n{text}".rstrip()
            yield f"```console\n{shown}\n```\n"
            if command.startswith("fit"):
                there = f"{len(all_gpus())} cards and three methods, with all imports"
                yield f"That took {seconds:.0f} s on {len(os.sched_getaffinity(0))} cores: {there}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/printed.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder(place)
        page = "\n".join(lines(place))
    if args.write:
        (DOCS / "printed.md").write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
