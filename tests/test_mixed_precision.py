"""FSDP2's mixed precision before a model is sharded: what it computes in, what is counted, and that nothing is left."""

import pytest
import tiny
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import memplan
from memplan.blocks import find_blocks, signature
from memplan.errors import BadLoss
from memplan.mixed_precision import MixedPrecision
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample

HALF, FULL = torch.bfloat16, torch.float32
POLICY = MixedPrecisionPolicy(HALF, FULL)
LARGE = {"hidden_size": 128, "intermediate_size": 352, "use_cache": False}


def llama() -> tiny.Made:
    return tiny.llama(layers=4, rows=4, length=32, **LARGE)


def test_a_model_computes_as_it_is_gathered_and_is_left_as_it_was() -> None:
    model, batch = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    kinds: list[torch.dtype] = []
    block = model.get_submodule(find_blocks(model)[0])
    hook = block.register_forward_pre_hook(lambda _, inputs: kinds.append(inputs[0].dtype))
    with Recipe(mixed=MixedPrecision.of(model, POLICY)).computing(model):
        assert {parameter.dtype for parameter in model.parameters()} == {HALF}
        assert model(**batch).logits.dtype == HALF
        model(inputs_embeds=torch.randn(1, 3, 128))
    hook.remove()
    assert kinds == [HALF, HALF]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert weight.grad is not None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, batch = llama()
    with pytest.raises(BadLoss):
        memplan.predict(model, {"input_ids": batch["input_ids"]}, world=memplan.World(1, 2, POLICY))
    assert {parameter.dtype for parameter in model.parameters()} == {FULL}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_copy_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llama()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own, asked = MixedPrecision.gathered, []

    def gathered(mixed: MixedPrecision, parameter: torch.Tensor) -> torch.dtype:
        asked.append(parameter)
        if len(asked) == len(list(model.parameters())) + 6:  # all are asked about, then cast
            raise torch.OutOfMemoryError("of 24 GiB none are free")
        return own(mixed, parameter)

    recipe = Recipe(mixed=MixedPrecision.of(model, POLICY))
    monkeypatch.setattr(MixedPrecision, "gathered", gathered)
    with pytest.raises(torch.OutOfMemoryError), recipe.computing(model):
        pass
    assert {parameter.dtype for parameter in model.parameters()} == {FULL}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_parameters_may_be_replaced_between_two_looks() -> None:
    model, batch = llama()
    recipe = Recipe(shards=2, mixed=MixedPrecision.of(model, POLICY))
    model.to("meta").to_empty(device="cpu")
    with recipe.computing(model):
        assert Recorder(model, recipe).record(Sample.of(batch)).peak_bytes > 0
        assert {recipe.kept[id(parameter)] for parameter in model.parameters()} == {FULL}


def test_integers_and_what_has_the_type_already_are_not_cast() -> None:
    model = nn.Linear(2, 2, dtype=HALF)
    model.table = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
    mixed = MixedPrecision.of(model, POLICY)
    assert [mixed.gathered(p) for p in model.parameters()] == [HALF, HALF, torch.int32]
    assert mixed.reduced(model.weight) == FULL
    assert MixedPrecision.of(model).gathered(model.weight) == HALF


def test_what_is_kept_is_counted_in_its_own_type_and_the_rest_as_computed() -> None:
    model, batch = llama()
    plain, mixed, half = (
        memplan.predict(made, batch, world=memplan.World(shards=2, mp_policy=policy))
        for made, policy in ((model, None), (model, POLICY), (llama()[0].to(HALF), None))
    )
    assert half.peak_bytes < mixed.peak_bytes < plain.peak_bytes
    for name in ("params", "optimizer"):
        assert min(mixed.timeline.bytes[name]) == min(plain.timeline.bytes[name])
    assert mixed.saved == half.saved
    assert "FSDP2's mixed precision: param_dtype=bfloat16, reduce_dtype=float32" in mixed.assumptions
    assert mixed.assumptions[0] == plain.assumptions[0]  # the weights are of float32


@pytest.mark.slow
def test_a_plan_is_for_the_model_as_it_is() -> None:
    model, batch = llama()
    world = memplan.World(shards=2, mp_policy=POLICY)
    free = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4, world=world)
    plan = memplan.plan(model, f"cpu:{free.peak_bytes * 9 // 10}B", sample=batch, micro_batch=4, world=world)
    assert plan.verdict == "fits"
    assert plan.changed
    assert plan.signature == signature(model)
    assert plan.mp_policy == "param_dtype=bfloat16, reduce_dtype=float32"
    assert memplan.Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("policy", [None, POLICY, MixedPrecisionPolicy(HALF, HALF)])
def test_replicas_hold_what_they_add_up(policy: MixedPrecisionPolicy | None) -> None:
    """What is reduced stays to the end of the backward, where this step's peak is."""
    model, batch = tiny.llama(layers=6, rows=1, length=8, **LARGE)
    asked = {"optimizer": "sgd", "accumulation": 2}
    one, two = (memplan.predict(model, batch, world=memplan.World(n, 2, policy), **asked) for n in (1, 2))
    parts = sum(parameter.numel() for parameter in model.parameters()) // 2
    reduced = 2 if policy is not None and policy.reduce_dtype == HALF else 4
    assert two.peak_bytes > one.peak_bytes
    assert two.peak_bytes <= one.peak_bytes + parts * reduced
