"""DeepSpeed's ZeRO-2 in an Accelerate script: the weights of the run without memplan, and what is refused.

On a stand-in for DeepSpeed's engine; on DeepSpeed itself, with two ranks, where it is installed.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import two_ranks
from accelerate import Accelerator

from integrations import scripts
from integrations.engines import BUCKET, stand_in, with_engine
from integrations.scripts import BATCH, fresh_accelerate
from memplan.errors import PlanMismatch, UsageError
from memplan.integrations.accelerate import attach
from memplan.integrations.deepspeed import as_the_engine_runs, check_engine, settle, write
from memplan.plan_record import Plan
from memplan.recipe import Recipe

ROWS = 21  # in batches of 8: ragged
RANK = Path(__file__).with_name("zero_rank.py")
BOUND_S = 300  # nothing may hang
ERROR = 0.02


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with fresh_accelerate():
        yield Accelerator(cpu=True)


# -- the mathematics of the run --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("own_accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_weights_are_those_without_memplan(own_accumulation: int) -> None:
    """Batches are cut to two rows, weighted by tokens; the last of an epoch is ragged."""
    options: dict[str, Any] = {"rows": ROWS, "own_accumulation": own_accumulation, "accumulate": own_accumulation > 1}
    plain = scripts.train(with_engine, **options)
    whole = BATCH * own_accumulation
    wishes = {"gpu": "cpu:64MiB", "micro_batch": 2} if whole > BATCH else {"plan": scripts.plan_file("llama", 2, whole)}
    planned = scripts.train(partial(with_engine, then=partial(attach, **wishes)), **options)
    plan = planned.accelerator.memplan.plan
    engine = planned.accelerator.deepspeed_engine_wrapped.engine
    assert engine.micro_batches == plan.accumulation == whole // 2
    assert engine.config["train_micro_batch_size_per_gpu"] == plan.micro_batch == 2
    assert planned.differs_by(plain) <= 1e-5
    assert planned.rates == plain.rates
    assert planned.losses == pytest.approx(plain.losses, rel=1e-4)
    if "gpu" in wishes:
        assert any("ZeRO-2 over 1 ranks" in said for said in plan.assumptions)
        assert plan.stepping == "plain"


@pytest.mark.usefixtures("deepspeed")
def test_a_loop_may_leave_the_optimizer_to_the_engine(accelerator: Accelerator) -> None:
    plan = scripts.plan_file("llama", 4, BATCH)
    with_engine(accelerator, partial(attach, plan=plan))
    model = scripts.make_model("llama")
    loader = torch.utils.data.DataLoader(scripts.Texts(BATCH), BATCH, collate_fn=scripts.padded)
    before = [p.detach().clone() for p in model.parameters()]
    model, _, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
    assert any((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks of DeepSpeed itself has left."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks.heard(RANK, folder, bound_s=BOUND_S)


@pytest.mark.slow
def test_the_weights_on_deepspeed_itself(ranks: Ranks) -> None:
    for rank in ranks:
        plain, planned = rank["plain"], rank["planned"]
        pairs = zip(planned["weights"], plain["weights"], strict=True)
        assert max(float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in pairs) <= 1e-5
        assert planned["rates"] == plain["rates"]
        assert planned["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert Plan.model_validate_json(planned["plan"]).changed
    assert ranks[0]["planned"]["plan"] == ranks[1]["planned"]["plan"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_each_rank_needs_what_is_predicted(ranks: Ranks, precision: str) -> None:
    for rank in ranks:
        found = rank["peaks"][precision]
        assert found["measured"] == pytest.approx(found["predicted"], rel=ERROR)


@pytest.mark.usefixtures("deepspeed")
def test_a_plan_that_steps_otherwise_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = Plan.load(scripts.plan_file("llama", 4, BATCH))
    plan.model_copy(update={"stepping": "in-backward"}).save(path)
    with_engine(accelerator, partial(attach, plan=path))
    model = scripts.make_model("llama")
    loader = torch.utils.data.DataLoader(scripts.Texts(BATCH), BATCH, collate_fn=scripts.padded)
    with pytest.raises(PlanMismatch, match="DeepSpeed steps in a way of its own"):
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)


# -- what the config says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "config", "words"),
    [
        ({"stage": 0}, {}, "Use DistributedDataParallel"),
        ({"stage": 1}, {}, "Use zero_stage=2"),
        ({"stage": 4}, {}, "ZeRO-4 is not known"),
        ({"offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer is not counted"),
        ({"offload_param": {"device": "nvme"}}, {}, "offload_param is not counted"),
        ({"contiguous_gradients": False}, {}, "contiguous_gradients=False"),
        ({"reduce_scatter": False}, {}, "reduce_scatter=False"),
        ({"zero_hpz_partition_size": 8}, {}, "zero_hpz_partition_size=8 is not counted"),
        ({"zero_quantized_gradients": True}, {}, "zero_quantized_gradients is not counted"),
        ({}, {"activation_checkpointing": {"cpu_checkpointing": True}}, "the plan decides what is recomputed"),
        ({}, {"pipeline": {"stages": 2}}, "stages of a pipeline"),
        ({}, {"tensor_parallel": {"autotp_size": 2}}, "weights are counted as whole"),
        ({}, {"data_types": {"grad_accum_dtype": "fp32"}}, "in the type of the weights"),
        ({}, {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "counted in float32"),
    ],
)
def test_what_is_not_counted_is_refused(
    accelerator: Accelerator, zero: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        with_engine(accelerator, attach, zero, **config)


def test_options_that_are_off_are_not_refused(accelerator: Accelerator) -> None:
    none = {"device": "none", "nvme_path": None}
    zero = {"offload_optimizer": none, "stage3_max_live_parameters": 1e9, "zero_hpz_partition_size": 1}
    off = {"activation_checkpointing": {"cpu_checkpointing": False}, "elasticity": {"enabled": False, "version": 0.1}}
    check_engine(with_engine(accelerator, zero=zero, **off))


def test_a_config_for_another_batch_is_refused(accelerator: Accelerator) -> None:
    with_engine(accelerator, train_micro_batch_size_per_gpu=4)
    with pytest.raises(UsageError, match="train_micro_batch_size_per_gpu=4, and the loader batches of 8"):
        settle(accelerator, tiny.plain()[0], 8)


def test_what_the_engine_would_do_first_is_done(accelerator: Accelerator) -> None:
    with_engine(accelerator, gradient_accumulation_steps=3, bf16={"enabled": True})
    model, _ = tiny.plain()
    settle(accelerator, model, 8)
    assert accelerator.gradient_accumulation_steps == 3
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_buffer("blocks.0.norm.running_mean").dtype == torch.float32


def test_the_recipe_of_a_rank(accelerator: Accelerator) -> None:
    with_engine(accelerator, zero={"reduce_bucket_size": "auto", "overlap_comm": True}, bf16={"enabled": True})
    accelerator.state._shared_state["num_processes"] = 4
    model, _ = tiny.llama(layers=1)
    head = list(model.lm_head.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    rest[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": head, "weight_decay": 0.0}])
    recipe = as_the_engine_runs(Recipe(optimizer=optimizer, autocast=torch.bfloat16, clips=True), accelerator, model)
    assert recipe.zero is not None
    assert recipe.zero.ranks == 4
    assert recipe.zero.numels == (tuple(p.numel() for p in rest[1:]), (head[0].numel(),))
    assert recipe.zero.dtype == torch.bfloat16
    assert (recipe.zero.bucket_numel, recipe.zero.buckets) == (32**2, 2)
    assert recipe.autocast is None


def test_the_optimizer_of_the_config(accelerator: Accelerator) -> None:
    model, _ = tiny.plain()
    with_engine(accelerator, optimizer={"type": "AdamW", "params": {"lr": 1e-3}})
    recipe = as_the_engine_runs(Recipe(), accelerator, model)
    assert recipe.optimizer == "adamw-fused"
    assert recipe.zero is not None
    assert recipe.zero.bucket_numel == BUCKET
    with_engine(accelerator, optimizer={"type": "Muon"})
    with pytest.raises(UsageError, match="the optimizer muon"):
        as_the_engine_runs(Recipe(), accelerator, model)


def test_the_plan_is_written_where_the_engine_reads_it(accelerator: Accelerator) -> None:
    with_engine(accelerator, train_batch_size=16)
    accelerator.state._shared_state["num_processes"] = 2
    write(accelerator, Plan.load(scripts.plan_file("llama", 4, BATCH)))
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 16
