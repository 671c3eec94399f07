"""Run by two processes (`torch.distributed.run`): trainers whose memory runs out on the second, what came of each.

python -m torch.distributed.run --nproc_per_node=2 guarded_trainer_rank.py FOLDER
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
import transformers
from guarding import Fault, out_of_memory
from two_ranks import leave

import memplan
from integrations import trainers
from memplan.integrations import trainer_guard

KEEP = memplan.Strategy("blocks", levers=("recompute",))  # in 1 GiB nothing is recomputed
RANK = int(os.environ["RANK"])


class Watch(transformers.TrainerCallback):
    """Whether replicas exchange by themselves, at the end of each step."""

    def __init__(self) -> None:
        self.by_themselves: list[bool] = []

    def on_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.by_themselves.append(self.trainer.model_wrapped.require_backward_grad_sync)


def ran(
    folder: Path, *faults: Fault, worth: float = math.inf, micro_batch: int = 2, again: bool = False
) -> dict[str, Any]:
    trainer_guard.WORTH = worth
    torch.manual_seed(0)
    model = tiny.llama(3, attention_dropout=0.2)[0]
    asked = {"train_dataset": trainers.dataset(64), "ddp_backend": "gloo", "max_grad_norm": 0.5, "num_train_epochs": 1}
    made = trainers.trainer(folder, model, **asked)
    watch = Watch()
    watch.trainer = made
    made.add_callback(watch)
    fit = memplan.autofit(made, "cpu:1GiB", micro_batch=micro_batch, strategy=KEEP)
    assert not fit.plan.changed
    made.add_callback(trainers.Begins(*faults))
    torch.manual_seed(1 + RANK)
    try:
        run = trainers.Run.of(made)
        run = trainers.Run.of(made) if again else run
    except Exception as error:  # what it is, is what is looked at
        weights = torch.cat([p.detach().flatten() for p in made.model.parameters()])
        return {
            "error": f"{type(error).__name__}: {error}",
            "notes": getattr(error, "__notes__", []),
            "weights": weights.tolist(),
            "gradients": sum(p.grad is not None for p in made.model.parameters()),
        }
    return {
        "weights": torch.cat([weight.flatten() for weight in run.weights.values()]).tolist(),
        "logged": run.logged,
        "by themselves": watch.by_themselves,
        "changed": len(fit.plan.changed),
        "said": fit.plan.assumptions,
        "divided": (fit.plan.micro_batch, fit.plan.accumulation),
    }


def on(rank: int, where: str, at: int, times: int = 1) -> tuple[Fault, ...]:
    return (Fault(where, at, times),) if rank == RANK else ()


def evaluated(folder: Path, *faults: int) -> dict[str, Any]:
    """A run that evaluates after each of two epochs, and runs out in some of its evaluations' batches."""
    trainer_guard.WORTH = math.inf
    torch.manual_seed(0)
    model = tiny.llama(3, attention_dropout=0.2)[0]
    asked = {"eval_dataset": trainers.dataset(24), "per_device_eval_batch_size": 4, "eval_strategy": "epoch"}
    made = trainers.trainer(folder, model, train_dataset=trainers.dataset(32), ddp_backend="gloo", **asked)
    fit = memplan.autofit(made, "cpu:1GiB", micro_batch=4, strategy=KEEP)
    own, seen = made.compute_loss, []

    def compute_loss(model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            seen.append(len(inputs["input_ids"]))
            if len(seen) in faults:
                out_of_memory()
        return own(model, inputs, *args, **kwargs)

    made.compute_loss = compute_loss
    torch.manual_seed(1 + RANK)
    run = trainers.Run.of(made)
    return {
        "weights": torch.cat([weight.flatten() for weight in run.weights.values()]).tolist(),
        "logged": run.logged,
        "rows": seen,
        "changed": len(fit.plan.changed),
        "put back": made.compute_loss is compute_loss,
    }


def sft(folder: Path) -> dict[str, Any]:
    """Its forwards wait for the other ranks, so that it is left alone, and says so."""
    asked = {"train_dataset": trainers.dataset(32), "ddp_backend": "gloo", "num_train_epochs": 1}
    made = trainers.sft_trainer(folder, **asked)
    memplan.autofit(made, "cpu:1GiB", micro_batch=4, strategy=KEEP)
    said: list[str] = []
    log = logging.getLogger(trainer_guard.__name__)
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: said.append(record.getMessage()) or True)
    made.train()
    return {"said": said, "steps": made.state.global_step}


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "left alone": lambda folder: ran(folder, worth=0.0),
    "well": ran,
    # Four micro-batches a step: the second step's third, the third step's last, and two at once.
    "forward": lambda folder: ran(folder, *on(1, "forward", 7)),
    "backward": lambda folder: ran(folder, *on(1, "backward", 12)),
    "both": lambda folder: ran(folder, *on(0, "forward", 6), *on(1, "backward", 7)),
    "again": lambda folder: ran(folder, *on(1, "forward", 2, 2)),
    "later decided": lambda folder: ran(folder, *on(1, "forward", 7), worth=0.0),
    "twice": lambda folder: ran(folder, *on(1, "forward", 7), again=True),
    "whole": lambda folder: ran(folder, micro_batch=8),
    "whole, backward": lambda folder: ran(folder, *on(1, "backward", 2), micro_batch=8),
    "evaluated": evaluated,
    "evaluated, out of memory": lambda folder: evaluated(folder, *((5,) if RANK == 1 else ())),
    "sft": sft,
    "the end": lambda folder: ran(folder, *on(1, "forward", 7, 10_000)),
    "well afterwards": ran,
}


def main() -> None:
    folder = Path(sys.argv[1])
    seen = {name: scenario(folder / "out") for name, scenario in SCENARIOS.items()}
    (folder / f"{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
