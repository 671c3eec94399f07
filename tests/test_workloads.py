"""The benchmark workloads are what their descriptions say, and train.

Where an independently written copy of the same workloads lies next to the checkout, both are compared.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import steps
import torch
import workloads
from torch import nn

TWIN = Path(__file__).resolve().parents[2] / "shared" / "tools" / "workloads.py"

# peft asks for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Parameters as their authors give them; each is checked by hand below or known from the model's paper.
PARAMETERS = {"W1": 68_170_240, "W2": 124_439_808, "W3": 109_514_298, "W4": 86_567_656, "W5": 25_557_032}


@pytest.fixture(scope="module")
def twin() -> ModuleType:
    if not TWIN.exists():
        pytest.skip("there is no second copy of the workloads next to this checkout to compare with")
    spec = importlib.util.spec_from_file_location("twin_workloads", TWIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count(model: nn.Module, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def facts(model: nn.Module) -> dict[str, object]:
    """All that decides how much memory training takes, but for what the code of the modules does."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "tensors": [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors],
        "modules": [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        "dropout": [module.p for module in model.modules() if isinstance(module, nn.Dropout)],
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    model, _ = workloads.build(name)
    assert count(model) == PARAMETERS[name]
    assert model.training


def test_w1_is_the_llama_that_it_says() -> None:
    model, batch = workloads.build("W1")
    attention = 512 * 512 + 2 * 512 * 256 + 512 * 512  # 8 query heads of 64, 4 key/value heads
    per_layer = attention + 3 * 512 * 1408 + 2 * 512
    assert count(model) == 12 * per_layer + 2 * 32_000 * 512 + 512
    assert len(model.model.layers) == 12
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"input_ids": (4, 512), "labels": (4, 512)}
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()


def test_w2_has_active_dropout_and_tied_weights() -> None:
    model, _ = workloads.build("W2")
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_w5_couples_its_batch() -> None:
    model, batch = workloads.build("W5")
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert batch["pixel_values"].shape == (8, 3, 224, 224)


def test_w6_trains_adapters_only() -> None:
    model, _ = workloads.build("W6")
    widths = [(512, 512), (512, 256), (512, 256), (512, 512), (512, 1408), (512, 1408), (1408, 512)]
    assert count(model, trained_only=True) == 12 * 16 * sum(in_ + out for in_, out in widths)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_two_builds_are_equal() -> None:
    (first, batch), (second, same_batch) = workloads.build("W4"), workloads.build("W4")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(batch[key], same_batch[key]) for key in batch)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mistral-7b", 7.24),
        ("llama-3-8b", 8.03),
        ("qwen1.5-14b", 14.17),
        ("qwen3-14b", 14.77),
        ("llama-3-70b", 70.55),
        ("llama-3.1-405b", 405.85),
    ],
)
def test_big_models_have_their_published_size_and_no_memory(name: str, billions: float) -> None:
    default = torch.get_default_dtype()
    model = workloads.build_on_meta(name)
    assert count(model) / 1e9 == pytest.approx(billions, abs=0.006)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model.training
    assert torch.get_default_dtype() == default


@pytest.mark.parametrize("name", sorted(workloads.SMALL))
def test_same_as_the_twin(twin: ModuleType, name: str) -> None:
    assert sorted(twin.ALL) == sorted(workloads.SMALL)
    (ours, batch), (theirs, their_batch) = workloads.build(name), twin.build(name)
    assert facts(ours) == facts(theirs)
    assert list(batch) == list(their_batch)
    for key, value in batch.items():
        assert (value.shape, value.dtype) == (their_batch[key].shape, their_batch[key].dtype)


@pytest.mark.parametrize("name", sorted(workloads.BIG))
def test_big_same_as_the_twin(twin: ModuleType, name: str) -> None:
    assert sorted(twin.SPEC) == sorted(workloads.BIG)
    assert facts(workloads.build_on_meta(name)) == facts(twin.build_on_meta(name))


class OneWeight(nn.Module):
    """loss = weight * x, so that the gradient of one micro-batch is x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.seen: list[tuple[bool, torch.Tensor | None]] = []

    def forward(self, x: torch.Tensor) -> "OneWeight":
        grad = self.weight.grad
        self.seen.append((torch.is_autocast_enabled("cpu"), None if grad is None else grad.clone()))
        self.loss = self.weight * x
        return self


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_step_accumulates_the_mean_and_leaves_no_gradient(accumulation: int) -> None:
    model = OneWeight()
    steps.make_step(model, {"x": torch.tensor(3.0)}, optimizer="sgd-momentum", accumulation=accumulation)()
    assert len(model.seen) == accumulation
    assert model.weight.grad is None
    assert model.weight.item() == pytest.approx(1 - 1e-3 * 3.0)
    assert model.frozen.item() == 1.0


def test_step_runs_forward_under_autocast() -> None:
    model = OneWeight()
    steps.make_step(model, {"x": torch.tensor(3.0)}, autocast=torch.bfloat16)()
    assert [autocast for autocast, _ in model.seen] == [True]


def test_step_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="adamw, adamw-foreach-false, sgd-momentum"):
        steps.make_step(OneWeight(), {}, optimizer="lion")
    with pytest.raises(ValueError, match="at least 1"):
        steps.make_step(OneWeight(), {}, accumulation=0)


def test_optimizers_have_the_flags_of_their_names() -> None:
    model = OneWeight()
    plain, one_by_one = steps.make_optimizer(model, "adamw"), steps.make_optimizer(model, "adamw-foreach-false")
    assert plain.defaults["foreach"] is None
    assert one_by_one.defaults["foreach"] is False
    assert steps.make_optimizer(model, "sgd-momentum").defaults["momentum"] == 0.9
    assert [p is model.weight for group in plain.param_groups for p in group["params"]] == [True]
