"""The lever `stepping`: weights as by the plain loop, less memory, and no trace after it was undone."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from memplan.device import CpuDevice
from memplan.errors import NoStepInBackward, UsageError
from memplan.levers.stepping import alternatives, install, refusal
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample

Maker = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "adamw": torch.optim.AdamW,
    "adamw-foreach": partial(torch.optim.AdamW, foreach=True, amsgrad=True),
    "adamw-single": partial(torch.optim.AdamW, foreach=False, maximize=True),
    "adamw-fused": partial(torch.optim.AdamW, fused=True),
    "sgd-momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}


def trained(model: nn.Module, optimizer: Optimizer, batch: tiny.Batch, steps: int = 3) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        sum_of = model(**batch)["loss"]
        sum_of.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [partial(tiny.plain, layers=2), partial(tiny.gpt2, layers=2)], ids=["plain", "tied"])
def test_weights_and_state_are_the_same_to_the_bit(name: str, make: Callable[[], tiny.Made]) -> None:
    (one, batch), (other, _) = make(), make()
    plain, early = (OPTIMIZERS[name](list(model.parameters())) for model in (one, other))
    trained(one, plain, batch)
    install(other, early)
    trained(other, early, batch)
    assert same(one, other)
    a, b = plain.state_dict(), early.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, entries in a["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b["state"][key][k])) for k, v in entries.items())


def test_groups_schedulers_and_hooks() -> None:
    ends = []
    for early in (False, True):
        model, batch = tiny.plain(layers=2)
        head, rest = list(model.head.parameters()), list(model.blocks.parameters())
        optimizer = torch.optim.AdamW([{"params": rest, "lr": 0.1}, {"params": head, "weight_decay": 0.5}])
        scheduler, calls = StepLR(optimizer, 1, 0.5), []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        if early:
            install(model, optimizer)
        for _ in range(3):
            trained(model, optimizer, batch, 1)
            scheduler.step()
        assert calls == ["before", "after"] * 3
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
        ends.append(model)
    assert same(*ends)


def test_undo_leaves_no_trace() -> None:
    model, batch = tiny.plain(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    before = {name: copy.copy(value) for name, value in vars(optimizer).items()}
    for stepping in ("in-backward", "single", "plain"):
        install(model, optimizer, stepping)()
        assert {n: v for n, v in vars(optimizer).items() if n != "param_groups"} == {
            n: v for n, v in before.items() if n != "param_groups"
        }
        assert optimizer.param_groups[0]["foreach"] is True
        assert all(p._post_accumulate_grad_hooks is None for p in model.parameters())
    model(**batch)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_peak_falls_as_predicted() -> None:
    peaks = {}
    for stepping in ("plain", "in-backward"):
        model, batch = tiny.plain(layers=6, rows=4, width=64)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        trace = Recorder(model, Recipe(optimizer=optimizer, stepping=stepping)).record(Sample.of(batch))
        install(model, optimizer, stepping)
        device, held = CpuDevice(), (*model.parameters(), *model.buffers(), *batch.values())
        others = device.peak_of(lambda: None) - sum(t.nbytes for t in held)
        measured = device.peak_of(partial(trained, model, optimizer, batch, 1)) - others
        assert abs(trace.peak_bytes - measured) <= 1024, (stepping, trace.peak_bytes, measured)
        peaks[stepping] = measured
    size = sum(p.nbytes for p in model.parameters())
    assert peaks["in-backward"] < peaks["plain"] - size // 2


def test_several_micro_steps_are_refused() -> None:
    model, batch = tiny.plain(layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(NoStepInBackward, match="4 micro-steps"):
        install(model, optimizer, accumulation=4)
    with pytest.raises(NoStepInBackward, match="2 micro-steps"):
        Recorder(model, Recipe(stepping="in-backward")).record(Sample.of(batch), accumulation=2)
    with pytest.raises(UsageError, match="one of plain, single, in-backward"):
        install(model, optimizer, "early")


def test_a_second_backward_before_the_step_is_an_error() -> None:
    model, batch = tiny.plain(layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    install(model, optimizer)
    model(**batch)["loss"].backward()
    loss = model(**batch)["loss"]
    with pytest.raises(NoStepInBackward, match=r"second gradient before optimizer\.step"):
        loss.backward()


def test_gradients_that_are_there_are_refused() -> None:
    model, batch = tiny.plain(layers=2)
    model(**batch)["loss"].backward()
    with pytest.raises(NoStepInBackward, match="hold a gradient already"):
        install(model, torch.optim.AdamW(model.parameters()))


class ByTheLargest(torch.optim.SGD):
    """Scales by the largest gradient of all parameters."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        largest = max((p.grad.abs().max() for p in params), default=1)
        for p in params:
            p.sub_(p.grad / largest)


@pytest.mark.parametrize("kind", [partial(ByTheLargest, lr=0.1), torch.optim.LBFGS])
def test_optimizers_that_look_at_several_parameters_are_refused(kind: Maker) -> None:
    model, _ = tiny.plain(layers=2)
    optimizer = kind(list(model.parameters()))
    weights = copy.deepcopy(model)
    with pytest.raises(NoStepInBackward, match=r"one by one|stepped alone"):
        install(model, optimizer)
    assert same(model, weights)
    assert not optimizer.state


def test_clipping_finds_nothing_and_harms_nothing() -> None:
    model, batch = tiny.plain(layers=2)
    install(model, torch.optim.AdamW(model.parameters()))
    model(**batch)["loss"].backward()
    assert clip_grad_norm_(model.parameters(), 1.0) == 0


def test_a_scaler_says_that_it_found_nothing() -> None:
    model, batch = tiny.plain(layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    install(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch)["loss"]).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_alternatives() -> None:
    def names(optimizer: str | Optimizer, accumulation: int = 1, foreach: bool | None = None) -> list[str]:
        found = alternatives(Recipe(optimizer=optimizer), accumulation, foreach)
        assert all(one.recipe.stepping == one.name for one in found)
        return [one.name for one in found]

    assert names("adamw") == ["plain", "in-backward"]
    assert names("adamw", foreach=True) == ["plain", "single", "in-backward"]
    assert names("adamw-foreach", 4) == ["plain", "single"]
    assert names("adamw-fused", foreach=True) == ["plain", "in-backward"]
    assert names("adam8bit", foreach=True) == ["plain", "in-backward"]
    model, _ = tiny.plain(layers=2)
    assert names(torch.optim.AdamW(model.parameters(), foreach=True)) == ["plain", "single", "in-backward"]
    assert names(torch.optim.LBFGS(model.parameters())) == ["plain"]
    assert refusal(Recipe(optimizer=torch.optim.Adagrad(model.parameters())), 1) is None
    for recipe, why in (
        (Recipe(clips=True), "the norm of all of them"),
        (Recipe(replicas=2), "2 replicas"),
        (Recipe(autocast=torch.float16), "a GradScaler scales them back only after the backward"),
    ):
        assert [one.name for one in alternatives(recipe, 1, True)] == ["plain", "single"]
        assert why in str(refusal(recipe, 1))


def test_a_checkpoint_that_is_loaded_or_saved_is_the_users_own() -> None:
    model, batch = tiny.plain(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    trained(model, optimizer, batch, 1)
    before = copy.deepcopy(optimizer.state_dict())
    undo = install(model, optimizer, "single")
    optimizer.load_state_dict(before)
    assert [group["foreach"] for group in optimizer.param_groups] == [False]
    assert [group["foreach"] for group in optimizer.state_dict()["param_groups"]] == [True]
    undo()
    assert [group["foreach"] for group in optimizer.param_groups] == [True]
    optimizer.load_state_dict(before)
    assert [group["foreach"] for group in optimizer.param_groups] == [True]
    assert not optimizer._optimizer_state_dict_post_hooks
