"""`memplan.autofit(trainer)`: the run is the run without it, and everything is as before after `undo`.

Every run has rows of unequal lengths and a last step of 5 rows instead of 8.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from accelerate.utils import DistributedType
from torch import Tensor, nn

import memplan
from integrations.trainers import BATCH, Run, collated, dataset, rows, run, trainer
from memplan import cache
from memplan.errors import BadBatch, PlanMismatch, UsageError
from memplan.integrations.trainer_arguments import optimizer_of
from memplan.integrations.trainer_data import rows_of
from memplan.integrations.trainer_loss import TrainerLoss, coupling
from memplan.integrations.trainer_words import evaluation
from memplan.recipe import Recipe

pytestmark = pytest.mark.slow

WHOLE = {"gpu": "cpu:100MiB", "strategy": "huggingface"}  # every block is recomputed, and nothing has to be searched


def check_same(planned: Run, plain: Run, most: float = 1e-5) -> None:
    assert planned.steps == plain.steps
    assert [(step, lr) for step, _, lr in planned.logged] == [(step, lr) for step, _, lr in plain.logged]
    losses = zip(planned.logged, plain.logged, strict=True)
    assert max(abs(mine[1] - theirs[1]) for mine, theirs in losses) <= 1e-5
    assert planned.distance(plain) <= most


def small(layers: int = 2) -> nn.Module:
    return tiny.llama(layers)[0]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    return lambda **changes: trainer(tmp_path, changes.pop("model", None) or small(), **changes)


# -- the same run ------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_run_without_a_plan(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fits = []
    plain = run(make)
    planned = run(make, lambda t: fits.append((memplan.autofit(t, **WHOLE, micro_batch=2), t)))
    check_same(planned, plain)
    (fit, used), said = fits[0], capsys.readouterr().err
    assert (fit.plan.micro_batch, fit.plan.accumulation) == (2, 4)
    assert len(fit.plan.recomputed) == 2
    assert "2 x 4 accumulated = 8 per step (was 8 x 1)" in said
    assert "2 rows of 23 tokens" in said
    assert "fit.undo()" in said
    (record,) = (r for r in used.state.log_history if "memplan/peak_bytes" in r)
    assert record["memplan/predicted_peak_bytes"] == fit.plan.peak_bytes
    assert 0.5 * fit.plan.peak_bytes < record["memplan/peak_bytes"] <= fit.plan.peak_bytes


def test_a_batch_that_is_changed_without_accumulation_is_noticed(make: Any) -> None:
    def wrong(changed: transformers.Trainer) -> None:
        changed.args.per_device_train_batch_size = changed._train_batch_size = 2

    with pytest.raises(AssertionError):
        check_same(run(make, wrong), run(make))


def test_with_dropout_a_batch_that_is_not_divided_is_the_same_to_the_bit(tmp_path: Path) -> None:
    gpt2 = partial(trainer, tmp_path)
    planned = run(lambda: gpt2(tiny.gpt2(layers=2)[0]), lambda t: memplan.autofit(t, **WHOLE, micro_batch=BATCH))
    check_same(planned, run(lambda: gpt2(tiny.gpt2(layers=2)[0])), most=0.0)


def test_micro_batches_may_be_larger_than_the_trainer_s_own(make: Any) -> None:
    several = partial(make, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=6)
    check_same(run(several, lambda t: memplan.autofit(t, **WHOLE, micro_batch=8)), run(several))


@pytest.mark.parametrize(("before", "after"), [(2, 4), (None, 2), (2, None)])
def test_a_run_goes_on_under_another_plan(tmp_path: Path, before: int | None, after: int | None) -> None:
    """From the middle of the second epoch, with a plan or without one."""

    def trained(folder: Path, micro_batch: int | None, resume: str | None = None, **changes: Any) -> nn.Module:
        made = trainer(folder, small(), save_strategy="steps", save_steps=7, **changes)
        if micro_batch is not None:
            memplan.autofit(made, **WHOLE, micro_batch=micro_batch)
        made.train(resume_from_checkpoint=resume)
        assert made.state.global_step == 10
        return made.model

    trained(tmp_path / "first", before)
    resumed = trained(tmp_path / "second", after, str(tmp_path / "first" / "checkpoint-7"))
    whole = trained(tmp_path / "whole", None)
    pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
    assert max(float((mine - other).detach().abs().max()) for mine, other in pairs) <= 1e-5


def test_a_real_run_needs_what_was_predicted_in_half_precision_too(make: Any, cache_folder: Path) -> None:
    alike = [row for row in rows(64) if len(row["input_ids"]) >= 16]
    alike = [{name: ids[:16] for name, ids in row.items()} for row in alike] * 2
    made = make(bf16=True, max_steps=3, train_dataset=alike)
    fit = memplan.autofit(made, **WHOLE, micro_batch=4)
    made.train()
    (record,) = (r for r in made.state.log_history if "memplan/peak_bytes" in r)
    assert fit.plan.autocast == "bfloat16"
    assert record["memplan/peak_bytes"] == pytest.approx(fit.plan.peak_bytes, rel=0.01)
    ((first, second),) = cache.all_runs().values()  # the next plan learns from autofit's own step, and from the run
    assert first.step_s is not None
    assert (second.step_s, second.peak_bytes) == (None, record["memplan/peak_bytes"])


def test_native_arguments_repeat_the_run_without_memplan(make: Any) -> None:
    plans = []
    planned = run(partial(make, max_steps=4), lambda t: plans.append(memplan.autofit(t, **WHOLE, micro_batch=2).plan))
    text = plans[0].settings("trainer")
    given: dict[str, Any] = eval(text.replace("TrainingArguments", "dict"), {"dict": dict})
    assert given["activation_checkpointing"] is True
    check_same(run(partial(make, max_steps=4, **given)), planned, most=0.0)


def test_planning_leaves_the_random_state_and_undo_everything_else(make: Any) -> None:
    made = make()
    args, own = dict(vars(made.args)), dict(vars(made))
    flags = [{**module.__dict__} for module in made.model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fit = memplan.autofit(made, **WHOLE, micro_batch=4)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert made.args.per_device_train_batch_size == made._train_batch_size == 4
    assert made.args.gradient_accumulation_steps == 2
    fit.undo()
    fit.undo()
    assert vars(made.args) == args
    assert vars(made) == own
    assert [{**module.__dict__} for module in made.model.modules()] == flags
    assert not any(type(c).__name__ == "PlanCallback" for c in made.callback_handler.callbacks)


def test_a_model_that_is_checkpointed_already_is_planned_as_one_that_is_not(make: Any) -> None:
    """The plan decides what is recomputed; after `undo` it is checkpointed as it was."""
    models, fits = [], []

    def checkpointed() -> transformers.Trainer:
        models.append(small())
        models[-1].gradient_checkpointing_enable()
        return make(model=models[-1], max_steps=4)

    planned = run(checkpointed, lambda t: fits.append(memplan.autofit(t, **WHOLE, micro_batch=2)))
    other = run(partial(make, max_steps=4), lambda t: fits.append(memplan.autofit(t, **WHOLE, micro_batch=2)))
    check_same(planned, other, most=0.0)
    check_same(planned, run(partial(make, max_steps=4)))
    mine, same = (fit.plan for fit in fits)
    assert (mine.peak_bytes, mine.recomputed) == (same.peak_bytes, same.recomputed)
    fits[0].undo()
    assert models[0].is_gradient_checkpointing


# -- what is adapted ---------------------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_frozen_embeddings_need_no_gradients_at_their_output(make: Any) -> None:
    """A block that is recomputed without reentrance gives its adapters gradients though its input needs none."""
    models = []

    def lora() -> transformers.Trainer:
        models.append(adapted(small()))
        return make(model=models[-1], max_steps=4)

    check_same(run(lora, lambda t: memplan.autofit(t, **WHOLE, micro_batch=2)), run(lora))
    assert not models[0].get_input_embeddings()._forward_hooks
    assert all(float(p.detach().abs().max()) > 0 for n, p in models[0].named_parameters() if "lora_B" in n)


def test_packed_weights_prepared_with_reentrance_are_recomputed_without(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from quantised import layers_of, quantised

    config = small().config

    def qlora(checkpointed: bool) -> transformers.Trainer:
        torch.manual_seed(0)
        base = quantised(config, layers_of(4, compute=torch.float32), "cpu", torch.float32)
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointed)
        return trainer(tmp_path, adapted(base), max_steps=3)

    planned = run(partial(qlora, True), lambda t: memplan.autofit(t, **WHOLE, micro_batch=2))
    check_same(planned, run(partial(qlora, False)))


# -- what is not divided -----------------------------------------------------------------------------------------------


class Contrast(nn.Module):
    """A loss that compares each row of a batch with all others, with a word for `num_items_in_batch`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(tiny.VOCABULARY, 8)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, **_: object) -> dict[str, Tensor]:
        means = self.words(input_ids).mean(1)
        return {"loss": nn.functional.cross_entropy(means @ means.T, torch.arange(len(means)))}


class Mean(Contrast):
    """A mean over the labels of a batch, which the trainer averages over micro-batches."""

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        scores = self.words(input_ids) @ self.words.weight.T
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())}


class MeanOfLabels(Contrast):
    """A mean over the labels of a batch that takes the number of items and does nothing with it, as T5's."""

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, **_: object) -> dict[str, Tensor]:
        scores = self.words(input_ids) @ self.words.weight.T
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())}


def test_losses_that_depend_on_the_division_keep_it(make: Any) -> None:
    for model, word in ((Contrast(), "couples"), (Mean(), "mean"), (MeanOfLabels(), "adds those means up")):
        made = make(model=model)
        assert word in str(coupling(made, rows_of(made), Recipe()))
    made = make()
    assert coupling(made, rows_of(made), Recipe()) is None
    smoothed = make(label_smoothing_factor=0.1)
    assert coupling(smoothed, rows_of(smoothed), Recipe()) is None


class Partly(Contrast):
    """A sum over the labels, divided by the items, and a small part that is a mean, as a router's loss."""

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, num_items_in_batch: Any = None, **_: object
    ) -> dict[str, Tensor]:
        scores = (self.words(input_ids) @ self.words.weight.T).flatten(0, 1)
        own = nn.functional.cross_entropy(scores, labels.flatten(), reduction="sum") / num_items_in_batch
        return {"loss": own + 0.01 * scores.logsumexp(-1).mean()}


def test_a_small_part_of_a_loss_is_seen_under_autocast_too(make: Any) -> None:
    made = make(model=Partly(), bf16=True)
    assert "couples" in str(coupling(made, rows_of(made), Recipe(autocast=torch.bfloat16)))


def test_a_router_s_loss_in_half_precision_keeps_the_division(make: Any) -> None:
    made = make(model=tiny.llama(use_cache=False)[0].bfloat16())
    assert coupling(made, rows_of(made), Recipe()) is None
    made.model.config.output_router_logits = True
    assert "router's loss" in str(coupling(made, rows_of(made), Recipe()))


class Halves(Contrast):
    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, **_: object) -> dict[str, Tensor]:
        means = self.words(input_ids).mean(1)
        scores = means @ means.T
        assert scores.dtype is torch.bfloat16, "only halves"
        return {"loss": nn.functional.cross_entropy(scores, torch.arange(len(means)))}


def test_a_model_that_needs_autocast_is_tried_with_it(make: Any) -> None:
    made = make(model=Halves(), bf16=True)
    assert "couples" in str(coupling(made, rows_of(made), Recipe(autocast=torch.bfloat16)))
    made = make(model=Halves().bfloat16())
    assert "couples" in str(coupling(made, rows_of(made), Recipe()))


class Noting(transformers.Trainer):
    """Keeps its losses to log their mean, and logs each as it comes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[Tensor] = []

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self.losses.append(loss.detach())
        self.log({"own": 1.0})
        return loss


def test_what_a_trainer_keeps_and_logs_itself_is_of_its_training_only(make: Any) -> None:
    made = make(kind=Noting)
    memplan.autofit(made, **WHOLE)
    assert made.losses == []
    assert made.state.log_history == []
    assert "log" not in vars(made)


def test_a_division_that_would_change_the_result_is_refused(make: Any) -> None:
    with pytest.raises(
        BadBatch, match="micro_batch=2 would change the result of the 8 x 1 rows per step: its loss couples"
    ):
        memplan.autofit(make(model=Contrast()), **WHOLE, micro_batch=2)
    with pytest.raises(BadBatch, match="drop_last"):
        memplan.autofit(make(dataloader_drop_last=True), **WHOLE, micro_batch=2)


def test_batch_norm_keeps_the_batch_whole(tmp_path: Path) -> None:
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": n % 10} for n in range(8)]

    def resnet(**changes: Any) -> transformers.Trainer:
        made = trainer(tmp_path, tiny.resnet()[0], train_dataset=images, **changes)
        made.data_collator = transformers.default_data_collator
        return made

    fit = memplan.autofit(resnet(per_device_train_batch_size=4), **WHOLE)
    assert (fit.plan.micro_batch, fit.plan.accumulation) == (4, 1)
    assert any("batch norm" in text for text in fit.plan.assumptions)
    with pytest.raises(UsageError, match="gradient_accumulation_steps=2"):
        memplan.autofit(resnet(gradient_accumulation_steps=2), **WHOLE)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_find_batch_size": True}, "the effective batch is another one"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, "reentrance"),
        ({"train_sampling_strategy": "batch_rebalance"}, "changing size"),
        ({"torch_compile": True}, "torch_compile"),
        ({"optim": "lomo"}, "inside the backward"),
    ],
)
def test_arguments_that_contradict_a_plan_are_refused(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        memplan.autofit(make(**changes), **WHOLE)


def test_ranks_that_divide_the_model_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(UsageError, match="2 ranks divide the model by MEGATRON_LM"):
        memplan.autofit(trainer, **WHOLE)


def test_ranks_that_share_a_batch_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(accelerator_config={"split_batches": True})
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(UsageError, match="split_batches in accelerator_config"):
        memplan.autofit(trainer, **WHOLE)


def test_what_the_trainer_decides_is_not_taken(make: Any) -> None:
    with pytest.raises(UsageError, match="sample, effective_batch, optimizer: the trainer decides that"):
        memplan.autofit(make(), "cpu", sample={}, effective_batch=4, optimizer="sgd")


def test_prefix_tuning_is_refused_with_the_reason(make: Any) -> None:
    prefixes = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UsageError, match="prefix tuning"):
        memplan.autofit(make(model=peft.get_peft_model(small(), prefixes)), **WHOLE)


def test_what_is_changed_after_planning_stops_the_run_before_its_first_step(make: Any) -> None:
    made = make()
    fit = memplan.autofit(made, **WHOLE, micro_batch=4)
    made.args.gradient_accumulation_steps = 1
    with pytest.raises(PlanMismatch, match=r"args\.gradient_accumulation_steps is 1, planned 2"):
        made.train()
    made.args.gradient_accumulation_steps = 2
    (block,) = (module for path, module in made.model.named_modules() if path == fit.plan.recomputed[0])
    made.args.max_steps = 2
    made.model.activation_checkpointing_disable()
    assert not block.gradient_checkpointing
    made.train()
    assert block.gradient_checkpointing
    assert made.state.global_step == 2
    made.model.model.layers[0] = type(block)(made.model.config, 0)
    with pytest.raises(PlanMismatch, match="not the one that was planned"):
        made.train()


def test_running_out_of_memory_ends_with_the_way_out(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(made, "training_step", full)
    fit = memplan.autofit(made, **WHOLE, micro_batch=4)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        made.train()
    assert "there is no smaller plan" in caught.value.__notes__[0]
    assert "memplan.autofit(trainer, micro_batch=2, strategy='smallest-memory')" in caught.value.__notes__[1]
    fit.undo()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        made.train()
    assert not hasattr(caught.value, "__notes__")


def test_memory_that_no_plan_is_about_is_told_apart(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    memplan.autofit(made, **WHOLE)

    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    monkeypatch.setattr(made, "training_step", killed)
    with pytest.raises(RuntimeError, match="worker") as caught:
        made.train()
    assert "in a loader's worker ran out, which no plan helps: start fewer loader workers" in caught.value.__notes__[0]


# -- the rows that are planned for -------------------------------------------------------------------------------------


class Unknown(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of which nothing tells the length."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, at: int) -> dict[str, Any]:
        return rows(5)[at]


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, once: bool) -> None:
        self.once, self.rows = once, iter(rows(5))

    def __iter__(self) -> Any:
        return self if self.once else iter(rows(5))

    def __next__(self) -> dict[str, Any]:
        return next(self.rows)


def test_the_longest_and_the_shortest_row_are_planned_for(make: Any) -> None:
    for data in (rows(), dataset(), dataset().shuffle(seed=1)):
        found = rows_of(make(train_dataset=data))
        assert found.data is not None
        assert found.data.tokens == found.sample.content["input_ids"].shape[1] == 23
        assert found.sample.content["attention_mask"].sum(1).tolist() == [23, 4]
        assert found.said == ()


def test_a_column_of_lengths_is_believed_if_the_rows_agree(make: Any) -> None:
    ids = dataset()
    right = ids.add_column("length", [len(row) for row in ids["input_ids"]])
    wrong = ids.add_column("length", [50] + [10] * (len(ids) - 1))
    assert rows_of(make(train_dataset=right)).data is not None
    found = rows_of(make(train_dataset=wrong))
    assert found.data is None
    assert "its column of lengths says 50" in found.said[0]


def test_the_longest_labels_count_too(make: Any) -> None:
    data = [{"input_ids": [1] * n, "labels": [1] * m} for n, m in ((9, 2), (3, 8), (2, 3))]
    made = make(train_dataset=data)
    made.data_collator = lambda batch: {
        name: nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in batch], batch_first=True)
        for name in ("input_ids", "labels")
    }
    sample = rows_of(made).sample.content
    assert (sample["input_ids"].shape[1], sample["labels"].shape[1]) == (9, 8)


def test_where_nothing_tells_the_lengths_the_plan_says_so(make: Any) -> None:
    found = rows_of(make(train_dataset=Unknown()))
    assert found.data is None
    assert "nothing says how long the others are" in found.said[0]
    assert rows_of(make(train_dataset=Stream(once=False), max_steps=1)).data is None
    with pytest.raises(UsageError, match="can be read once"):
        rows_of(make(train_dataset=Stream(once=True), max_steps=1))


def test_the_loss_is_the_trainer_s_own_and_leaves_no_trace(make: Any) -> None:
    made = make(label_smoothing_factor=0.2)
    found = rows_of(made)
    before, batch = dict(vars(made)), collated(rows(2))
    mine = TrainerLoss(made, found)(made.model, batch)
    theirs = made.compute_loss(made.model, dict(batch), num_items_in_batch=TrainerLoss(made, found).items)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, made.model(**batch).loss)
    assert vars(made) == before


@pytest.mark.parametrize(
    ("optim", "name"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw-fused"),
        ("adamw_8bit", "adam8bit"),
        ("rmsprop", "rmsprop"),
    ],
)
def test_optimizers_are_planned_by_name(make: Any, optim: str, name: str) -> None:
    made = make(optim=optim)
    assert optimizer_of(made) == name
    assert made.optimizer is None


def test_other_optimizers_are_planned_as_they_are(make: Any) -> None:
    made = make(optim="adafactor")
    assert optimizer_of(made) is made.optimizer
    model = small()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    assert optimizer_of(make(model=model, optimizers=(own, None))) is own


def test_evaluation_is_mentioned_only_where_it_may_need_more(make: Any) -> None:
    fit = memplan.autofit(make(), **WHOLE, micro_batch=4)
    plan = fit.plan
    assert evaluation(make(), plan) == ()
    assert evaluation(make(eval_dataset=rows(4), per_device_eval_batch_size=1), plan) == ()
    (said,) = evaluation(make(eval_dataset=rows(4), per_device_eval_batch_size=64), plan)
    assert "per_device_eval_batch_size=64 may need up to" in said
