"""`Recorder`: its peak against real steps in the CPU's allocator, its errors, and what it leaves behind: nothing."""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from imprint import Imprint
from torch import Tensor, nn

from memplan.abstract import preserved
from memplan.device import CpuDevice
from memplan.errors import BadLoss, CannotTrace, ModelError, ModelFailed, NothingToTrain
from memplan.fitting import training_step
from memplan.optimizers import OPTIMIZERS
from memplan.recipe import AFTER_FORWARD, AFTER_STEP, Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import CATEGORIES, Trace

KIB = 1024

MODELS: dict[str, Callable[[], tiny.Made]] = {
    "llama": partial(tiny.llama, layers=2),
    "gpt2": partial(tiny.gpt2, layers=2),
    "bert": partial(tiny.bert, layers=2),
    "vit": partial(tiny.vit, layers=2, rows=4),
    "resnet": tiny.resnet,
    "lora": partial(tiny.lora, layers=2),
}


def wide() -> tiny.Made:
    """Mostly activations, so that the peak is in the backward."""
    return tiny.plain(layers=2, rows=256, width=8)


def real_peak(model: nn.Module, sample: Sample, recipe: Recipe) -> int:
    """Bytes of the step that `Fit.measure` runs, by the CPU allocator's own record; of other tensors, none."""
    device = CpuDevice()
    with preserved(model):
        model.train()
        tensors = (*model.parameters(), *model.buffers())
        own = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        others = device.peak_of(lambda: None) - sum(own.values())
        micro = sample.map(torch.clone)
        with training_step(model, micro, recipe, device) as step:
            return device.peak_of(step) - others


def agree(model: nn.Module, batch: object, recipe: Recipe) -> Trace:
    """The recorded peak is the real one, and recording leaves the model as it was."""
    sample = Sample.of(batch)
    before = Imprint(model)
    trace = Recorder(model, recipe).record(sample)
    assert before.differences() == []
    measured = real_peak(model, sample, recipe)
    assert abs(trace.peak_bytes - measured) <= KIB, (trace.peak_bytes, measured)
    assert trace.how == "fake"
    return trace


# --- peaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "accumulation"), [*((name, 3) for name in MODELS), ("resnet", 1)])
def test_the_peak_of_a_step(name: str, accumulation: int) -> None:
    agree(*MODELS[name](), Recipe(accumulation=accumulation))


def test_accumulation() -> None:
    trace = agree(*wide(), Recipe(accumulation=2))
    assert trace.accumulation == 2
    assert trace.phase_of(trace.peak_tick) in ("loss", "backward")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str) -> None:
    agree(*tiny.plain(layers=2, width=32), Recipe(optimizer=optimizer))


@pytest.mark.parametrize("name", ["vit", "lora"])
def test_autocast(name: str) -> None:
    agree(*MODELS[name](), Recipe(autocast=torch.bfloat16))


def test_padding_masks() -> None:
    for make in (MODELS["llama"], MODELS["bert"]):
        model, batch = make()
        padded = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        full = Recorder(model, Recipe()).record(Sample.of(padded))
        padded["attention_mask"][0, 5:] = 0
        assert agree(model, padded, Recipe()).peak_bytes >= full.peak_bytes


def test_a_loss_of_ones_own() -> None:
    model, batch = wide()

    def loss(model: nn.Module, batch: tiny.Batch) -> Tensor:
        return model(**batch)["loss"].exp() + model.head.weight.square().sum()

    agree(model, batch, Recipe(loss=loss))


def test_samples_of_positional_arguments() -> None:
    model, batch = wide()
    agree(model, (batch["x"], batch["labels"]), Recipe())


@pytest.mark.parametrize("drops", [AFTER_STEP, AFTER_FORWARD])
@pytest.mark.parametrize("keeps_output", [False, True])
def test_a_loop_that_keeps_its_output_or_its_gradients(drops: str, keeps_output: bool) -> None:
    model, batch = MODELS["gpt2"]()
    device, optimizer, kept = CpuDevice(), torch.optim.AdamW(model.parameters()), list[object]()

    def step() -> None:
        output = model(**batch)
        loss = output.loss
        kept[:] = [output] if keeps_output else []
        del output
        if drops == AFTER_FORWARD:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if drops == AFTER_STEP:
            optimizer.zero_grad()

    tensors = (*model.parameters(), *model.buffers(), *batch.values())
    own = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    others = device.peak_of(lambda: None) - sum(own.values())
    measured = device.peak_of(step) - others
    kept.clear()
    trace = Recorder(model, Recipe(drops=drops, keeps_output=keeps_output)).record(Sample.of(batch))
    assert abs(trace.peak_bytes - measured) <= KIB, (trace.peak_bytes, measured)


def test_a_sample_of_one_tensor() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    agree(model, torch.randn(64, 8), Recipe(loss=lambda model, x: model(x).square().mean()))


@pytest.mark.parametrize("output", ["tensor", "tuple", "attribute", "dict"])
def test_where_a_loss_is_found(output: str) -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> object:
            loss = super().forward(x).mean()
            return {"tensor": loss, "tuple": (loss, x), "attribute": Output(loss), "dict": {"loss": loss}}[output]

    trace = Recorder(Model(4, 4), Recipe()).record(Sample.of(torch.randn(3, 4)))
    assert trace.how == "fake"


@pytest.mark.parametrize(
    ("kind", "steps"), [(torch.optim.AdamW, 1), (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 0)]
)
def test_a_live_optimizer(kind: Callable[..., torch.optim.Optimizer], steps: int) -> None:
    model, batch = tiny.plain(layers=2, width=32)
    optimizer = kind(model.parameters())
    for _ in range(steps):
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {key: dict(value) for key, value in optimizer.state.items()}
    values = [v.clone() for entry in state.values() for v in entry.values() if isinstance(v, Tensor)]
    trace = agree(model, batch, Recipe(optimizer=optimizer))
    size = sum(p.nbytes for p in model.parameters())
    assert trace.of_category(CATEGORIES.index("optimizer"))[0] >= size
    assert optimizer.state == state
    after = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(values, after, strict=True))


def test_gradients_that_are_there_do_not_count() -> None:
    model, batch = wide()
    expected = Recorder(model, Recipe()).record(Sample.of(batch)).peak_bytes
    model(**batch)["loss"].backward()
    assert agree(model, batch, Recipe()).peak_bytes == expected


def test_a_model_in_evaluation_is_recorded_in_training() -> None:
    model, batch = MODELS["gpt2"]()
    expected = Recorder(model, Recipe()).record(Sample.of(batch)).live
    assert np.array_equal(agree(model.eval(), batch, Recipe()).live, expected)


@pytest.mark.parametrize("name", ["resnet", "lora"])
def test_a_model_on_meta_has_the_same_trace(name: str) -> None:
    model, batch = MODELS[name]()
    here = Recorder(model, Recipe()).record(Sample.of(batch))
    model.to("meta")
    before = Imprint(model)
    there = Recorder(model, Recipe()).record(Sample.of(batch))
    assert before.differences() == []
    assert np.array_equal(here.live, there.live)
    assert here.steps == there.steps


def test_a_recorder_can_be_asked_again() -> None:
    model, batch = wide()
    recorder = Recorder(model, Recipe())
    sample = Sample.of(batch)
    first, small = recorder.record(sample), recorder.record(sample.resized(3))
    often = recorder.record(sample, accumulation=2)
    assert np.array_equal(first.live, recorder.record(sample).live)
    assert small.peak_bytes < first.peak_bytes < often.peak_bytes
    assert [trace.micro_batch for trace in (first, small, often)] == [256, 3, 256]
    assert [trace.accumulation for trace in (first, small, often)] == [1, 1, 2]


# --- errors -----------------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], match: str, model: nn.Module, batch: object, recipe: Recipe) -> Exception:
    before = Imprint(model)
    with pytest.raises(kind, match=match) as caught:
        Recorder(model, recipe).record(Sample.of(batch))
    assert before.differences() == []
    return caught.value


def test_nothing_to_train() -> None:
    model, batch = wide()
    model.requires_grad_(False)
    refused(NothingToTrain, "no parameter of Plain requires a gradient", model, batch, Recipe())


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda model, batch: {"loss": 1.0}, r"loss\(model, batch\) holds no loss \(found dict\)"),
        (lambda model, batch: model.head(batch["x"]), r"is no scalar but of shape \(256, 10\)"),
        (lambda model, batch: batch["x"].mean(), "does not depend on a trainable parameter"),
    ],
)
def test_losses_that_are_none(loss: Callable[[nn.Module, tiny.Batch], object], match: str) -> None:
    model, batch = wide()
    refused(BadLoss, match, model, batch, Recipe(loss=loss))


def test_an_output_without_a_loss() -> None:
    model, batch = MODELS["llama"]()
    del batch["labels"]
    error = refused(BadLoss, "the output of LlamaForCausalLM holds no loss", model, batch, Recipe())
    assert "labels" in str(error)


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a mistake")


def test_a_model_that_raises_is_named_with_its_module() -> None:
    model, batch = wide()
    model.blocks[1].dropout = Breaks()
    error = refused(ModelFailed, r"Plain raised KeyError in blocks\.1\.dropout: 'a mistake'", model, batch, Recipe())
    assert isinstance(error.__cause__, KeyError)
    assert isinstance(error, ModelError)


def test_a_sample_that_does_not_go() -> None:
    model, _ = wide()
    batch = {"x": torch.randn(4, 7), "labels": torch.zeros(4, dtype=torch.long)}
    error = refused(ModelFailed, r"Plain raised RuntimeError in blocks\.0\.wide", model, batch, Recipe())
    assert isinstance(error.__cause__, RuntimeError)


class Reads(nn.Module):
    """What runs is decided by a value that only a real forward has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.first(x)
        return (self.second(x) if x.sum() < 1e9 else x).mean()


def test_a_model_that_reads_values_is_run_for_real() -> None:
    model, x = Reads(), torch.randn(64, 8)
    before = Imprint(model)
    recipe = Recipe(accumulation=2)
    trace = Recorder(model, recipe).record(Sample.of(x))
    assert before.differences() == []
    assert trace.how == "recorded"
    assert abs(trace.peak_bytes - real_peak(model, Sample.of(x), recipe)) <= KIB


def test_on_meta_there_is_nothing_to_read() -> None:
    model = Reads().to("meta")
    error = refused(CannotTrace, "Reads asks for the value of a floating", model, torch.randn(2, 8), Recipe())
    assert error.__cause__ is not None


def test_warnings_of_the_model_are_its_own() -> None:
    model, batch = wide()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Recorder(model, Recipe()).record(Sample.of(batch))
    assert not caught
