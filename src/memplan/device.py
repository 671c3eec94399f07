"""Where a step runs: what memory is there, what a step needs at its peak, how long it takes.

The only file of memplan that says ``torch.cuda``. There are `CpuDevice`, `CudaDevice` and, for tests,
`FakeDevice`. `resolve_gpu` turns what a user wrote ("auto", "cuda:1", "cpu:2GiB", "rtx-4090", "24GiB") into a card and,
where it is this machine's, the live device.

All sizes are bytes (int), all times seconds (float).
"""

import gc
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Final, TypeVar, final

import psutil
import torch

from memplan.allocator import Settings
from memplan.driver import reading_of
from memplan.errors import NoDevice, UnknownGpu, UsageError
from memplan.fake_memory import FakeMemory
from memplan.gpus import LIVE_CUDA, Gpu, find_gpu
from memplan.meter import allocator_record, reachable_storages, survivors
from memplan.units import format_bytes

CUDA_CONTEXT_BYTES: Final = 450 * 2**20
"""What a CUDA context and its kernels take on a card that is not here to be asked.

Measured elsewhere with torch 2.10 and later: 141 MiB (T4) to 426 MiB (RTX 6000 Ada, CUDA 13.0); it grows as kernels are
loaded. Sources: fitcheck's archived runs, unslothai/unsloth-zoo#1053, pytorch/pytorch#86509. Rounded up: against us.
"""


Step = Callable[[], object]
_Scripted = TypeVar("_Scripted")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One reading of a device's memory: total = free + this process + others."""

    total_bytes: int
    free_bytes: int  # what a new process could take now
    others_bytes: int  # held by other processes
    context_bytes: int  # held, or to be held, by this process before its first tensor


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most that one step needed at any moment, counted from zero: weights and optimizer state are inside."""

    tensor_bytes: int  # asked for by tensors
    reserved_bytes: int  # taken from the device by the allocator to serve them; the same where nothing is cached


class Device(ABC):
    """Something a step can run on. Each reading is taken when it is asked for; nothing is cached."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As its driver calls it."""

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """Where to put the model and the batch."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """A reading of the memory now."""

    @abstractmethod
    def peaks_of(self, step: Step) -> Peaks:
        """Run `step` twice and measure the second run, so that lazily made optimizer state is there. Errors pass."""

    @abstractmethod
    def seconds_of(self, step: Step, repeats: int) -> list[float]:
        """Wall-clock seconds of each of `repeats` runs, the device idle before and after each. Warms nothing up."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything queued on the device is done."""

    def pressure(self) -> tuple[int, int]:
        """Of a caching allocator: retries so far, and the most bytes reserved since `release`. Zeros without one."""
        return 0, 0

    def release(self) -> None:
        """Collect garbage, give the device back what is cached and not in use, and begin a new peak."""
        gc.collect()

    @final
    def peak_of(self, step: Step) -> int:
        """The tensor bytes of `peaks_of`."""
        return self.peaks_of(step).tensor_bytes


@final
class CpuDevice(Device):
    """The processor and main memory, with a meter that is exact for what torch's CPU allocator serves.

    The peak is the bytes of distinct storages alive when the measured run begins plus the allocator's own record of
    every allocation and free during it. Not counted, because it passes by that allocator or its record: scratch memory
    inside oneDNN and BLAS, the Python heap, allocations made on threads that `step` starts itself, and memory that only
    C++ holds since before the first of the two runs.

    Cannot be used under a running `torch.profiler`; that raises torch's RuntimeError.
    """

    @property
    def name(self) -> str:
        return "cpu"

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def memory(self) -> DeviceMemory:
        """Physical memory of the machine. A limit on the process alone (cgroup, ulimit) is not seen: pass a budget."""
        machine = psutil.virtual_memory()
        own_bytes = psutil.Process().memory_info().rss
        others_bytes = max(0, machine.total - machine.available - own_bytes)
        return DeviceMemory(machine.total, machine.available, others_bytes, context_bytes=0)

    def peaks_of(self, step: Step) -> Peaks:
        with allocator_record() as first:  # frees are recorded only for memory whose allocation was recorded
            step()
            gc.collect()
        alive = survivors(first) | reachable_storages()
        with allocator_record() as second:
            step()
        now = peak = sum(alive.values())
        for _, change in second:
            now += change
            peak = max(peak, now)
        return Peaks(peak, peak)

    def seconds_of(self, step: Step, repeats: int) -> list[float]:
        return _stopwatch(step, repeats, self.synchronize)

    def synchronize(self) -> None:
        """Nothing to wait for: CPU operators return when they are done."""


@final
class CudaDevice(Device):
    """One card of this machine, by torch's index (which follows CUDA_VISIBLE_DEVICES)."""

    def __init__(self, index: int = 0) -> None:
        self.index = index

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.index)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor, such as (9, 0)."""
        return torch.cuda.get_device_capability(self.index)

    def memory(self) -> DeviceMemory:
        """From the driver library, which needs no CUDA context; without it, from CUDA itself, which makes one.

        Where the driver does not tell what this process holds (another pid namespace, Windows), its context is taken to
        be `CUDA_CONTEXT_BYTES`. That shifts bytes between context and others and leaves their sum as it is.
        """
        reserved_bytes = torch.cuda.memory_reserved(self.index)
        reading = self._driver_reading()
        own_bytes: int | None = None
        if reading is not None:
            total_bytes, free_bytes, own_bytes = reading
        else:
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.index)
        if own_bytes is None:
            has_context = reading is None or reserved_bytes > 0
            own_bytes = reserved_bytes + CUDA_CONTEXT_BYTES if has_context else 0
        context_bytes = max(own_bytes - reserved_bytes, 0) or CUDA_CONTEXT_BYTES
        others_bytes = max(0, total_bytes - free_bytes - own_bytes)
        return DeviceMemory(total_bytes, free_bytes, others_bytes, context_bytes)

    def allocator_settings(self) -> Settings:
        """Of the caching allocator in this process. Raises BadAllocatorSetting for what memplan does not simulate."""
        return Settings.from_snapshot(torch.cuda.memory._snapshot(self.index)["allocator_settings"])

    @property
    def cap_bytes(self) -> int:
        """What the allocator may reserve by `torch.cuda.set_per_process_memory_fraction`; all of it by default."""
        fraction = torch.cuda.get_per_process_memory_fraction(self.index)
        return int(torch.cuda.mem_get_info(self.index)[1] * fraction)

    def pressure(self) -> tuple[int, int]:
        stats = torch.cuda.memory_stats_as_nested_dict(self.index)  # flattened, as by memory_stats, it takes far longer
        return stats["num_alloc_retries"], stats["reserved_bytes"]["all"]["peak"]

    def release(self) -> None:
        super().release()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.index)

    def warnings(self) -> list[str]:
        """What makes this device's memory less sure than that of others, a sentence each.

        On Windows and in WSL NVIDIA's driver may give out host memory (microsoft/WSL#11050).
        """
        found = []
        if platform.system() == "Windows" or "microsoft" in platform.release().lower():
            found.append(
                "here the driver may use host memory where the card's runs out, and no error is raised: a step that is "
                "many times slower than planned has run out (NVIDIA settings, CUDA - Sysmem Fallback Policy)"
            )
        if self._driver_reading() is None:
            found.append(
                "the driver library does not know this device (a MIG slice, a vGPU) or does not answer (no pynvml, no "
                "permission): memory is as CUDA tells it, which cannot tell other processes from this one's context, "
                f"and that is taken to be {format_bytes(CUDA_CONTEXT_BYTES)}"
            )
        return found

    def _driver_reading(self) -> tuple[int, int, int | None] | None:
        """By the uuid: the driver's own index follows no CUDA_VISIBLE_DEVICES."""
        return reading_of(f"GPU-{torch.cuda.get_device_properties(self.index).uuid}")

    def peaks_of(self, step: Step) -> Peaks:
        self.synchronize()
        torch.cuda.empty_cache()  # what earlier, larger runs left cached is not this step's
        step()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.index)
        step()
        self.synchronize()
        return Peaks(torch.cuda.max_memory_allocated(self.index), torch.cuda.max_memory_reserved(self.index))

    def seconds_of(self, step: Step, repeats: int) -> list[float]:
        return _stopwatch(step, repeats, self.synchronize)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)


@final
class FakeDevice(Device):
    """A device that runs steps on the CPU and answers from a script, or from a `FakeMemory` that counts.

    From the script, each `peaks_of` takes the next of `peaks`, each run inside `seconds_of` the next of `seconds`;
    UsageError when it has run out. With `counting` there is no script: steps run under it, peaks are what it counted,
    seconds are the clock's, and what it refuses raises torch.OutOfMemoryError.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        *,
        peaks: Iterable[Peaks] = (),
        seconds: Iterable[float] = (),
        counting: FakeMemory | None = None,
        name: str = "fake",
    ) -> None:
        self._memory = memory
        self._peaks = iter(tuple(peaks))
        self._seconds = iter(tuple(seconds))
        self._counting = counting
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def memory(self) -> DeviceMemory:
        return self._memory

    def peaks_of(self, step: Step) -> Peaks:
        with self._counting or nullcontext():
            step()
            if self._counting is not None:
                self._counting.reset_peak()
            step()
        if self._counting is None:
            return _next_of(self._peaks, "peaks")
        return Peaks(self._counting.peak_bytes, self._counting.peak_bytes)

    def seconds_of(self, step: Step, repeats: int) -> list[float]:
        with self._counting or nullcontext():
            seconds = _stopwatch(step, repeats, self.synchronize)
        return seconds if self._counting is not None else [_next_of(self._seconds, "seconds") for _ in range(repeats)]

    def synchronize(self) -> None:
        """Nothing to wait for."""


def resolve_gpu(gpu: str | Gpu) -> tuple[Gpu, Device | None]:
    """The card that `gpu` names and, where it is this machine's, the device.

    "auto" is the current CUDA device or else the CPU; "cuda" and "cuda:1" are live cards; "cpu" and "cpu:2GiB" the CPU.
    All other text, a card's name or a size, is looked up by `find_gpu` and has no device; nor has a `Gpu` of a card.

    Raises:
        NoDevice: CUDA was asked for by "cuda" or an index and is not here; the message says what to pass instead.
        UnknownGpu, BadBudget: as `find_gpu` does.
    """
    if isinstance(gpu, str):
        text = gpu.strip()
        if text.lower() == "auto":
            text = "cuda" if torch.cuda.is_available() else "cpu"
        if live := LIVE_CUDA.fullmatch(text.lower()):
            device = _live_cuda(int(live[1]) if live[1] else None)
            return _record_of(device), device
        gpu = find_gpu(text)
    elif not isinstance(gpu, Gpu):
        raise UnknownGpu(f"gpu is {gpu!r}: pass a text such as 'cuda:0', 'cpu:2GiB', 'rtx-4090' or '24GiB', or a Gpu")
    return gpu, CpuDevice() if gpu.kind == "cpu" else None


def memory_parts(gpu: Gpu, device: Device | None) -> tuple[int, int, int]:
    """(total, others, context) in bytes: what the card has, what other processes hold, what CUDA takes for itself.

    A card that is not here, and a size, count as empty and give up `CUDA_CONTEXT_BYTES`. A budget for the CPU is for
    tensors alone: nothing is taken off. UsageError for a record with neither a size nor a device.
    """
    if gpu.total_bytes is not None and gpu.kind == "cpu":
        return gpu.total_bytes, 0, 0
    if device is not None:
        now = device.memory()
        return now.total_bytes, now.others_bytes, now.context_bytes
    if gpu.total_bytes is None:
        raise UsageError(f"{gpu.name!r} has no total_bytes and is not a device of this machine: give it a size")
    return gpu.total_bytes, 0, CUDA_CONTEXT_BYTES


def room_of(gpu: Gpu, device: Device | None) -> int:
    """Bytes for training: of `memory_parts` what is left."""
    total, others, context = memory_parts(gpu, device)
    return total - others - context


def _live_cuda(index: int | None) -> CudaDevice:
    """The card of that index, or the current one for None. NoDevice where it is not on this machine."""
    instead = "pass 'cpu', 'cpu:2GiB', a card's name such as 'rtx-4090', or a size such as '24GiB'"
    wanted = "cuda" if index is None else f"cuda:{index}"
    if not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no usable CUDA device"
        raise NoDevice(f"{wanted!r} was asked for, but {why}; to plan without it, {instead}")
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        known = "'cuda:0'" if count == 1 else f"'cuda:0' to 'cuda:{count - 1}'"
        raise NoDevice(f"{wanted!r} was asked for, but this machine has {known}; pass one of those, or {instead}")
    return CudaDevice(torch.cuda.current_device() if index is None else index)


def _record_of(device: CudaDevice) -> Gpu:
    """The catalogue's record with the driver's own total; a bare record for a card that the catalogue does not know."""
    total_bytes = device.memory().total_bytes
    try:
        return replace(find_gpu(device.name), total_bytes=total_bytes)
    except UnknownGpu:
        return Gpu(
            name=device.name,
            kind="cuda",
            total_bytes=total_bytes,
            driver_names=(device.name,),
            compute_capability=device.compute_capability,
            source="the driver",
        )


def _stopwatch(step: Step, repeats: int, synchronize: Callable[[], None]) -> list[float]:
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}, it must be at least 1")
    seconds = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _next_of(script: Iterator[_Scripted], what: str) -> _Scripted:
    for value in script:
        return value
    raise UsageError(f"this FakeDevice was given no more {what}")
