"""The measured peak of a step, from the allocator's record."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from memplan.integrations.watching import Watch, _own


def peak_of(record: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """With nothing but what the record says."""
    monkeypatch.setattr("memplan.integrations.watching.allocator_record", lambda: nullcontext(record))
    watch = Watch(torch.device("cpu"), nn.Identity(), [])
    watch.count()
    return watch.stop()


def test_the_highest_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of([(1, 100), (2, 50), (1, -100), (3, 80)], monkeypatch) == 150


def test_what_was_there_before_is_not_the_step_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of([(9, -1000), (1, 100), (1, -100)], monkeypatch) == 100


def test_an_address_given_out_again_was_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread of which the record tells nothing, as gloo's are."""
    assert peak_of([(1, 100), (1, 100), (1, -100), (1, 100), (1, 100)], monkeypatch) == 100


def test_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of([], monkeypatch) is None


def test_on_a_card_other_tensors_than_the_step_s_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As averaged weights are, or another model; but not what the loop lets go of. The card's figures are made up."""
    model = nn.Linear(100, 3)  # 1,200 and 12 bytes, in blocks of 512
    own, kept, output, more = 1536 + 512, 4096, 8192, 10000
    allocated = iter([own + kept, own + kept + output])
    monkeypatch.setattr("memplan.integrations.watching._own", lambda *_: {1: 1200, 2: 12})
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: next(allocated))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: own + kept + more)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda _: None)
    watch = Watch(torch.device("cuda"), model, [])
    watch.count()
    assert watch.stop() == own + more


def test_what_is_on_another_device_is_not_the_step_s() -> None:
    model = nn.Linear(100, 3)
    assert sum(_own(model, [], torch.device("cpu")).values()) == 1212
    assert not _own(model, [], torch.device("cuda"))
