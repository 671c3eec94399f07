"""A plan that is solved again leads to itself, and to what a plan for another budget would be."""

from dataclasses import replace

import pytest
import tiny
import torch

import memplan
from memplan.errors import PlanMismatch, UsageError
from memplan.report.explain import explain
from memplan.resolving import solved_again

WHOLE = memplan.Strategy("whole", levers=("recompute",))


def on_meta(layers: int = 3) -> torch.nn.Module:
    return tiny.llama(layers)[0].to("meta")


def a_plan(gpu: str) -> memplan.Plan:
    """All blocks cost the same to recompute, so that how many are follows from bytes alone."""
    return memplan.plan(on_meta(), gpu, seq_len=64, micro_batch=4, optimizer="sgd", strategy=WHOLE)


@pytest.fixture(scope="module")
def plenty() -> memplan.Plan:
    return a_plan("cpu:1GiB")


def test_a_tight_budget_solved_again(plenty: memplan.Plan) -> None:
    middle = (plenty.smallest_bytes + plenty.needs_bytes) // 2
    tight = a_plan(f"cpu:{middle + plenty.budget.margin_bytes}B")
    assert 0 < len(tight.recomputed) < len(tight.layers)
    again = solved_again(on_meta(), tight, middle - plenty.smallest_bytes, WHOLE)
    less, same, more = again.less, again.same, again.more
    assert same is not None
    assert (same.budget_bytes, len(same.recomputed)) == (tight.budget_bytes, len(tight.recomputed))
    assert less is not None
    assert more is not None
    assert (less.budget_bytes, more.budget_bytes) == (plenty.smallest_bytes, 2 * middle - plenty.smallest_bytes)
    assert len(less.recomputed) > len(same.recomputed) > len(more.recomputed)
    assert less.step_s > same.step_s > more.step_s
    assert solved_again(on_meta(), tight, tight.budget_bytes // 2, WHOLE).less is None


def test_the_price_of_one_gib_is_what_solving_again_saves(plenty: memplan.Plan) -> None:
    middle = (plenty.smallest_bytes + plenty.needs_bytes) // 2
    tight = a_plan(f"cpu:{middle + plenty.budget.margin_bytes}B")
    again = solved_again(on_meta(), tight, 2**20, WHOLE)
    assert again.same is not None
    assert again.one_gib_more is not None
    assert again.one_gib_more.budget_bytes - again.same.budget_bytes == 2**30
    assert again.same.shadow_price > 0
    price = explain(again.same, again=again).price  # whose times are by the same measure
    assert price is not None
    assert price.told_s == again.same.shadow_price
    assert price.solved_s == pytest.approx(price.told_s)


def test_a_strategy_that_takes_as_little_as_it_can_has_no_price(plenty: memplan.Plan) -> None:
    least = memplan.Strategy("least", objective="peak", levers=("recompute",))
    made = memplan.plan(on_meta(), "cpu:1GiB", seq_len=64, micro_batch=4, optimizer="sgd", strategy=least)
    again = solved_again(on_meta(), made, 2**20, least)
    assert again.same is not None
    assert again.one_gib_more is None
    assert explain(made, again=again).price is None


@pytest.mark.parametrize("changes", [{"risk": 0.2}, {"budget_share": 0.7}])
def test_what_the_file_does_not_say_was_kept_free_is_found(changes: dict[str, float]) -> None:
    """The strategy that is loaded by its name keeps another margin of the same card."""
    made = memplan.plan(
        on_meta(), "24GiB", seq_len=64, micro_batch=4, optimizer="sgd", strategy=replace(WHOLE, **changes)
    )
    plain = memplan.plan(on_meta(), "24GiB", seq_len=64, micro_batch=4, optimizer="sgd", strategy=WHOLE)
    assert abs(made.budget_bytes - plain.budget_bytes) > 2**28
    again = solved_again(on_meta(), made, 2**30, WHOLE)
    less, same, more = again.less, again.same, again.more
    assert same is not None
    assert same.budget_bytes == pytest.approx(made.budget_bytes, abs=2**20)
    assert less is not None
    assert more is not None
    assert less.budget_bytes < same.budget_bytes < more.budget_bytes


def test_another_model_or_another_optimizer(plenty: memplan.Plan) -> None:
    with pytest.raises(PlanMismatch, match="made for another LlamaForCausalLM"):
        solved_again(on_meta(5), plenty, 2**20)
    with pytest.raises(UsageError, match="Leave the model out"):
        solved_again(on_meta(), plenty.model_copy(update={"optimizer": "adamw"}), 2**20, WHOLE)
