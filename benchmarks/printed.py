"""What the commands print, for docs/printed.md: `python benchmarks/printed.py --write`.

A large model from its config alone, and a small one that is run for real. The commands run in an empty folder, with a
cache of their own; nothing is left out of what they print. `memplan fit` is timed, imports and all.
"""

import argparse
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
        "Tuned by measuring",
        "Short samples, so that a step takes seconds. See [Tune by measuring](tune.md).",
        (f"tune {SMALL} --gpu cpu:1.15GB --seq-len 128 --effective-batch 4 --optimizer adamw-fused --save tuned.json",),
    ),
    Part("What was learned from that", "", ("cache show", "cache clear")),
    Part("The machine", "The one that printed this page has no card.", ("doctor",)),
)


def folder(place: Path) -> None:
    """The two models' configurations."""
    workloads.BIG[BIG].config().save_pretrained(place / BIG)
    model, _ = workloads.build(SMALL)
    model.config.save_pretrained(place / SMALL)


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
