from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import tiny
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.optim import Optimizer

import memplan
from memplan.errors import BadOptimizer
from memplan.optimizers import OPTIMIZERS, Adam8bit, build, name_of

REAL: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adam-foreach": lambda params: torch.optim.Adam(params, foreach=True),
    "adam-fused": lambda params: torch.optim.Adam(params, fused=True),
    "adamw": torch.optim.AdamW,
    "adamw-foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, fused=True),
    "adamw-single": lambda params: torch.optim.AdamW(params, foreach=False),
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
}


def parameters() -> list[Parameter]:
    """Of 5000 elements, of 6 and of one dimension, each with a gradient."""
    made = [Parameter(torch.ones(50, 100)), Parameter(torch.ones(2, 3)), Parameter(torch.ones(7))]
    for parameter in made:
        parameter.grad = torch.full_like(parameter, 0.5)
    return made


def copies_of(params: list[Parameter]) -> dict[int, Parameter]:
    made = {id(parameter): Parameter(torch.zeros_like(parameter)) for parameter in params}
    for copy in made.values():
        copy.grad = torch.ones_like(copy)
    return made


def state_of(optimizer: Optimizer) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    """What each parameter's state looks like, in the order of the parameters."""
    return [
        {
            name: (value.shape, value.dtype)
            for name, value in optimizer.state[parameter].items()
            if torch.is_tensor(value)
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


@pytest.mark.parametrize("name", REAL)
def test_a_name_allocates_what_the_real_optimizer_does(name: str) -> None:
    named, real = build(name, parameters()), REAL[name](parameters())
    assert type(named) is type(real)
    for optimizer in (named, real):
        optimizer.step()
    assert state_of(named) == state_of(real)
    flags = [{key: group.get(key) for key in ("foreach", "fused", "momentum")} for group in named.param_groups]
    assert flags == [{key: group.get(key) for key in ("foreach", "fused", "momentum")} for group in real.param_groups]


def test_every_name_is_compared_with_a_real_one() -> None:
    assert set(REAL) | {"adam8bit", "paged-adamw8bit"} == set(OPTIMIZERS)
    assert list(OPTIMIZERS) == sorted(OPTIMIZERS)


def test_adam8bit_allocates_bytes_blocks_and_maps() -> None:
    params = parameters()
    optimizer = build("adam8bit", params)
    optimizer.step()
    large, small = optimizer.state[params[0]], optimizer.state[params[1]]
    assert {name: (value.numel(), value.dtype) for name, value in large.items()} == {
        "state1": (5000, torch.uint8),
        "state2": (5000, torch.uint8),
        "absmax1": (20, torch.float32),
        "absmax2": (20, torch.float32),
        "qmap1": (256, torch.float32),
        "qmap2": (256, torch.float32),
    }
    assert {name: (value.numel(), value.dtype) for name, value in small.items()} == {
        "state1": (6, torch.float32),
        "state2": (6, torch.float32),
    }
    assert all(bool((parameter == 1).all()) for parameter in params)


def test_adam8bit_shares_its_maps_and_skips_what_has_no_gradient() -> None:
    params = [Parameter(torch.ones(4096)) for _ in range(3)]
    for parameter in params[:2]:
        parameter.grad = torch.ones(4096)
    optimizer = Adam8bit(params)
    assert optimizer.step(lambda: 1.5) == 1.5
    assert len(optimizer.state) == 2
    assert optimizer.state[params[0]]["qmap1"] is optimizer.state[params[1]]["qmap1"]


def test_foreach_is_taken_where_the_name_leaves_it_open() -> None:
    assert build("adamw", parameters(), foreach=True).param_groups[0]["foreach"] is True
    assert build("adamw-single", parameters(), foreach=True).param_groups[0]["foreach"] is False
    assert build("adamw-foreach", parameters(), foreach=False).param_groups[0]["foreach"] is True
    assert build("adamw-fused", parameters(), foreach=True).param_groups[0]["foreach"] is None


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adafactor"}))  # which reads norms of its parameters
def test_a_name_is_stepped_without_memory(name: str) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        params = [Parameter(mode.from_tensor(parameter)) for parameter in parameters()]
        optimizer = build(name, params, foreach=True)
        for _ in range(2):
            for parameter in params:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()


@pytest.mark.parametrize(
    ("name", "nearest"), [("adamv", "adam"), ("adamw-fuse", "adamw-fused"), ("sgd-momentun", "sgd-momentum")]
)
def test_an_unknown_name_gives_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(BadOptimizer, match=f"no optimizer is called '{name}'; did you mean '{nearest}'\\?"):
        build(name, parameters())


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(BadOptimizer, match="The names are adafactor, adagrad"):
        build("zzzz", parameters())
    with pytest.raises(BadOptimizer, match="no optimizer is called"):
        name_of("zzzz")


def test_spelling_is_forgiven() -> None:
    assert name_of(" AdamW_Fused ") == "adamw-fused"
    assert build("SGD", parameters()).defaults["momentum"] == 0


@pytest.mark.parametrize("optimizer", [None, 3, torch.optim.AdamW])
def test_other_things_are_no_optimizers(optimizer: Any) -> None:
    with pytest.raises(BadOptimizer, match=r"a torch\.optim\.Optimizer, got"):
        build(optimizer, parameters())
    with pytest.raises(BadOptimizer, match=r"a torch\.optim\.Optimizer, got"):
        name_of(optimizer)


class TestLive:
    def test_groups_flags_and_state_are_copied(self) -> None:
        params = parameters()
        groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "weight_decay": 0.3}]
        live = torch.optim.AdamW(groups, lr=0.2, foreach=True, amsgrad=True)
        live.step()
        replacement = copies_of(params)
        copy = build(live, [], replacement)
        assert type(copy) is torch.optim.AdamW
        assert [group["lr"] for group in copy.param_groups] == [0.1, 0.2]
        assert [group["weight_decay"] for group in copy.param_groups] == [0.01, 0.3]
        assert all(group["foreach"] and group["amsgrad"] for group in copy.param_groups)
        assert copy.defaults == live.defaults
        assert [id(p) for g in copy.param_groups for p in g["params"]] == [id(replacement[id(p)]) for p in params]
        assert state_of(copy) == state_of(live)
        assert set(state_of(copy)[0]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_stepping_the_copy_leaves_the_original(self, name: str) -> None:
        params = parameters()
        live = build(name, params)
        live.step()
        values = [parameter.detach().clone() for parameter in params]
        state = {id(p): {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for p, s in live.state.items()}
        before = {key: value for key, value in live.param_groups[0].items() if key != "params"}
        copy = build(live, [], copies_of(params))
        copy.step()
        copy.param_groups[0]["lr"] = 7.0
        assert all(torch.equal(old, new) for old, new in zip(values, params, strict=True))
        assert {key: value for key, value in live.param_groups[0].items() if key != "params"} == before
        assert [id(parameter) for parameter in live.param_groups[0]["params"]] == [
            id(parameter) for parameter in params
        ]
        for parameter, tensors in live.state.items():
            for key, tensor in state[id(parameter)].items():
                assert torch.equal(tensors[key], tensor)

    def test_a_fresh_one_stays_without_state(self) -> None:
        params = parameters()
        live = torch.optim.Adam(params)
        copy = build(live, [], copies_of(params))
        copy.step()
        assert len(copy.state) == 3
        assert not live.state

    def test_stand_ins_are_made_once_for_a_shared_tensor(self) -> None:
        params = [Parameter(torch.ones(4096)) for _ in range(2)]
        for parameter in params:
            parameter.grad = torch.ones(4096)
        live = Adam8bit(params)
        live.step()
        seen: list[torch.Tensor] = []

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            seen.append(tensor)
            return torch.empty_like(tensor, device="meta")

        copy = build(live, [], copies_of(params), stand_in)
        assert isinstance(copy, Adam8bit)
        assert len(seen) == len({id(tensor) for tensor in seen}) == 2 * 4 + 2
        first, second = copy.state.values()
        assert first["qmap1"] is second["qmap1"] is copy.maps["qmap1"]
        assert first["qmap1"].is_meta

    def test_hooks_and_patched_methods_stay_behind(self) -> None:
        params = parameters()
        live = torch.optim.SGD(params, lr=0.1)
        calls: list[str] = []
        live.register_step_pre_hook(lambda *_: calls.append("hook"))
        scheduler = torch.optim.lr_scheduler.LambdaLR(live, lambda _: 1.0)  # it patches step
        live.zero_grad = lambda *_: calls.append("patch")  # type: ignore[method-assign]
        assert "step" in vars(live)
        copy = build(live, [], copies_of(params))
        copy.step()
        copy.zero_grad()
        assert calls == []
        assert {"step", "zero_grad"} <= set(vars(live))
        live.step()
        scheduler.step()
        assert calls == ["hook"]

    def test_attributes_of_other_classes_are_kept(self) -> None:
        params = parameters()
        live = torch.optim.LBFGS(params, history_size=3)
        replacement = copies_of(params)
        copy = build(live, [], replacement)
        assert [id(p) for p in vars(copy)["_params"]] == [id(p) for p in replacement.values()]
        copy.step(lambda: sum(p.sum() for p in replacement.values()).detach())
        assert all(bool((parameter == 1).all()) for parameter in params)

    def test_accelerate_s_wrapper_is_seen_through(self) -> None:
        model = nn.Linear(2, 2)
        live = torch.optim.AdamW(model.parameters(), lr=0.5)
        wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(live)
        assert type(wrapped) is not torch.optim.AdamW
        copy = build(wrapped, [], copies_of(list(model.parameters())))
        assert type(copy) is torch.optim.AdamW
        assert copy.param_groups[0]["lr"] == 0.5
        assert name_of(wrapped) == name_of(live) == "AdamW"

    def test_foreach_is_decided_only_where_it_is_open(self) -> None:
        params = parameters()
        groups = [
            {"params": params[:1]},
            {"params": params[1:2], "foreach": False},
            {"params": params[2:], "fused": True},
        ]
        live = torch.optim.AdamW(groups)
        copy = build(live, [], copies_of(params), foreach=True)
        assert [group["foreach"] for group in copy.param_groups] == [True, False, None]
        assert live.param_groups[0]["foreach"] is None

    def test_parameters_of_another_model_are_counted(self) -> None:
        params = parameters()
        live = torch.optim.AdamW([*params, Parameter(torch.ones(2))])
        with pytest.raises(BadOptimizer, match="1 of the 4 parameters of this AdamW are not parameters of the model"):
            build(live, [], copies_of(params))
        with pytest.raises(BadOptimizer, match="4 of the 4"):
            build(live, [])


@pytest.mark.parametrize("flags", [{"capturable": True}, {"lr": torch.tensor(1e-3)}, {"differentiable": True}])
@pytest.mark.parametrize("gpu", ["cpu", "rtx-4090"])
def test_flags_that_torch_allows_on_some_devices_only_do_not_stand_in_the_way(flags: dict[str, Any], gpu: str) -> None:
    model, batch = tiny.plain()
    usual = torch.optim.AdamW(model.parameters())
    odd = torch.optim.AdamW(model.parameters(), **flags)
    found = memplan.predict(model, batch, optimizer=odd, gpu=gpu)
    counters = (
        512 * sum(1 for _ in model.parameters()) if flags.get("capturable") and gpu != "cpu" else 0
    )  # on the card
    assert found.peak_bytes - counters == memplan.predict(model, batch, optimizer=usual, gpu=gpu).peak_bytes
    assert all(odd.param_groups[0][name] is value for name, value in flags.items())
