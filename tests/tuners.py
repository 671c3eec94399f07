"""Plans by hand for the tuner, and a process that works on a study of them: its trials' numbers on stdout.

python tests/tuners.py STORAGE PATIENCE [hang | tune], where one that hangs claims a trial and does no more, and one
that tunes runs a model by the planner's plans: which trials it ran and what it found, on stdout.
"""

import json
import os
import sys
import time
from typing import Any

import torch

from memplan.plan_record import Budget, Layer, Measured, Plan, Verdict
from memplan.storages import storage_of
from memplan.trials import Candidate, Trials

BUDGET_BYTES = 1000
MADE_FOR = {"model": "Tower", "effective_batch": 8}
COUNT = 12
EXIT, SPOIL = "MEMPLAN_TEST_EXIT", "MEMPLAN_TEST_SPOIL"


def plan_of(step_s: float, micro_batch: int = 4, **changes: Any) -> Plan:
    layer = Layer(path="block", option="keep", keep_bytes=1, held_bytes=1, extra_s=0.0)
    values: dict[str, Any] = {
        "verdict": Verdict.FITS,
        "reason": "",
        "budget": Budget(gpu="cpu", total_bytes=BUDGET_BYTES, others_bytes=0, context_bytes=0, margin_bytes=0),
        "strategy": "balanced",
        "micro_batch": micro_batch,
        "accumulation": 8 // micro_batch,
        "effective_batch": 8,
        "decisions": {"block": "keep"},
        "layers": (layer,),
        "peak_bytes": 900,
        "peak_phase": "backward",
        "breakdown": {"params": 900},
        "unplanned_bytes": 900,
        "step_s": step_s,
        "samples_per_s": 8 / step_s,
        "slowdown": 0.0,
        "gap": 0.0,
        "shadow_price": 0.0,
        "times": "measured",
        "smallest_bytes": 500,
        "optimizer": "adamw",
        "autocast": None,
        "how": "fake",
        "model": "Tower",
        "signature": "0",
    }
    return Plan(**(values | changes))


def candidate(step_s: float, micro_batch: int = 4, share: float = 1.0) -> Candidate:
    return Candidate(micro_batch, share, "balanced", "any", plan_of(step_s, micro_batch))


def queue() -> list[Candidate]:
    return [candidate(0.01 * (1 + 0.01 * number)) for number in range(COUNT)]


def measured(plan: Plan, step_s: float, peak_bytes: int = 900) -> Measured:
    return Measured(
        peak_bytes=peak_bytes,
        predicted_bytes=plan.peak_bytes,
        step_s=step_s,
        predicted_s=plan.step_s,
        budget_bytes=BUDGET_BYTES,
        device="cpu",
        steps=1,
    )


def loss_or_exit(model: Any, batch: Any) -> Any:
    """The model's loss; where the environment says so, the end of the process, or no end to what becomes of weights."""
    exit_if_told()
    while os.environ.get(SPOIL):
        with torch.no_grad():
            next(iter(model.parameters())).mul_(-3)
    return model(**batch).loss


def exit_if_told() -> None:
    if os.environ.get(EXIT):
        os._exit(int(os.environ[EXIT]))


class Fuse:
    """A part of a model with which a process may end when it is handed the model."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return exit_if_told, ()


def tune(storage: str, patience_s: str) -> None:
    """Work on a study of plans that the planner makes."""
    import tiny

    from memplan import tuning

    ran: list[int] = []

    def noted(trial: Any, *others: Any) -> None:
        ran.append(trial.number)
        attempt(trial, *others)

    attempt, tuning._try = tuning._try, noted
    model, batch = tiny.llama(layers=2, use_cache=False)
    asked: dict[str, Any] = {"sample": batch, "effective_batch": 2, "budget_shares": (1.0, 0.8), "n_trials": 10**6}
    found = tuning.tune(model, "cpu:600KiB", storage=storage, patience_s=float(patience_s), **asked)
    best = {"decisions": found.plan.decisions, "measured": found.measured.model_dump()}
    sys.stdout.write(json.dumps({"ran": ran, "best": best}))


def share(storage: str, patience_s: str, *hang: str) -> None:
    """Work on a study of plans by hand."""
    trials = Trials(storage_of(storage), "shared", MADE_FOR, queue, float(patience_s))
    while (trial := trials.claim(most=COUNT)) is not None:
        sys.stdout.write(f"{trial.number}\n")
        sys.stdout.flush()
        time.sleep(1e9 if hang else 0.02)
        trials.measured(trial, measured(trial.plan, 0.02, peak_bytes=BUDGET_BYTES + 1))  # so that none is let go


if __name__ == "__main__":
    tune(*sys.argv[1:3]) if sys.argv[3:] == ["tune"] else share(*sys.argv[1:])
