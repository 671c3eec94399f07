"""A memory that counts, has a cap and fails where it is told; and the device that runs steps in it."""

import gc

import pytest
import torch
from torch import nn

from memplan.device import DeviceMemory, FakeDevice, Peaks
from memplan.fake_memory import FakeMemory

MIB = 2**20
READING = DeviceMemory(total_bytes=100, free_bytes=60, others_bytes=30, context_bytes=10)


def floats(size: int) -> torch.Tensor:
    """A tensor of that many bytes."""
    return torch.empty(size // 4)


def test_it_counts_what_is_made_and_dropped_but_views_of_nothing() -> None:
    with FakeMemory() as memory:
        first = floats(MIB)
        view = first[1:].view(-1)
        second = first + 1
        assert (memory.held_bytes, memory.allocations) == (2 * MIB, 2)
        del first
        assert memory.held_bytes == 2 * MIB  # a view holds it
        del view, second
    assert (memory.held_bytes, memory.peak_bytes) == (0, 2 * MIB)
    assert [change for _, change in memory.events] == [MIB, MIB, -MIB, -MIB]
    memory.reset_peak()
    assert memory.peak_bytes == 0


def test_what_is_older_is_held_once_it_is_used_and_is_no_allocation() -> None:
    older = floats(MIB)
    with FakeMemory() as memory:
        older.add_(1)
        assert (memory.held_bytes, memory.allocations) == (MIB, 0)
    del older
    assert memory.held_bytes == 0


def test_beyond_the_cap_it_refuses_and_then_goes_on() -> None:
    with FakeMemory(cap_bytes=3 * MIB) as memory:
        kept = floats(2 * MIB)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 MiB beside 2\.00 MiB: the cap is 3"):
            floats(2 * MIB)
        gc.collect()
        assert memory.held_bytes == 2 * MIB
        assert floats(MIB).numel() == kept.numel() // 2


def test_one_allocation_fails_where_it_is_told() -> None:
    with FakeMemory(fails_at=3):
        floats(64), floats(64)
        with pytest.raises(torch.OutOfMemoryError, match="allocation 3 was told to fail"):
            floats(64)
        floats(64)


def step_of(model: nn.Module, x: torch.Tensor) -> None:
    model(x).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def test_a_counting_device_measures_the_second_run_and_reads_the_clock() -> None:
    model, x = nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU()), torch.randn(64, 256)
    device = FakeDevice(READING, counting=FakeMemory())
    peaks = device.peaks_of(lambda: step_of(model, x))
    weights, rows = 256 * 256 * 4, 64 * 256 * 4
    assert peaks == Peaks(peaks.tensor_bytes, peaks.tensor_bytes)
    assert 2 * weights + 2 * rows <= peaks.tensor_bytes <= 2 * weights + 5 * rows
    assert all(seconds > 0 for seconds in device.seconds_of(lambda: step_of(model, x), repeats=2))


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_step_survives_any_allocation_that_fails(at: int) -> None:
    """Afterwards nothing is held but what was there, and the next step is like every other."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(4, 16)
    memory = FakeMemory(fails_at=at)
    device = FakeDevice(READING, counting=memory)
    with pytest.raises(torch.OutOfMemoryError):
        device.peaks_of(lambda: step_of(model, x))
    assert device.peaks_of(lambda: step_of(model, x)) == FakeDevice(READING, counting=FakeMemory()).peaks_of(
        lambda: step_of(model, x)
    )
