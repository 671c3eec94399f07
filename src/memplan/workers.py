"""Which process is at work on a trial, so that others can see when it has ended."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_SAME_S: Final = 1.0  # within which two processes of one number cannot both have begun

Worker = Sequence[object]  # host, namespace of its process numbers, number, when it began; as JSON has it


def this_worker() -> list[object]:
    """This process, in values that a storage takes."""
    return [*_machine(), os.getpid(), psutil.Process().create_time()]


def has_ended(worker: Worker | None) -> bool:
    """Whether a process is known to have ended. Of one of another machine or container, nothing is known here."""
    if worker is None or list(worker[:2]) != _machine():
        return False
    _, _, number, began = worker
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


def _machine() -> list[object]:
    """Numbers of processes are of a namespace, of which each container on a machine has one."""
    namespace = ""
    with suppress(OSError):  # where there are none
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return [socket.gethostname(), namespace]
