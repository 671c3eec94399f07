"""The study: which levers a model is offered, and that a plan with each of them runs as it was traced."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import tiny
import torch
from imprint import Imprint
from real import peak_of
from torch import Tensor, nn

import memplan
from memplan.errors import DoesNotFit, PlanMismatch
from memplan.gpus import Gpu
from memplan.kernels import backend_for
from memplan.recorder import Recipe, Recorder
from memplan.samples import Sample
from memplan.strategy import LEVERS, Lever
from memplan.study import Study

CPU = Gpu("cpu", "cpu", None)
KIB = 1024

wide_llama = partial(tiny.llama, layers=2, rows=4, length=16, vocab_size=2048, use_cache=False)


def study_of(model: nn.Module, batch: tiny.Batch, recipe: Recipe = Recipe()) -> Study:  # noqa: B008  # frozen
    recorder = Recorder(model, recipe, backend_for(CPU))
    return Study(model, Sample.of(batch), recipe, recorder, CPU, None, (4,), 1)


def only(*levers: Lever) -> memplan.Strategy:
    return memplan.Strategy("a test's", objective="peak", levers=levers)


def leanest(
    model: nn.Module, batch: tiny.Batch, *levers: Lever, optimizer: "str | torch.optim.Optimizer" = "adamw"
) -> memplan.Plan:
    """The plan of the smallest peak that these levers reach; made without weights if it can be, so nothing is timed."""
    bare = deepcopy(model).to("meta") if optimizer == "adamw" else model
    return memplan.plan(bare, "cpu:1GiB", sample=batch, micro_batch=4, strategy=only(*levers), optimizer=optimizer)


def leanest_stepping(model: nn.Module, batch: tiny.Batch, optimizer: torch.optim.Optimizer) -> memplan.Plan:
    """A plan for the smallest budget that any lever reaches."""
    asked = {"sample": batch, "micro_batch": 4, "optimizer": optimizer}
    strategy = memplan.Strategy("all of them", levers=LEVERS)
    plenty = memplan.plan(model, "cpu:1GiB", strategy=strategy, **asked)
    return memplan.plan(model, f"cpu:{plenty.smallest_bytes + KIB}B", strategy=strategy, **asked)


# --- what is offered ------------------------------------------------------------------------------------------------


def test_alike_blocks_share_their_options_and_each_level_shows_one() -> None:
    study = study_of(*wide_llama())
    menus = set(study.menu.options.values())
    assert len(menus) == 1
    (names,) = menus
    assert names[:2] == ("keep", "recompute")
    assert set(names[2:]) == set(study.menu.selections)
    assert [set(level.values()) for level in study.menu.levels] == [{name} for name in names]


def test_the_first_selection_drops_what_norms_and_activations_give_out() -> None:
    study = study_of(*wide_llama())
    first = study.menu.selections[study.menu.options["model.layers.0"][2]]
    assert first.dropped
    assert all("layernorm" in name or "mlp" in name for name in first.dropped)


def test_a_model_whose_loss_is_a_cross_entropy_of_a_head_has_it_in_chunks() -> None:
    assert study_of(*wide_llama()).head == {"lm_head": "chunked-2048"}
    assert study_of(*tiny.bert()).head.keys() == {"cls.predictions.decoder"}


def test_a_card_computes_more_rows_at_once() -> None:
    model, batch = wide_llama()
    plan = memplan.plan(model.to("meta"), "rtx-4090", sample=batch, micro_batch=4, strategy=only("loss-head"))
    assert plan.decisions["lm_head"] == "chunked-32768"


def reads_the_logits(model: nn.Module, batch: object) -> Tensor:
    output = model(**batch)  # type: ignore[arg-type]  # a dict
    return output.loss + 0 * output.logits.sum()


def other_loss(model: nn.Module, batch: object) -> Tensor:
    hidden = model.model(input_ids=batch["input_ids"])  # type: ignore[index]  # a dict
    return hidden.last_hidden_state.pow(2).mean()


def test_a_loss_without_the_head_has_nothing_to_say() -> None:
    study = study_of(*wide_llama(), Recipe(loss=other_loss))
    assert (study.head, study.refusals) == ({}, ())


def test_a_lever_that_fails_its_proof_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.study.difference", lambda *_: "the loss differs by 1 from 2")
    model, batch = wide_llama()
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4, strategy="smallest-memory")
    assert "the loss cannot be computed in chunks: the loss differs by 1 from 2" in plan.assumptions
    assert "lm_head" not in plan.decisions


def test_an_optimizer_is_made_to_step_otherwise_only_if_it_is_there() -> None:
    model, batch = wide_llama()
    assert study_of(model, batch).steppings == {}
    live = Recipe(optimizer=torch.optim.AdamW(model.parameters(), foreach=True))
    assert study_of(model, batch, live).steppings.keys() == {"optimizer-single", "in-backward"}


def test_a_step_that_would_take_for_ever_is_not_run_to_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.study._LONGEST_S", 0.0)
    model, batch = tiny.plain()
    ran: list[str] = []
    model.register_forward_pre_hook(lambda *_: ran.append(str(next(model.parameters()).device)))
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4)
    assert plan.times == "estimate"


# --- what is planned runs so ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levers", [("select",), ("loss-head",), ("select", "loss-head"), ("recompute", "select")])
def test_a_plan_with_a_lever_takes_less_and_is_as_large_as_predicted(levers: tuple[Lever, ...]) -> None:
    model, batch = wide_llama()
    plan = leanest(model, batch, *levers)
    kept = leanest(model, batch)
    assert plan.peak_bytes < kept.peak_bytes
    assert {memplan_lever(option) for option in plan.decisions.values()} - {None} <= set(levers)
    with memplan.apply(model, plan):
        measured = peak_of(model, Sample.of(batch))
    assert abs(measured - plan.peak_bytes) <= KIB


def memplan_lever(option: str) -> str | None:
    names = {"recompute": "recompute", "select": "select", "chunked": "loss-head"}
    return names.get(option.partition("-")[0])


def test_the_plans_own_selections_are_what_it_drops() -> None:
    model, batch = wide_llama()
    plan = leanest(model, batch, "select")
    assert set(plan.decisions.values()) <= {"keep", *plan.selections}
    again = memplan.Plan.model_validate_json(plan.model_dump_json())
    with memplan.apply(model, again):
        model(**batch).loss.backward()
        blocks = [model.get_submodule(path) for path, option in plan.decisions.items() if option != "keep"]
        assert blocks
        assert all(block.forward.found == block.forward.dropped for block in blocks)


def test_an_optimizer_that_steps_in_the_backward_is_planned_applied_measured_and_undone() -> None:
    model, batch = tiny.llama(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = leanest_stepping(model, batch, optimizer)
    assert plan.stepping == "in-backward"
    assert any("gradients are dropped inside the backward" in line for line in plan.assumptions)
    before = [p.detach().clone() for p in model.parameters()]
    with memplan.apply(model, plan) as fit:
        measured = fit.measure(steps=1)
        assert abs(measured.peak_bytes - plan.peak_bytes) <= KIB
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        model(**batch).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        assert not all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        optimizer.step()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_strategy_that_is_shipped_steps_in_the_backward() -> None:
    model, batch = wide_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4, strategy="smallest-memory", optimizer=optimizer)
    assert plan.stepping != "in-backward"


def test_a_plan_from_a_file_cannot_make_an_optimizer_step_otherwise() -> None:
    model, batch = tiny.llama(layers=4)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = leanest_stepping(model, batch, optimizer)
    before = Imprint(model)
    with pytest.raises(PlanMismatch, match=r"'in-backward', but it was read from a file.*optimizer=\.\.\."):
        memplan.apply(model, memplan.Plan.model_validate_json(plan.model_dump_json()))
    assert before.differences() == []


@pytest.mark.parametrize("make", [wide_llama, tiny.plain])
def test_less_than_the_leanest_plan_does_not_fit_and_says_how_much_would(make: Callable[[], tiny.Made]) -> None:
    model, batch = make()
    least = leanest(model, batch, "recompute", "select", "loss-head").peak_bytes
    with pytest.raises(DoesNotFit) as caught:
        memplan.autofit(model.to("meta"), f"cpu:{least * 9 // 10}B", sample=batch, micro_batch=4)
    assert least * 9 // 10 < caught.value.smallest_bytes
