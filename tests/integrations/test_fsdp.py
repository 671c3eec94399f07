"""FSDP2 in an Accelerate script: weights of the run without memplan, the peak that was predicted, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

import memplan
from integrations import scripts
from memplan.errors import UsageError

RANK = Path(__file__).with_name("sharded_rank.py")
BOUND_S = 300  # nothing may hang
ERROR = 0.005

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks has left."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks.heard(RANK, folder, bound_s=BOUND_S)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gpt2", "half"])
def test_the_weights_are_those_of_accelerates_own_sharding(ranks: Ranks, model: str) -> None:
    """The llama's batches are split, some into parts without a label; the others have dropout on."""
    for rank in ranks:
        plain, planned = rank[model], rank[f"{model}-planned"]
        assert two_ranks.difference(plain, planned) <= 1e-5
        assert planned["rates"] == plain["rates"]
        assert planned["losses"] == pytest.approx(plain["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "accumulation"), [("llama", 4), ("gpt2", 1), ("half", 1)])
def test_one_plan_is_made_for_all(ranks: Ranks, model: str, accumulation: int) -> None:
    first, second = (rank[f"{model}-planned"]["plan"] for rank in ranks)
    plan = memplan.Plan.model_validate_json(first)
    assert first == second
    assert plan.changed
    assert plan.accumulation == accumulation
    assert any("FSDP2 over 2 ranks" in said for said in plan.assumptions)


@pytest.mark.slow
@pytest.mark.parametrize("peaks", ["peaks", "half-peaks"])
def test_each_rank_needs_what_is_predicted(ranks: Ranks, peaks: str) -> None:
    for rank in ranks:
        assert rank[peaks]["measured"] == pytest.approx(rank[peaks]["predicted"], rel=ERROR)


@pytest.mark.parametrize(
    ("plugin", "accelerator", "words"),
    [
        (FullyShardedDataParallelPlugin, {}, "MemplanFSDPPlugin"),
        (lambda: memplan.MemplanFSDPPlugin(fsdp_version=1), {}, "fsdp_version=1"),
        (lambda: memplan.MemplanFSDPPlugin(activation_checkpointing=True), {}, "the plan decides what is recomputed"),
        (lambda: memplan.MemplanFSDPPlugin(reshard_after_forward=False), {}, "reshard_after_forward=False"),
        (lambda: memplan.MemplanFSDPPlugin(cpu_offload=True), {}, "cpu_offload"),
        (lambda: memplan.MemplanFSDPPlugin(ignored_modules=[]), {}, "ignored_modules"),
        (lambda: memplan.MemplanFSDPPlugin(cpu_ram_efficient_loading=True), {}, "cpu_ram_efficient_loading"),
        (
            lambda: memplan.MemplanFSDPPlugin(mixed_precision_policy=MixedPrecisionPolicy(torch.float16)),
            {},
            "mixed_precision='fp16' is not counted",
        ),
        (memplan.MemplanFSDPPlugin, {}, "one process"),
        (
            memplan.MemplanFSDPPlugin,
            {"dataloader_config": DataLoaderConfiguration(even_batches=False)},
            "even_batches=False is not counted",
        ),
        (memplan.MemplanFSDPPlugin, {"parallelism_config": ParallelismConfig()}, "parallelism_config"),
    ],
)
def test_what_is_not_counted_is_refused(
    monkeypatch: pytest.MonkeyPatch, plugin: Any, accelerator: dict[str, Any], words: str
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):  # Accelerate sets them
        monkeypatch.setenv(name, "false")
    with scripts.fresh_accelerate():
        own = Accelerator(cpu=True, **accelerator)
        own.state.distributed_type, own.state.fsdp_plugin = DistributedType.FSDP, plugin()
        with pytest.raises(UsageError, match=words):
            memplan.attach(own)
