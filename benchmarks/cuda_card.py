"""The card that `cuda.py` and `cuda_accuracy.py` measure on, or its stand-in for dry runs. Only here: ``torch.cuda``.

card = CudaCard()                       # or FakeCard(), which runs on the CPU and counts
card.set_cap(8 * 2**30)                 # the allocator's limit: acts as a smaller card
peaks = card.device.peaks_of(step)      # a step beyond the cap raises torch.OutOfMemoryError
card.retries()                          # times that the allocator had to give back its cache to go on
"""

import importlib
import importlib.metadata
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import nn

import memplan
from memplan.allocator import CachingAllocator, Settings
from memplan.device import CudaDevice, Device, DeviceMemory, FakeDevice, memory_parts
from memplan.fake_memory import FakeMemory
from memplan.gpus import find_gpu
from memplan.strategy import Strategy

Facts = dict[str, Any]
Kind = Literal["cuda", "fake"]

ACTED_CARD = "rtx-4090"
"""The 24 GB card that a larger one acts as. The cap is what its allocator gets: the total less the CUDA context."""

DRY_CAP_BYTES = 2 * 2**20  # what stands for those 24 GB in a dry run
DRY_MARGIN = 0.2  # and what its plans keep free of it: the first step of a plan, in which it is proved, takes more


def versions() -> Facts:
    """Of what decides about memory, None where a package is missing."""
    names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Card(ABC):
    """What a benchmark asks of a card beyond memplan's `Device`. Sizes are bytes."""

    device: Device
    gpu: str  # as memplan is told: a live device
    cap_bytes: int  # the smaller card that is acted

    @abstractmethod
    def facts(self) -> Facts:
        """Card, driver, memory and versions; JSON."""

    @abstractmethod
    def set_cap(self, cap_bytes: int | None) -> None:
        """Limit what the process may reserve, and give back what is cached. None: all that there is."""

    @abstractmethod
    def retries(self) -> int:
        """How often the allocator found nothing, gave back its cache and asked again, since the process began."""

    @abstractmethod
    def asked(self, usable_bytes: int, strategy: Strategy) -> tuple[str, Strategy]:
        """What to pass to `memplan.plan` so that the plan's budget is that many bytes on this device."""

    @abstractmethod
    def acted_bytes(self) -> int:
        """What memplan would take as its budget on the smaller card that is acted."""

    @abstractmethod
    def smallest_cap(self, sizes: Mapping[str, int | None]) -> int | None:
        """The smallest cap with no retries, by a prediction's sizes."""

    @abstractmethod
    def start_history(self) -> None:
        """Record what the allocator does from now on."""

    @abstractmethod
    def history(self) -> Facts:
        """What was recorded, in the form of a snapshot of torch's; see `anonymous`."""


@final
class CudaCard(Card):
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = self._cuda = CudaDevice(torch.cuda.current_device())
        self.gpu = str(self.device.torch_device)
        total, _, context = memory_parts(find_gpu(ACTED_CARD), None)
        self.cap_bytes = total - context

    def facts(self) -> Facts:
        properties = torch.cuda.get_device_properties(self._cuda.index)
        return {
            "card": self.device.name,
            "compute_capability": list(self._cuda.compute_capability),
            "total_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            **versions(),
        }

    def set_cap(self, cap_bytes: int | None) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(self._cuda.index)[1]  # the allocator multiplies by the same
        if cap_bytes is not None and cap_bytes > total:
            raise SystemExit(f"a cap of {cap_bytes:,} bytes was asked for on a card of {total:,}: take a larger card")
        # Half a byte more, so that the product does not round down to a byte less.
        torch.cuda.set_per_process_memory_fraction(1.0 if cap_bytes is None else min(1.0, (cap_bytes + 0.5) / total))

    def retries(self) -> int:
        return int(torch.cuda.memory_stats(self._cuda.index).get("num_alloc_retries", 0))

    def asked(self, usable_bytes: int, strategy: Strategy) -> tuple[str, Strategy]:
        share = usable_bytes / budget_of(self.gpu)
        if share > 1:
            raise SystemExit(f"a budget of {usable_bytes:,} bytes is more than {self.device.name} has for a plan")
        return self.gpu, replace(strategy, budget_share=share)

    def acted_bytes(self) -> int:
        return budget_of(ACTED_CARD)

    def smallest_cap(self, sizes: Mapping[str, int | None]) -> int | None:
        return sizes["fits"]

    def start_history(self) -> None:
        torch.cuda.memory._record_memory_history(enabled="all", context=None)

    def history(self) -> Facts:
        snapshot = torch.cuda.memory._snapshot(self._cuda.index)
        torch.cuda.memory._record_memory_history(enabled=None)
        return anonymous(snapshot, self._cuda.index)


@final
class FakeCard(Card):
    """Stands for a card where there is none: runs on the CPU, counts, and refuses like a card that is full."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.memory = FakeMemory(fails_at=fails_at)
        reading = DeviceMemory(2**30, 2**30, others_bytes=0, context_bytes=0)
        self.device = FakeDevice(reading, counting=self.memory, name="dry run")
        self.gpu = "cpu"
        self.cap_bytes = DRY_CAP_BYTES

    def facts(self) -> Facts:
        return {"card": self.device.name, "driver": None, "total_bytes": self.device.memory().total_bytes, **versions()}

    def set_cap(self, cap_bytes: int | None) -> None:
        self.memory.cap_bytes = cap_bytes

    def retries(self) -> int:
        return 0  # it has no cache to give back

    def asked(self, usable_bytes: int, strategy: Strategy) -> tuple[str, Strategy]:
        return f"cpu:{usable_bytes}B", strategy

    def acted_bytes(self) -> int:
        return int(DRY_CAP_BYTES * (1 - DRY_MARGIN))

    def smallest_cap(self, sizes: Mapping[str, int | None]) -> int | None:
        return sizes["peak"]  # nothing is cached

    def start_history(self) -> None:
        self.memory.events.clear()

    def history(self) -> Facts:
        """What memplan's own allocator answers to the same requests: the form of a history, and no measurement.

        A storage's number stands for its address. Segments follow each other from 0 on, so that it lies within them.
        """
        allocator, answered, end = CachingAllocator(Settings()), 0, 0
        events: list[Facts] = []
        for number, change in self.memory.events:
            if change > 0:
                allocator.allocate(number, change)
            else:
                allocator.free(number)
            for action, size, stream in allocator.segment_events[answered:]:
                events.append({"action": action, "addr": end, "size": size, "stream": stream})
                answered, end = answered + 1, end + size
            action = "alloc" if change > 0 else "free_completed"
            events.append({"action": action, "addr": number, "size": abs(change), "stream": 0})
        states = {"allocated": "active_allocated", "free": "inactive"}
        segments = [
            {
                "total_size": segment.total_bytes,
                "stream": segment.stream,
                "segment_type": "small" if segment.is_small else "large",
                "blocks": [{"size": size, "state": states[state]} for size, state in segment.blocks],
            }
            for segment in allocator.segments()
        ]
        return {"segments": segments, "device_traces": [events], "allocator_settings": {}}


def card_of(kind: Kind, fails_at: int | None = None) -> Card:
    """The card to measure on. SystemExit where a real one is asked for and torch has none."""
    if kind == "fake":
        return FakeCard(fails_at)
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; --dry-run goes through everything that needs none")
    return CudaCard()


def budget_of(gpu: str) -> int:
    """The usable bytes that memplan takes on a card, whatever the model: as a plan of one layer says."""
    sample = (torch.zeros(2, 8),)
    found = memplan.plan(nn.Linear(8, 8), gpu, sample=sample, loss=lambda model, b: model(*b).sum(), micro_batch=1)
    return found.budget.usable_bytes


def anonymous(snapshot: Mapping[str, Any], index: int = 0) -> Facts:
    """What a simulator of the allocator needs of a snapshot of torch's: no frames, paths or times.

    Addresses count from the lowest that occurs, streams are numbered. A free that is completed at once is one event.
    """
    traces = [e for e in snapshot["device_traces"][index] if "addr" in e and e["action"] != "snapshot"]  # oom has none
    segments = [segment for segment in snapshot["segments"] if segment["device"] == index]
    lowest = min([event["addr"] for event in traces] + [segment["address"] for segment in segments], default=0)
    streams = sorted({event["stream"] for event in traces} | {segment["stream"] for segment in segments})
    lane = {stream: at for at, stream in enumerate(streams)}
    events = []
    for at, event in enumerate(traces):
        done = [(after["action"], after["addr"]) for after in traces[at + 1 : at + 2]] == [
            ("free_completed", event["addr"])
        ]
        if event["action"] != "free_requested" or not done:
            named = {"action": event["action"], "addr": event["addr"] - lowest, "size": event["size"]}
            events.append(named | {"stream": lane[event["stream"]]})
    return {
        "segments": [
            {
                "address": segment["address"] - lowest,
                "total_size": segment["total_size"],
                "stream": lane[segment["stream"]],
                "segment_type": segment["segment_type"],
                "is_expandable": segment.get("is_expandable", False),
                "blocks": [{"size": block["size"], "state": block["state"]} for block in segment["blocks"]],
            }
            for segment in segments
        ],
        "device_traces": [events],
        "allocator_settings": dict(snapshot.get("allocator_settings", {})),
    }


def _driver() -> str | None:
    """The driver's version as NVML gives it; None where it does not."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # the package is missing, or its library refuses: the benchmark runs without
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
