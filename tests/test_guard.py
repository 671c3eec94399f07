"""Memory runs out where it is told to; the run has to end as if it had not."""

import copy
import gc
import random
import weakref
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from guarding import (
    LENGTH,
    MICRO,
    ROWS,
    Fault,
    Faulty,
    Loop,
    batches,
    differences,
    out_of_memory,
    plans_for,
    state_of,
    texts,
    weights_of,
)
from torch import Tensor, nn

import memplan
from memplan import rewind
from memplan.device import CpuDevice
from memplan.errors import AlreadyApplied, UsageError
from memplan.fake_memory import FakeMemory
from memplan.guard import Guard
from memplan.plan_record import Plan
from memplan.rewind import Before
from memplan.rungs import ladder
from memplan.strategy import Strategy

GOOD_STEPS = 3


@cache
def plans() -> tuple[Plan, ...]:
    return plans_for(texts())


def loop(guarded: bool = True, some: tuple[Plan, ...] | None = None) -> Loop:
    model = texts()
    optimizer = Faulty(model.parameters(), lr=1e-2)
    some = some or plans()
    guard = Guard(memplan.apply(model, some[0]), optimizer, some) if guarded else None
    torch.manual_seed(1)
    return Loop(model, optimizer, guard)


@cache
def unfaulted() -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Weights, buffers and losses of a run without memplan."""
    ours = loop(guarded=False)
    ours.train(batches())
    return weights_of(ours.model), list(ours.model.buffers()), ours.losses


def check_as_unfaulted(ours: Loop) -> None:
    weights, buffers, losses = unfaulted()
    assert differences(weights_of(ours.model), weights) <= 1e-6
    assert differences(list(ours.model.buffers()), buffers) <= 1e-6
    assert ours.losses == pytest.approx(losses, abs=1e-6)
    assert ours.fetched == len(losses)


# --- the ladder -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ladder_is_planned_when_it_is_needed_and_gets_ever_smaller() -> None:
    model = texts(norm=False)  # a batch norm's batch would not be split
    data = batches(lengths=(64,))  # so that there is more to recompute than the optimizer's step takes
    first = memplan.plan(
        model,
        "cpu:1GiB",
        sample=data[0],
        effective_batch=ROWS,
        micro_batch=MICRO,
        strategy=Strategy(name="keep-all", levers=()),
    )
    asked = Strategy(name="blocks", levers=("recompute",))
    fit = memplan.apply(model, first)
    by_hand = ladder(model, first, asked, MICRO)
    assert next(by_hand) is first
    with pytest.raises(AlreadyApplied, match="before apply"):
        next(by_hand)
    optimizer = Faulty(model.parameters(), lr=1e-2)
    guard = Guard(fit, optimizer, ladder(model, first, asked, MICRO))
    torch.manual_seed(1)
    with Fault("forward", 4).on(model):
        Loop(model, optimizer, guard).train(data)
    assert guard.plan.needs_bytes < first.needs_bytes
    assert (guard.plan.effective_batch, guard.plan.micro_batch) == (ROWS, MICRO)
    assert guard.plan.changed
    assert not first.changed

    plain = texts(norm=False)
    wanted = Loop(plain, Faulty(plain.parameters(), lr=1e-2))
    torch.manual_seed(1)
    wanted.train(data)
    assert differences(weights_of(model), weights_of(plain)) <= 1e-6


def test_a_plan_from_a_file_has_no_ladder() -> None:
    with pytest.raises(UsageError, match="read from a file"):
        next(ladder(texts(), Plan.model_validate_json(plans()[0].model_dump_json())))


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_guard_changes_nothing_where_nothing_happens() -> None:
    ours = loop()
    ours.train(batches())
    check_as_unfaulted(ours)
    assert ours.guard is not None
    assert ours.guard.falls == []
    assert ours.guard.plan is plans()[0]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("good", [0, GOOD_STEPS])
@pytest.mark.parametrize("times", [1, 2])
def test_a_step_is_run_again_by_a_smaller_plan(where: str, good: int, times: int) -> None:
    """The second of the step's micro-batches fails: the first has left gradients, and dropout has drawn."""
    ours = loop()
    with Fault(where, 2 * good + 2, times).on(ours.model):
        ours.train(batches())
    check_as_unfaulted(ours)
    assert ours.guard is not None
    assert len(ours.guard.falls) == times
    assert ours.guard.plan is plans()[times]


@pytest.mark.parametrize("good", [0, GOOD_STEPS])
@pytest.mark.parametrize("at", [1, 3, 11])
@pytest.mark.parametrize("part_bytes", [1, 8192, rewind.PART_BYTES])
def test_a_step_of_the_optimizer_is_finished(
    good: int, at: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle: of some parameters the weights are changed, of some the state, of others nothing."""
    monkeypatch.setattr(rewind, "PART_BYTES", part_bytes)
    ours = loop()
    optimizer = ours.optimizer
    assert isinstance(optimizer, Faulty)
    data = batches()
    ours.train(data[:good])
    optimizer.at, optimizer.fails = at, (optimizer.calls + 1,)
    ours.train(data[good:])
    check_as_unfaulted(ours)
    assert ours.guard is not None
    assert ours.guard.falls == []  # a smaller plan would not help it


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_at_the_end_of_the_ladder_all_is_as_before_the_step(where: str) -> None:
    ours = loop()
    data = batches()
    ours.train(data[:2])
    before, drawn = state_of(ours.model, ours.optimizer), (random.getstate(), np.random.get_state()[1].tolist())
    with (
        Fault(where, 1, times=99).on(ours.model),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as raised,
    ):
        ours.train(data[2:])
    assert differences(state_of(ours.model, ours.optimizer), before) == 0
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn
    (note,) = raised.value.__notes__
    assert "there is no smaller plan" in note
    assert "as before it" in note
    assert "Way out: " in note
    ours.losses.clear()
    ours.fetched = 2
    ours.train(data[2:])  # nothing stands in the way of going on
    assert differences(weights_of(ours.model), unfaulted()[0]) <= 1e-6


def test_an_optimizer_that_finds_no_room_at_all_has_changed_nothing() -> None:
    ours = loop()
    assert isinstance(ours.optimizer, Faulty)
    data = batches()
    ours.train(data[:2])
    before = state_of(ours.model, ours.optimizer)
    ours.optimizer.fails, ours.optimizer.at = tuple(range(99)), 1
    with pytest.raises(torch.OutOfMemoryError) as raised:
        ours.train(data[2:])
    assert differences(state_of(ours.model, ours.optimizer), before) == 0
    assert "no parameter was stepped" in raised.value.__notes__[0]


def test_a_parameter_for_whose_copy_there_is_no_room_is_stepped_without(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, refused = rewind._Copies, []

    class NoRoom(copies):  # type: ignore[misc,valid-type]  # a class by another name
        def __init__(self, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> None:
            if len(refused) < 4:  # of the first step's only part, and of three parameters alone
                refused.append(len(params))
                out_of_memory()
            super().__init__(optimizer, params)

    monkeypatch.setattr(rewind, "_Copies", NoRoom)
    ours = loop()
    ours.train(batches())
    check_as_unfaulted(ours)
    assert refused[1:] == [1, 1, 1]
    assert ours.guard is not None
    assert not ours.guard.falls


def test_an_optimizer_that_stops_half_way_says_so() -> None:
    ours = loop()
    assert isinstance(ours.optimizer, Faulty)
    ours.optimizer.fails, ours.optimizer.at = (1, 4), 1
    with pytest.raises(torch.OutOfMemoryError) as raised:
        ours.train(batches())
    assert "had stepped 2 of" in raised.value.__notes__[0]
    assert "load the last checkpoint" in raised.value.__notes__[0]
    assert "not run again" in raised.value.__notes__[1]


def test_other_errors_pass_as_they_are() -> None:
    ours = loop()
    assert ours.guard is not None

    def broken() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        ours.guard.step(broken)
    assert not hasattr(raised.value, "__notes__")
    assert ours.guard.plan is plans()[0]


def test_what_no_plan_helps_is_said_and_not_tried_again() -> None:
    ours = loop()
    assert ours.guard is not None
    calls = []

    def broken() -> None:
        calls.append(1)
        raise RuntimeError("DataLoader worker (pid 249) is killed by signal: Bus error. It is possible that")

    with pytest.raises(RuntimeError, match="Bus error") as raised:
        ours.guard.step(broken)
    assert calls == [1]
    assert "fewer loader workers" in raised.value.__notes__[0]


# --- what has to be put back ------------------------------------------------------------------------------------------


def test_without_the_random_state_the_run_ends_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that forgets it is found out by the tests above."""
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    ours = loop()
    with Fault("forward", 4).on(ours.model):
        ours.train(batches())
    assert differences(weights_of(ours.model), unfaulted()[0]) > 1e-4


def test_without_the_buffers_the_run_ends_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewind.Before, "note", forgetting_buffers(Before.note))
    ours = loop()
    with Fault("forward", 4).on(ours.model):
        ours.train(batches())
    wanted = loop(guarded=False)
    wanted.train(batches())
    assert differences(*([b.clone() for b in each.model.buffers()] for each in (ours, wanted))) > 1e-4


def forgetting_buffers(note: Callable[[Before], None]) -> Callable[[Before], None]:
    def forget(before: Before) -> None:
        note(before)
        before._buffers.clear()
        before._copies.clear()

    return forget


def test_every_source_of_chance_is_put_back() -> None:
    model = texts()
    own = torch.Generator().manual_seed(3)
    before = Before(model, [own])

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(1).item(), torch.rand(1, generator=own).item()]

    before.note()
    first = draw()
    before.put_back()
    assert draw() == first


def test_a_buffer_that_a_forward_replaces_is_put_back() -> None:
    model = nn.BatchNorm1d(3)
    before, mean = Before(model), model.running_mean
    before.note()
    model.running_mean = torch.ones(3)
    before.put_back()
    assert model.running_mean is mean
    assert mean is not None
    assert not mean.any()


def test_nothing_of_the_failed_attempt_is_held_while_the_next_one_runs() -> None:
    """Frames of an error hold the step's tensors, which would be twice there."""
    ours = loop()
    assert ours.guard is not None
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def run() -> None:
        alive.append(sum(ref() is not None for ref in seen))
        activations = torch.ones(5)
        seen.append(weakref.ref(activations))
        if len(seen) < 3:
            out_of_memory()

    gc.disable()
    try:
        ours.guard.step(run)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


# --- being close ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["retries", "reserved"])
def test_it_falls_before_memory_runs_out(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"retries": 0, "reserved": 0}
    monkeypatch.setattr(CpuDevice, "pressure", lambda _: (says["retries"], says["reserved"]))
    released = []
    monkeypatch.setattr(CpuDevice, "release", lambda _: released.append(says.update(reserved=0)))
    ours = loop()
    assert ours.guard is not None
    released.clear()
    data = batches()
    ours.train(data[:2])
    assert ours.guard.plan is plans()[0]
    says[sign] = 1 if sign == "retries" else plans()[0].budget_bytes + 1
    ours.train(data[2:4])
    assert ours.guard.plan is plans()[1]  # once: the next step was not close
    assert len(released) == 1
    assert "nearly ran out" in ours.guard.falls[0]
    ours.train(data[4:])
    check_as_unfaulted(ours)


def test_at_the_end_of_the_ladder_being_close_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1, 99))
    monkeypatch.setattr(CpuDevice, "pressure", lambda _: (next(calls), 0))
    ours = loop(some=plans()[:2])
    ours.train(batches())
    check_as_unfaulted(ours)
    assert ours.guard is not None
    assert ours.guard.plan is plans()[1]
    assert len(ours.guard.falls) == 1


# --- batches of different lengths -------------------------------------------------------------------------------------


def test_plans_by_length_give_the_weights_of_one_plan() -> None:
    """Short batches keep everything, long ones recompute; steps alternate, and a long one runs out once."""
    short, long = LENGTH, 2 * LENGTH
    data = batches(lengths=(short, long, short, long, long, short))
    wanted = loop(guarded=False)
    wanted.train(data)
    found = plans()
    model = texts()
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    optimizer = Faulty(model.parameters(), lr=1e-2)
    guard = Guard(memplan.apply(model, found[0]), optimizer, {ROWS * short: [found[0]], ROWS * long: found[1:]})
    torch.manual_seed(1)
    ours, used = Loop(model, optimizer, guard), []

    with Fault("backward", 8).on(model):  # the second half of the fourth step
        for batch in data:
            ours.train([batch], Tensor.numel)
            used.append(found.index(guard.plan))
    assert used == [0, 1, 0, 2, 2, 0]
    assert differences(weights_of(model), weights_of(wanted.model)) <= 1e-6
    guard.undo()
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert vars(optimizer).get("step") is None


def test_a_batch_longer_than_any_plan_is_refused() -> None:
    found = plans()
    ours = loop(guarded=False)
    guard = Guard(memplan.apply(ours.model, found[0]), ours.optimizer, {64: [found[0]], 128: [found[1]]})
    with pytest.raises(UsageError, match="129 tokens, and the plans are for 128"):
        guard.step(lambda: None, 129)
    with pytest.raises(UsageError, match="how many tokens"):
        guard.step(lambda: None)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_goes_on_with_fewer_rows_and_the_training_as_before() -> None:
    ours = loop()
    guard = ours.guard
    assert guard is not None
    data = batches()
    ours.train(data[:3])
    asked: list[int] = []

    def evaluate(rows: int) -> float:
        asked.append(rows)
        drawn = torch.rand(1).item()
        if rows > 2:
            out_of_memory()
        return drawn

    drawn = torch.get_rng_state()
    wanted = torch.rand(2).tolist()
    torch.set_rng_state(drawn)
    assert [guard.evaluate(evaluate, ROWS), guard.evaluate(evaluate, ROWS)] == wanted
    assert asked == [8, 4, 2, 2]
    assert guard.plan is plans()[0]
    torch.set_rng_state(drawn)
    ours.train(data[3:])
    check_as_unfaulted(ours)


def test_an_evaluation_of_one_row_that_does_not_fit_is_an_error() -> None:
    guard = loop().guard
    assert guard is not None
    with pytest.raises(torch.OutOfMemoryError) as raised:
        guard.evaluate(out_of_memory, 2)
    assert "batches of one row" in raised.value.__notes__[0]


# --- wrong use --------------------------------------------------------------------------------------------------------


# --- the loop of another ----------------------------------------------------------------------------------------------


def train_by_micro_steps(ours: Loop, *, keeps_zeros: bool = False) -> None:
    """A loop that hands out micro-batches, and steps the optimizer itself."""
    guard = ours.guard
    assert guard is not None
    for batch in batches():
        total = 0.0
        for part in batch.split(MICRO):

            def run(part: Tensor = part) -> float:
                loss: Tensor = ours.model(part) * (MICRO / ROWS)
                loss.backward()
                return loss.item()

            total += guard.micro_step(run)
        ours.optimizer.step()
        ours.optimizer.zero_grad(set_to_none=not keeps_zeros)
        ours.schedule.step()
        ours.fetched += 1
        ours.losses.append(total)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [1, 2, 7, 8])  # the first and the second micro-step of a step
def test_a_step_in_micro_steps_is_run_again(where: str, at: int) -> None:
    ours = loop()
    with Fault(where, at).on(ours.model):
        train_by_micro_steps(ours)
    assert ours.guard is not None
    assert len(ours.guard.falls) == 1
    check_as_unfaulted(ours)


def test_a_second_fault_while_micro_steps_run_again() -> None:
    ours = loop()
    with Fault("backward", 8, times=2).on(ours.model):  # the second micro-step, then the first of the next attempt
        train_by_micro_steps(ours)
    assert ours.guard is not None
    assert len(ours.guard.falls) == 2
    check_as_unfaulted(ours)


@pytest.mark.parametrize(("where", "at"), [("forward", 8), ("backward", 7), ("backward", 8)])
def test_a_forward_and_a_backward_of_their_own(where: str, at: int) -> None:
    """Each is a part of a step: run again, a backward makes its forward anew."""
    ours = loop()
    guard = ours.guard
    assert guard is not None
    with Fault(where, at).on(ours.model):
        for batch in batches():
            total = 0.0
            for part in batch.split(MICRO):
                made: list[Tensor] = []

                def forward(part: Tensor = part, made: list[Tensor] = made) -> None:
                    made[:] = [ours.model(part) * (MICRO / ROWS)]

                def backward(made: list[Tensor] = made) -> None:
                    made[0].backward()

                guard.micro_step(forward)
                total += made[0].item()
                guard.micro_step(backward, begins=False)
            ours.optimizer.step()
            ours.optimizer.zero_grad()
            ours.schedule.step()
            ours.fetched += 1
            ours.losses.append(total)
    assert len(guard.falls) == 1
    check_as_unfaulted(ours)


def test_a_step_that_is_left_is_not_run_again() -> None:
    ours = loop()
    guard, part = ours.guard, batches()[0][:MICRO]
    assert guard is not None
    guard.micro_step(lambda: ours.model(part).backward())
    guard.leave_step()
    before = [p.grad.clone() for p in ours.model.parameters() if p.grad is not None]
    with pytest.raises(torch.OutOfMemoryError) as raised:
        guard.micro_step(out_of_memory, begins=False)
    assert not hasattr(raised.value, "__notes__")
    assert all(torch.equal(p.grad, was) for p, was in zip(ours.model.parameters(), before, strict=True))
    ours.optimizer.zero_grad()
    with Fault("forward", 1).on(ours.model):
        guard.micro_step(lambda: ours.model(part).backward())  # the next one is
    assert len(guard.falls) == 1


def test_a_step_that_begins_with_gradients_is_not_guarded() -> None:
    ours = loop()
    train_by_micro_steps(ours, keeps_zeros=True)
    check_as_unfaulted(ours)
    with Fault("forward", 1).on(ours.model), pytest.raises(torch.OutOfMemoryError):
        train_by_micro_steps(ours)
    assert ours.guard is not None
    assert not ours.guard.falls


def test_micro_steps_by_plans_of_several_lengths_are_refused() -> None:
    model, optimizer = texts(), torch.optim.AdamW(texts().parameters())
    guard = Guard(memplan.apply(model, plans()[0]), optimizer, {8: plans()[:1], 16: plans()[:1]})
    with pytest.raises(UsageError, match="are guarded with plans for any length"):
        guard.micro_step(lambda: None)


def test_gradients_before_a_step_are_refused() -> None:
    ours = loop()
    assert ours.guard is not None
    ours.model(batches()[0]).backward()
    with pytest.raises(UsageError, match="set_to_none=True"):
        ours.guard.step(lambda: None)


def test_plans_that_make_no_ladder_are_refused() -> None:
    found = plans()
    ours = loop(guarded=False)
    fit = memplan.apply(ours.model, found[0])
    wrong = {
        "each has to need less": [found[0], found[2], found[1]],
        "a plan for 16 samples a step among plans for 8": [
            found[0],
            found[1].model_copy(update={"effective_batch": 16}),
        ],
        "steps inside the backward": [found[0], found[1].model_copy(update={"stepping": "in-backward"})],
        "by another plan than the first": found[1:],
        "the one in force": [],
    }
    for words, some in wrong.items():
        with pytest.raises(UsageError, match=words):
            Guard(fit, ours.optimizer, some)


def test_a_closure_is_refused() -> None:
    ours = loop()
    with pytest.raises(UsageError, match="closure"):
        ours.optimizer.step(lambda: 1.0)


@pytest.mark.parametrize("room", [0.0, 0.2, 10.0])
def test_copies_stay_below_the_plan_s_peak(room: float) -> None:
    """Of weights and states, which are half of each other's; half of the room is for temporaries."""
    model = texts(norm=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    held = 4 * sum(p.nbytes for p in model.parameters())  # with gradients and two states
    most = int((1 + room) * held)
    careful = rewind.CarefulStep(model, optimizer, CpuDevice(), lambda: None, lambda: most)
    model(batches()[0]).backward()
    optimizer.step()
    model(batches()[0]).backward()
    with FakeMemory() as memory:
        states = (t for state in optimizer.state.values() for t in state.values())
        for tensor in (*model.parameters(), *(p.grad for p in model.parameters()), *states):
            tensor.clone()  # what is older is no allocation
        before = memory.held_bytes
        memory.reset_peak()
        optimizer.step()
    careful.undo()
    peak, largest = memory.peak_bytes - before, max(p.nbytes for p in model.parameters())
    assert peak <= max(most - held, 6 * largest)
    assert peak >= min((most - held) // 4, 3 * held // 4)


def test_a_scheduler_that_is_older_than_the_guard_warns_of_nothing() -> None:
    model = texts()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    Guard(memplan.apply(model, plans()[0]), optimizer, plans())
    model(batches()[0]).backward()
    optimizer.step()
    schedule.step()  # warnings are errors here


def test_hooks_and_schedulers_see_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewind, "PART_BYTES", 1)
    ours = loop()
    calls: list[str] = []
    ours.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    ours.train(batches()[:2])
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize(
    "kind", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, fused=True)]
)
def test_other_optimizers_step_as_ever(kind: Callable[..., torch.optim.Optimizer]) -> None:
    ends = []
    for guarded in (False, True):
        model = texts()
        optimizer = kind(model.parameters())
        guard = Guard(memplan.apply(model, plans()[0]), optimizer, plans()) if guarded else None
        torch.manual_seed(1)
        Loop(model, optimizer, guard).train(batches())
        ends.append(copy.deepcopy(weights_of(model)))
    assert differences(*ends) == 0
