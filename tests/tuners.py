"""Plans by hand for the tuner, and a process that works on a study of them: its trials' numbers on stdout.

python tests/tuners.py STORAGE PATIENCE [hang], where one that hangs claims a trial and does no more.
"""

import os
import sys
import time
from typing import Any

from memplan.plan_record import Budget, Layer, Measured, Plan, Verdict
from memplan.storages import storage_of
from memplan.trials import Candidate, Trials

BUDGET_BYTES = 1000
MADE_FOR = {"model": "Tower", "effective_batch": 8}
COUNT = 12
EXIT = "MEMPLAN_TEST_EXIT"


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
    """The model's loss; where the environment says so, the end of the process."""
    if os.environ.get(EXIT):
        os._exit(int(os.environ[EXIT]))
    return model(**batch).loss


def main(storage: str, patience_s: str, *hang: str) -> None:
    trials = Trials(storage_of(storage), "shared", MADE_FOR, queue, float(patience_s))
    while (trial := trials.claim(most=COUNT)) is not None:
        sys.stdout.write(f"{trial.number}\n")
        sys.stdout.flush()
        time.sleep(1e9 if hang else 0.02)
        trials.measured(trial, measured(trial.plan, 0.02, peak_bytes=BUDGET_BYTES + 1))  # so that none is let go


if __name__ == "__main__":
    main(*sys.argv[1:])
