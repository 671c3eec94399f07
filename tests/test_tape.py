"""`Tape`: which storages there are, when they die, and which module they belong to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memplan.abstract import AbstractModel
from memplan.device import CpuDevice
from memplan.inplace import sole_owner_counts
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.tape import Tape, on_host
from memplan.trace import CATEGORIES, Trace

KIB = 1024
FLOATS = 1000
SIZE = 4 * FLOATS


def taped(work: Callable[[Tensor], object]) -> Tape:
    """The tape of some work on an abstract vector that was there before."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        x = torch.empty(FLOATS)
    tape = Tape(nn.Identity(), fake)
    tape.pass_over(x)
    with tape:
        kept = work(x)
    tape.forget()
    del kept
    return tape


def names(tape: Tape) -> list[str]:
    table = list(tape.notes.op_names)
    return [table[column[0]].removeprefix("aten::") for column in tape.notes.op_columns]


# --- storages ---------------------------------------------------------------------------------------------------------


def test_a_result_is_a_storage_and_its_input_is_none() -> None:
    tape = taped(lambda x: x.sin())
    assert tape.notes.bytes == [SIZE]
    assert (tape.notes.born, tape.notes.died) == ([1], [None])
    assert tape.notes.rows()["died"].tolist() == [tape.notes.now] == [2]


def test_a_storage_dies_with_its_last_holder() -> None:
    tape = taped(lambda x: x.sin().cos().tan())
    assert tape.notes.bytes == [SIZE] * 3
    assert tape.notes.died[2] is None
    assert [died is not None for died in tape.notes.died] == [True, True, False]
    assert all(born < died for born, died in zip(tape.notes.born, tape.notes.died, strict=True) if died is not None)


@pytest.mark.parametrize(
    "view", [lambda x: x.view(10, 100), lambda x: x[3:], lambda x: x.expand(5, FLOATS), lambda x: x.view(10, 100).t()]
)
def test_views_are_no_storages(view: Callable[[Tensor], Tensor]) -> None:
    tape = taped(view)
    assert tape.notes.bytes == []
    assert {column[2] for column in tape.notes.op_columns} == {0}


def test_a_view_keeps_its_storage_alive() -> None:
    tape = taped(lambda x: x.sin()[:2])
    assert (tape.notes.bytes, tape.notes.died) == ([SIZE], [None])


def test_an_expanded_tensor_takes_what_it_is_expanded_from() -> None:
    assert taped(lambda x: x[:1].sin().expand(FLOATS)).notes.bytes == [4]
    assert taped(lambda x: x[:1].sin().expand(FLOATS).contiguous()).notes.bytes == [4, SIZE]


def test_writing_in_place_makes_nothing() -> None:
    tape = taped(lambda x: x.sin().mul_(2).add_(1))
    assert tape.notes.bytes == [SIZE]
    assert names(tape) == ["sin", "mul_", "add_"]


def test_known_values_stay_known() -> None:
    seen: list[object] = []

    def work(x: Tensor) -> Tensor:
        mask = torch.arange(6) < 4
        seen.append((mask.sum().item(), bool(mask.all()), mask.nonzero().shape))
        return x

    taped(work)
    assert seen == [(4, False, (4, 1))]


def test_an_answer_stands_for_unknown_values() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        x = torch.empty(3)
    with Tape(nn.Identity(), fake, answer=1.0):
        assert x.sum().item() == 1.0
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException), Tape(nn.Identity(), fake):
        x.sum().item()


def test_what_dies_after_it_is_forgotten_does_not_count() -> None:
    tape = taped(lambda x: [x.sin() for _ in range(3)])
    assert tape.notes.died == [None] * 3
    assert tape.notes.now == 4


def test_a_tape_leaves_no_hooks_and_no_functions_behind() -> None:
    hooks = torch.nn.modules.module
    before = torch.get_rng_state, dict(hooks._global_forward_hooks), dict(hooks._global_forward_pre_hooks)
    with pytest.raises(KeyboardInterrupt), Tape(nn.Identity(), None):
        raise KeyboardInterrupt
    assert before == (torch.get_rng_state, dict(hooks._global_forward_hooks), dict(hooks._global_forward_pre_hooks))


def test_host_memory_is_not_the_devices() -> None:
    """It has no row, nor have its views; copies to it and from it are no work of the device."""

    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        with on_host():
            host = x.new_empty(4 * FLOATS, dtype=torch.uint8)
            host.view(torch.float32).copy_(x)
        back = torch.empty_like(x)
        with on_host():
            back.copy_(host.view(torch.float32))
        return host[4:], back.sin()

    tape = taped(work)
    assert tape.notes.bytes == [SIZE, SIZE]
    assert tape.notes.died[0] is not None
    assert tape.notes.died[1] is None
    copies = [c for c, name in zip(tape.notes.op_columns, names(tape), strict=True) if name == "copy_"]
    assert [column[2:4] for column in copies] == [(0, 0), (0, 0)]


def test_random_states_that_checkpoints_keep_are_seen() -> None:
    tape = taped(lambda _: torch.get_rng_state())
    assert tape.notes.bytes == [torch.get_rng_state().nbytes]


# --- gradients that are added up --------------------------------------------------------------------------------------


class Graph(nn.Module):
    """One parameter, and a function of it and the input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale).sum()


class OwnFormula(torch.autograd.Function):
    """Adds up in its backward, in Python: what it asks for is not written in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad * x) + (x * grad)


GRAPHS: dict[str, Callable[[Tensor], Tensor]] = {
    "two fresh gradients": lambda h: h.sin() + h.cos() * 3,
    "three": lambda h: h.sin() + h.cos() * 3 + h.tanh(),
    "residual with an expanded gradient": lambda h: h + h.cos(),
    "residuals": lambda h: (h + h.tanh() + (h + h.tanh()).sin()).square(),
    "the same twice": lambda h: h * h,
    "a view": lambda h: h.view(10, -1).sin().sum(0) + h.view(10, -1).cos().sum(0),
    "a slice": lambda h: h[:500].sin() + h[500:].cos() * h[:500],
    "an index": lambda h: h[torch.arange(0, FLOATS, 2)].sin() + h[: FLOATS // 2].cos(),
    "a gather": lambda h: h.gather(0, torch.arange(FLOATS)).sin() + h.tanh(),
    "in place": lambda h: h.sin().mul_(2).add_(h).tanh(),
    "an expansion": lambda h: h[:1].expand(FLOATS) * h.sin(),
    "a formula in Python": lambda h: OwnFormula.apply(h).tanh() + h.sin(),
    "a concatenation": lambda h: torch.cat([h, h.sin(), h.tanh()]).cos(),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_backward_takes_what_the_allocator_says(name: str) -> None:
    """Under a mode autograd adds out of place; the tape has to count as if it did not."""
    model, x = Graph(GRAPHS[name]), torch.randn(FLOATS)
    trace = Recorder(model, Recipe(optimizer="sgd")).record(Sample.of(x))

    def step() -> None:
        model(x).backward()
        model.scale.grad = None

    device = CpuDevice()
    step_bytes = device.peak_of(step) - device.peak_of(lambda: None)
    resident = trace.live[0]
    assert abs(int(trace.live[: trace.optimizer.start].max() - resident) - step_bytes) <= 64


def test_the_engine_is_understood() -> None:
    owners, storage_owners = sole_owner_counts()
    assert owners >= 1
    assert storage_owners >= 1


# --- modules ----------------------------------------------------------------------------------------------------------


def owners_in(trace: Trace, phase: str) -> list[str]:
    span = getattr(trace.steps[0], f"{phase}_ops")
    rows = range(span.start, span.stop)
    return [trace.modules[trace.op_module[row]] for row in rows if "mm" in trace.op_names[trace.op_name[row]]]


def test_operators_belong_to_the_module_that_runs() -> None:
    model, batch = tiny.plain(layers=2)
    trace = Recorder(model, Recipe()).record(Sample.of(batch))
    forward = ["blocks.0.wide", "blocks.0.narrow", "blocks.1.wide", "blocks.1.narrow"]
    assert owners_in(trace, "forward") == forward
    assert owners_in(trace, "loss") == ["head"]
    backward = owners_in(trace, "backward")
    assert list(dict.fromkeys(backward)) == ["head", *reversed(forward)]
    assert backward.count("blocks.0.wide") == 1  # its input needs no gradient
    assert backward.count("blocks.1.wide") == 2


def test_storages_belong_to_the_module_that_made_them() -> None:
    model, batch = tiny.plain(layers=2)
    trace = Recorder(model, Recipe()).record(Sample.of(batch))
    kept = trace.breakdown(trace.steps[0].forward.stop)
    assert kept["activations/blocks.0.wide"] == kept["activations/blocks.1.wide"] == 8 * 64 * 4
    assert kept["activations/blocks.0.dropout"] >= 8 * 16 * 4


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, x, use_reentrant=False)).mean()


def test_recomputation_belongs_to_what_is_recomputed() -> None:
    trace = Recorder(Recomputed(), Recipe()).record(Sample.of(torch.randn(16, 8)))
    step = trace.steps[0]
    backward = owners_in(trace, "backward")
    assert backward[:2] == ["last", "last"]
    assert backward[2] == "inner.0"  # forwards once more ...
    assert backward[-1] == "inner.0"  # ... and then back
    assert set(backward[3:-1]) == {"inner.2"}
    again = (trace.born >= step.backward.start) & (trace.storage_category == CATEGORIES.index("activations"))
    assert {trace.modules[m] for m in trace.storage_module[again]} >= {"inner.0", "inner.1"}


def test_tied_weights_have_one_gradient() -> None:
    model, batch = tiny.gpt2(layers=1)
    trace = Recorder(model, Recipe()).record(Sample.of(batch))
    grads = trace.of_category(CATEGORIES.index("grads"))
    assert grads[-1] == sum(parameter.nbytes for parameter in model.parameters())
    assert trace.breakdown(0)["params"] == grads[-1]


def test_last_entered_is_where_an_error_comes_from() -> None:
    model, batch = tiny.plain(layers=2)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with AbstractModel(model, fake) as abstract, Tape(model, fake) as tape:
        model.blocks[1].narrow.forward = None
        with pytest.raises(TypeError):
            model(**{name: abstract.imitate(tensor) for name, tensor in batch.items()})
        assert tape.last_entered == "blocks.1.narrow"


# --- operators --------------------------------------------------------------------------------------------------------


def test_operators_are_counted() -> None:
    model = nn.Linear(8, 32, bias=False)
    recipe = Recipe(loss=lambda model, x: model(x).sum())
    trace = Recorder(model, recipe).record(Sample.of(torch.randn(16, 8)))
    product = [row for row, name in enumerate(trace.op_name) if trace.op_names[name] == "aten::mm"]
    assert trace.op_flops[product].tolist() == [2 * 16 * 8 * 32] * 2  # forward, and the weight's gradient
    assert trace.op_bytes[product[0]] == 4 * (16 * 8 + 8 * 32 + 16 * 32)
    assert {trace.dtypes[code] for code in trace.op_dtype[product]} == {"float32"}


def test_recorded_for_real_and_abstractly_a_step_is_the_same() -> None:
    model, batch = tiny.plain(layers=2)
    recorder, sample = Recorder(model, Recipe()), Sample.of(batch)
    abstract = recorder.record(sample)
    static = recorder._static(sample)
    model.zero_grad()
    real, _ = recorder._micro_steps(sample, ["blocks.0", "blocks.1"], static, None)
    assert real.how == "recorded"
    assert abs(int(real.live.max() - real.live[0]) - int(abstract.live[: real.ticks].max() - abstract.live[0])) <= KIB
    flops = abstract.op_flops[: abstract.optimizer_ops.start]
    assert np.array_equal(real.op_flops[real.op_flops > 0], flops[flops > 0])
