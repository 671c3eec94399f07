"""What cannot be used ends in one typed error that says what, why and the way out, and leaves the model as it was."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from imprint import Imprint
from torch import Tensor, nn

import memplan
from memplan.errors import (
    AlreadyApplied,
    BadBatch,
    BadBudget,
    BadLoss,
    BadOptimizer,
    BadSample,
    BadStrategy,
    DoesNotFit,
    MemplanError,
    ModelFailed,
    NoDevice,
    NothingToTrain,
    PlanMismatch,
    PlanSchema,
    UnknownGpu,
    UsageError,
)


@dataclass(frozen=True)
class Scene:
    """What a bad call is made with: a model that is fine, its batch, and a folder for files."""

    model: nn.Module
    batch: tiny.Batch
    folder: Path

    def plan(self, gpu: str = "cpu:1GiB", **settings: object) -> memplan.Plan:
        given = {"sample": self.batch, "micro_batch": 8, **settings}
        return memplan.plan(self.model, gpu, **given)  # type: ignore[arg-type]

    def predict(self, **settings: object) -> memplan.Prediction:
        given = {"sample": self.batch, **settings}
        return memplan.predict(self.model, **given)  # type: ignore[arg-type]

    def file(self, text: str, name: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def strategy(self, text: str) -> memplan.Plan:
        return self.plan(strategy=self.file(text, "mine.toml"))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    model, batch = tiny.plain(layers=2)
    return Scene(model, batch, tmp_path)


def loss_of(change: Callable[[Tensor], object]) -> Callable[[nn.Module, tiny.Batch], object]:
    return lambda model, batch: change(model(**batch)["loss"])


def fail(*_: object) -> Tensor:
    raise ArithmeticError("the model's own trouble")


def other(make: Callable[[], tiny.Made]) -> tiny.Made:
    """Another model, made without a trace in the random state."""
    with torch.random.fork_rng():
        return make()


def foreign_optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW(other(tiny.plain)[0].head.parameters())


def apply_twice(scene: Scene) -> None:
    plan = scene.plan()
    with memplan.apply(scene.model, plan):
        memplan.apply(scene.model, plan)


def apply_to(scene: Scene, make: Callable[[], tiny.Made]) -> None:
    plan, (model, _) = scene.plan(), other(make)
    before = Imprint(model)
    try:
        memplan.apply(model, plan)
    finally:
        assert before.differences() == []


def split_a_llama(scene: Scene) -> None:
    model, batch = other(partial(tiny.llama, layers=1))
    memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4, effective_batch=6)


def apply_misfit(scene: Scene) -> None:
    plan = scene.plan()
    tight = scene.plan(f"cpu:{int(0.95 * plan.smallest_bytes)}B")
    memplan.apply(scene.model, tight)


def load_other_version(scene: Scene) -> None:
    text = scene.plan().model_dump_json().replace('"schema_version":3', '"schema_version":99')
    memplan.Plan.load(scene.file(text, "plan.json"))


# what is done, the error, and words that its message has to have: what is wrong, the numbers, the way out
CASES: dict[str, tuple[Callable[[Scene], object], type[MemplanError], tuple[str, ...]]] = {
    # cards and budgets
    "unknown card": (lambda s: s.plan("rtx-4091"), UnknownGpu, ("'rtx-4091'", "rtx-4090", "24GiB")),
    "no card at all": (lambda s: s.plan(None), UnknownGpu, ("None", "'rtx-4090'", "'24GiB'")),  # type: ignore[arg-type]
    "budget of zero": (lambda s: s.plan("0GiB"), BadBudget, ("'0GiB'", "at least one byte", "'24GiB'")),
    "negative budget": (lambda s: s.plan("cpu:-2GiB"), BadBudget, ("'-2GiB'", "at least one byte", "'24GiB'")),
    "budget that is no size": (lambda s: s.plan("24 bananas"), BadBudget, ("'bananas'", "GiB", "'24GiB'")),
    "budget that is no number": (lambda s: s.plan("cpu:nanGiB"), BadBudget, ("'nanGiB'", "finite", "'24GiB'")),
    "budget without a unit": (lambda s: s.plan("24"), BadBudget, ("'24'", "no unit", "'24GiB'")),
    "budget below the weights": (
        lambda s: s.plan("cpu:8KiB"),
        DoesNotFit,
        ("7.92 KiB on cpu:8KiB", "always there", "weights", "optimizer state", "KiB"),
    ),
    "budget below the smallest plan": (apply_misfit, DoesNotFit, ("does not fit", "saves about")),
    "CUDA that is not there": (lambda s: s.plan("cuda:99"), NoDevice, ("'cuda:99'", "'cpu:2GiB'", "'24GiB'")),
    # samples
    "no sample": (lambda s: s.plan(sample=None), BadSample, ("Plain", "sample=")),
    "no sample to predict with": (
        lambda s: s.predict(sample=None),
        BadSample,
        ("NoneType", "a dict, a tuple or a tensor"),
    ),
    "rows that disagree": (
        lambda s: s.plan(sample={**s.batch, "labels": s.batch["labels"][:3]}),
        BadSample,
        ("x (8, 16)", "labels (3,)", "first dimension"),
    ),
    "no rows": (lambda s: s.plan(sample={"x": torch.zeros(0, 16)}), BadSample, ("x (0, 16)", "at least 1")),
    "no tensors": (lambda s: s.plan(sample={"x": 3}), BadSample, ("no tensor", "for example")),
    "a sample that the model does not take": (
        lambda s: s.plan(sample={"y": torch.zeros(8, 16)}),
        ModelFailed,
        ("TypeError", "'y'", "by hand"),
    ),
    # losses
    "loss of many elements": (
        lambda s: s.plan(loss=loss_of(lambda x: x.expand(3))),
        BadLoss,
        ("no scalar", "(3,)", "loss=lambda"),
    ),
    "loss without a gradient": (
        lambda s: s.plan(loss=loss_of(lambda x: x.detach())),
        BadLoss,
        ("does not depend on a trainable parameter", "loss=lambda"),
    ),
    "loss that is a number": (
        lambda s: s.plan(loss=loss_of(lambda _: 1.5)),
        BadLoss,
        ("float", "loss=lambda", "labels"),
    ),
    "loss by name": (lambda s: s.plan(loss="ce"), BadLoss, ("'ce'", "loss(model, batch)")),
    "loss of one argument": (lambda s: s.plan(loss=lambda m: m), BadLoss, ("two arguments", "loss(model, batch)")),
    "a criterion": (
        lambda s: s.predict(loss=nn.CrossEntropyLoss()),
        BadLoss,
        ("CrossEntropyLoss", "outputs and targets", "loss(model, batch)"),
    ),
    "a criterion's function": (
        lambda s: s.predict(loss=nn.functional.cross_entropy),
        BadLoss,
        ("cross_entropy", "outputs and targets", "loss(model, batch)"),
    ),
    "output without a loss": (
        lambda s: memplan.predict(s.model.blocks, {"x": s.batch["x"]}, loss=lambda m, b: m[0](b["x"])),
        BadLoss,
        ("no scalar", "(8, 16)", "loss=lambda"),
    ),
    # models
    "nothing to train": (lambda s: s.plan(), NothingToTrain, ("Plain", "requires_grad", "PEFT")),
    "model that raises": (
        lambda s: s.plan(),
        ModelFailed,
        ("Plain", "ArithmeticError", "blocks.1.narrow", "the model's own trouble", "by hand"),
    ),
    "a class": (
        lambda s: memplan.plan(nn.Linear, "24GiB", sample=s.batch),
        UsageError,
        ("class Linear", "Linear(...)"),
    ),
    "a hub id": (lambda s: memplan.predict("org/llama", s.batch), UsageError, ("a str", "nn.Module", "--config")),
    # strategies
    "no strategy": (lambda s: s.plan(strategy=None), BadStrategy, ("None", "'balanced'")),
    "NaN in a strategy": (
        lambda s: s.strategy("budget_share = nan"),
        BadStrategy,
        ("mine.toml", "budget_share = nan", "0"),
    ),
    "unknown key in a strategy": (
        lambda s: s.strategy("tolerence = 0.1"),
        BadStrategy,
        ("mine.toml", "'tolerence'", "did you mean 'tolerance'?"),
    ),
    "unknown strategy": (lambda s: s.plan(strategy="fast"), BadStrategy, ("'fast'", "throughput", "balanced", ".toml")),
    # optimizers
    "optimizer of other parameters": (
        lambda s: s.plan(optimizer=foreign_optimizer()),
        BadOptimizer,
        ("2 of the 2 parameters", "AdamW", "model.parameters()"),
    ),
    "unknown optimizer": (lambda s: s.plan(optimizer="adamz"), BadOptimizer, ("'adamz'", "'adam'", "passed live")),
    "no optimizer": (lambda s: s.plan(optimizer=None), BadOptimizer, ("NoneType", "'adamw'")),
    # batches
    "batch that does not divide": (
        split_a_llama,
        BadBatch,
        ("effective_batch = 6", "micro_batch = 4", "3 and 6"),
    ),
    "batch that must not be split": (
        lambda s: s.plan(micro_batch=4, effective_batch=8),
        BadBatch,
        ("micro_batch = 4", "effective_batch = 8", "BatchNorm", "leave micro_batch out"),
    ),
    "micro-batch of zero": (lambda s: s.plan(micro_batch=0), BadBatch, ("micro_batch = 0", "at least 1")),
    "negative effective batch": (
        lambda s: s.plan(micro_batch=None, effective_batch=-8),
        BadBatch,
        ("effective_batch = -8", "at least 1"),
    ),
    "half a sample": (lambda s: s.plan(micro_batch=2.5), BadBatch, ("micro_batch = 2.5", "whole number")),
    "a batch that is a truth value": (lambda s: s.plan(micro_batch=True), BadBatch, ("True", "whole number")),
    "half an accumulation": (lambda s: s.predict(accumulation=1.5), BadBatch, ("accumulation is 1.5", "at least 1")),
    "half a token": (
        lambda s: memplan.plan(other(tiny.llama)[0], "cpu:1GiB", seq_len=3.5),
        BadSample,
        ("seq_len is 3.5", "whole number"),
    ),
    "autocast by name": (lambda s: s.plan(autocast="bfloat16"), UsageError, ("'bfloat16'", "torch.bfloat16", "None")),
    "autocast to integers": (lambda s: s.predict(autocast=torch.int8), UsageError, ("torch.int8", "torch.float16")),
    "accumulation of zero": (lambda s: s.predict(accumulation=0), BadBatch, ("accumulation is 0", "at least 1")),
    # plans
    "a folder for a plan": (lambda s: s.plan().save(s.folder), PlanSchema, ("cannot write", "Name another")),
    "what is no plan": (lambda s: memplan.apply(s.model, {}), UsageError, ("dict", "Plan.load")),  # type: ignore[arg-type]
    "plan of another version": (load_other_version, PlanSchema, ("schema version 99", "reads version 3", "Plan again")),
    "no plan": (
        lambda s: memplan.Plan.load(s.file("{}", "plan.json")),
        PlanSchema,
        ("plan.json", "schema_version", "Plan.save"),
    ),
    "plan for other modules": (
        lambda s: apply_to(s, tiny.vit),
        PlanMismatch,
        ("Plain", "'blocks.0'", "2 of 2", "ViTForImageClassification", "Plan for this model"),
    ),
    "plan for other shapes": (
        lambda s: apply_to(s, partial(tiny.plain, layers=2, width=12)),
        PlanMismatch,
        ("Plain", "shapes", "Plan for this model"),
    ),
    "plan applied twice": (apply_twice, AlreadyApplied, ("Plain", "0 modules", "undo()")),
}


# what the model has to be for some of them
PREPARED: dict[str, Callable[[nn.Module], object]] = {
    "nothing to train": lambda model: model.requires_grad_(False),
    "model that raises": lambda model: setattr(model.blocks[1].narrow, "forward", fail),
}


@pytest.mark.parametrize("name", CASES)
def test_one_typed_error_with_the_way_out_and_nothing_changed(name: str, scene: Scene) -> None:
    call, kind, words = CASES[name]
    scene.model(**scene.batch)["loss"].backward()
    PREPARED.get(name, lambda _: None)(scene.model)
    before = Imprint(scene.model)
    with pytest.raises(MemplanError) as caught:
        call(scene)
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert missing == [], str(caught.value)
    assert before.differences() == []


def test_the_error_of_a_model_is_chained(scene: Scene) -> None:
    PREPARED["model that raises"](scene.model)
    with pytest.raises(ModelFailed) as caught:
        scene.plan()
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_cuda_where_there_is_none(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoDevice, match=r"'cuda' was asked for, but .* pass 'cpu'"):
        memplan.autofit(scene.model, "cuda", sample=scene.batch)


def test_errors_are_caught_by_what_they_are() -> None:
    """Callers that know nothing of memplan's tree catch them too."""
    assert issubclass(BadSample, ValueError)
    assert issubclass(DoesNotFit, RuntimeError)
    assert all(issubclass(kind, MemplanError) for _, kind, _ in CASES.values())
