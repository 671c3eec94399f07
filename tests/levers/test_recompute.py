"""The contract of a lever: a planned model computes what it computed before, to the bit, and undo leaves no trace.

Every comparison here is made by `differences`, and the last section shows that it notices levers that are wrong.
"""

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import pytest
import tiny
import torch
import transformers
from imprint import Imprint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memplan import levers
from memplan.blocks import alike, find_blocks
from memplan.errors import PlanMismatch
from memplan.levers import KEEP, RECOMPUTE, recompute

Results = dict[str, Tensor | None]
Make = Callable[[], tiny.Made]

# Without a key/value cache, of which training has no use; see `test_a_cache_in_training` for the other case.
MODELS: dict[str, Make] = {
    **tiny.WORKLOADS,
    "llama": partial(tiny.llama, use_cache=False),
    "gpt2": partial(tiny.gpt2, use_cache=False),
    "t5": partial(tiny.t5, use_cache=False),
}
PATTERNS: dict[str, Callable[[int], str]] = {
    "all": lambda _: RECOMPUTE,
    "alternating": lambda i: RECOMPUTE if i % 2 else KEEP,
    "first only": lambda i: KEEP if i else RECOMPUTE,
}
for_every_model = pytest.mark.parametrize("name", MODELS)


def decisions(model: nn.Module, pattern: str = "all") -> dict[str, str]:
    return {path: PATTERNS[pattern](i) for i, path in enumerate(find_blocks(model))}


def run(model: nn.Module, batch: Mapping[str, Tensor], *, bf16: bool = False, micro_steps: int = 1) -> Results:
    """One step without an optimizer: the losses, and all that it leaves behind."""
    torch.manual_seed(7)
    found: Results = {}
    for number in range(micro_steps):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model(**batch)["loss"]
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    found["random state"] = torch.get_rng_state()
    return found


def differences(found: Results, wanted: Results) -> list[str]:
    """Names of the results that are not equal to the bit."""
    assert found.keys() == wanted.keys()
    pairs = {name: (found[name], wanted[name]) for name in found}
    return [n for n, (a, b) in pairs.items() if (a is None or b is None or not torch.equal(a, b)) and a is not b]


@cache
def unplanned(name: str, bf16: bool = False, micro_steps: int = 1) -> Results:
    model, batch = MODELS[name]()
    return run(model, batch, bf16=bf16, micro_steps=micro_steps)


@contextmanager
def planned(name: str, pattern: str = "all") -> Iterator[tiny.Made]:
    model, batch = MODELS[name]()
    with levers.decided(model, decisions(model, pattern)):
        yield model, batch


def inner_runs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, int]:
    """How often something inside each block runs in one step."""
    counts = dict.fromkeys(find_blocks(model), 0)

    def count(path: str, module: nn.Module, args: object) -> None:
        counts[path] += 1

    def leaf(block: nn.Module) -> nn.Module:
        return next(m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d) or type(m).__name__ == "Conv1D")

    hooks = [leaf(model.get_submodule(p)).register_forward_pre_hook(partial(count, p)) for p in counts]
    output = model(**batch)["loss"]
    if output.requires_grad:
        output.backward()
    for hook in hooks:
        hook.remove()
    return counts


# --- nothing changes but memory and time ----------------------------------------------------------------------------


@for_every_model
@pytest.mark.parametrize("pattern", PATTERNS)
def test_results_are_the_same(name: str, pattern: str) -> None:
    with planned(name, pattern) as (model, batch):
        assert differences(run(model, batch), unplanned(name)) == []


@for_every_model
def test_results_are_the_same_under_autocast(name: str) -> None:
    with planned(name, "alternating") as (model, batch):
        assert differences(run(model, batch, bf16=True), unplanned(name, bf16=True)) == []


@for_every_model
def test_results_are_the_same_over_two_micro_batches(name: str) -> None:
    with planned(name, "alternating") as (model, batch):
        assert differences(run(model, batch, micro_steps=2), unplanned(name, micro_steps=2)) == []


@for_every_model
def test_what_is_decided_is_what_runs_twice(name: str) -> None:
    with planned(name, "alternating") as (model, batch):
        wanted = {path: 2 if option == RECOMPUTE else 1 for path, option in decisions(model, "alternating").items()}
        assert inner_runs(model, batch) == wanted


@for_every_model
def test_nothing_is_run_twice_where_nothing_runs_back(name: str) -> None:
    with planned(name) as (model, batch):
        with torch.no_grad():
            assert set(inner_runs(model, batch).values()) == {1}
        model.eval()
        assert set(inner_runs(model, batch).values()) == {1}


@for_every_model
def test_names_keys_and_hooks_are_the_same(name: str) -> None:
    model, batch = MODELS[name]()
    block = model.get_submodule(find_blocks(model)[0])
    calls: list[str] = []
    block.register_forward_pre_hook(lambda *_: calls.append("before"))
    block.register_forward_hook(lambda *_: calls.append("after"))
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    with levers.decided(model, decisions(model)):
        assert list(model.state_dict()) == keys
        assert dict(model.named_modules()) == modules
        model(**batch)["loss"].backward()
    assert calls == ["before", "after"]  # and not once more in the second forward


def test_batch_norms_count_a_batch_once() -> None:
    with planned("resnet") as (model, batch):
        run(model, batch)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert {int(norm.num_batches_tracked) for norm in norms} == {1}
        assert {norm.momentum for norm in norms} == {0.1}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16, momentum=None), nn.InstanceNorm1d(16, track_running_stats=True)])
def test_other_running_statistics(norm: nn.Module) -> None:
    """A cumulative average, and a norm that is given its statistics even if it does not follow them."""
    results = []
    for option in (KEEP, RECOMPUTE):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(norm), nn.Linear(4, 4))
        model = nn.Sequential(block)
        with levers.decided(model, {"0": option}):
            loss = model(torch.randn(3, 16, 4)).square().sum()
            loss.backward()
            loss.detach_()
        results.append(
            {"loss": loss, **dict(block.named_buffers()), **{n: p.grad for n, p in block.named_parameters()}}
        )
    assert differences(*results) == []


def test_frozen_batch_norms_stay_frozen() -> None:
    results = []
    for option in (KEEP, RECOMPUTE):
        model, batch = tiny.plain()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        with levers.decided(model, dict.fromkeys(find_blocks(model), option)):
            results.append(run(model, batch))
    assert differences(*results) == []


# --- key/value caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_in_training(make: Callable[..., tiny.Made], attention: str) -> None:
    """Left on, as transformers has it: a second forward must not append to the cache. Equal but for rounding."""
    results = []
    for option in (KEEP, RECOMPUTE):
        model, batch = make(attn_implementation=attention)
        assert model.config.use_cache
        mask = torch.ones_like(batch["input_ids"])
        mask[:, -3:] = 0
        with levers.decided(model, dict.fromkeys(find_blocks(model), option)):
            results.append(run(model, {**batch, "attention_mask": mask}))
    kept, again = results
    for name, wanted in kept.items():
        torch.testing.assert_close(again[name], wanted, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_a_layer_that_only_reads_the_cache_keeps_it() -> None:
    class Reader(transformers.modeling_layers.GradientCheckpointingLayer):
        _can_checkpoint_with_cache = True

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.seen: list[object] = []

        def forward(self, x: Tensor, cache: object) -> Tensor:
            self.seen.append(cache)
            return self.linear(x)

    reader, held = Reader(), transformers.DynamicCache()
    with levers.decided(nn.Sequential(reader), {"0": RECOMPUTE}):
        reader(torch.ones(1, 2), held).sum().backward()
    assert reader.seen == [held, held]


# --- undo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "enabled"),
    [(name, False) for name in MODELS] + [(name, True) for name in ("llama", "gpt2", "bert", "vit", "lora", "t5")],
)
def test_undo_restores_the_very_same_attributes(name: str, enabled: bool) -> None:
    """Also where the model's own checkpointing was on before."""
    model, _ = MODELS[name]()
    if enabled:
        model.gradient_checkpointing_enable()
    before = Imprint(model)
    undo = levers.install(model, decisions(model, "alternating"))
    assert before.differences() != []
    undo()
    assert before.differences() == []
    undo()
    assert before.differences() == []


def test_keep_switches_off_what_was_on() -> None:
    model, batch = tiny.bert()
    model.gradient_checkpointing_enable()
    with levers.decided(model, dict.fromkeys(find_blocks(model), KEEP)):
        assert set(inner_runs(model, batch).values()) == {1}
    assert set(inner_runs(model, batch).values()) == {2}


def test_a_plan_on_top_of_a_plan_replaces_it() -> None:
    """A copy of a planned model carries the plan; what is decided anew must not be nested in it."""
    model, batch = tiny.plain()
    first, *others = find_blocks(model)
    with levers.decided(model, dict.fromkeys(find_blocks(model), RECOMPUTE)):
        with levers.decided(model, {first: RECOMPUTE, **dict.fromkeys(others, KEEP)}):
            assert inner_runs(model, batch) == {first: 2, **dict.fromkeys(others, 1)}
        assert set(inner_runs(model, batch).values()) == {2}


def test_a_forward_that_somebody_set_is_used_and_comes_back() -> None:
    model, batch = tiny.plain()
    block = model.get_submodule("blocks.1")
    plain, calls = block.forward, []

    def patched(x: Tensor, **kwargs: Any) -> Tensor:
        calls.append("patched")
        return plain(x, **kwargs) * 2

    block.forward = patched
    wanted = run(*tiny.plain())
    with levers.decided(model, decisions(model)):
        found = run(model, batch)
    assert calls == ["patched", "patched"]
    assert differences(found, wanted) != []
    assert block.__dict__["forward"] is patched


@pytest.mark.parametrize("bad", [{"blocks.9": RECOMPUTE}, {"blocks.1": "offload"}])
def test_all_or_nothing(bad: dict[str, str]) -> None:
    model, _ = tiny.plain()
    before = Imprint(model)
    with pytest.raises((AttributeError, PlanMismatch)):
        levers.install(model, {"blocks.0": RECOMPUTE, **bad})
    assert before.differences() == []


def test_an_unknown_option_is_named_with_those_that_are_known() -> None:
    model, _ = tiny.plain()
    with pytest.raises(PlanMismatch, match=r"blocks\.1 is to 'offload', but the options are keep, recompute"):
        levers.install(model, {"blocks.1": "offload"})


def test_arguments_of_a_block_may_have_the_names_of_checkpointing() -> None:
    class Block(nn.Linear):
        def forward(self, x: Tensor, *, debug: int, use_reentrant: bool, context_fn: float) -> Tensor:
            return super().forward(x) * debug * context_fn * use_reentrant

    model = nn.Sequential(Block(2, 2))
    with levers.decided(model, {"0": RECOMPUTE}):
        assert model[0](torch.ones(1, 2), debug=2, use_reentrant=True, context_fn=0.5).requires_grad


def test_blocks_that_run_alike_are_told_from_others() -> None:
    """So that a planned model can be traced by a few of its blocks."""
    model, _ = tiny.plain(layers=6)
    blocks = find_blocks(model)
    options = dict(zip(blocks, [RECOMPUTE] * 2 + [KEEP] * 3 + [RECOMPUTE], strict=True))
    with levers.decided(model, options):
        assert [len(group) for group in alike(model, blocks)] == [2, 3, 1]


# --- copies ---------------------------------------------------------------------------------------------------------


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@for_every_model
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["copied", "saved and loaded"])
def test_a_copy_is_planned_and_stands_on_its_own(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    with planned(name) as (model, batch):
        copied = duplicate(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
        assert differences(run(copied, batch), unplanned(name)) == []
        assert all(parameter.grad is None for parameter in model.parameters())
        assert set(inner_runs(copied, batch).values()) == {2}


def test_undo_does_not_reach_a_copy() -> None:
    model, batch = tiny.plain()
    with levers.decided(model, decisions(model)):
        copied = copy.deepcopy(model)
    assert set(inner_runs(copied, batch).values()) == {2}
    assert set(inner_runs(model, batch).values()) == {1}


# --- the comparison notices levers that are wrong -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "lora", "plain"])
def test_another_dropout_in_the_second_forward_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "checkpoint", partial(checkpoint, preserve_rng_state=False))
    with planned(name) as (model, batch):
        assert any("gradient" in difference for difference in differences(run(model, batch), unplanned(name)))


@pytest.mark.parametrize("name", ["resnet", "plain"])
def test_a_batch_norm_that_counts_twice_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_Uncounted", lambda norms: nullcontext())
    with planned(name) as (model, batch):
        assert any("running_mean" in difference for difference in differences(run(model, batch), unplanned(name)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_swapped_blocks_are_noticed(name: str) -> None:
    with planned(name) as (model, batch):
        first = find_blocks(model)[0]
        container = model.get_submodule(first.rpartition(".")[0])
        container[0], container[1] = container[1], container[0]
        assert "loss 0" in differences(run(model, batch), unplanned(name))


def test_a_block_without_gradients_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "checkpoint", lambda run, *args, **_: torch.no_grad()(run)(*args))
    with planned("llama", "first only") as (model, batch):
        missed = differences(run(model, batch), unplanned("llama"))
    assert any("layers.0" in name for name in missed)
    assert not any("layers.1" in name for name in missed)
