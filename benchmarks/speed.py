"""How long memplan takes to answer: `python benchmarks/speed.py --write`. Each figure is the best of a few, in seconds.

Every row runs in a process of its own; building the model is not counted, importing memplan and torch is not either
(but for the first two rows, which are nothing else).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"

_ANSWER = """
import json, resource, time, warnings
warnings.simplefilter("ignore")
import memplan, workloads
from memplan.samples import sample_for
{build}
memplan.predict(*tiny)  # imports are not counted
begin = time.perf_counter()
{answer}
seconds = time.perf_counter() - begin
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""
_TINY = """
import torch
tiny = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Flatten(0), torch.nn.Linear(2, 1)), torch.ones(1, 2))
"""
_BIG = _TINY + "model = workloads.build_on_meta({name!r}); batch = sample_for(model, {rows}, 2048).content"
_PREDICT = "memplan.predict(model, batch)"
_PLAN = 'memplan.plan(model, "h100-sxm", sample=batch, world=memplan.World(shards={shards}))'
_W1 = _TINY + "model, batch = workloads.build('W1')"

_IMPORT = """
import time
begin = time.perf_counter()
import memplan
print([time.perf_counter() - begin, 0])
"""
_HELP = """
import json, subprocess, time
begin = time.perf_counter()
subprocess.run([sys.executable, "-c", "from memplan.cli import main; main()", "--help"], capture_output=True)
print(json.dumps([time.perf_counter() - begin, 0]))
"""

_FIT = """
import json, subprocess, sys, tempfile, time
import workloads
from pathlib import Path
folder = Path(tempfile.mkdtemp())
workloads.BIG["llama-3-8b"].config().save_pretrained(folder)
command = "memplan fit --dtype bfloat16 --seq-len 2048 --tokens-per-step 32768 --config".split()
begin = time.perf_counter()
subprocess.run([sys.executable, "-m", *command, str(folder)], capture_output=True, check=True)
print(json.dumps([time.perf_counter() - begin, 0]))
"""

# name, wanted seconds, program
ROWS = [
    ("import memplan", 0.15, _IMPORT),
    ("memplan --help", 0.5, _HELP),
    ("predict W1 (12-layer Llama, 4 x 512)", 1.5, _ANSWER.format(answer=_PREDICT, build=_W1)),
    (
        "predict Llama-3-8B on meta, 2 x 2048",
        4.0,
        _ANSWER.format(answer=_PREDICT, build=_BIG.format(name="llama-3-8b", rows=2)),
    ),
    (
        "predict Llama-3.1-405B on meta, 1 x 2048",
        15.0,
        _ANSWER.format(answer=_PREDICT, build=_BIG.format(name="llama-3.1-405b", rows=1)),
    ),
    *(
        (
            f"plan Llama-3.1-405B for {shards:,} H100 (FSDP2), 2,048 tokens a sample",
            20.0,
            _ANSWER.format(answer=_PLAN.format(shards=shards), build=_BIG.format(name="llama-3.1-405b", rows=1)),
        )
        for shards in (128, 1024)
    ),
    ("memplan fit, a config of Llama-3-8B: 36 cards, in full, with LoRA and with QLoRA", 30.0, _FIT),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/speed.md")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    lines = [
        "# Speed",
        "",
        f"Best of {args.repeats} on 2 cores, made by `python benchmarks/speed.py --write`. The solver's times are in "
        "[solver.md](solver.md).",
        "",
        "| | seconds | wanted | resident GiB |",
        "|---|--:|--:|--:|",
    ]
    for name, wanted, program in ROWS:
        runs = [_run(program) for _ in range(args.repeats)]
        seconds, resident = min(runs)
        memory = f"{resident:.2f}" if resident else ""
        lines.append(f"| {name} | {seconds:.2f} | {wanted} | {memory} |")
        print(lines[-1], flush=True)
    if args.write:
        (DOCS / "speed.md").write_text("\n".join([*lines, ""]))


def _run(program: str) -> tuple[float, float]:
    here = str(Path(__file__).parent)
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, resident = json.loads(answer.stdout.splitlines()[-1])
    return seconds, resident


if __name__ == "__main__":
    main()
