"""A block that does something else than when it was captured: captured anew or held, and never silently wrong."""

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from selecting import Block, capture, dropped_names, gradients, holding, install, made, rows, same, usual
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from memplan import levers
from memplan.blocks import find_blocks
from memplan.errors import PlanNotFollowed
from memplan.levers import select
from memplan.levers.select import capturing

from_then_on = pytest.mark.filterwarnings("ignore::memplan.errors.PlanNotFollowed")


def scaled(block: Block, x: Tensor, factor: float = 2.0) -> Tensor:
    return block.last(torch.relu(block.first(x) * factor) * block.first(x))


def given_a_function(block: Block, x: Tensor, act: Callable[[Tensor], Tensor] = functional.silu) -> Tensor:
    return block.last(act(block.first(x)))


def set_dropout(block: Block) -> None:
    block.dropout.p = 0.5


def freeze(block: Block) -> None:
    block.norm.weight.requires_grad_(False)
    block.first.requires_grad_(False)


def other_function(block: Block) -> None:
    block.act = nn.SiLU()


def other_parameter(block: Block) -> None:
    block.norm.weight = nn.Parameter(torch.full((8,), 3.0))


def moved_parameter(block: Block) -> None:
    """Into a flat buffer, as sharding does it."""
    flat = torch.randn(80)
    flat[16:24] = block.norm.weight.data
    block.norm.weight.data = flat[16:24]


def hooked(block: Block) -> None:
    block.norm.register_forward_hook(lambda module, args, output: output * 2)


def norm_in_evaluation(block: Block) -> None:
    block.dropout.eval()


@from_then_on
@pytest.mark.parametrize(
    "change",
    [set_dropout, freeze, other_function, other_parameter, moved_parameter, hooked, norm_in_evaluation],
)
def test_a_change_between_steps_is_followed(change: Callable[[Block], None]) -> None:
    block, x = made(), rows()
    undo = install(block, x)
    for _ in range(2):
        gradients(block, x)
    change(block)
    found = [gradients(block, x) for _ in range(2)]
    assert holding(block)
    undo()
    wanted = gradients(block, x)
    assert all(same(again, wanted) for again in found)


@from_then_on
@pytest.mark.parametrize(
    ("function", "first", "second"),
    [
        (scaled, {"factor": 2.0}, {"factor": 3.0}),
        (given_a_function, {"act": functional.silu}, {"act": functional.mish}),
        (given_a_function, {"act": torch.tanh}, {"act": torch.sigmoid}),
    ],
)
def test_other_arguments_are_another_kind_of_call(
    function: Callable[..., Tensor], first: dict[str, object], second: dict[str, object]
) -> None:
    block, x = made(function), rows()
    wanted = [gradients(block, x, **kwargs) for kwargs in (first, second)]
    install(block, x, **first)
    for _ in range(2):
        assert same(gradients(block, x, **first), wanted[0])
        assert same(gradients(block, x, **second), wanted[1])


def by_settings(block: Block, x: Tensor) -> Tensor:
    factor = block.scaling["one"] * block.bounds[0][1] * len(block.active) * float(block.rate)
    return block.last(torch.relu(block.first(x) * factor))


def set_in_place(block: Block) -> None:
    block.scaling["one"] = 3.0


def set_inside(block: Block) -> None:
    block.bounds[0] = (0.0, 3.0)


def added(block: Block) -> None:
    block.active.add("two")


def of_numpy(block: Block) -> None:
    block.rate = np.float64(3.0)


@from_then_on
@pytest.mark.parametrize("change", [set_in_place, set_inside, added, of_numpy])
def test_settings_in_containers_and_of_numpy_are_seen(change: Callable[[Block], None]) -> None:
    """As PEFT keeps the scale of each adapter in a dict."""
    block, x = made(by_settings), rows()
    block.scaling, block.bounds, block.active = {"one": 2.0, "other": object()}, [(0.0, 1.0)], {"one"}
    block.rate = np.float64(1.0)
    undo = install(block, x)
    for _ in range(2):
        gradients(block, x)
    kinds = len(block.forward._known)
    assert kinds == 1
    change(block)
    found = [gradients(block, x) for _ in range(2)]
    assert holding(block)
    assert len(block.forward._known) == kinds + 1
    undo()
    wanted = gradients(block, x)
    assert all(same(again, wanted) for again in found)


def test_a_block_that_is_another_one_in_every_step_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(select, "_OFTEN", 3)
    block = made()
    block.seen = {"steps": 0}
    install(block, rows())
    for step in range(5):
        block.seen["steps"] = step
        gradients(block, rows())
    assert len(caplog.records) == 1
    assert "b is captured anew in every forward" in caplog.text


def test_the_kinds_of_call_that_were_seen_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_MOST_KINDS", 2)
    block = made()
    install(block, rows())
    for count in (4, 5, 4, 6):
        gradients(block, rows(count=count))
    captured = []
    monkeypatch.setattr(select, "capturing", lambda *args: captured.append(args) or capturing(*args))
    gradients(block, rows(count=4))
    assert not captured
    gradients(block, rows(count=5))
    assert len(captured) == 1


def by_sign(block: Block, x: Tensor) -> Tensor:
    h = block.norm(block.first(x))
    return block.last(functional.silu(h) if h.sum() > x.sum() else functional.gelu(h))


def by_sign_and_factor(block: Block, x: Tensor) -> Tensor:
    h = block.norm(block.first(x))
    return block.last(torch.relu(h * (2 if x.sum().item() > 0 else 3)))


@from_then_on
@pytest.mark.parametrize("function", [by_sign, by_sign_and_factor])
def test_a_branch_on_data_is_not_run_again(function: Callable[..., Tensor]) -> None:
    """What comes before it still is."""
    block = made(function)
    inputs = [rows(n) for n in range(6)]
    assert len({bool(x.sum() > 0) for x in inputs}) == 2
    wanted = [gradients(block, x) for x in inputs]
    install(block, inputs[0])
    for x, plain in zip(inputs, wanted, strict=True):
        assert same(gradients(block, x), plain)
    gradients(block, inputs[0])
    assert holding(block)


def test_another_operator_at_the_same_shapes_is_noticed() -> None:
    """By something that the lever does not look at."""
    acts = [torch.relu]
    block, x = made(lambda block, x: block.last(acts[-1](block.first(x)))), rows()
    install(block, x)
    gradients(block, x)
    acts.append(torch.tanh)
    with pytest.warns(PlanNotFollowed, match="saves other tensors than in its last forward"):
        found = gradients(block, x)
    with pytest.warns(PlanNotFollowed, match="has no relu to be dropped"):
        again = gradients(block, x)
    del block.__dict__["forward"]
    wanted = gradients(block, x)
    assert same(found, wanted)
    assert same(again, wanted)


def test_experts_that_are_chosen_anew_stay_right() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).train()
    batches = [torch.randint(96, (2, 9)) for _ in range(3)]

    def step(ids: Tensor) -> list[Tensor | None]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    wanted = [step(ids) for ids in batches]
    found: dict[str, select.Captured] = {}
    with select.watched(model, find_blocks(model), found):
        model(input_ids=batches[0])
    dropped = {p: tuple(c.graph.values[v].name for v in c.graph.droppable) for p, c in found.items()}
    assert all(dropped.values())
    with levers.decided(model, {path: path for path in dropped}, dropped):
        assert all(same(step(ids), plain) for ids, plain in zip(batches, wanted, strict=True))


# --- others who use the same hooks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [nullcontext, save_on_cpu, lambda: saved_tensors_hooks(torch.clone, torch.clone)])
def test_hooks_of_somebody_outside(outer: Callable[..., object]) -> None:
    block, x = made(), rows()
    plain = gradients(block, x)
    install(block, x)
    for _ in range(2):
        with outer():
            assert same(gradients(block, x), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_of_somebody_outside(reentrant: bool) -> None:
    block, x = made(), rows()
    outer = Block(lambda outer, x: checkpoint(block, x, use_reentrant=reentrant).sin())
    plain = [*gradients(outer, x), *(parameter.grad for parameter in block.parameters())]
    install(block, x)
    for _ in range(2):
        block.zero_grad()
        assert same([*gradients(outer, x), *(parameter.grad for parameter in block.parameters())], plain)


# --- errors ---------------------------------------------------------------------------------------------------------


class Trouble(Exception):
    pass


def test_an_exception_in_the_forward_passes_through() -> None:
    is_broken = [False]

    def function(block: Block, x: Tensor) -> Tensor:
        out = usual(block, x)
        if is_broken[0]:
            raise Trouble
        return out

    block, x = made(function), rows()
    plain = gradients(block, x)
    install(block, x)
    for _ in range(2):  # when it is captured, and later
        is_broken[0] = True
        with pytest.raises(Trouble):
            block(x)
        is_broken[0] = False
        assert same(gradients(block, x), plain)


def test_an_exception_in_a_rerun_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made(), rows()
    plain = gradients(block, x)
    undo = install(block, x)
    gradients(block, x)

    def broken(*_: object) -> None:
        raise Trouble

    state = torch.get_rng_state()
    with monkeypatch.context() as patched:
        patched.setattr("memplan.levers.capture.Call.run", broken)
        with pytest.raises(Trouble):
            gradients(block, x)
    torch.set_rng_state(state)
    assert same(gradients(block, x), plain)
    undo()
    assert same(gradients(block, x), plain)


@pytest.mark.parametrize("is_known", [False, True])
def test_writing_to_the_input_after_the_forward_is_an_error(is_known: bool) -> None:
    block, x = made(), rows()
    install(block, x)
    if is_known:
        gradients(block, x)
    out = block(x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="written to in place since the forward: it is at version"):
        out.sum().backward()


def test_what_autograd_saved_and_the_block_wrote_to_is_an_error_as_before() -> None:
    def function(block: Block, x: Tensor) -> Tensor:
        return block.last(torch.exp(block.first(x)).add_(1))

    block, x = made(function), rows()
    assert not any("exp" in value.name for value in capture(block, x).graph.values if not value.saved)
    select.install(block, "b", ())
    with pytest.raises(RuntimeError, match="written to in place"):
        block(x).sum().backward()


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_numbers_that_python_draws_are_not_taken_for_constants(draw: Callable[[], float]) -> None:
    block, x = made(lambda block, x: block.last(functional.silu(block.first(x) * draw()))), rows()
    assert dropped_names(block, x) == ()
    names = dropped_names(made(lambda block, x: block.last(functional.silu(block.first(x) * 0.5))), x)
    assert names  # of the same operators with a constant
    undo = select.install(block, "b", names)
    found = []
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanNotFollowed)  # there is nothing to be dropped
            found.append(gradients(block, x))
    undo()
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        assert same(found[seed], gradients(block, x))


@pytest.mark.parametrize("by_mask", [False, True])
def test_tokens_that_go_to_an_expert_are_others_in_each_step(by_mask: bool) -> None:
    """What lies before they are counted is dropped, in every step; nothing is warned of."""

    def routed(block: Block, x: Tensor) -> Tensor:
        y = x + block.act(block.norm(block.first(x)))
        mask = y.detach()[:, 0] > 0
        at = mask if by_mask else mask.nonzero()[:, 0]
        return y.index_put((at,), functional.silu(block.last(y[at])))

    block = made(routed)
    names = dropped_names(block, rows())
    assert names
    assert not any("silu" in name for name in names)
    undo = select.install(block, "b", names)
    found = [gradients(block, rows(seed, 16)) for seed in (0, 1, 2, 3, 1)]
    assert holding(block) == len(names)
    undo()
    assert all(same(f, gradients(block, rows(s, 16))) for f, s in zip(found, (0, 1, 2, 3, 1), strict=True))


@from_then_on
def test_an_input_that_is_written_to_in_some_steps_only() -> None:
    """After Python has looked at a value, as it did in the captured forward, and found nothing then."""

    def forward(block: Block, x: Tensor, limit: float) -> Tensor:
        made_again = functional.gelu(x + block.norm.bias)
        if bool(x.detach().abs().max() > limit):
            x.mul_(0.5)
        return block.last(torch.tanh(made_again)) + block.first(x).tanh()

    def results(block: Block, limit: float) -> list[Tensor | None]:
        block.zero_grad()
        x = rows()
        out = block(x * 1.0, torch.tensor(limit))
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in block.parameters())]

    block, limits = made(forward), (100.0, 100.0, 0.1, 100.0)
    undo = install(block, rows() * 1.0, torch.tensor(100.0))
    found = [results(block, limit) for limit in limits]
    undo()
    assert all(same(some, results(block, limit)) for some, limit in zip(found, limits, strict=True))


@from_then_on
def test_a_draw_of_another_thread_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made(), rows()
    undo = install(block, x)
    moved = iter([0, 1])  # during the first capture somebody drew
    monkeypatch.setattr(select, "_chances", lambda: next(moved, 2))
    gradients(block, x)
    gradients(block, x)
    assert holding(block)
    undo()
