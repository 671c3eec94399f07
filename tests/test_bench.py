"""Runs of a small model, in this process and, as on a card, in another one. It is afterwards what it was before."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import tuners
from imprint import Imprint
from torch import nn

import memplan
from memplan import cache
from memplan.bench import Bench, Failure, _Apart, at_home
from memplan.device import CpuDevice
from memplan.errors import UsageError
from memplan.fitting import Fit, Live
from memplan.plan_record import Measured, Plan
from memplan.recipe import Recipe
from memplan.samples import Sample

ROWS = 2


def model_and_batch() -> tiny.Made:
    return tiny.llama(layers=2, rows=ROWS, use_cache=False)


@pytest.fixture(scope="module")
def plan() -> Plan:
    model, batch = model_and_batch()
    return memplan.plan(model, "cpu:600KiB", sample=batch, effective_batch=ROWS)


def test_the_optimizer_in_use_is_put_back_to_the_bit(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch).loss.backward()
    optimizer.step()
    state = optimizer.state[next(model.parameters())]
    state["exp_avg"][0, :3] = torch.tensor([torch.nan, 0.0, -0.0])
    before = state["exp_avg"].clone()

    def spoilt(fit: Fit, steps: int) -> Measured:
        state["exp_avg"].zero_()
        state["step"].add_(steps)
        return measure(fit, steps)

    measure = Fit.measure
    monkeypatch.setattr(Fit, "measure", spoilt)
    with Bench(model, Recipe(optimizer=optimizer), Sample.of(batch), CpuDevice()) as bench:
        assert isinstance(bench.run(plan), Measured)
    assert torch.equal(state["exp_avg"].view(torch.int32), before.view(torch.int32))
    assert state["step"] == 1


def test_only_runs_that_are_to_be_remembered_are(plan: Plan, cache_folder: None) -> None:
    model, batch = model_and_batch()
    with Bench(model, Recipe(), Sample.of(batch), CpuDevice()) as bench:
        for remembered in (True, False, False):
            assert isinstance(bench.run(plan, remembered=remembered), Measured)
    assert [len(runs) for runs in cache.all_runs().values()] == [1]


def test_a_plan_of_another_card_is_run_as_one_for_the_card_here(plan: Plan) -> None:
    card: Any = SimpleNamespace(torch_device=torch.device("cuda:1"))
    elsewhere, wanted = (
        plan.model_copy(update={"budget": plan.budget.model_copy(update={"gpu": place})})
        for place in ("cuda:0", "cuda:1")
    )
    here = at_home(elsewhere, card)
    assert here == wanted
    assert at_home(here, card) is here
    assert at_home(plan, CpuDevice()) is plan
    model, batch = model_and_batch()
    ran: list[Plan] = []
    with Bench(model, Recipe(), Sample.of(batch), card) as bench:
        apart: Any = SimpleNamespace(run=lambda plan, _: ran.append(plan), end=lambda: None)
        bench._apart = apart
        bench.run(elsewhere)
    assert ran == [wanted]


# --- in a process of its own ----------------------------------------------------------------------------------------


def apart(model: nn.Module, batch: tiny.Batch) -> Bench:
    recipe, sample = Recipe(loss=tuners.loss_or_exit), Sample.of(batch)
    bench = Bench(model, recipe, sample, CpuDevice())
    bench._apart = _Apart(model, Live(recipe, sample))
    return bench


@pytest.mark.slow  # starts two processes
def test_a_crash_is_a_failure(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    before = Imprint(model)
    with Bench(model, Recipe(), Sample.of(batch), CpuDevice()) as bench:
        here = bench.run(plan)
    with apart(model, batch) as bench:
        monkeypatch.setenv(tuners.EXIT, "3")
        assert bench.run(plan) == Failure("its process ended by itself, with exit code 3", memory=False)
        monkeypatch.delenv(tuners.EXIT)
        found = bench.run(plan)
    assert isinstance(here, Measured)
    assert isinstance(found, Measured)
    assert found.peak_bytes == pytest.approx(here.peak_bytes, abs=2048)
    assert found.budget_bytes == plan.budget_bytes
    assert before.differences() == []


@pytest.mark.slow  # starts three processes
def test_a_process_that_dies_outside_a_run_costs_no_more(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    model.fuse = tuners.Fuse()  # type: ignore[assignment]  # what torch knows to be in a module is less than may be
    with apart(model, batch) as bench:
        monkeypatch.setenv(tuners.EXIT, "4")  # while it is handed the model, before it reads the plan
        assert bench.run(plan) == Failure("its process ended by itself, with exit code 4", memory=False)
        monkeypatch.delenv(tuners.EXIT)
        assert isinstance(bench.run(plan), Measured)
        assert bench._apart is not None
        bench._apart._process.kill()  # between two runs
        bench._apart._process.join()
        assert isinstance(bench.run(plan), Measured)


def test_a_process_that_cannot_be_started_is_a_failure(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    model, batch = model_and_batch()
    with apart(model, batch) as bench:
        monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refused)
        found = bench.run(plan)
    assert isinstance(found, Failure)
    assert "no process could be started for it (BlockingIOError: Resource temporarily unavailable)" in found.why


@pytest.mark.slow  # starts a process
def test_after_ctrl_c_nobody_goes_on_with_the_weights(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    before, weights = Imprint(model), next(iter(model.parameters()))
    copy = weights.detach().clone()

    def interrupted() -> None:
        while torch.equal(weights, copy):
            time.sleep(0.01)
        raise KeyboardInterrupt

    with apart(model, batch) as bench:
        assert bench._apart is not None
        monkeypatch.setenv(tuners.SPOIL, "1")
        bench._apart._start()
        pipe, process = bench._apart._pipe, bench._apart._process
        monkeypatch.setattr(bench._apart, "_pipe", SimpleNamespace(send=pipe.send, recv=interrupted))
        with pytest.raises(KeyboardInterrupt):
            bench.run(plan)
    assert not process.is_alive()
    assert before.differences() == []


def test_a_loss_that_no_other_process_can_have_is_refused(plan: Plan) -> None:
    model, batch = model_and_batch()
    recipe, sample = Recipe(loss=lambda model, batch: model(**batch).loss), Sample.of(batch)
    with pytest.raises(UsageError, match="make the loss a function of a module"):
        _Apart(model, Live(recipe, sample)).run(plan)
