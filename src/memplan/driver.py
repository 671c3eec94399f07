"""What NVIDIA's driver library says of a card's memory. The only file of memplan that says ``pynvml``."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class DriverCard:
    """A card as the driver knows it, whether or not torch can use it."""

    name: str
    total_bytes: int | None  # None: it has no memory of its own
    has_mig: bool  # it is cut into slices


def driver_version() -> str:
    """Of NVIDIA's driver, such as "570.86.15"; empty where there is none or it does not answer."""
    return _asked(lambda pynvml: str(pynvml.nvmlSystemGetDriverVersion())) or ""


def cards() -> tuple[DriverCard, ...]:
    """Every card of this machine, in the order of their slots; empty where there is no driver or it does not answer."""
    return _asked(_cards) or ()


def reading_of(uuid: str) -> tuple[int, int, int | None] | None:
    """(total, free, held by this process or None where it is not told), or None where the driver library cannot say.

    The total leaves out what the driver keeps for itself, as CUDA's own total does. A MIG slice has another kind of
    uuid, is not found here, and is left to CUDA.
    """

    def reading(pynvml: ModuleType) -> tuple[int, int, int | None]:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return memory.total - memory.reserved, memory.free, _own_bytes(pynvml, handle)

    return _asked(reading)


def _asked(question: Callable[[ModuleType], _Answer]) -> _Answer | None:
    """What the library answers; None where it is not there or does not answer."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return question(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _cards(pynvml: ModuleType) -> tuple[DriverCard, ...]:
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return tuple(
        DriverCard(str(pynvml.nvmlDeviceGetName(handle)), _total_bytes(pynvml, handle), _has_mig(pynvml, handle))
        for handle in handles
    )


def _total_bytes(pynvml: ModuleType, handle: object) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError_NotSupported:
        return None


def _has_mig(pynvml: ModuleType, handle: object) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError_NotSupported:
        return False


def _own_bytes(pynvml: ModuleType, handle: object) -> int | None:
    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if process.pid == os.getpid() and process.usedGpuMemory is not None:
            return int(process.usedGpuMemory)
    return None
