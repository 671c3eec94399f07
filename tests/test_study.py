"""The study: which levers a model is offered, and that a plan with each of them runs as it was traced."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from imprint import Imprint
from real import other_meter, peak_of
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import memplan
from memplan.errors import DoesNotFit, PlanMismatch
from memplan.gpus import Gpu
from memplan.kernels import backend_for
from memplan.problem import RECOMPUTE
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.strategy import LEVERS, SAFE_LEVERS, Lever
from memplan.study import Study

CPU = Gpu("cpu", "cpu", None)
KIB = 1024

wide_llama = partial(tiny.llama, layers=2, rows=4, length=16, vocab_size=2048, use_cache=False)


def study_of(
    model: nn.Module,
    batch: tiny.Batch,
    recipe: Recipe = Recipe(),  # noqa: B008  # frozen
    levers: Sequence[Lever] = LEVERS,
) -> Study:
    recorder = Recorder(model, recipe, backend_for(CPU))
    return Study(model, Sample.of(batch), recipe, recorder, CPU, None, (4,), 1, levers)


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


class _Fused(torch.autograd.Function):
    """As Liger's and TRL's kernels: a few rows of logits at a time, past the head's module and torch's own loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        to_hidden, to_weight, total = torch.empty_like(hidden), torch.zeros_like(weight), hidden.new_zeros(())
        for start in range(0, len(hidden), 8):
            rows, wanted = hidden[start : start + 8], target[start : start + 8, None]
            logs = (rows @ weight.t()).log_softmax(-1)
            total -= logs.gather(1, wanted).sum()
            grad = logs.exp_().scatter_add_(1, wanted, logs.new_full(wanted.shape, -1.0))
            to_hidden[start : start + 8] = grad @ weight
            to_weight.addmm_(grad.t(), rows)
        ctx.save_for_backward(to_hidden.div_(len(hidden)), to_weight.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden.mul_(grad), to_weight.mul_(grad), None


def fused_loss(model: nn.Module, batch: object) -> Tensor:
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)  # type: ignore[index]
    loss: Tensor = _Fused.apply(hidden, model.lm_head.weight, batch["labels"][:, 1:].flatten())  # type: ignore[index]
    return loss


def fused_by_trl(model: nn.Module, batch: object) -> Tensor:
    """What `SFTTrainer` asks of a model that it gave its fused head."""
    loss: Tensor = model(**batch, fused_lm_head=True).loss  # type: ignore[arg-type]  # a dict
    return loss


@pytest.mark.parametrize("loss", [fused_loss, fused_by_trl])
def test_a_loss_that_does_without_logits_already_is_seen_and_left_alone(loss: Callable[..., Tensor]) -> None:
    model, batch = wide_llama()
    if loss is fused_by_trl:
        pytest.importorskip("trl").trainer.utils.add_fused_lm_head(model)
    asked = {"sample": batch, "micro_batch": 4, "strategy": only("select", "loss-head")}
    plan = memplan.plan(model, "cpu:1GiB", loss=loss, **asked)  # type: ignore[arg-type]
    assert "lm_head" not in plan.decisions
    assert not refusals_of(plan)
    with memplan.apply(model, plan):
        measured = peak_of(model, Sample.of(batch), Recipe(loss=loss), other_meter())
    assert abs(measured - plan.peak_bytes) <= KIB
    with_logits = memplan.plan(model, "cpu:1GiB", **asked)  # type: ignore[arg-type]
    assert "lm_head" in with_logits.decisions


def other_loss(model: nn.Module, batch: object) -> Tensor:
    hidden = model.model(input_ids=batch["input_ids"])  # type: ignore[index]  # a dict
    return hidden.last_hidden_state.pow(2).mean()


def test_a_loss_without_the_head_has_nothing_to_say() -> None:
    study = study_of(*wide_llama(), Recipe(loss=other_loss), SAFE_LEVERS)
    assert (study.head, study.refusals) == ({}, ())


def test_a_lever_that_fails_its_proof_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.proof._difference", lambda *_: "the loss differs by 1 from 2")
    model, batch = wide_llama()
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4, strategy="smallest-memory")
    assert "the loss cannot be computed in chunks: the loss differs by 1 from 2" in plan.assumptions
    assert "lm_head" not in plan.decisions


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_plan_says_if_what_it_does_was_not_tried_on_the_model(place: str) -> None:
    model, batch = tiny.llama(layers=2, use_cache=False)

    def says(strategy: memplan.Strategy) -> bool:
        plan = memplan.plan(model.to(place), "cpu:1GiB", sample=batch, micro_batch=2, strategy=strategy)
        return any("was not tried on this model" in line for line in plan.assumptions)

    assert says(memplan.Strategy("all", levers=("recompute",), every_block="recompute")) == (place == "meta")
    assert not says(memplan.Strategy("none", levers=()))


class Stateful(nn.Module):
    """A block that changes something of its own in every forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(32, 128), nn.Linear(128, 32)
        if how == "spectral norm":
            self.first = spectral_norm(self.first)
        self.register_buffer("mean", torch.zeros(128))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.noise = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(x).relu()
        if self.how == "moving average":
            self.mean.mul_(0.9).add_(inner.detach().mean((0, 1)), alpha=0.1)
            inner = inner - self.mean
        elif self.how == "hidden moving average":
            self.mean.data.mul_(0.9).add_(inner.detach().mean((0, 1)), alpha=0.1)
        elif self.how == "another buffer":
            self.mean = self.mean + 1
        elif self.how == "counter":
            self.seen += 1
        elif self.how == "noise of its own":
            inner = inner * torch.rand(inner.shape, generator=self.noise)
        return x + self.last(inner)


def mean_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def stateful(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(*(Stateful(how) for _ in range(4)), nn.Linear(32, 1)), torch.randn(4, 16, 32)


SEEN = ["spectral norm", "moving average", "another buffer", "counter"]


@pytest.mark.parametrize("how", [*SEEN, "hidden moving average", "noise of its own"])
def test_blocks_that_change_in_every_forward_are_not_recomputed(how: str) -> None:
    model, x = stateful(how)
    before = deepcopy(model.state_dict())
    plan = memplan.plan(model, "cpu:1GiB", sample=x, loss=mean_of, micro_batch=4, strategy="recompute-only")
    (line,) = (line for line in plan.assumptions if line.startswith("blocks cannot be recomputed: "))
    assert ("changed by every forward" in line) == (how in SEEN)
    assert plan.recomputed == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_kind_of_block_is_tried() -> None:
    """The last one says nothing for others."""
    torch.manual_seed(0)
    hows = ["noise of its own"] * 2 + ["none"] * 2
    model = nn.Sequential(*map(Stateful, hows), nn.Linear(32, 1))
    plan = memplan.plan(
        model, "cpu:1GiB", sample=torch.randn(4, 16, 32), loss=mean_of, micro_batch=4, strategy="recompute-only"
    )
    assert any(line.startswith("blocks cannot be recomputed: ") for line in plan.assumptions)
    assert plan.recomputed == ()


@pytest.mark.parametrize("how", SEEN)
def test_neither_where_they_cannot_be_run(how: str) -> None:
    model, x = stateful(how)
    study = study_of(model.to("meta"), x, Recipe(loss=mean_of), ("recompute",))
    assert any("changed by every forward" in line for line in study.refusals)
    assert not any(RECOMPUTE in level.values() for level in study.menu.levels)


def test_a_loss_that_is_no_number_says_nothing_against_recomputation() -> None:
    model, batch = tiny.llama()
    ignored = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    plan = memplan.plan(model, "cpu:1GiB", sample=ignored, micro_batch=2, strategy="huggingface")
    assert plan.recomputed


def test_blocks_without_state_of_their_own_are_recomputed() -> None:
    model, x = stateful("none")
    study = study_of(model, x, Recipe(loss=mean_of), ("recompute",))
    assert study.refusals == ()
    assert any(RECOMPUTE in level.values() for level in study.menu.levels)


def test_an_optimizer_is_made_to_step_otherwise_only_if_it_is_there() -> None:
    model, batch = wide_llama()
    assert study_of(model, batch).steppings == {}
    live = Recipe(optimizer=torch.optim.AdamW(model.parameters(), foreach=True))
    assert study_of(model, batch, live).steppings.keys() == {"optimizer-single", "in-backward"}


# --- what is not offered --------------------------------------------------------------------------------------------


def refusals_of(plan: memplan.Plan, *starts: str) -> list[str]:
    """What the plan says of levers that are not offered."""
    every = ("blocks cannot", "no part of", "the loss cannot", "the optimizer cannot", "nothing is copied")
    return [line for line in plan.assumptions if line.startswith(starts or every)]


class Together(torch.optim.SGD):
    """Its steps depend on how many parameters learn."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        learning = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            for parameter in learning:
                parameter -= parameter.grad / len(learning)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "effective_batch", "why"),
    [
        (None, 4, "'sgd' is only a name"),
        (torch.optim.SGD, 8, "Give the whole batch as micro_batch"),
        (Together, 4, "Together moves parameters otherwise when it steps them one by one"),
    ],
)
def test_a_step_in_the_backward_that_is_asked_for_in_vain_is_explained(
    make: "type[torch.optim.Optimizer] | None", effective_batch: int, why: str
) -> None:
    model, batch = tiny.llama(layers=1, use_cache=False)
    optimizer = "sgd" if make is None else make(model.parameters(), lr=0.1)  # type: ignore[call-arg]  # SGD's
    asked = {"sample": batch, "optimizer": optimizer, "effective_batch": effective_batch, "micro_batch": 4}
    everything = memplan.Strategy("all of them", levers=LEVERS)
    (line,) = refusals_of(memplan.plan(model, "cpu:1GiB", strategy=everything, **asked))  # type: ignore[arg-type]
    assert line.startswith("the optimizer cannot step inside the backward: ")
    assert why in line
    assert not refusals_of(memplan.plan(model, "cpu:1GiB", **asked))  # type: ignore[arg-type]  # nobody asked for it


@pytest.mark.parametrize(
    ("gpu", "host_memory", "why"),
    [
        ("cpu:1GiB", 0.5, "the tensors of a CPU are there already"),
        ("24GiB", "8GiB", "the speed of the link between 24GiB and its host is unknown"),
        ("rtx-4090", 0.5, "a plan may use 50% of its memory, unknown of a host that is not here"),
        ("rtx-4090", "1B", "host_memory = '1B' leaves no room there"),
        ("rtx-4090", "8GiB", None),
    ],
)
def test_copies_to_the_host_that_were_to_come_first_are_explained(
    gpu: str, host_memory: "str | float", why: str | None
) -> None:
    model, batch = tiny.llama(layers=2, use_cache=False)
    first = memplan.Strategy("first", levers=("offload",), levers_first=("offload",), host_memory=host_memory)
    plan = memplan.plan(model.to("meta"), gpu, sample=batch, micro_batch=2, strategy=first)
    lines = refusals_of(plan)
    assert [line.startswith("nothing is copied to the host: ") for line in lines] == ([True] if why else [])
    assert why is None or why in lines[0]
    any_order = memplan.plan(model, gpu, sample=batch, micro_batch=2)
    assert len(refusals_of(any_order)) == (gpu != "cpu:1GiB")  # where they could not have helped, nobody asks why


class Reading(nn.Module):
    """A block that asks what it got before it does anything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) if bool(mask.all()) else x


class Stack(nn.Module):
    """Blocks and a loss of their own; `learns` says whether autograd saves anything in the blocks."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        self.blocks, self.learns = nn.ModuleList(Reading() for _ in range(3)), learns
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(len(x), dtype=torch.bool)
        with torch.set_grad_enabled(self.learns):
            for block in self.blocks:
                x = block(x, mask)
        return self.last(x).square().mean()


def test_blocks_of_which_no_part_can_run_again_are_named_unless_they_save_nothing() -> None:
    for learns in (True, False):
        asked = {"sample": torch.randn(4, 16), "micro_batch": 4, "strategy": only("select")}
        lines = refusals_of(memplan.plan(Stack(learns), "cpu:1GiB", **asked))  # type: ignore[arg-type]
        assert [line.startswith("no part of a block can be recomputed: ") for line in lines] == [True] * learns


def test_labels_that_are_all_ignored_are_what_a_plan_says_is_wrong() -> None:
    model, batch = wide_llama()
    ignored = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    plan = memplan.plan(model, "cpu:1GiB", sample=ignored, micro_batch=4, strategy=only("loss-head"))
    (line,) = refusals_of(plan)
    assert line == (
        "the loss cannot be computed in chunks: every label of the sample is ignored (-100), so that its loss is nan, "
        "which shows no difference. Plan with a sample from which something is learned."
    )


def test_a_step_that_would_take_for_ever_is_not_run_to_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.study._LONGEST_S", 0.0)
    model, batch = tiny.plain()
    ran: list[str] = []
    model.register_forward_pre_hook(lambda *_: ran.append(str(next(model.parameters()).device)))
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4)
    assert plan.times == "estimate"


# --- what is planned runs so ----------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
