"""The main memory that a process may count on: the machine's, its container's or job's, and of that its own part."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

CGROUP: Final = Path("/sys/fs/cgroup")  # where Linux keeps the limits of groups of processes, such as a container's
OWN_GROUPS: Final = Path("/proc/self/cgroup")  # in which of them this process is, as `number:controllers:path`


def limit_bytes(cgroup: Path = CGROUP, own_groups: Path = OWN_GROUPS) -> int | None:
    """What the groups that this process is in may have, a container or a job of a batch system; None without a limit.

    Each group within another one may have a limit of its own, and the lowest counts. Version 1 may write a number
    beyond any memory for none. See cgroups(7).
    """
    files = {cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"}  # a container may see its own as the root
    for line in _read(own_groups).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            files |= {group / "memory.max" for group in _with_outer(cgroup, path)}
        elif "memory" in controllers.split(","):
            files |= {group / "memory.limit_in_bytes" for group in _with_outer(cgroup / "memory", path)}
    return min((int(text) for text in map(_read, files) if text.isdecimal()), default=None)


def _with_outer(root: Path, path: str) -> list[Path]:
    """The group of a path below a root, and those that it is in."""
    inside = Path(path.lstrip("/"))
    return [root / group for group in (inside, *inside.parents)]


def share_bytes(
    environment: Mapping[str, str] = os.environ, cgroup: Path = CGROUP, own_groups: Path = OWN_GROUPS
) -> int:
    """This process's part, if all processes that torchrun has started on this machine take the same."""
    total: int = psutil.virtual_memory().total
    limit = limit_bytes(cgroup, own_groups)
    text = environment.get("LOCAL_WORLD_SIZE", "")
    processes = int(text) if text.isdecimal() else 1
    return (total if limit is None else min(total, limit)) // max(processes, 1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
