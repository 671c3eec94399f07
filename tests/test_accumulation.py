"""`repeated`: the second micro-step made of the first against the one that runs, column by column."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import memplan.micro_steps
from memplan import levers
from memplan.accumulation import repeated
from memplan.assembly import MicroBorders
from memplan.blocks import find_blocks
from memplan.gpus import find_gpu
from memplan.kernels import Backend
from memplan.kernels.cpu import CpuBackend
from memplan.kernels.cuda import CudaBackend
from memplan.levers.loss_head import find_head
from memplan.notes import Notes
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.repeat import same_step
from memplan.samples import Sample
from memplan.study import Study
from memplan.trace import Trace

Seen = list[tuple[Notes, MicroBorders] | None]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What came of each attempt to make the second micro-step of the first."""
    found: Seen = []

    def watched(notes: Notes, first: MicroBorders, grads: Sequence[int]) -> tuple[Notes, MicroBorders] | None:
        found.append(repeated(notes, first, grads))
        return found[-1]

    monkeypatch.setattr(memplan.micro_steps, "repeated", watched)
    return found


class Odd(nn.Module):
    """Gradients of all kinds: a weight used twice, a broadcast one, one that is part of another's, one of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 8)
        self.gain = nn.Parameter(torch.ones(1))
        self.both = nn.Parameter(torch.ones(2, 8))
        self.norm = nn.BatchNorm1d(8)
        self.idle = nn.Linear(8, 8)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        x = self.table(rows) * self.gain
        x = self.norm((x * self.both[0] + self.both[1]).transpose(1, 2)).transpose(1, 2)
        logits = x @ self.table.weight.t()
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten())}


def odd() -> tiny.Made:
    return Odd(), {"rows": torch.arange(24).reshape(4, 6)}


MODELS: dict[str, Callable[[], tiny.Made]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "vit": tiny.vit,
    "resnet": tiny.resnet,
    "lora": tiny.lora,
    "t5": tiny.t5,
    "odd": odd,
}
BACKENDS: tuple[Backend, ...] = (CpuBackend(), CudaBackend((8, 0)))


def same_columns(one: Trace, other: Trace) -> bool:
    names = [[trace.op_names[code] for code in trace.op_name.tolist()] for trace in (one, other)]
    owners = np.array_equal(one.op_module, other.op_module)
    births = [np.lexsort((trace.storage_bytes, trace.born)) for trace in (one, other)]
    columns = ("storage_bytes", "storage_category", "storage_module", "born")
    rows = all(np.array_equal(getattr(one, c)[births[0]], getattr(other, c)[births[1]]) for c in columns)
    return names[0] == names[1] and owners and rows and same_step(one, other)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_runs(name: str, backend: Backend, seen: Seen) -> None:
    model, batch = MODELS[name]()
    recorder, sample = Recorder(model, Recipe(accumulation=2), backend), Sample.of(batch)
    recorder.record(sample)
    assert recorder._repeatable, "the second micro-step was not shown to follow from the first"
    if recorder._by_enough:  # then of few blocks, where these do
        recorder.record(sample)
    known, seen[:] = set(recorder._repeatable), []
    taken = recorder.record(sample)
    assert len(seen) == 1
    assert seen[0] is not None
    recorder._repeatable.clear()
    assert same_columns(recorder.record(sample), taken)
    assert recorder._repeatable == known


@pytest.mark.parametrize("option", ["recompute", "chunked-64"])
def test_other_operators_are_shown_first(option: str, seen: Seen) -> None:
    model, batch = tiny.llama(layers=2, use_cache=False)
    paths = find_blocks(model) if option == "recompute" else [find_head(model)]
    recorder, sample = Recorder(model, Recipe(accumulation=2)), Sample.of(batch)
    recorder.record(sample)
    known = set(recorder._repeatable)

    def planned() -> Trace:
        return recorder.record(sample, lambda: levers.decided(model, dict.fromkeys(map(str, paths), option)))

    ran = planned()
    assert recorder._repeatable > known, "the levers' operators were taken for known"
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert same_columns(planned(), ran)
    handle.remove()
    assert len(forwards) == 1


class Unknown(set[str]):
    """Operators of which nothing was ever shown."""

    def issuperset(self, other: object) -> bool:  # as a set has it
        return False


def test_levels_are_as_if_every_micro_step_ran(seen: Seen) -> None:
    """Under all levers: those that prepare in their first forward do so in the trace."""

    def levels(known: set[str]) -> list[Trace]:
        model, batch = tiny.lora(layers=2)
        recorder = Recorder(model, Recipe(), CudaBackend((8, 0)))
        recorder._repeatable = known
        card = find_gpu("a100-sxm-40gb")  # whose times are not measured, so that both have the same options
        study = Study(model, Sample.of(batch), Recipe(), recorder, card, None, (2,), 2, host_bytes=2**30)
        return [level.trace for levels in study.levels(2).values() for level in levels]

    ran = levels(Unknown())
    seen.clear()
    taken = levels(set())
    assert any(again is not None for again in seen)
    assert len(ran) == len(taken)
    assert all(map(same_columns, ran, taken))


class Keeping(nn.Module):
    """Keeps a tensor from its first forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = x.sin()
        return (self.linear(x) * self.kept).sum()


class Growing(nn.Module):
    """Does more in its second forward, by the same operators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        for _ in range(self.count):
            x = self.linear(x)
        return x.sum()


class Sharing(nn.Module):
    """Two parameters whose gradients share a storage."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.cat([self.one, self.other]) * x).sum()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    made: Tensor = model(batch)
    return made


@pytest.mark.parametrize("kind", [Keeping, Growing, Sharing])
def test_what_does_not_follow_is_run(kind: type[nn.Module]) -> None:
    recorder = Recorder(kind(), Recipe(accumulation=2, loss=loss))
    sample = Sample.of(torch.ones(2, 8))
    first, second = recorder.record(sample), recorder.record(sample)
    assert not recorder._repeatable
    assert same_columns(first, second)


@pytest.mark.parametrize("recipe", [{"replicas": 2, "bucket_view": True}, {"keeps_output": True}], ids=str)
def test_other_hands_on_the_gradients_or_the_output(recipe: dict[str, object]) -> None:
    model, batch = tiny.llama(layers=2)
    recorder = Recorder(model, Recipe(accumulation=2, **recipe))  # type: ignore[arg-type]  # of two kinds
    recorder.record(Sample.of(batch))
    assert not recorder._repeatable


def test_cards_share_what_was_shown() -> None:
    model, _ = tiny.llama(layers=2)
    recorder = Recorder(model, Recipe(accumulation=2), CudaBackend((8, 0)))
    assert recorder.on(CudaBackend((9, 0)))._repeatable is recorder._repeatable
