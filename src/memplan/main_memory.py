"""The main memory that a process may count on: the machine's or its container's, and of that its own part."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

CGROUP: Final = Path("/sys/fs/cgroup")  # where Linux keeps the limits of a container
_LIMITS: Final = ("memory.max", "memory/memory.limit_in_bytes")  # of version 2 and 1


def limit_bytes(cgroup: Path = CGROUP) -> int | None:
    """What this container may have; None without a limit, for which version 1 may write a number beyond any memory."""
    texts = [_read(cgroup / name) for name in _LIMITS]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def share_bytes(environment: Mapping[str, str] = os.environ, cgroup: Path = CGROUP) -> int:
    """This process's part, if all processes that torchrun has started on this machine take the same."""
    total: int = psutil.virtual_memory().total
    limit = limit_bytes(cgroup)
    text = environment.get("LOCAL_WORLD_SIZE", "")
    processes = int(text) if text.isdecimal() else 1
    return (total if limit is None else min(total, limit)) // max(processes, 1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
