"""Scripts that run as two ranks over gloo, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run(script: "str | Path", *arguments: object, bound_s: float) -> None:
    """Run a script by torchrun, to its end. Fails the test if a rank fails, or if it takes longer than that."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    asked = [*command, str(script), *map(str, arguments)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=bound_s, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


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
