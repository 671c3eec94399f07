"""Run by two processes (`torch.distributed.run`): the training script under FSDP2, with and without memplan.

python -m torch.distributed.run --standalone --nproc_per_node=2 sharded_rank.py FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from collectives import without_copies
from two_ranks import leave

import memplan
from integrations.peaks import peaks_of
from integrations.scripts import Texts, fresh_accelerate, train

PLUGIN, HALF_PLUGIN = memplan.MemplanFSDPPlugin(), memplan.MemplanFSDPPlugin()
HALF_PLUGIN.set_mixed_precision("bf16")  # as Accelerate does where there are cards
ROWS = 21  # for two ranks and batches of 8: ragged
SPLIT = {"gpu": "cpu:640KiB", "micro_batch": 2, "strategy": "huggingface"}
WHOLE = {"gpu": "cpu:1300KiB", "micro_batch": 8}
WHOLE_OF_HALF = {"gpu": "cpu:1000KiB", "micro_batch": 8}
WIDE = {"gpu": "cpu:16MiB", "micro_batch": 2}


def sparse() -> Texts:
    """Half of the rows of one token, which nothing predicts: some micro-batches have no label that counts."""
    texts = Texts(ROWS)
    texts.rows[: ROWS // 2] = [row[:1] for row in texts.rows[: ROWS // 2]]
    return texts


def as_on_cards(accelerator: Accelerator, then: Callable[[Accelerator], object] | None = None) -> None:
    """Accelerate leaves its FSDP plugin out where there are no cards."""
    plugin = PLUGIN if accelerator.mixed_precision == "no" else HALF_PLUGIN
    for state in (accelerator.state, PartialState()):  # the one is made like the other every now and then
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if then is not None:
        then(accelerator)


def trained(model: str, wishes: dict[str, Any] | None, precision: str = "no", **options: Any) -> dict[str, Any]:
    line = partial(as_on_cards, then=None if wishes is None else partial(memplan.attach, **wishes))
    ran = train(line, rows=ROWS, model=model, accelerator={"mixed_precision": precision}, **options)
    return {
        "weights": [w.full_tensor().tolist() for w in ran.weights],  # type: ignore[attr-defined]  # they are DTensors
        "rates": ran.rates,
        "losses": ran.losses,
        "plan": None if wishes is None else ran.accelerator.memplan.plan.model_dump_json(),
    }


def peaks(precision: str) -> dict[str, int]:
    """Of a step as people write it, predicted and measured."""
    with fresh_accelerate(), without_copies():
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        as_on_cards(accelerator, partial(memplan.attach, **WIDE))
        return peaks_of(accelerator, rows=16, runs=2)


def main() -> None:
    torch.set_num_threads(1)
    ran = {
        "peaks": peaks("no"),  # first: what other runs leave behind would be counted
        "half-peaks": peaks("bf16"),
        "llama": trained("llama", None, accumulate=True, dataset=sparse()),
        "llama-planned": trained("llama", SPLIT, accumulate=True, dataset=sparse()),
        "gpt2": trained("gpt2", None),
        "gpt2-planned": trained("gpt2", WHOLE),
        "half": trained("gpt2", None, "bf16"),
        "half-planned": trained("gpt2", WHOLE_OF_HALF, "bf16"),
    }
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(ran))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
