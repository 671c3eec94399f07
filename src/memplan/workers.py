"""Which process is at work on a trial, so that others can see when it has ended."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import psutil

_SAME_S: Final = 30.0  # by which a clock may be set while a process runs, and sooner than a number comes again

Worker = Sequence[object]  # host, namespace of its process numbers, boot, number, when it began; as JSON has it


def this_worker() -> list[object]:
    """This process, in values that a storage takes."""
    return [*_machine(), os.getpid(), psutil.Process().create_time()]


def has_ended(worker: Worker | None) -> bool:
    """Whether a process is known to have ended. Of one of another machine or container, nothing is known here."""
    here = _machine()
    if worker is None or list(worker[: len(here)]) != here:
        return False
    number, began = worker[len(here) :]
    assert isinstance(number, int)
    assert isinstance(began, float)
    try:
        found = psutil.Process(number)
        is_zombie: bool = found.status() == psutil.STATUS_ZOMBIE
        return is_zombie or abs(found.create_time() - began) > _SAME_S
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


@cache
def _machine() -> list[object]:
    """Numbers of processes are of a namespace, which each container has for itself; machines may share a name."""
    namespace = booted = ""
    with suppress(OSError):  # where there are none
        namespace = str(Path("/proc/self/ns/pid").readlink())
        booted = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return [socket.gethostname(), namespace, booted]
