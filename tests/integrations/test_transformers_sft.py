"""`memplan.autofit` for TRL's SFTTrainer: full, LoRA, packed, padding-free and 4-bit runs are the runs without it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl

import memplan
from integrations.test_transformers import WHOLE, check_same
from integrations.trainers import BATCH, rows, run, sft_trainer
from memplan.errors import UsageError
from memplan.integrations.trainer_data import joined, rows_of
from memplan.integrations.trainer_loss import TrainerLoss, coupling
from memplan.recipe import Recipe

# TRL 1.16 sets the old name of activation_checkpointing, which transformers 5.23 has renamed
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]

PACKED = {"packing": True, "max_length": 24, "per_device_train_batch_size": 4}
JOINED = {"padding_free": True, "max_length": None}  # on a CPU scaled-dot-product attention tells the rows apart


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": True}, PACKED, JOINED],
    ids=["full", "lora", "packed", "joined"],
)
def test_the_weights_are_those_of_the_run_without_a_plan(tmp_path: Path, changes: dict[str, Any]) -> None:
    make, used = partial(sft_trainer, tmp_path, **changes), []
    planned = run(make, lambda t: used.append((t, memplan.autofit(t, **WHOLE, micro_batch=2))))
    check_same(planned, run(make))
    ((trainer, fit),) = used
    assert fit.plan.accumulation == trainer.args.gradient_accumulation_steps > 1
    assert len(fit.plan.recomputed) == len(fit.plan.layers) == 3
    own = [r for r in trainer.state.log_history if "loss" in r]
    assert all({"mean_token_accuracy", "num_tokens"} <= r.keys() for r in own)  # TRL's averages are in TRL's records
    (record,) = (r for r in trainer.state.log_history if "memplan/peak_bytes" in r)
    assert "mean_token_accuracy" not in record
    assert 0.8 * fit.plan.peak_bytes < record["memplan/peak_bytes"] <= fit.plan.peak_bytes


def qlora(folder: Path, dtype: torch.dtype) -> trl.SFTTrainer:
    """A base in 4 bits under adapters, which TRL makes bfloat16."""
    from quantised import layers_of, quantised

    config = tiny.llama(layers=3)[0].config
    torch.manual_seed(0)
    base = quantised(config, layers_of(4, compute=torch.float32), "cpu", torch.float32)
    made = sft_trainer(folder, lora=True, model=base)
    adapters = [p for p in made.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.bfloat16}
    for parameter in adapters:
        parameter.data = parameter.data.to(dtype)
    return made


@pytest.mark.parametrize(
    ("dtype", "micro_batch", "most"), [(torch.float32, 2, 1e-5), (torch.bfloat16, BATCH, 0.0)], ids=["divided", "whole"]
)
def test_adapters_on_packed_weights_are_those_of_the_run_without_a_plan(
    tmp_path: Path, dtype: torch.dtype, micro_batch: int, most: float
) -> None:
    """bfloat16 rounds sums of other parts by more than any bound that would tell something, so that is not divided."""
    pytest.importorskip("bitsandbytes")
    make, used = partial(qlora, tmp_path, dtype), []
    planned = run(make, lambda t: used.append(memplan.autofit(t, **WHOLE, micro_batch=micro_batch)))
    check_same(planned, run(make), most)
    (fit,) = used
    assert fit.plan.micro_batch == micro_batch
    assert len(fit.plan.recomputed) == len(fit.plan.layers) == 3
    trained = {name: weight for name, weight in planned.weights.items() if "lora_B" in name}
    assert trained
    assert all(float(weight.abs().max()) > 0 for weight in trained.values())  # they begin as zeros


def test_planning_counts_no_tokens_and_takes_the_loss_without_logits(tmp_path: Path) -> None:
    made = sft_trainer(tmp_path)
    found = rows_of(made)
    batch, items = found.sample.content, TrainerLoss(made, found).items
    mine = TrainerLoss(made, found)(made.model, batch)
    assert coupling(made, found, Recipe()) is None
    assert made._total_train_tokens == 0
    assert not any(made._metrics.values())
    assert torch.equal(mine, made.compute_loss(made.model, dict(batch), num_items_in_batch=items))
    assert made._total_train_tokens > 0


@pytest.mark.parametrize("changes", [PACKED, JOINED], ids=["packed", "joined"])
def test_rows_without_padding_are_joined_as_the_collator_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = sft_trainer(tmp_path, **changes)
    found = rows_of(made)
    assert found.is_joined
    assert found.data is not None
    assert found.sample.content["input_ids"].shape == (1, found.data.tokens)
    lengths = [len(row["input_ids"]) for row in made.train_dataset]
    longest = made.train_dataset[lengths.index(max(lengths))]
    theirs = made.data_collator([longest] * 3)
    mine = joined(found.sample.resized(3).content, found.pair[1])
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(value)), name


def test_copying_everything_to_the_host_contradicts_a_plan(tmp_path: Path) -> None:
    made = sft_trainer(tmp_path, train_dataset=None)
    made.args.activation_offloading = True
    with pytest.raises(UsageError, match="activation_offloading"):
        memplan.autofit(made, **WHOLE)


def test_rows_have_unequal_lengths() -> None:
    assert len({len(row["input_ids"]) for row in rows()}) > 10
