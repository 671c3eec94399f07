"""A loss is tried whole and in parts before a batch is divided, by whatever plans."""

from typing import Any

import pytest
import tiny
import torch
from tiny import Contrastive, contrastive
from torch import Tensor, nn

import memplan
from memplan import division
from memplan.division import A_SUM, MEAN_OVER_TOKENS, NO_MEAN, NO_MEAN_OF_THESE, UNTRIED
from memplan.errors import DoesNotFit
from memplan.plan_record import Plan, Verdict
from memplan.rungs import ladder
from memplan.strategy import Strategy


def found(made: tiny.Made, **asked: Any) -> Plan:
    """For a budget in which the whole batch does not fit without a plan."""
    model, batch = made
    whole = memplan.plan(model, "cpu:1GiB", sample=batch, effective_batch=8, micro_batch=8)
    budget = (whole.unplanned_bytes + whole.smallest_bytes) // 2
    return memplan.plan(model, f"cpu:{budget}B", sample=batch, effective_batch=8, **asked)


def test_one_that_compares_rows_is_not_divided() -> None:
    plan = found(contrastive())
    assert (plan.micro_batch, plan.accumulation) == (8, 1)
    assert plan.verdict is not Verdict.DOES_NOT_FIT
    assert NO_MEAN in plan.assumptions


def test_what_is_asked_for_is_done_and_said() -> None:
    plan = found(contrastive(), micro_batch=2)
    assert (plan.micro_batch, plan.accumulation) == (2, 4)
    assert NO_MEAN_OF_THESE in plan.assumptions


def test_a_mean_over_tokens_is_said() -> None:
    plan = found(tiny.llama(layers=2, rows=4, length=32, use_cache=False), micro_batch=2)
    assert MEAN_OVER_TOKENS in plan.assumptions


def test_a_mean_over_samples_needs_no_words() -> None:
    plan = found(tiny.vit(layers=2, rows=4), micro_batch=2)
    assert not {NO_MEAN, NO_MEAN_OF_THESE, MEAN_OVER_TOKENS} & set(plan.assumptions)


def test_one_that_sets_rows_against_a_running_mean_of_them_is_not_divided() -> None:
    class Centred(Contrastive):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running", torch.zeros(64))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for block in self.blocks:
                x = block(x)
            with torch.no_grad():
                self.running.mul_(0.5).add_(x.mean((0, 1)), alpha=0.5)
            return {"loss": (x - self.running).square().mean()}

    plan = found((Centred(), {"x": torch.randn(8, 16, 64)}))
    assert (plan.micro_batch, plan.accumulation) == (8, 1)
    assert NO_MEAN in plan.assumptions


def test_a_sum_over_rows_is_divided_and_said() -> None:
    model, batch = tiny.vit(layers=2, rows=4)

    def total(module: nn.Module, rows: Any) -> Tensor:
        made: Tensor = module(**rows).loss * len(rows["labels"])
        return made

    asked = {"sample": batch, "effective_batch": 8, "micro_batch": 2, "loss": total}
    assert A_SUM in memplan.plan(model, "cpu:1GiB", **asked).assumptions


def test_a_loss_that_draws_random_numbers_may_be_divided() -> None:
    class Noisy(Contrastive):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = x
            for block in self.blocks:
                y = block(y)
            return {"loss": (y - torch.randn_like(y)).square().mean()}

    plan = found((Noisy(), {"x": torch.randn(8, 16, 64)}), micro_batch=2)
    assert UNTRIED in plan.assumptions


def test_a_model_that_needs_autocast_is_tried_with_it() -> None:
    class Halves(Contrastive):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.blocks[0](x)
            assert y.dtype is torch.bfloat16, "only halves"
            return super().forward(x)

    model, batch = Halves(), {"x": torch.randn(8, 16, 64)}
    asked = {"sample": batch, "effective_batch": 8, "micro_batch": 2, "autocast": torch.bfloat16}
    assert NO_MEAN_OF_THESE in memplan.plan(model, "cpu:1GiB", **asked).assumptions


def test_what_cannot_be_tried_is_planned_as_it_was() -> None:
    model, batch = contrastive()[0].to("meta"), contrastive()[1]
    assert not {NO_MEAN, NO_MEAN_OF_THESE} & set(found((model, batch), micro_batch=2).assumptions)
    model = Contrastive()
    model.register_forward_pre_hook(lambda module, _: None if module.training else 1 / 0)
    plan = found((model, batch), micro_batch=2)
    assert not {NO_MEAN, NO_MEAN_OF_THESE} & set(plan.assumptions)


def wide(rows: int) -> tiny.Made:
    """Blocks that are worth recomputing, and rows so long that activations set the peak."""
    model = Contrastive()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)) for _ in range(4))
    return model, {"x": torch.randn(rows, 256, 64)}


@pytest.mark.slow
def test_a_guards_smaller_plans_divide_it_no_more_than_the_first() -> None:
    model, batch = wide(8)
    keeping = Strategy(name="keep-all", levers=())
    for asked in ({}, {"micro_batch": 8}):  # the first, tried already; of the second, the ladder has to find out
        first = memplan.plan(
            model, "cpu:1GiB", sample=batch, effective_batch=8, optimizer="sgd", strategy=keeping, **asked
        )
        smaller = list(ladder(model, first, "recompute-only"))[1:]
        assert {(plan.micro_batch, plan.accumulation) for plan in smaller} == {(8, 1)}


@pytest.mark.slow
def test_a_batch_that_was_divided_as_asked_is_divided_alike_by_a_guard() -> None:
    model, batch = wide(2)
    asked = {"sample": batch, "effective_batch": 8, "micro_batch": 2, "optimizer": "sgd"}
    first = memplan.plan(model, "cpu:1GiB", strategy=Strategy(name="keep-all", levers=()), **asked)
    smaller = list(ladder(model, first, "recompute-only"))[1:]
    assert {(plan.micro_batch, plan.accumulation) for plan in smaller} == {(2, 4)}
    assert all(NO_MEAN_OF_THESE in plan.assumptions for plan in smaller)


@pytest.mark.slow
def test_a_guard_asks_a_loss_but_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out when the plan was made; when memory has run out there may be no room to try."""
    model, batch = tiny.llama(layers=2, rows=4, length=64, use_cache=False)
    keeping = Strategy(name="keep-all", levers=())
    first = memplan.plan(
        model, "cpu:1GiB", sample=batch, effective_batch=8, micro_batch=4, optimizer="sgd", strategy=keeping
    )

    def never(*_: object) -> str:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(division, "mean_over", never)
    assert {plan.micro_batch for plan in ladder(model, first)} > {4}  # divided further
    untried = memplan.plan(
        model, "cpu:1GiB", sample=batch, effective_batch=8, micro_batch=8, optimizer="sgd", strategy=keeping
    )
    assert {plan.micro_batch for plan in ladder(model, untried)} == {8}


def test_one_that_fits_nothing_is_not_told_to_accumulate() -> None:
    model, batch = contrastive()
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, effective_batch=8)
    tight = memplan.plan(model, f"cpu:{plan.smallest_bytes * 95 // 100}B", sample=batch, effective_batch=8)
    assert tight.verdict is Verdict.DOES_NOT_FIT
    assert NO_MEAN in tight.assumptions
    assert not any("accumulation)" in way for way in tight.ways_out)
    assert any("this one is not split" in way for way in tight.ways_out)


def test_tuning_keeps_it_whole_and_says_so() -> None:
    model, batch = contrastive()
    found = memplan.tune(model, "cpu:1GiB", sample=batch, effective_batch=8, n_trials=1)
    assert {(trial.plan.micro_batch, trial.plan.accumulation) for trial in found.trials} == {(8, 1)}
    assert NO_MEAN in found.plan.assumptions
    with pytest.raises(DoesNotFit, match="the batch is not divided"):
        memplan.tune(model, f"cpu:{found.plan.smallest_bytes * 95 // 100}B", sample=batch, effective_batch=8)


def test_tuned_plans_that_divide_a_mean_over_tokens_say_so() -> None:
    model, batch = tiny.llama(layers=1, rows=2, use_cache=False)
    found = memplan.tune(model, "cpu:1GiB", sample=batch, effective_batch=2, n_trials=1)
    said = {trial.plan.accumulation: MEAN_OVER_TOKENS in trial.plan.assumptions for trial in found.trials}
    assert said == {1: False, 2: True}
