"""Where DistributedDataParallel copies what a model returns, no plan computes the loss in chunks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.utils.data import DataLoader

import memplan
from integrations.scripts import BATCH, Texts, fresh_accelerate, padded
from memplan.errors import DoesNotFit, PlanMismatch
from memplan.integrations import replicas
from memplan.integrations.accelerate import attach
from memplan.integrations.replicas import copying, for_replicas, refuse_copied
from memplan.strategy import LEVERS, Strategy

UNUSED = DistributedDataParallelKwargs(find_unused_parameters=True)
STATIC = DistributedDataParallelKwargs(static_graph=True)
MODEL = tiny.llama(layers=2)[0]


def accelerator(handler: Any, ranks: int = 2, kind: DistributedType = DistributedType.MULTI_CPU) -> Any:
    return SimpleNamespace(num_processes=ranks, distributed_type=kind, ddp_handler=handler)


def arguments(unused: bool | None, static: bool | None = None) -> Any:
    return SimpleNamespace(ddp_find_unused_parameters=unused, ddp_static_graph=static)


@pytest.mark.parametrize(
    ("made", "args", "option"),
    [
        (accelerator(UNUSED), None, "find_unused_parameters"),
        (accelerator(STATIC), None, "static_graph"),
        (accelerator(DistributedDataParallelKwargs()), None, None),
        (accelerator(None), None, None),
        (accelerator(UNUSED, ranks=1), None, None),
        (accelerator(UNUSED, kind=DistributedType.FSDP), None, None),
        # Of a Trainer: what its accelerator was made with; where that is decided later, its arguments.
        (accelerator(UNUSED), arguments(False), "find_unused_parameters"),
        (accelerator(DistributedDataParallelKwargs()), arguments(None), None),
        (accelerator(None), arguments(None), "find_unused_parameters"),
        (accelerator(None), arguments(True), "find_unused_parameters"),
        (accelerator(None), arguments(False), None),
        (accelerator(None), arguments(False, static=True), "static_graph"),
    ],
)
def test_what_copies_the_outputs(made: Any, args: Any, option: str | None) -> None:
    assert copying(made, args) == option


def test_the_lever_is_left_out_and_the_way_out_said() -> None:
    asked = Strategy("mine", levers=LEVERS, levers_first=("offload", "loss-head"))
    chosen, (said,) = for_replicas(asked, MODEL, accelerator(UNUSED))
    assert isinstance(chosen, Strategy)
    assert set(LEVERS) - set(chosen.levers) == {"loss-head"}
    assert chosen.levers_first == ("offload",)
    assert "DistributedDataParallelKwargs(find_unused_parameters=False)" in said
    _, (said,) = for_replicas("balanced", MODEL, accelerator(UNUSED), arguments(None))
    assert "If every parameter takes part in every step, make the trainer with ddp_find_unused_parameters=False" in said


@pytest.mark.parametrize(
    ("strategy", "made", "model"),
    [
        ("balanced", accelerator(DistributedDataParallelKwargs()), MODEL),
        ("huggingface", accelerator(UNUSED), MODEL),  # which does not use it
        ("balanced", accelerator(UNUSED), tiny.vit()[0]),  # which has no logits to speak of
    ],
)
def test_nothing_is_said_where_nothing_is_lost(strategy: str, made: Any, model: Any) -> None:
    assert for_replicas(strategy, model, made) == (strategy, ())


@pytest.fixture(scope="module")
def in_chunks() -> memplan.Plan:
    model, batch = wide(), tiny.tokens(8, 64)
    chunks = Strategy("chunks", objective="peak", levers=("loss-head",))
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, strategy=chunks, micro_batch=BATCH, effective_batch=BATCH)
    assert any(option.startswith("chunked") for option in plan.decisions.values())
    return plan


def wide() -> Any:
    return tiny.llama(layers=2, vocab_size=2048)[0]


def test_a_plan_that_was_made_elsewhere_is_refused(in_chunks: memplan.Plan) -> None:
    refuse_copied(in_chunks, accelerator(None))
    refuse_copied(in_chunks.model_copy(update={"decisions": {"lm_head": "keep"}}), accelerator(UNUSED))
    with pytest.raises(PlanMismatch, match=r"in chunks, and .*find_unused_parameters=True.* without a file"):
        refuse_copied(in_chunks, accelerator(UNUSED))


def prepared(**settings: Any) -> Any:
    with fresh_accelerate():
        own = Accelerator(cpu=True)
        attach(own, **settings)
        model = wide()
        loader = DataLoader(Texts(16), batch_size=BATCH, collate_fn=padded)
        own.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        return own


def test_prepare_asks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_chunks: memplan.Plan
) -> None:
    monkeypatch.setattr(replicas, "copying", lambda *_: "find_unused_parameters")
    plan = prepared(gpu="cpu:1GiB", micro_batch=BATCH).memplan.plan
    assert not any(option.startswith("chunked") for option in plan.decisions.values())
    assert any(line.startswith("the loss is not computed in chunks") for line in plan.assumptions)
    assert "the loss is not computed in chunks" in capsys.readouterr().err
    with pytest.raises(DoesNotFit, match="the loss is not computed in chunks"):
        prepared(gpu="cpu:2MiB", micro_batch=BATCH)
    in_chunks.save(tmp_path / "plan.json")
    with pytest.raises(PlanMismatch, match="computes the loss in chunks"):
        prepared(plan=str(tmp_path / "plan.json"))
