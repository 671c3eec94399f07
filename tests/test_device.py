"""The CPU meter against peaks worked out by hand, the cards that are not here, and the scripted device.

Where an independent meter lies next to the checkout, both must agree to the byte.
"""

import gc
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import steps
import torch
from torch import nn

from memplan import device as devices
from memplan.allocator import Settings
from memplan.device import (
    CUDA_CONTEXT_BYTES,
    CpuDevice,
    CudaDevice,
    DeviceMemory,
    FakeDevice,
    Peaks,
    memory_parts,
    resolve_gpu,
)
from memplan.errors import BadAllocatorSetting, BadBudget, NoDevice, UnknownGpu, UsageError
from memplan.gpus import Gpu, find_gpu

KIB, MIB, GIB = 2**10, 2**20, 2**30
OTHER_METER = Path(__file__).resolve().parents[2] / "shared" / "tools" / "true_peak.py"


def block(n_bytes: int) -> torch.Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8)


def idle() -> None:
    """A step that does nothing: its peak is what is alive."""


def above_idle(step: Callable[[], object]) -> int:
    """The peak of `step`, without what other tests left alive."""
    cpu = CpuDevice()
    return cpu.peak_of(step) - cpu.peak_of(idle)


class TestCpuPeak:
    def test_nothing_happens_but_what_is_alive_counts(self) -> None:
        before = CpuDevice().peak_of(idle)
        kept = block(5 * MIB)
        assert CpuDevice().peak_of(idle) - before == 5 * MIB
        del kept

    def test_the_largest_moment_counts_and_not_the_sum(self) -> None:
        def step() -> None:
            first, second = block(10 * MIB), block(20 * MIB)
            del first
            third = block(15 * MIB)  # 35 alive
            del second, third
            block(33 * MIB)

        assert above_idle(step) == 35 * MIB

    def test_a_free_before_the_first_allocation_lowers_it(self) -> None:
        box = [block(8 * MIB)]

        def step() -> None:
            box.clear()
            box.append(block(8 * MIB))

        assert above_idle(step) == 0

    def test_swap_has_both_alive(self) -> None:
        box = [block(8 * MIB)]

        def step() -> None:
            box[0] = block(8 * MIB)

        assert above_idle(step) == 8 * MIB

    def test_views_and_aliases_count_once(self) -> None:
        before = CpuDevice().peak_of(idle)
        kept = block(4 * MIB)
        aliases = [kept, kept[1:], kept.view(2, -1), kept.detach(), nn.Parameter(kept.float())]
        assert CpuDevice().peak_of(idle) - before == 4 * MIB + 16 * MIB
        del aliases

    def test_a_step_that_keeps_memory_is_measured_at_its_second_run(self) -> None:
        kept: list[torch.Tensor] = []
        before = CpuDevice().peak_of(idle)
        assert CpuDevice().peak_of(lambda: kept.append(block(3 * MIB))) - before == 6 * MIB
        assert CpuDevice().peak_of(lambda: kept.append(block(3 * MIB))) - before == 12 * MIB

    def test_growth_in_place(self) -> None:
        box = block(2 * MIB)

        def step() -> None:
            box.resize_(6 * MIB)  # never shrinks: the second run finds it grown

        before = CpuDevice().peak_of(idle)
        assert CpuDevice().peak_of(step) - before == 4 * MIB

    def test_gradients_without_a_python_object_count(self) -> None:
        weight = nn.Parameter(torch.zeros(MIB))

        before = CpuDevice().peak_of(idle)
        weight.sum().backward()
        assert CpuDevice().peak_of(idle) - before == 4 * MIB

    def test_saved_tensors_of_a_kept_graph_count(self) -> None:
        """The result of exp is held by the graph alone, the product by the list: two tensors per run."""
        weight = nn.Parameter(torch.zeros(MIB))
        kept: list[torch.Tensor] = []

        def step() -> None:
            kept[:] = [weight.exp() * weight]

        before = CpuDevice().peak_of(idle)
        assert CpuDevice().peak_of(step) - before == 2 * (2 * 4 * MIB)

    def test_garbage_in_cycles_from_the_first_run_does_not_count(self) -> None:
        def step() -> None:
            cycle: list[object] = [block(7 * MIB)]
            cycle.append(cycle)

        gc.disable()
        try:
            assert above_idle(step) == 7 * MIB
        finally:
            gc.enable()

    def test_backward_of_a_chain(self) -> None:
        """e1, e2, e3 = three exps; each saves its result, and e3 is held until backward returns."""
        weight, ones = nn.Parameter(torch.zeros(MIB)), torch.ones(MIB)

        def step() -> None:
            weight.exp().exp().exp().backward(ones)
            weight.grad = None

        # e1 e2 e3 | + g2 = 4 | + g1 = 5 | e2, g2 freed = 3 | + g0 = 4
        assert above_idle(step) == 5 * 4 * MIB

    def test_optimizer_state_made_by_the_first_run_counts(self) -> None:
        weight = nn.Parameter(torch.zeros(MIB))
        optimizer = torch.optim.SGD([weight], momentum=0.9)

        def step() -> None:
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            weight.grad = None

        before = CpuDevice().peak_of(idle)
        scalars_bytes = CpuDevice().peak_of(step) - before - (4 * MIB + 4 * MIB)  # momentum and gradient
        assert 0 <= scalars_bytes <= 16  # python numbers that torch wraps in tensors while it computes

    def test_errors_of_the_step_pass_and_the_next_measurement_is_right(self) -> None:
        def broken() -> None:
            block(MIB)
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            CpuDevice().peak_of(broken)
        assert above_idle(lambda: block(2 * MIB)) == 2 * MIB

    def test_tensors_without_an_address_are_left_out(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        before = CpuDevice().peak_of(idle)
        with FakeTensorMode():
            fake = torch.empty(GIB)
        others = [torch.empty(GIB, device="meta"), torch.eye(4).to_sparse(), nn.UninitializedParameter()]
        assert CpuDevice().peak_of(idle) - before < KIB
        del fake, others

    def test_runs_the_step_twice(self) -> None:
        calls: list[int] = []
        CpuDevice().peaks_of(lambda: calls.append(1))
        assert len(calls) == 2

    def test_prints_nothing(self) -> None:
        code = (
            "import os; from memplan.device import *; CpuDevice().peak_of(int); print('KINETO_LOG_LEVEL' in os.environ)"
        )
        environment = {key: value for key, value in os.environ.items() if key != "KINETO_LOG_LEVEL"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert (done.stdout.strip(), done.stderr.strip()) == ("False", "")


@pytest.fixture(scope="module")
def other_meter() -> Callable[..., int]:
    if not OTHER_METER.exists():
        pytest.skip("there is no second meter next to this checkout to compare with")
    spec = importlib.util.spec_from_file_location("other_meter", OTHER_METER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    meter: Callable[..., int] = module.true_peak
    return meter


class Tower(nn.Module):
    """Enough of a network to have saved tensors, temporaries and an optimizer with more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Dropout(0.1), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(loss=self.body(x).square().mean())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-foreach-false", "sgd-momentum"])
def test_agrees_with_the_other_meter(
    other_meter: Callable[..., int],
    optimizer: steps.OptimizerName,
    autocast: torch.dtype | None,
    accumulation: int,
) -> None:
    batch = {"x": torch.randn(128, 64)}
    step = steps.make_step(Tower(), batch, optimizer=optimizer, autocast=autocast, accumulation=accumulation)
    step()
    assert CpuDevice().peak_of(step) == other_meter(step)


def test_cpu_memory_and_clock() -> None:
    cpu = CpuDevice()
    memory = cpu.memory()
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 <= memory.others_bytes < memory.total_bytes
    assert memory.context_bytes == 0
    assert (cpu.name, cpu.torch_device) == ("cpu", torch.device("cpu"))
    seconds = cpu.seconds_of(lambda: torch.ones(10).sum(), repeats=3)
    assert len(seconds) == 3
    assert all(0 < one < 5 for one in seconds)
    with pytest.raises(UsageError, match="at least 1"):
        cpu.seconds_of(idle, repeats=0)


class TestResolve:
    @pytest.fixture(autouse=True)
    def _no_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @pytest.mark.parametrize("text", ["cuda", "cuda:0", "cuda:7", " CUDA:1 "])
    def test_no_cuda_says_what_to_pass_instead(self, text: str) -> None:
        with pytest.raises(NoDevice) as caught:
            resolve_gpu(text)
        for hint in (text.strip().lower(), "'cpu'", "'cpu:2GiB'", "'rtx-4090'", "'24GiB'"):
            assert hint in str(caught.value)

    def test_auto_is_the_cpu(self) -> None:
        gpu, device = resolve_gpu("auto")
        assert gpu.kind == "cpu"
        assert isinstance(device, CpuDevice)

    def test_cpu_with_a_budget(self) -> None:
        gpu, device = resolve_gpu("cpu:2GiB")
        assert isinstance(device, CpuDevice)
        assert memory_parts(gpu, device) == (2 * GIB, 0, 0)

    def test_cpu_without_a_budget_leaves_out_what_others_use(self) -> None:
        gpu, device = resolve_gpu("cpu")
        total_bytes, others_bytes, context_bytes = memory_parts(gpu, device)
        assert total_bytes == psutil.virtual_memory().total
        assert 0 <= others_bytes < total_bytes
        assert context_bytes == 0

    @pytest.mark.parametrize(("text", "total_bytes"), [("24GiB", 24 * GIB), ("24GB", 24 * 10**9)])
    def test_a_size_is_an_empty_card(self, text: str, total_bytes: int) -> None:
        gpu, device = resolve_gpu(text)
        assert device is None
        assert memory_parts(gpu, device) == (total_bytes, 0, CUDA_CONTEXT_BYTES)

    def test_a_card_by_name_and_by_record(self) -> None:
        card = find_gpu("rtx-4090")
        assert resolve_gpu("rtx-4090") == (card, None)
        assert resolve_gpu(card) == (card, None)
        assert memory_parts(card, None) == (card.total_bytes, 0, CUDA_CONTEXT_BYTES)

    def test_a_cpu_record_has_its_device(self) -> None:
        assert isinstance(resolve_gpu(find_gpu("cpu:1GiB"))[1], CpuDevice)

    @pytest.mark.parametrize(
        ("gpu", "error"),
        [("rtx-4091", UnknownGpu), ("cuda:x", UnknownGpu), ("cpu:0GiB", BadBudget), ("-3GiB", BadBudget)],
    )
    def test_what_cannot_be_used(self, gpu: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            resolve_gpu(gpu)

    def test_what_is_no_text(self) -> None:
        with pytest.raises(UnknownGpu, match="pass a text"):
            resolve_gpu(24)  # type: ignore[arg-type]  # what a caller without a type checker may do

    def test_a_record_without_a_size_or_a_device(self) -> None:
        with pytest.raises(UsageError, match="give it a size"):
            memory_parts(Gpu(name="mystery", kind="cuda", total_bytes=None), None)


class FakeNvml(types.ModuleType):
    """Stands in for pynvml: one card of 24 GiB with 1 GiB kept by the driver."""

    class NVMLError(Exception):
        """As pynvml's."""

    nvmlMemory_v2 = 2  # noqa: N815  # pynvml's name

    def __init__(self, *, used: dict[int, int | None], library: bool = True) -> None:
        super().__init__("pynvml")
        self.used = used
        self.library = library
        self.sessions = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.library:
            raise self.NVMLError("Library Not Found")
        self.sessions += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.sessions -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-0123":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int) -> types.SimpleNamespace:  # noqa: N802
        assert (handle, version) == ("handle", 2)
        used = sum(n_bytes or 0 for n_bytes in self.used.values())
        return types.SimpleNamespace(total=24 * GIB, reserved=GIB, used=used, free=23 * GIB - used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[types.SimpleNamespace]:  # noqa: N802
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=n_bytes) for pid, n_bytes in self.used.items()]


class TestCuda:
    """What `CudaDevice` makes of the driver's answers. No card is needed, so the answers are given here."""

    @pytest.fixture(autouse=True)
    def _two_cards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.reserved_bytes = 0
        answers: dict[str, object] = {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: 1,
            "get_device_name": lambda index: ["NVIDIA GeForce RTX 4090", "Some Card Of Tomorrow"][index],
            "get_device_capability": lambda index: (8, 9),
            "get_device_properties": lambda index: types.SimpleNamespace(uuid="0123"),
            "memory_reserved": lambda index: self.reserved_bytes,
            "mem_get_info": lambda index: (10 * GIB, 23 * GIB),
            "synchronize": lambda index: None,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def driver(self, used: dict[int, int | None], *, library: bool = True) -> FakeNvml:
        nvml = FakeNvml(used=used, library=library)
        self.monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    def test_idle_process_beside_another(self) -> None:
        nvml = self.driver({1: 5 * GIB})
        memory = CudaDevice(0).memory()
        assert memory == DeviceMemory(23 * GIB, 18 * GIB, 5 * GIB, CUDA_CONTEXT_BYTES)
        assert nvml.sessions == 0

    def test_own_memory_is_not_held_by_others(self) -> None:
        self.reserved_bytes = 3 * GIB
        self.driver({1: 5 * GIB, os.getpid(): 3 * GIB + 300 * MIB})
        memory = CudaDevice(0).memory()
        assert (memory.others_bytes, memory.context_bytes) == (5 * GIB, 300 * MIB)

    @pytest.mark.parametrize("told", [{}, {os.getpid(): None}])
    def test_own_memory_that_the_driver_does_not_tell(self, told: dict[int, int | None]) -> None:
        self.reserved_bytes = 3 * GIB
        self.driver({1: 5 * GIB + 3 * GIB + 300 * MIB, **told})  # this process too, under a pid that is not ours
        memory = CudaDevice(0).memory()
        assert memory.others_bytes + memory.context_bytes == 5 * GIB + 300 * MIB

    def test_without_a_driver_library_cuda_is_asked(self) -> None:
        nvml = self.driver({}, library=False)
        memory = CudaDevice(0).memory()
        assert memory == DeviceMemory(23 * GIB, 10 * GIB, 13 * GIB - CUDA_CONTEXT_BYTES, CUDA_CONTEXT_BYTES)
        assert nvml.sessions == 0

    def test_a_slice_that_the_driver_library_does_not_find(self) -> None:
        nvml = self.driver({})
        self.monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="slice"))
        assert CudaDevice(0).memory().free_bytes == 10 * GIB
        assert nvml.sessions == 0

    def test_without_pynvml(self) -> None:
        self.monkeypatch.setitem(sys.modules, "pynvml", None)
        assert CudaDevice(0).memory().total_bytes == 23 * GIB

    @pytest.mark.parametrize(("text", "index"), [("cuda", 1), ("auto", 1), ("cuda:0", 0), ("CUDA:1", 1)])
    def test_live_cards(self, text: str, index: int) -> None:
        self.driver({1: 5 * GIB})
        gpu, device = resolve_gpu(text)
        assert isinstance(device, CudaDevice)
        assert device.torch_device == torch.device("cuda", index)
        assert gpu.total_bytes == 23 * GIB
        assert memory_parts(gpu, device) == (23 * GIB, 5 * GIB, CUDA_CONTEXT_BYTES)

    def test_a_known_card_has_its_rates_and_an_unknown_one_none(self) -> None:
        self.driver({})
        known, unknown = resolve_gpu("cuda:0")[0], resolve_gpu("cuda:1")[0]
        assert (known.name, known.flops) == ("rtx-4090", find_gpu("rtx-4090").flops)
        assert (unknown.name, unknown.flops) == ("Some Card Of Tomorrow", {})
        assert unknown.compute_capability == (8, 9)

    def test_the_allocator_is_simulated_as_it_is_set(self) -> None:
        told = {"max_split_size": 64 * MIB, "expandable_segments": True}
        self.monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda _: {"allocator_settings": told})
        assert CudaDevice(0).allocator_settings() == Settings.from_snapshot(told)
        told["a_setting_of_tomorrow"] = 7
        with pytest.raises(BadAllocatorSetting, match="a_setting_of_tomorrow"):
            CudaDevice(0).allocator_settings()

    @pytest.mark.parametrize(
        ("system", "release", "spills"),
        [
            ("Linux", "6.8.0-generic", False),
            ("Linux", "5.15-microsoft-standard-WSL2", True),
            ("Windows", "11", True),
        ],
    )
    def test_where_the_driver_gives_out_host_memory_instead(self, system: str, release: str, spills: bool) -> None:
        self.driver({})
        self.monkeypatch.setattr("platform.system", lambda: system)
        self.monkeypatch.setattr("platform.release", lambda: release)
        assert [sentence for sentence in CudaDevice(0).warnings() if "host memory" in sentence] == (
            CudaDevice(0).warnings() if spills else []
        )
        assert bool(CudaDevice(0).warnings()) is spills

    @pytest.mark.parametrize("why", ["slice", "refused", "missing"])
    def test_a_device_that_the_driver_library_does_not_tell_of(self, why: str) -> None:
        self.driver({}, library=why != "refused")
        if why == "slice":
            self.monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="slice"))
        if why == "missing":
            self.monkeypatch.setitem(sys.modules, "pynvml", None)
        (sentence,) = CudaDevice(0).warnings()
        assert "MIG slice" in sentence
        assert "450.00 MiB" in sentence

    def test_cards_are_told_apart_by_their_uuid_and_not_by_their_index(self) -> None:
        self.driver({1: 5 * GIB})
        uuids = ["another", "0123"]  # CUDA_VISIBLE_DEVICES=1,0
        self.monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid=uuids[i]))
        assert CudaDevice(1).memory().others_bytes == 5 * GIB
        assert CudaDevice(0).memory().free_bytes == 10 * GIB  # CUDA's own word

    def test_a_cap_on_the_process_is_read(self) -> None:
        self.monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 0.5)
        assert CudaDevice(0).cap_bytes == 23 * GIB // 2

    def test_a_card_that_this_machine_does_not_have(self) -> None:
        with pytest.raises(NoDevice, match=r"'cuda:2'.*'cuda:0' to 'cuda:1'.*'cpu:2GiB'"):
            resolve_gpu("cuda:2")

    def test_peaks_are_of_the_second_run(self) -> None:
        events: list[str] = []
        for name, result in (("empty_cache", 0), ("reset_peak_memory_stats", 0)):
            self.monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, result=result: events.append(name))
        self.monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: 7)
        self.monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: 9)
        assert CudaDevice(0).peaks_of(lambda: events.append("step")) == Peaks(7, 9)
        assert events == ["empty_cache", "step", "reset_peak_memory_stats", "step"]


class TestFake:
    memory = DeviceMemory(total_bytes=100, free_bytes=60, others_bytes=30, context_bytes=10)

    def test_answers_from_its_script(self) -> None:
        fake = FakeDevice(self.memory, peaks=[Peaks(7, 8), Peaks(9, 10)], seconds=[0.5, 0.25, 0.125], name="toy")
        calls: list[int] = []
        assert [fake.peak_of(lambda: calls.append(1)), fake.peaks_of(lambda: calls.append(1))] == [7, Peaks(9, 10)]
        assert fake.seconds_of(lambda: calls.append(1), repeats=2) == [0.5, 0.25]
        assert len(calls) == 2 + 2 + 2
        assert (fake.name, fake.torch_device, fake.memory()) == ("toy", torch.device("cpu"), self.memory)
        assert memory_parts(Gpu(name="toy", kind="cuda", total_bytes=100), fake) == (100, 30, 10)

    def test_says_when_the_script_has_run_out(self) -> None:
        fake = FakeDevice(self.memory, seconds=[1.0])
        with pytest.raises(UsageError, match="no more peaks"):
            fake.peak_of(idle)
        with pytest.raises(UsageError, match="no more seconds"):
            fake.seconds_of(idle, repeats=2)


def test_devices_are_final() -> None:
    for kind in (CpuDevice, CudaDevice, FakeDevice):
        assert kind.__bases__ == (devices.Device,)
        assert kind.__final__  # type: ignore[attr-defined]  # set by typing.final
