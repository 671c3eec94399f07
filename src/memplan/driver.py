"""What NVIDIA's driver library says of a card's memory. The only file of memplan that says ``pynvml``."""

import importlib
import os
from types import ModuleType


def reading_of(uuid: str) -> tuple[int, int, int | None] | None:
    """(total, free, held by this process or None where it is not told), or None where the driver library cannot say.

    The total leaves out what the driver keeps for itself, as CUDA's own total does. A MIG slice has another kind of
    uuid, is not found here, and is left to CUDA.
    """
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return memory.total - memory.reserved, memory.free, _own_bytes(pynvml, handle)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _own_bytes(pynvml: ModuleType, handle: object) -> int | None:
    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if process.pid == os.getpid() and process.usedGpuMemory is not None:
            return int(process.usedGpuMemory)
    return None
