"""The examples run as a user runs them, and their plans hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

MOST_SECONDS = 900  # they take one minute by themselves; a busy machine may need more


def output_of(name: str, folder: Path, *launcher: str) -> str:
    """What an example prints. It has one thread and no way to the network."""
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name)],
        env={**os.environ, **offline},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["03_trainer.py", "04_sft_lora.py"])
def test_trainers_keep_to_their_budget(name: str, tmp_path: Path) -> None:
    said = output_of(name, tmp_path)
    record = eval(next(line[line.index("{'memplan") :] for line in said.splitlines() if "{'memplan/" in line))
    peak, predicted, budget = (int(record[f"memplan/{name}_bytes"]) for name in ("peak", "predicted_peak", "budget"))
    assert peak <= predicted <= budget
    assert "train_runtime" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("02_accelerate.py", ()),
        ("05_lightning.py", ("-W", "ignore")),
    ],
)
def test_loops_train_by_a_plan_that_fits(name: str, launcher: tuple[str, ...], tmp_path: Path) -> None:
    said = output_of(name, tmp_path, *launcher)
    assert "fits" in said
    assert " accumulated = " in said


@pytest.mark.slow
def test_ranks_train_by_the_micro_batch_of_the_plan(tmp_path: Path) -> None:
    launcher = ("-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    steps = [line for line in output_of("06_fsdp2.py", tmp_path, *launcher).splitlines() if line.startswith("step")]
    assert len(steps) == 4
    assert all("4 of 8 rows at a time" in line for line in steps)
    losses = [float(line.split()[-1]) for line in steps]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["02_accelerate.py", "05_lightning.py", "06_fsdp2.py"])
def test_the_lines_that_memplan_takes_are_marked(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.count("\n") <= 60
    code = text.split('"""', 2)[2].splitlines()
    assert all("# +" in line for line in code if "memplan" in line)
    assert sum("# +" in line for line in code) == 2


@pytest.mark.parametrize("name", ["03_trainer.py", "04_sft_lora.py"])
def test_one_line_makes_the_difference(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.count("# the one line") == 1
    assert sum("memplan." in line for line in text.splitlines()) == 1
    assert text.count("\n") <= 60
