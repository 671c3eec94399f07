"""DeepSpeed's ZeRO-3 in an Accelerate script: the weights of the run without memplan, and what is refused.

On a stand-in for DeepSpeed's engine; on DeepSpeed itself, with two ranks, where it is installed.
"""

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import two_ranks
from accelerate import Accelerator
from torch import nn

from integrations import scripts
from integrations.engines import stand_in, with_engine
from integrations.scripts import BATCH, fresh_accelerate
from memplan.errors import PlanMismatch, UsageError
from memplan.integrations.accelerate import attach
from memplan.integrations.deepspeed import as_the_engine_runs, check_engine, settle, shares_weights
from memplan.plan_record import Plan
from memplan.recipe import Recipe
from memplan.zero3 import Zero3

ROWS = 21  # in batches of 8: ragged
RANK = Path(__file__).with_name("zero3_rank.py")
BOUND_S = 600  # nothing may hang
ERROR = 0.02
STAGE = {"stage": 3}

Ranks = list[dict[str, Any]]


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with fresh_accelerate():
        yield Accelerator(cpu=True)


# -- the mathematics of the run --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("deepspeed")
def test_the_weights_are_those_without_memplan() -> None:
    """On a stand-in, which keeps all weights: what is planned and written, and how micro-batches are weighted."""
    line = partial(with_engine, zero=STAGE)
    plain = scripts.train(line, rows=ROWS)
    planned = scripts.train(partial(line, then=partial(attach, gpu="cpu:64MiB", micro_batch=2)), rows=ROWS)
    plan, engine = planned.accelerator.memplan.plan, planned.accelerator.deepspeed_engine_wrapped.engine
    assert engine.micro_batches == plan.accumulation == BATCH // 2
    assert engine.config["train_micro_batch_size_per_gpu"] == plan.micro_batch == 2
    assert planned.differs_by(plain) <= 1e-5
    assert planned.rates == plain.rates
    assert any("ZeRO-3 over 1 ranks" in said for said in plan.assumptions)
    assert any("blocks are recomputed as a whole or not at all" in said for said in plan.assumptions)


@pytest.mark.usefixtures("deepspeed")
def test_only_whole_blocks_are_recomputed() -> None:
    line = partial(with_engine, zero=STAGE, then=partial(attach, gpu="cpu:1550KiB", micro_batch=4))
    plan = scripts.train(line, rows=BATCH).accelerator.memplan.plan
    assert plan.changed
    assert set(plan.decisions.values()) <= {"keep", "recompute"}
    assert plan.stepping == "plain"


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
        assert Plan.model_validate_json(planned["plan"]).recomputed
    assert ranks[0]["planned"]["plan"] == ranks[1]["planned"]["plan"]
    assert ranks[0]["planned"]["weights"] == ranks[1]["planned"]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "recomputes"), [("whole", False), ("near", True), ("far", True), ("bf16", True)])
def test_each_rank_needs_what_is_predicted(ranks: Ranks, case: str, recomputes: bool) -> None:
    for rank in ranks:
        found = rank["peaks"][case]
        assert found["measured"] == pytest.approx(found["predicted"], rel=ERROR)
        assert bool(found["recomputed"]) is recomputes


@pytest.mark.usefixtures("deepspeed")
def test_a_plan_with_other_levers_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = Plan.load(scripts.plan_file("llama", 4, BATCH))
    first = next(iter(plan.decisions))
    plan.model_copy(update={"decisions": {**plan.decisions, first: "offload"}}).save(path)
    with_engine(accelerator, partial(attach, plan=path), STAGE)
    model = scripts.make_model("llama")
    loader = torch.utils.data.DataLoader(scripts.Texts(BATCH), BATCH, collate_fn=scripts.padded)
    with pytest.raises(PlanMismatch, match="the plan has offload, and ZeRO-3 takes a module's weights away"):
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)


# -- what the config and the model say -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"offload_param": {"device": "cpu"}}, "offload_param is not counted"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer is not counted"),
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size=2 is not counted"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights is not counted"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights is not counted"),
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients is not counted"),
        ({"contiguous_gradients": False}, "contiguous_gradients=False"),
        ({"reduce_scatter": False}, "reduce_scatter=False"),
        ({"stage3_module_granularity_threshold": 10}, "stage3_module_granularity_threshold is not counted"),
        ({"leaf_module": {"names": ["mlp"]}}, "leaf_module is not counted"),
        ({"stage3_use_all_reduce_for_fetch_params": True}, "stage3_use_all_reduce_for_fetch_params is not counted"),
        ({"stage3_allgather_sequential": True}, "stage3_allgather_sequential is not counted"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow is not counted"),
    ],
)
def test_what_is_not_counted_is_refused(accelerator: Accelerator, zero: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        with_engine(accelerator, attach, {**STAGE, **zero})


def test_options_that_are_counted_are_not_refused(accelerator: Accelerator) -> None:
    none = {"device": "none"}
    sizes = {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e8, "stage3_prefetch_bucket_size": "auto"}
    whole = {"stage3_param_persistence_threshold": 1e4, "stage3_model_persistence_threshold": 1e6}
    other = {"stage3_gather_16bit_weights_on_model_save": True, "sub_group_size": 1e9, "overlap_comm": True}
    check_engine(with_engine(accelerator, zero={**STAGE, "offload_param": none, **sizes, **whole, **other}))


def test_leaf_modules_of_the_plugin_are_refused(accelerator: Accelerator) -> None:
    with_engine(accelerator, zero=STAGE)
    accelerator.state.deepspeed_plugin.transformer_moe_cls_names = "Block"
    with pytest.raises(UsageError, match="gathered module by module"):
        check_engine(accelerator)


class MixtralSparseMoeBlock(nn.Linear):
    """By its name, what DeepSpeed gathers at once."""


def packed() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    return model


def spread() -> nn.Module:
    model = nn.Linear(4, 4)
    vars(model.weight)["ds_id"] = 0
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (spread, r"spread over the ranks already.*zero3_init_flag=False"),
        (packed, "some weights are packed"),
        (lambda: nn.Sequential(MixtralSparseMoeBlock(4, 4)), "DeepSpeed gathers MixtralSparseMoeBlock"),
    ],
)
def test_a_model_that_cannot_be_counted_is_refused(accelerator: Accelerator, model: Any, words: str) -> None:
    with_engine(accelerator, zero=STAGE)
    with pytest.raises(UsageError, match=words):
        settle(accelerator, model(), 8)


def test_the_model_is_not_moved_before_it_is_spread(accelerator: Accelerator) -> None:
    assert shares_weights(with_engine(accelerator, zero=STAGE))
    assert not shares_weights(with_engine(accelerator))


def zero_of(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> Zero3:
    recipe = as_the_engine_runs(Recipe(optimizer=optimizer), accelerator, model)
    assert isinstance(recipe.zero, Zero3)
    return recipe.zero


def test_the_recipe_of_a_rank(accelerator: Accelerator) -> None:
    auto = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    with_engine(accelerator, zero={**STAGE, **dict.fromkeys(auto, "auto")}, bf16={"enabled": True})
    accelerator.state._shared_state["num_processes"] = 4
    model, _ = tiny.llama(layers=1)
    head = list(model.lm_head.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    rest[0].requires_grad_(False)
    zero = zero_of(accelerator, model, torch.optim.AdamW([{"params": rest}, {"params": head}]))
    assert zero.trained == (tuple(p.numel() for p in rest[1:]), (head[0].numel(),))
    assert zero.others == (rest[0].numel(),)
    assert zero.dtype == torch.bfloat16
    assert zero.stay == tuple(p.numel() for p in model.parameters() if p.numel() <= 320)
    gathers = zero.gathers
    assert (gathers.ranks, gathers.bucket, gathers.prefetch, gathers.whole) == (4, 32**2, int(0.9 * 32**2), 320)


def test_the_defaults_are_deepspeed_s(accelerator: Accelerator) -> None:
    with_engine(accelerator, zero=STAGE)
    model, _ = tiny.llama(layers=1)
    zero = zero_of(accelerator, model, torch.optim.AdamW(model.parameters()))
    gathers = zero.gathers
    assert zero.sub_group == gathers.live == gathers.reuse == 10**9
    assert (gathers.prefetch, gathers.whole, gathers.all_whole) == (50_000_000, 100_000, sys.maxsize)
    assert gathers.holds_no_views
