"""`predict`, `plan` and `autofit` from end to end on tiny models, against real steps on the CPU.

Where decisions are compared, the model is on `meta`: no block is timed then, and plans do not depend on the clock.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import tiny
import torch
import transformers
from imprint import Imprint
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import memplan
from memplan.device import CpuDevice, resolve_gpu
from memplan.errors import AlreadyApplied, BadBatch, DoesNotFit, MemoryTaken, ModelFailed
from memplan.plan_record import Plan, Verdict
from memplan.recipe import Recipe
from memplan.samples import Sample
from memplan.session import Session
from memplan.strategy import Strategy

KIB, GIB = 1024, 2**30

LLAMA = partial(tiny.llama, layers=2, rows=4, length=32, use_cache=False)
MODELS: dict[str, Callable[[], tiny.Made]] = {
    "llama": LLAMA,
    "t5": partial(tiny.t5, layers=1, rows=4, use_cache=False),
    "vit": partial(tiny.vit, layers=2, rows=4),
    "resnet": tiny.resnet,
    "lora": partial(tiny.lora, layers=2),
    "plain": partial(tiny.plain, rows=64, width=8),
}


def real_peak(model: nn.Module, batch: Mapping[str, Tensor], plan: Plan | None = None) -> int:
    """Bytes that one real training step of this very model needs, weights and optimizer state included."""
    micro_batch = plan.micro_batch if plan else len(next(iter(batch.values())))
    micro = {name: tensor[:micro_batch].clone() for name, tensor in batch.items()}
    accumulation = plan.accumulation if plan else 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, optimizer = CpuDevice(), torch.optim.AdamW(trained)

    def step() -> None:
        for _ in range(accumulation):
            loss = model(**micro)["loss"]
            (loss / accumulation if accumulation > 1 else loss).backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    own = [*model.parameters(), *model.buffers(), *micro.values()]
    inside = sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in own}.values())
    return device.peak_of(step) - (device.peak_of(lambda: None) - inside - state_bytes(optimizer))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.untyped_storage().nbytes() for value in states if isinstance(value, Tensor))


def on_meta(made: tiny.Made) -> tiny.Made:
    model, batch = made
    model.to("meta")
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()  # moving them has made two of one
    return model, batch


def planned(name: str, budget_bytes: int, **settings: Any) -> Plan:
    with torch.random.fork_rng():  # whoever asks first must not see another random state
        model, batch = on_meta(MODELS[name]())
    return memplan.plan(model, f"cpu:{budget_bytes}B", sample=batch, **settings)


@cache
def ample(name: str) -> Plan:
    """The batch as it is made, in one piece, with a GiB for it."""
    with torch.random.fork_rng():
        _, batch = MODELS[name]()
    return planned(name, GIB, micro_batch=len(batch["labels"]))


@cache
def tight(name: str) -> Plan:
    """The same within three quarters of what separates the least from the most."""
    plenty = ample(name)
    budget = plenty.smallest_bytes + (plenty.peak_bytes - plenty.smallest_bytes) * 3 // 4
    return planned(name, budget, micro_batch=plenty.micro_batch)


# --- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_predicted_is_what_a_real_step_needs(name: str) -> None:
    model, batch = MODELS[name]()
    predicted = memplan.predict(model, batch)
    assert abs(predicted.peak_bytes - real_peak(model, batch)) <= KIB
    assert sum(predicted.breakdown.values()) == predicted.peak_bytes == max(predicted.timeline.total)
    assert predicted.how == "fake"


def test_a_model_on_meta_needs_the_same() -> None:
    real, meta = LLAMA(), on_meta(LLAMA())
    assert memplan.predict(*meta).model_dump() == memplan.predict(*real).model_dump()


def by_transformers(model: Any) -> None:
    model.gradient_checkpointing_enable()


def by_torch(model: Any) -> None:
    for at, layer in enumerate(model.model.layers):
        model.model.layers[at] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


@pytest.mark.parametrize("checkpoint", [by_transformers, by_torch])
def test_what_somebody_else_recomputes_is_predicted_as_it_runs(checkpoint: Callable[[Any], None]) -> None:
    model, batch = LLAMA()
    plain = memplan.predict(model, batch)
    checkpoint(model)
    predicted = memplan.predict(model, batch)
    assert abs(predicted.peak_bytes - real_peak(model, batch)) <= KIB
    assert predicted.peak_bytes < plain.peak_bytes


def test_what_torch_recomputes_already_is_not_planned_for() -> None:
    model, batch = LLAMA()
    by_torch(model)
    with pytest.raises(AlreadyApplied, match=r"model\.layers\.0 is inside torch's CheckpointWrapper already"):
        memplan.plan(model, "cpu:1GiB", sample=batch)


def test_accumulation_and_optimizer_count() -> None:
    model, batch = LLAMA()
    once, twice = (memplan.predict(model, batch, accumulation=n).peak_bytes for n in (1, 2))
    assert twice > once
    assert memplan.predict(model, batch, optimizer="sgd").peak_bytes < once


# --- plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_recomputed_where_memory_is_plentiful(name: str) -> None:
    plan = ample(name)
    assert plan.verdict is Verdict.FITS
    assert plan.changed == ()
    assert plan.decisions
    assert plan.slowdown == 0
    assert plan.times == "estimate"
    assert plan.ways_out == ()
    assert plan.peak_bytes == plan.unplanned_bytes == sum(plan.breakdown.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_tight_budget_is_kept_by_recomputing_and_the_step_is_as_large_as_predicted(name: str) -> None:
    plan = tight(name)
    assert plan.verdict is Verdict.FITS
    assert plan.changed
    assert plan.peak_bytes <= plan.budget_bytes < plan.unplanned_bytes
    assert plan.slowdown > 0
    model, batch = MODELS[name]()
    with memplan.apply(model, plan):
        peak = real_peak(model, batch, plan)
    assert abs(peak - plan.peak_bytes) <= KIB
    assert peak <= plan.budget_bytes + KIB


def test_the_layers_say_what_is_decided_and_what_it_saves() -> None:
    plan = tight("llama")
    assert {layer.path: layer.option for layer in plan.layers}.items() <= plan.decisions.items()
    changed = [layer for layer in plan.layers if layer.option != "keep"]
    assert changed
    assert all(layer.held_bytes < layer.keep_bytes and layer.extra_s > 0 for layer in changed)
    assert all(layer.held_bytes == layer.keep_bytes for layer in plan.layers if layer not in changed)


@pytest.mark.parametrize("name", MODELS)
def test_the_frontier_has_the_plan_in_it_and_what_each_block_does_at_every_point(name: str) -> None:
    plan = tight(name)
    (own,) = [point for point in plan.frontier if point.chosen]
    assert (own.peak_bytes, own.step_s) == (plan.needs_bytes, plan.step_s)
    assert own.options == tuple(layer.option for layer in plan.layers)
    peaks = [point.peak_bytes for point in plan.frontier]
    seconds = [point.step_s for point in plan.frontier]
    assert peaks == sorted(set(peaks))
    assert seconds == sorted(set(seconds), reverse=True)
    for point in plan.frontier:
        if (point.head, point.stepping) != (own.head, own.stepping):
            continue
        extra = [sum(layer.extra[o] for layer, o in zip(plan.layers, p.options, strict=True)) for p in (point, own)]
        assert point.step_s - own.step_s == pytest.approx(plan.accumulation * (extra[0] - extra[1]), abs=1e-9)
    for layer in plan.layers:
        assert (layer.held[layer.option], layer.extra[layer.option]) == (layer.held_bytes, layer.extra_s)


@pytest.mark.parametrize("name", MODELS)
def test_the_timelines_are_those_of_the_plan_and_of_the_model_as_it_stands(name: str) -> None:
    plan = tight(name)
    assert plan.timeline is not None
    assert plan.unplanned_timeline is not None
    assert max(plan.timeline.total) == plan.peak_bytes
    assert max(plan.unplanned_timeline.total) == plan.unplanned_bytes
    at_peak = plan.timeline.total.index(plan.peak_bytes)
    assert plan.timeline.phase[at_peak] == plan.peak_phase


def test_what_is_saved_is_against_the_model_as_it_stands_in_the_same_batch() -> None:
    model, batch = LLAMA()
    smallest = memplan.Strategy("smallest", levers=("recompute",), objective="peak")
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, effective_batch=4, strategy=smallest)
    assert (plan.micro_batch, plan.accumulation) == (1, 4)
    stands = memplan.predict(model, {name: rows[:1] for name, rows in batch.items()}, accumulation=4)
    assert plan.unplanned_bytes == stands.peak_bytes
    assert plan.unplanned_timeline == stands.timeline


def test_more_memory_is_never_slower() -> None:
    model, batch = on_meta(LLAMA())
    strategy = memplan.Strategy("to the last sample", tolerance=0.0)

    session = Session(model, Sample.of(batch), Recipe(), *resolve_gpu("cpu:1GiB"))  # one set of times

    def planned_for(usable_bytes: int) -> Plan:
        return session.within(usable_bytes + KIB).plan(strategy, None, 4)

    plenty = planned_for(GIB)
    least, most = plenty.smallest_bytes, plenty.peak_bytes * 101 // 100
    budgets = [least, (least + most) // 2, most]
    tighter = [planned_for(budget) for budget in budgets]
    assert all(plan.verdict is Verdict.FITS for plan in tighter)
    seconds = [plan.step_s for plan in (*tighter, plenty)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[2] == seconds[3]


def test_plans_for_other_budgets_are_those_that_would_be_made_for_them_alone() -> None:
    model, batch = on_meta(LLAMA())
    session = Session(model, Sample.of(batch), Recipe(), *resolve_gpu("cpu:1GiB"))
    strategy = memplan.Strategy("blocks", levers=("recompute",), objective="peak")
    whole = session.plan(strategy, None, 4)
    for budget in (whole.peak_bytes + KIB, whole.peak_bytes + 64 * KIB):
        again = memplan.plan(model, f"cpu:{budget}B", sample=batch, micro_batch=4, strategy=strategy)
        assert session.within(budget).plan(strategy, None, 4).decisions == again.decisions
        assert session.within(budget).plan(strategy, None, 4).budget == again.budget


def test_where_memory_is_taken_meanwhile_it_plans_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = on_meta(LLAMA())
    applied: list[Plan] = []

    def taken(times: int) -> Callable[[nn.Module, Plan], object]:
        def apply(model: nn.Module, plan: Plan) -> object:
            applied.append(plan)
            if len(applied) <= times:
                raise MemoryTaken("gone", 1)
            return real_apply(model, plan)

        return apply

    real_apply = memplan.apply
    monkeypatch.setattr("memplan.pipeline.apply", taken(2))
    memplan.autofit(model, "cpu:1GiB", sample=batch, micro_batch=2).undo()
    assert len(applied) == 3
    applied.clear()
    monkeypatch.setattr("memplan.pipeline.apply", taken(9))
    with pytest.raises(MemoryTaken):
        memplan.autofit(model, "cpu:1GiB", sample=batch, micro_batch=2)
    assert len(applied) == 3


def test_a_card_is_planned_for_without_it() -> None:
    model, batch = LLAMA()
    plan = memplan.plan(model, "rtx-4090", sample=batch)
    budget = plan.budget
    assert budget.gpu == "rtx-4090"
    parts = budget.others_bytes + budget.context_bytes + budget.margin_bytes
    assert plan.budget_bytes == budget.total_bytes - parts
    assert plan.times == "estimate"
    assert any("without the card" in sentence for sentence in plan.assumptions)


def test_blocks_are_timed_where_the_weights_are_on_the_device() -> None:
    model, batch = MODELS["plain"]()
    assert memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=64).times == "measured"


def test_a_plan_is_the_same_every_time_but_for_the_clock() -> None:
    model, batch = on_meta(LLAMA())
    first, second = (memplan.plan(model, "24GiB", sample=batch, micro_batch=4) for _ in range(2))
    assert first == second


def test_the_sample_may_be_left_out_and_its_size_binds_nothing() -> None:
    model, batch = on_meta(LLAMA())
    made = memplan.plan(model, "cpu:64MiB", micro_batch=3, seq_len=32)
    given = memplan.plan(model, "cpu:64MiB", sample=batch, micro_batch=3)
    assert made.peak_bytes == given.peak_bytes
    assert made.sample[0].shape == (32,)


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "micro_batch", "accumulation"),
    [
        ({"micro_batch": 3}, 3, 1),
        ({"micro_batch": 2, "effective_batch": 6}, 2, 3),
        ({"effective_batch": 1}, 1, 1),
    ],
)
def test_batches_that_are_given_are_taken(settings: dict[str, int], micro_batch: int, accumulation: int) -> None:
    plan = planned("llama", GIB, **settings)
    assert (plan.micro_batch, plan.accumulation) == (micro_batch, accumulation)
    assert plan.effective_batch == micro_batch * accumulation


@pytest.mark.slow
def test_an_effective_batch_is_split_as_the_budget_wants() -> None:
    whole = planned("llama", GIB, effective_batch=6)
    assert (whole.micro_batch, whole.accumulation, whole.changed) == (6, 1, ())
    split = planned("llama", (whole.peak_bytes + ample("llama").smallest_bytes) // 2, effective_batch=6)
    assert split.verdict is Verdict.FITS
    assert split.effective_batch == 6
    assert split.accumulation > 1 or split.changed


def test_without_a_batch_the_memory_goes_into_it() -> None:
    model, batch = on_meta(LLAMA())
    plan = memplan.plan(model, "cpu:8MiB", sample=batch, strategy="largest-batch")
    assert plan.micro_batch > 4
    assert plan.accumulation == 1
    assert 0.9 * plan.budget_bytes < plan.peak_bytes <= plan.budget_bytes


def test_batch_norm_is_never_split() -> None:
    plan = planned("resnet", GIB, effective_batch=4)
    assert (plan.micro_batch, plan.accumulation) == (4, 1)
    assert any("batch norm" in sentence for sentence in plan.assumptions)
    with pytest.raises(BadBatch, match="would split"):
        planned("resnet", GIB, effective_batch=4, micro_batch=2)


class Checkpointing(nn.Module):
    """Runs its blocks by torch's checkpoint in its own forward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_checkpoints_itself(reentrant: bool) -> None:
    model, batch = Checkpointing(reentrant), {"x": torch.randn(4, 16)}
    assert memplan.predict(model, batch).peak_bytes
    with pytest.raises(AlreadyApplied, match=r"torch\.utils\.checkpoint run blocks\.\d in a forward"):
        memplan.plan(model, "cpu:1GiB", sample=batch)
    nothing_again = Strategy("mine", levers=("loss-head",))
    assert memplan.plan(model, "cpu:1GiB", sample=batch, strategy=nothing_again).verdict is Verdict.FITS


def test_what_a_loss_checkpoints_is_no_block() -> None:
    model, batch = tiny.plain()

    def loss(module: nn.Module, rows: Any) -> Tensor:
        made: Tensor = torch.utils.checkpoint.checkpoint(
            lambda x: x.square(), module(**rows)["loss"], use_reentrant=False
        )
        return made

    assert memplan.plan(model, "cpu:1GiB", sample=batch, loss=loss).verdict is Verdict.FITS


def test_batch_norms_that_are_frozen_stay_frozen_and_may_be_split() -> None:
    model, batch = tiny.resnet()
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    before = Imprint(model)
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=2, effective_batch=4)
    assert (plan.micro_batch, plan.accumulation) == (2, 2)
    with memplan.apply(model, plan) as fit:
        assert abs(fit.measure(steps=1).peak_bytes - plan.peak_bytes) <= KIB
    assert before.differences() == []
    model.eval()
    with pytest.raises(BadBatch, match="would split"):
        memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=2, effective_batch=4)


def test_a_model_without_repeated_blocks_plans_the_batch_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))

    def loss(model: nn.Module, batch: object) -> Tensor:
        assert isinstance(batch, Tensor)
        return model(batch).square().mean()

    plan = memplan.plan(model, "cpu:1MiB", sample=torch.randn(4, 8), loss=loss)
    assert plan.verdict is Verdict.FITS
    assert plan.reason.startswith("no repeated blocks, so only the batch is planned")
    assert plan.decisions == {}
    assert plan.micro_batch > 4
    assert plan.peak_bytes <= plan.budget_bytes
    with memplan.apply(model, plan) as fit:
        assert abs(fit.measure(steps=1).peak_bytes - plan.peak_bytes) <= KIB


# --- does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_what_does_not_fit_says_what_would(name: str) -> None:
    static = sum(ample(name).breakdown[part] for part in ("params", "buffers", "optimizer"))
    least = ample(name).smallest_bytes
    plan = planned(name, static + (least - static) // 3, micro_batch=ample(name).micro_batch)
    assert plan.verdict is Verdict.DOES_NOT_FIT
    assert plan.reason
    assert plan.budget_bytes < plan.peak_bytes <= plan.smallest_bytes
    assert len(plan.ways_out) == 3
    enough = plan.smallest_bytes + plan.budget.margin_bytes
    assert planned(name, enough, micro_batch=plan.micro_batch).verdict is Verdict.FITS


@pytest.mark.slow
def test_with_a_free_batch_the_smallest_budget_fits_too() -> None:
    plan = planned("llama", ample("llama").breakdown["params"] * 4, effective_batch=4)
    assert plan.verdict is Verdict.DOES_NOT_FIT
    assert planned("llama", plan.smallest_bytes + KIB, effective_batch=4).verdict is Verdict.FITS


def test_below_what_is_always_there_nothing_can_be_planned() -> None:
    with pytest.raises(DoesNotFit, match="is below what is always there") as caught:
        planned("llama", 100 * KIB, micro_batch=1)
    assert caught.value.smallest_bytes > 100 * KIB


def test_autofit_applies_nothing_that_does_not_fit() -> None:
    model, batch = LLAMA()
    before = Imprint(model)
    with pytest.raises(DoesNotFit):
        memplan.autofit(model, f"cpu:{ample('llama').breakdown['params'] * 4}B", sample=batch, micro_batch=1)
    assert before.differences() == []


# --- strategies -----------------------------------------------------------------------------------------------------


def test_strategies_differ_in_what_they_are_for() -> None:
    everything = planned("plain", GIB, effective_batch=64, strategy="huggingface")
    assert set(everything.decisions.values()) == {"recompute"}
    least = planned("plain", GIB, effective_batch=64, strategy="smallest-memory")
    most = planned("plain", GIB, effective_batch=64)
    assert least.peak_bytes <= everything.peak_bytes < most.peak_bytes
    assert (everything.strategy, least.strategy, most.strategy) == ("huggingface", "smallest-memory", "balanced")


# --- autofit --------------------------------------------------------------------------------------------------------


def test_autofit_plans_applies_and_measures() -> None:
    model, batch = MODELS["plain"]()
    before = Imprint(model)
    with memplan.autofit(model, f"cpu:{tight('plain').budget_bytes}B", sample=batch, micro_batch=64) as fit:
        assert fit.model is model
        assert fit.plan.changed
        assert fit.measured is not None
        assert abs(fit.measured.peak_bytes - fit.plan.peak_bytes) <= KIB
        assert fit.measured.predicted_bytes == fit.plan.peak_bytes
    assert before.differences() == []


def test_autofit_for_a_card_that_is_not_here_does_not_measure() -> None:
    model, batch = MODELS["plain"]()
    with memplan.autofit(model, "24GiB", sample=batch, micro_batch=64) as fit:
        assert fit.measured is None


def test_autofit_is_undone_if_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("memplan.fitting.Fit.measure", fail)
    model, batch = MODELS["plain"]()
    before = Imprint(model)
    with pytest.raises(MemoryError):
        memplan.autofit(model, f"cpu:{tight('plain').budget_bytes}B", sample=batch, micro_batch=64)
    assert before.differences() == []


# --- nothing is touched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_residuals_that_are_made_again_are_as_large_as_predicted(norm_first: bool) -> None:
    """In torch's own layers, normed before or behind, nothing else holds what is added up."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
            self.words = nn.Embedding(300, 64)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 256, **wide) for _ in range(4))
            self.head = nn.Linear(64, 5)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1)).square().mean()

    torch.manual_seed(0)
    model, ids = Encoder(), torch.randint(300, (16, 64))
    fit = memplan.autofit(
        model, "cpu:1GiB", sample=ids, optimizer="sgd-momentum", micro_batch=16, strategy="smallest-memory"
    )
    assert any(option.startswith("select") for option in fit.plan.decisions.values())
    assert fit.measured is not None
    assert abs(fit.measured.peak_bytes - fit.plan.peak_bytes) < 1000
    fit.undo()


@pytest.mark.parametrize("name", ["resnet", "lora", "plain"])
@pytest.mark.parametrize("training", [True, False])
def test_planning_touches_nothing(name: str, training: bool) -> None:
    model, batch = MODELS[name]()
    model(**batch)["loss"].backward()
    model.train(training)
    given = {key: value.clone() for key, value in batch.items()}
    before = Imprint(model)
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, effective_batch=4)
    assert before.differences() == []
    assert all(torch.equal(batch[key], value) for key, value in given.items())
    assert any("eval mode" in sentence for sentence in plan.assumptions) is not training
    assert plan.trained.startswith("weights: ")


def test_a_model_that_is_planned_already_is_refused() -> None:
    """What its blocks do now hides what they could do."""
    model, batch = LLAMA()
    with memplan.apply(model, tight("llama")):
        before = Imprint(model)
        for make in (memplan.plan, memplan.autofit):
            with pytest.raises(AlreadyApplied, match=r"on the Fit that memplan\.apply returned, then plan"):
                make(model, "cpu:1GiB", sample=batch, micro_batch=4)
        assert before.differences() == []
    assert memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4).changed == ()


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        (0, r"raised ArithmeticError in blocks\.2\.dropout: out of luck"),
        (3, r"can be traced, but raised ArithmeticError when its blocks were run to be timed, at micro-batch 64"),
    ],
    ids=["in the trace", "in the timing"],
)
def test_a_model_that_fails_half_way_is_as_before(passed: int, message: str) -> None:
    model, batch = MODELS["plain"]()
    calls: list[int] = []

    def fail_later(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > passed:
            raise ArithmeticError("out of luck")
        return x

    model.blocks[2].dropout.forward = fail_later
    before = Imprint(model)
    with pytest.raises(ModelFailed, match=message) as caught:
        memplan.plan(model, "cpu:1GiB", sample=batch, effective_batch=64)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert before.differences() == []
