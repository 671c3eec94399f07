"""Scripts that run as two ranks over gloo, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run(script: "str | Path", *arguments: object, bound_s: float) -> None:
    """Run a script by torchrun, to its end. Fails the test if a rank fails, or if it takes longer than that."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    asked = [*command, str(script), *map(str, arguments)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=bound_s, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def heard(script: "str | Path", folder: Path, *arguments: object, bound_s: float) -> list[Any]:
    """`run`, for a script that is given a folder first; what each rank has left there in `<rank>.json`."""
    run(script, folder, *arguments, bound_s=bound_s)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """max |dW| of what was left by two runs, each with nested lists as `weights`."""
    pairs = zip(one["weights"], other["weights"], strict=True)
    return max(float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in pairs)


def leave() -> None:
    """At a rank's end, also behind an error: an interpreter that ends with gloo's threads at work may abort.

    So it does not end where all went well; the process does.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if sys.exc_info()[0] is None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
