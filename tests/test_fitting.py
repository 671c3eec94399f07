"""`apply` and `Fit`: a plan in a real model, measured there, refused where it does not belong, and taken out again."""

import gc
import weakref
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import tiny
import torch
from imprint import Imprint
from torch import Tensor, nn

import memplan
from memplan.blocks import find_blocks
from memplan.device import DeviceMemory, FakeDevice
from memplan.errors import (
    AlreadyApplied,
    BadOptimizer,
    BadSample,
    DoesNotFit,
    MemoryTaken,
    NoDevice,
    PlanMismatch,
    PlanSchema,
    UsageError,
)
from memplan.fitting import Fit
from memplan.gpus import find_gpu
from memplan.plan_record import Budget, Plan, Verdict
from memplan.strategy import LEVERS

KIB = 1024


BLOCKS_ONLY = memplan.Strategy("blocks only", levers=("recompute",))


@cache
def tight_plan() -> Plan:
    """A plan of the plain model whose budget makes it recompute some blocks, but not all."""
    with torch.random.fork_rng():  # whoever asks first must not see another random state
        model, batch = wide()
    model.to("meta")  # so that no block is timed: the same plan every time
    plenty = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=64)
    budget = (plenty.peak_bytes + plenty.smallest_bytes) // 2
    found = memplan.plan(model, f"cpu:{budget}B", sample=batch, micro_batch=64, strategy=BLOCKS_ONLY)
    assert found.verdict is Verdict.FITS
    assert 0 < len(found.recomputed) < len(found.decisions)
    return found


wide = partial(tiny.plain, layers=4, rows=64, width=8)  # mostly activations


@dataclass(frozen=True)
class Applied:
    model: nn.Module
    batch: tiny.Batch
    fit: Fit


@pytest.fixture
def applied() -> Applied:
    model, batch = wide()
    return Applied(model, batch, memplan.apply(model, tight_plan()))


def forwards_in_a_step(model: nn.Module, batch: tiny.Batch) -> dict[str, int]:
    """How often each block's inner layer runs."""
    counts = dict.fromkeys(find_blocks(model), 0)

    def count(path: str, *_: object) -> None:
        counts[path] += 1

    hooks = [model.get_submodule(f"{p}.wide").register_forward_pre_hook(partial(count, p)) for p in counts]
    model(**batch)["loss"].backward()
    for hook in hooks:
        hook.remove()
    return counts


# --- apply and undo -------------------------------------------------------------------------------------------------


def test_the_model_runs_as_the_plan_says(applied: Applied) -> None:
    wanted = {path: 2 if option == "recompute" else 1 for path, option in applied.fit.plan.decisions.items()}
    assert forwards_in_a_step(applied.model, applied.batch) == wanted


def test_undo_leaves_no_trace() -> None:
    model, _ = wide()
    before = Imprint(model)
    fit = memplan.apply(model, tight_plan())
    assert fit.model is model
    assert fit.plan is tight_plan()
    assert before.differences() != []
    fit.undo()
    assert before.differences() == []
    with pytest.raises(UsageError, match="the plan was undone"):
        fit.measure()


def test_as_a_context_manager_it_is_undone_at_the_end_and_on_an_error() -> None:
    model, _ = wide()
    before = Imprint(model)
    with memplan.apply(model, tight_plan()) as fit:
        assert isinstance(fit, Fit)
        assert before.differences() != []
    assert before.differences() == []
    with pytest.raises(KeyError), memplan.apply(model, tight_plan()):
        raise KeyError
    assert before.differences() == []


def test_a_second_undo_does_not_touch_a_later_plan(applied: Applied) -> None:
    applied.fit.undo()
    with memplan.apply(applied.model, tight_plan()):
        applied.fit.undo()
        assert max(forwards_in_a_step(applied.model, applied.batch).values()) == 2
        with pytest.raises(AlreadyApplied):
            memplan.apply(applied.model, tight_plan())


def test_a_planned_model_can_be_collected() -> None:
    model, _ = wide()
    fit = memplan.apply(model, tight_plan())
    gone = weakref.ref(model)
    del model, fit
    gc.collect()
    assert gone() is None


# --- refused --------------------------------------------------------------------------------------------------------


def test_applied_twice(applied: Applied) -> None:
    before = Imprint(applied.model)
    changed = len(applied.fit.plan.changed)
    with pytest.raises(AlreadyApplied, match=rf"Plain runs by a plan already \({changed} modules .* undo\(\)"):
        memplan.apply(applied.model, tight_plan())
    assert before.differences() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny.llama, r"for a Plain and decides on 'blocks.0'; this LlamaForCausalLM has no such module \(4 of 4"),
        (partial(tiny.plain, layers=3), r"has no such module \(1 of 4 are missing\)"),
        (partial(tiny.plain, layers=4, width=12), "names, shapes, types or requires_grad"),
        (partial(tiny.plain, layers=5, width=8), "names, shapes, types or requires_grad"),
    ],
    ids=["another model", "fewer blocks", "other shapes", "more blocks"],
)
def test_a_plan_for_another_model(make: "partial[tiny.Made]", message: str) -> None:
    model, _ = make()
    before = Imprint(model)
    with pytest.raises(PlanMismatch, match=message):
        memplan.apply(model, tight_plan())
    assert before.differences() == []


def test_a_plan_for_other_trained_parameters() -> None:
    model, _ = wide()
    model.head.weight.requires_grad_(False)
    with pytest.raises(PlanMismatch, match="requires_grad"):
        memplan.apply(model, tight_plan())


def test_a_plan_with_an_unknown_option() -> None:
    model, _ = wide()
    before = Imprint(model)
    odd = tight_plan().model_copy(update={"decisions": {**tight_plan().decisions, "blocks.3": "offload"}})
    with pytest.raises(PlanMismatch, match=r"blocks\.3 is to 'offload'"):
        memplan.apply(model, odd)
    assert before.differences() == []
    memplan.apply(model, tight_plan()).undo()  # the refused one left nothing in the way


@pytest.mark.parametrize(
    ("taken", "spare", "applies"), [(0, 0, True), (90, 100, True), (110, 100, False), (1, -50, False)]
)
def test_memory_that_others_have_taken_since_is_missed_before_the_first_step(
    taken: int, spare: int, applies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = wide()
    others = 1000
    plan = tight_plan()
    budget = Budget(
        gpu="cuda:0", total_bytes=others + plan.peak_bytes + spare, others_bytes=others, context_bytes=0, margin_bytes=0
    )
    found = plan.model_copy(update={"budget": budget})
    now = FakeDevice(DeviceMemory(10**9, 10**9, others + taken, 0))
    monkeypatch.setattr("memplan.fitting._card_of", lambda _: ("cuda:0", find_gpu("24GiB"), now))
    if applies:
        memplan.apply(model, found).undo()
        return
    with pytest.raises(MemoryTaken, match=f"cuda:0 hold {taken} B more .* Plan again"):
        memplan.apply(model, found)
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize(("beyond", "applies"), [(0, True), (-1, False)])
def test_on_the_card_of_another_rank_there_has_to_be_enough(
    beyond: int, applies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = wide()
    plan = tight_plan()
    total = 10**9
    budget = Budget(gpu="cuda:0", total_bytes=total, others_bytes=0, context_bytes=0, margin_bytes=0)
    others = total - 10 - plan.needs_bytes - beyond
    now = FakeDevice(DeviceMemory(total, total - others, others, 10))
    monkeypatch.setattr("memplan.fitting._card_of", lambda _: ("cuda:1", find_gpu("24GiB"), now))
    found = plan.model_copy(update={"budget": budget})
    if applies:
        memplan.apply(model, found).undo()
        return
    with pytest.raises(MemoryTaken, match=r"cuda:1 has .* left .* made on cuda:0, needs .* Plan again"):
        memplan.apply(model, found)


def test_a_plan_that_does_not_fit() -> None:
    model, _ = wide()
    before = Imprint(model)
    changes = {"verdict": Verdict.DOES_NOT_FIT, "reason": "too small.", "ways_out": ("Buy more.",), "smallest_bytes": 7}
    with pytest.raises(DoesNotFit, match=r"does not fit: too small\. Buy more\.") as caught:
        memplan.apply(model, tight_plan().model_copy(update=changes))
    assert caught.value.smallest_bytes == 7
    assert before.differences() == []


# --- measure --------------------------------------------------------------------------------------------------------


def test_measured_is_what_was_predicted(applied: Applied) -> None:
    found = applied.fit.measure(steps=2)
    assert found.predicted_bytes == applied.fit.plan.peak_bytes
    assert abs(found.peak_bytes - found.predicted_bytes) <= KIB
    assert found.peak_bytes <= found.budget_bytes == applied.fit.plan.budget_bytes
    assert found.step_s > 0
    assert (found.device, found.steps) == ("cpu", 2)


def test_measuring_leaves_the_model_as_it_was(applied: Applied) -> None:
    applied.model(**applied.batch)["loss"].backward()
    applied.model.eval()
    before = Imprint(applied.model)
    applied.fit.measure(steps=1)
    assert before.differences() == []


def test_the_peak_is_that_of_the_step_whatever_else_is_in_memory(applied: Applied) -> None:
    """Gradients, an optimizer in use, and tensors of nobody's."""
    alone = applied.fit.measure(steps=1).peak_bytes
    optimizer = torch.optim.AdamW(applied.model.parameters())
    applied.model(**applied.batch)["loss"].backward()
    optimizer.step()
    ballast = torch.ones(2**20)
    assert abs(applied.fit.measure(steps=1).peak_bytes - alone) <= KIB
    assert ballast.sum() == 2**20


def test_gradients_that_are_not_finite_do_not_reach_the_weights(applied: Applied) -> None:
    before = Imprint(applied.model)

    def loss(model: nn.Module, batch: object) -> Tensor:
        assert isinstance(batch, dict)
        return model(**batch)["loss"] * float("inf")

    assert applied.fit.measure(steps=1, loss=loss).peak_bytes > 0
    assert before.differences() == []


@pytest.mark.slow
def test_neither_where_they_are_stepped_in_the_backward() -> None:
    model, batch = tiny.gpt2(layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    least = memplan.Strategy("least", objective="peak", levers=LEVERS)
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, optimizer=optimizer, micro_batch=1, strategy=least)
    assert plan.stepping == "in-backward"
    before = Imprint(model)

    def loss(model: nn.Module, batch: object) -> Tensor:
        assert isinstance(batch, dict)
        return model(**batch)["loss"] * float("inf")

    with memplan.apply(model, plan) as fit:
        measured = fit.measure(steps=2)
        assert abs(measured.peak_bytes - plan.peak_bytes) <= KIB
        fit.measure(steps=1, loss=loss)
    assert before.differences() == []


def test_a_live_optimizer_is_measured_and_left_alone() -> None:
    model, batch = wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(**batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    found = memplan.plan(model, "cpu:1GiB", sample=batch, optimizer=optimizer, micro_batch=64)
    assert found.optimizer == "SGD"
    before = Imprint(model)
    states = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
    with memplan.apply(model, found) as fit:
        measured = fit.measure(steps=1)
    assert abs(measured.peak_bytes - found.peak_bytes) <= KIB
    assert before.differences() == []
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], state) for p, state in states.items())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


@pytest.mark.slow
def test_accumulation_is_measured_too() -> None:
    model, batch = tiny.gpt2(layers=2)
    found = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=1, effective_batch=3)
    assert (found.micro_batch, found.accumulation) == (1, 3)
    with memplan.apply(model, found) as fit:
        assert abs(fit.measure(steps=1).peak_bytes - found.peak_bytes) <= KIB


class Narrow(nn.Module):
    """So many so small weights that their norms are most of what an optimizer's step takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(200))

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer.weight.sum() for layer in self.layers), x.mean())


@pytest.mark.slow
def test_clipping_is_predicted_planned_and_measured() -> None:
    model, x, peaks = Narrow(), torch.randn(2, 2), {}
    for clips in (False, True):
        asked = {"optimizer": "sgd", "clip_grad_norm": clips}
        found = memplan.plan(model, "cpu:1GiB", sample=x, micro_batch=2, **asked)
        assert memplan.predict(model, x, **asked).peak_bytes == found.peak_bytes
        before = Imprint(model)
        with memplan.apply(model, found) as fit:
            assert abs(fit.measure(steps=1).peak_bytes - found.peak_bytes) <= 64
        assert before.differences() == []
        assert any("clipped by their norm" in line for line in found.assumptions) is clips
        peaks[clips] = found.peak_bytes
    assert peaks[True] > peaks[False] + 200 * 4
    with pytest.raises(UsageError, match="pass True if the loop clips"):
        memplan.predict(model, x, clip_grad_norm=1.0)


def test_autocast_and_a_loss_of_ones_own() -> None:
    def loss(model: nn.Module, batch: object) -> Tensor:
        assert isinstance(batch, dict)
        return model(batch["input_ids"]).logits.float().square().mean()

    model, batch = tiny.llama(layers=2, use_cache=False)
    found = memplan.plan(model, "cpu:1GiB", sample=batch, loss=loss, autocast=torch.bfloat16, micro_batch=2)
    with memplan.apply(model, found) as fit:
        assert abs(fit.measure(steps=1).peak_bytes - found.peak_bytes) <= KIB


def test_steps_are_counted_from_one(applied: Applied) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        applied.fit.measure(steps=0)


@pytest.mark.parametrize("budget", ["rtx-4090", "NVIDIA H100 80GB HBM3", "24GiB"])
def test_a_plan_for_a_card_is_not_measured_elsewhere(budget: str) -> None:
    model, _ = wide()
    plan = tight_plan()
    elsewhere = plan.model_copy(update={"budget": plan.budget.model_copy(update={"gpu": budget})})
    before = Imprint(model)
    with memplan.apply(model, elsewhere) as fit, pytest.raises(NoDevice, match=f"{budget}, but the weights are on cpu"):
        fit.measure()
    assert before.differences() == []


def test_a_model_without_memory_is_not_measured() -> None:
    model, _ = wide()
    with memplan.apply(model.to("meta"), tight_plan()) as fit, pytest.raises(NoDevice, match="weights are on meta"):
        fit.measure()


# --- plans in files -------------------------------------------------------------------------------------------------


def saved_and_loaded(plan: Plan, folder: Path) -> Plan:
    plan.save(folder / "plan.json")
    return Plan.load(folder / "plan.json")


def test_a_loaded_plan_is_the_same_plan(tmp_path: Path) -> None:
    loaded = saved_and_loaded(tight_plan(), tmp_path)
    assert loaded == tight_plan()
    assert loaded != tight_plan().model_copy(update={"micro_batch": 1})
    model, batch = wide()
    with memplan.apply(model, loaded) as fit:
        assert forwards_in_a_step(model, batch) == {p: 1 + (p in loaded.recomputed) for p in loaded.decisions}
        measured = fit.measure(steps=1)
    assert abs(measured.peak_bytes - loaded.peak_bytes) <= KIB


def test_a_loaded_plan_does_not_know_an_optimizer_without_a_name(tmp_path: Path) -> None:
    class Own(torch.optim.SGD):
        pass

    model, batch = wide()
    optimizer = Own(model.parameters(), lr=0.1)
    found = memplan.plan(model, "cpu:1GiB", sample=batch, optimizer=optimizer, micro_batch=64)
    with memplan.apply(model, saved_and_loaded(found, tmp_path)) as fit:
        with pytest.raises(BadOptimizer, match="'Own'"):
            fit.measure(steps=1)
        assert abs(fit.measure(steps=1, optimizer=optimizer).peak_bytes - found.peak_bytes) <= KIB


def test_a_loaded_plan_does_not_know_a_nested_sample(tmp_path: Path) -> None:
    nested = tight_plan().model_copy(update={"sample": (tight_plan().sample[0].model_copy(update={"name": "a.b"}),)})
    model, batch = wide()
    with memplan.apply(model, saved_and_loaded(nested, tmp_path)) as fit:
        with pytest.raises(BadSample, match="pass sample="):
            fit.measure(steps=1)
        assert fit.measure(steps=1, sample=batch).peak_bytes > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "no plan, or one that was cut short: it is no JSON"),
        ('{"schema_version": 3, "verd', "cut short: it is no JSON"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": 99}', "schema version 99; this memplan reads version 3"),
        ('{"schema_version": 3}', "is a damaged plan"),
    ],
)
def test_files_that_are_no_plans(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanSchema, match=message):
        Plan.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanSchema, match="cannot read"):
        Plan.load(tmp_path / "plan.json")
