"""Measured times: the model is as before, and what a plan needs is there. No figure is asserted: clocks lie."""

from collections import UserDict
from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from imprint import Imprint
from torch import Tensor, nn

import memplan
from memplan import levers
from memplan.blocks import find_blocks
from memplan.device import CpuDevice
from memplan.errors import ModelFailed
from memplan.gpus import find_gpu
from memplan.kernels import backend_for
from memplan.menu import Menu
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.roofline import StepTimes, estimated
from memplan.samples import Sample
from memplan.study import Study
from memplan.timing import cpu_rates, measured


def guess(model: nn.Module, sizes: tuple[int, ...] = (2,)) -> StepTimes:
    """An estimate by which recomputing costs a third more."""
    seconds = {"keep": 3.0, "recompute": 4.0}
    blocks = {(path, o): dict.fromkeys(sizes, s) for path in find_blocks(model) for o, s in seconds.items()}
    return StepTimes(blocks, {"keep": dict.fromkeys(sizes, 1.0)}, optimizer_s=1.0)


def time_it(
    model: nn.Module, batch: tiny.Batch, sizes: tuple[int, ...] = (2,), autocast: torch.dtype | None = None
) -> StepTimes:
    recipe = Recipe(autocast=autocast)
    samples = [Sample.of(batch).resized(size) for size in sizes]
    menu = Menu(dict.fromkeys(find_blocks(model), levers.OPTIONS), {})
    return measured(model, recipe, samples, CpuDevice(), menu, {}, guess(model, sizes))


def study_at(model: nn.Module, batch: object, size: int) -> Study:
    recorder = Recorder(model, Recipe(), backend_for(find_gpu("cpu")))
    return Study(model, Sample.of(batch), Recipe(), recorder, find_gpu("cpu"), CpuDevice(), (size,), 1)


MODELS: dict[str, Callable[[], tiny.Made]] = {
    "llama": partial(tiny.llama, layers=2),  # with a cache, that would grow with every run
    "gpt2": partial(tiny.gpt2, layers=2),  # and as a positional argument
    "t5": tiny.t5,
    "resnet": tiny.resnet,
    "lora": partial(tiny.lora, layers=2),
    "plain": tiny.plain,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_block_and_option_has_a_time_and_the_model_is_as_before(name: str) -> None:
    model, batch = MODELS[name]()
    model(**batch)["loss"].backward()
    model.eval()
    before = Imprint(model)
    times = time_it(model, batch)
    assert before.differences() == []
    assert times.how == "measured"
    for path in find_blocks(model):
        keep, recompute = (times.block_s(path, option, 2) for option in levers.OPTIONS)
        assert 0 < keep < recompute
    assert times.rest_s(2, "keep") > 0
    assert times.optimizer_s > 0


def test_one_of_a_run_of_alike_blocks_stands_for_all() -> None:
    model, batch = tiny.llama(layers=9)
    times = time_it(model, batch)
    assert len({times.block_s(path, "keep", 2) for path in find_blocks(model)}) == 1


def test_the_rest_is_scaled_as_the_blocks_are() -> None:
    model, batch = tiny.plain()
    times = time_it(model, batch)
    scale = sum(times.block_s(path, "keep", 2) for path in find_blocks(model)) / (3.0 * 4)
    assert times.rest_s(2, "keep") == pytest.approx(scale)
    assert times.optimizer_s == pytest.approx(scale)


def test_with_a_head_the_rest_is_run_in_both_ways_and_other_micro_batches_follow_it() -> None:
    model, batch = tiny.llama()
    sizes = (2, 4)
    studies = [study_at(model, batch, size) for size in sizes]
    found = {size: study.levels(size) for size, study in zip(sizes, studies, strict=True)}
    study = studies[0]
    estimate = estimated(found, cpu_rates())
    (option,) = study.head.values()
    samples = [Sample.of(batch).resized(size) for size in sizes]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    times = measured(model, Recipe(), samples, CpuDevice(), study.menu, study.head, estimate)
    for variant in ("keep", option):
        factor = times.rest_s(2, variant) / estimate.rest_s(2, variant)
        assert times.rest_s(4, variant) == pytest.approx(factor * estimate.rest_s(4, variant))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "forward" not in model.get_submodule(next(iter(study.head))).__dict__


def test_more_work_is_never_faster_at_any_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the clock says so: keep 1 s then 9 s, recompute 2 s then 3 s."""
    model, batch = tiny.plain(layers=2)
    readings = iter([{"keep": 1.0, "recompute": 2.0}, {"keep": 9.0, "recompute": 3.0}])
    monkeypatch.setattr("memplan.timing._Clock._block", lambda *_: next(readings))
    times = time_it(model, batch, sizes=(2, 4))
    for micro_batch in (1, 2, 3, 4, 64):
        keep, recompute = (times.block_s("blocks.0", option, micro_batch) for option in levers.OPTIONS)
        assert recompute >= keep * 7 / 6 - 1e-9  # half of the third that the estimate has


def test_blocks_are_timed_under_autocast() -> None:
    model, batch = tiny.plain()
    seen: set[bool] = set()
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    time_it(model, batch, autocast=torch.bfloat16)
    assert seen == {True}


def test_the_head_is_not_run() -> None:
    model, batch = tiny.plain()
    ran: list[str] = []
    model.head.register_forward_pre_hook(lambda *_: ran.append("head"))
    time_it(model, batch)
    assert ran == []


def test_an_error_of_the_model_leaves_it_as_it_was() -> None:
    model, batch = tiny.plain()

    def fail(*_: object) -> Tensor:
        raise ArithmeticError("no")

    model.blocks[2].narrow.forward = fail
    before = Imprint(model)
    with pytest.raises(ModelFailed, match=r"Plain can be traced, but raised ArithmeticError .* at micro-batch 2: no"):
        time_it(model, batch)
    assert before.differences() == []


def test_the_processor_has_rates() -> None:
    rates = cpu_rates()
    assert rates.flops["other"] > 0
    assert rates.bytes > 0


class Masked(nn.Module):
    """Blocks that get a mask in a dict of the model's own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, inputs: Tensor, given: UserDict[str, Tensor]) -> Tensor:
            return inputs + self.inner(inputs) * given["mask"]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.given = UserDict(mask=torch.ones(8))

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs, self.given)
        return inputs.mean()


def test_a_dict_of_the_model_s_own_stays_as_it_is() -> None:
    model = Masked()
    asked = {"sample": torch.randn(4, 8), "effective_batch": 4, "loss": lambda model, batch: model(batch)}
    plan = memplan.plan(model, "cpu:64MiB", strategy="recompute-only", **asked)
    assert plan.times == "measured"
    assert list(model.given) == ["mask"]


def test_a_model_that_checkpoints_its_blocks_itself_has_parts_to_drop() -> None:
    """Checkpointing left on, as `prepare_model_for_kbit_training` leaves it, hides what a block saves."""
    model, batch = tiny.llama(layers=2, use_cache=False)
    model.gradient_checkpointing_enable()
    study = study_at(model, batch, 2)
    assert study.can_time
    assert study.menu.selections
    assert model.model.layers[0].gradient_checkpointing


class Unseen(nn.Module):
    """Adds what a kernel that is not torch's has written, which nobody sees: made again it is zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        unseen = torch.zeros(16)
        unseen.numpy()[:] = 7
        return x + self.last(torch.nn.functional.gelu(self.norm(x)) * (unseen + 1))


def test_what_comes_out_differently_when_it_is_made_again_is_not_offered_and_said() -> None:
    model = nn.Sequential(*(Unseen() for _ in range(4)), nn.Linear(16, 1))
    study = Study(
        model,
        Sample.of(torch.randn(64, 16)),
        recipe := Recipe(loss=lambda model, batch: model(batch).sum()),
        Recorder(model, recipe, backend_for(find_gpu("cpu"))),
        find_gpu("cpu"),
        CpuDevice(),
        (64,),
        1,
    )
    assert study.menu.selections
    names = {name for selection in study.menu.selections.values() for name in selection.dropped}
    assert "mul" in names
    assert "add" not in names
    (said,) = (line for line in study.refusals if "come out differently" in line)
    assert said.startswith("1 of the values that 0 saves are held")
    assert said.endswith(": add")
