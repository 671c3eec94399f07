"""The process behind `cuda.py` and `cuda_accuracy.py`: requests in JSON, a line each, in; lines of JSON out.

    echo '{"do": "run", "task": "mistral-7b int8", "setting": "none"}' | python cuda_measure.py --card cuda

On a card each request has a process of its own, so that nothing of another setting lies in its allocator. An answer
with `done` ends each request; what fails is answered by `error`, with `oom` if it was the memory.
"""

import argparse
import gc
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_cases
import torch
from cuda_card import Card, card_of, versions
from cuda_models import TASKS, Task, build, tiny
from cuda_report import AT_FULL, CAPPED, FULL, FULL_CAPPED
from cuda_step import Answer, checkpointed, failed, is_out_of_memory, sizes_of, step_of, taken
from peers import Undo
from torch import nn
from workloads import Batch, token_batch

import memplan
from memplan.errors import DoesNotFit
from memplan.plan_record import Plan, Verdict
from memplan.strategy import LEVERS, load_strategy

TRIES = 5  # batches that full checkpointing may try under the cap, beside half of the best
SMALLEST_TRIES = 3  # at a plan for a measured peak
NEAR = 0.06  # of its batch: no nearer is the largest one looked for


class Bench:
    """A task's live model on the card, with the optimizer that trains it."""

    def __init__(self, card: Card, task: Task) -> None:
        self.card, self.task = card, task
        self.model, self.batch = build(task, card.device.torch_device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        made = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}
        self.optimizer: torch.optim.Optimizer = made[task.optimizer](trained)
        self.card.set_cap(None)  # gives back what quantising left in the cache

    @property
    def asked(self) -> dict[str, Any]:
        """How memplan is told of the step. Levers on the optimizer want the live one; plan files know names only."""
        optimizer = self.optimizer if self.task.method == "full" else self.task.optimizer
        return {"optimizer": optimizer, "autocast": self.task.autocast}

    def batch_of(self, rows: int) -> Batch:
        made = token_batch(rows, self.task.length, self.task.sizes.vocab)
        return {name: tensor.to(self.card.device.torch_device) for name, tensor in made.items()}

    def step_of(self, rows: int, accumulation: int = 1) -> Callable[[], None]:
        """One optimizer step over that many micro-batches of `rows` samples."""
        return step_of(self.model, self.batch_of(rows), self.optimizer, self.task.autocast, accumulation)

    def predicted(self, rows: int, accumulation: int = 1) -> dict[str, int | None]:
        """Of the model as it runs now."""
        batch, gpu = self.batch_of(rows), self.card.gpu
        return sizes_of(memplan.predict(self.model, batch, accumulation=accumulation, gpu=gpu, **self.asked))

    def planned(self, budget_bytes: int, rows: int | None) -> Plan:
        """The plan for a budget. DoesNotFit where there is none.

        `rows` fixes the micro-batch. Then the budget is another setting's measured peak, and where the prediction is
        above what would be measured, so is the smallest budget that has a plan: that one is taken. With None, the
        planner takes the best micro-batch, and the budget is what it is.
        """
        strategy = load_strategy("balanced")
        if self.task.method == "full":  # nothing clips gradients here, so they may be used up in the backward
            strategy = replace(strategy, levers=LEVERS)
        for _ in range(SMALLEST_TRIES):
            gpu, shared = self.card.asked(budget_bytes, strategy)
            plan = memplan.plan(self.model, gpu, sample=self.batch, micro_batch=rows, strategy=shared, **self.asked)
            if plan.verdict is not Verdict.DOES_NOT_FIT:
                return plan
            if rows is None:
                break
            budget_bytes = max(plan.smallest_bytes, budget_bytes + 1)
        raise DoesNotFit(plan.reason, plan.smallest_bytes)


def about_plan(plan: Plan) -> Answer:
    """What the table says of a plan."""
    options: dict[str, int] = {}
    for option in plan.decisions.values():
        kind = "in part" if option in plan.selections else option
        options[kind] = options.get(kind, 0) + 1
    names = ("verdict", "peak_bytes", "budget_bytes", "step_s", "slowdown", "times", "stepping", "host_bytes")
    return {name: getattr(plan, name) for name in names} | {"options": options}


# --- what can be asked for ------------------------------------------------------------------------------------------


def facts(card: Card) -> Iterator[Answer]:
    """The card, the driver, the versions, and the cap of the card that is acted."""
    yield {"facts": card.facts(), "cap_bytes": card.cap_bytes}


def run(card: Card, task: Task, setting: str, budget: int | None = None, plan: str = "") -> Iterator[Answer]:
    """One setting alone: measured, then predicted. `plan` is the file for a setting of memplan."""
    bench, rows, accumulation = Bench(card, task), task.rows, 1
    cap = card.cap_bytes if setting in (CAPPED, FULL_CAPPED) else None
    if setting == FULL_CAPPED:
        yield from _best_under_cap(bench, card.cap_bytes)
        return
    found = None
    if setting == FULL:
        checkpointed(bench.model)
    elif setting in (AT_FULL, CAPPED):
        fixed = task.rows if setting == AT_FULL else None
        found = bench.planned(card.acted_bytes() if budget is None else budget, fixed)
        Path(plan).parent.mkdir(parents=True, exist_ok=True)
        found.save(plan)
        rows, accumulation = found.micro_batch, found.accumulation
        yield {"plan": about_plan(found)}  # also of one that then does not run
        memplan.apply(bench.model, found)
        gc.collect()
    card.set_cap(cap)
    measured = taken(card, bench.step_of(rows, accumulation))
    card.set_cap(None)
    yield measured | {"micro_batch": rows, "accumulation": accumulation}
    if found is not None and found.stepping != "plain":  # `predict` sees no optimizer that steps otherwise
        yield {"predicted": {"peak": found.peak_bytes, "reserved": found.reserved_bytes, "fits": found.fits_bytes}}
    else:
        yield {"predicted": bench.predicted(rows, accumulation)}


def _best_under_cap(bench: Bench, cap: int) -> Iterator[Answer]:
    """Full checkpointing with the batch that gives it most samples per second under the cap, from real runs.

    Tried first is the largest batch by prediction, then up while it runs without retries, or down until it does; and
    half of the largest that ran.
    """
    checkpointed(bench.model)
    points = [bench.predicted(rows) for rows in (2, 4)]
    needed = [point["fits"] or point["peak"] or 0 for point in points]
    rows = guess = max(1, 2 + (cap - needed[0]) * 2 // max(1, needed[1] - needed[0]))
    near, tried = max(1, int(guess * NEAR)), dict[int, Answer]()
    while rows not in tried and len(tried) < TRIES:
        tried[rows] = _tried(bench, rows, cap)
        low = max((n for n, answer in tried.items() if _runs(answer)), default=0)
        high = min((n for n, answer in tried.items() if n > low), default=None)
        if high is None:
            rows = low + near
        elif high - low > near or low == 0:
            rows = (low + high) // 2 if low else max(1, high - max(near, high // 8))
        else:
            break
    half = (low + 1) // 2
    if low > 1 and half not in tried:
        tried[half] = _tried(bench, half, cap)
    bench.card.set_cap(None)
    good = {n: answer for n, answer in tried.items() if _runs(answer)}
    tries = {n: "runs" if n in good else answer.get("error", "retries") for n, answer in sorted(tried.items())}
    if not good:
        yield {"error": f"no batch runs under the cap: {tries}", "oom": True, "kind": "OutOfMemoryError"}
        return
    best = max(good, key=lambda n: n / min(good[n]["seconds"]))
    yield {**good[best], "micro_batch": best, "accumulation": 1, "tries": tries}
    yield {"predicted": bench.predicted(best)}


def _tried(bench: Bench, rows: int, cap: int) -> Answer:
    bench.card.set_cap(cap)
    try:
        return taken(bench.card, bench.step_of(rows), laps=2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer = failed(error)
    # Outside `except`, whose traceback holds what the step held. Autograd keeps a backward that failed until the next.
    torch.zeros((), device=bench.card.device.torch_device, requires_grad=True).backward()
    for parameter in bench.model.parameters():
        parameter.grad = None
    gc.collect()
    return answer


def _runs(answer: Answer) -> bool:
    return "error" not in answer and answer["retries"] == 0


def laps(card: Card, task: Task, settings: dict[str, Answer], rounds: int, capped: bool) -> Iterator[Answer]:
    """`round`: (setting, seconds of a whole step), in an order drawn anew each round, on one live model.

    `settings` gives micro_batch, accumulation and, of a setting of memplan, the plan's file. Each step is timed after
    one that fills the allocator's cache again.
    """
    bench, order = Bench(card, task), random.Random(0)
    names = list(settings)
    for _ in range(rounds):
        order.shuffle(names)
        done = []
        for name in names:
            rows, accumulation = settings[name]["micro_batch"], settings[name]["accumulation"]
            undo = _switched(bench.model, name, settings[name].get("plan_file"))
            card.set_cap(card.cap_bytes if capped else None)
            step = bench.step_of(rows, accumulation)
            card.device.seconds_of(step, 1)
            done.append((name, round(card.device.seconds_of(step, 1)[0], 5)))
            undo()
            del step
            gc.collect()
        yield {"round": done}


def _switched(model: nn.Module, setting: str, plan_file: str | None) -> Undo:
    if plan_file:
        return memplan.apply(model, Plan.load(plan_file)).undo
    return checkpointed(model) if setting in (FULL, FULL_CAPPED) else lambda: None


REQUESTS: dict[str, Callable[..., Iterator[Answer]]] = {
    "facts": facts,
    "run": run,
    "laps": laps,
    "case": cuda_cases.case,
    "cap": cuda_cases.capped,
}


def answers(request: Answer, kind: str) -> Iterator[Answer]:
    """All answers to one request; the last one has `done`."""
    request = dict(request)
    do, fails_at = request.pop("do"), request.pop("fails_at", None)
    try:
        if "task" in request:
            task = TASKS[request["task"]]
            request["task"] = tiny(task) if kind == "fake" else task
        card = card_of(kind, fails_at)  # type: ignore[arg-type]  # argparse lets nothing else in
        yield from REQUESTS[do](card, **request)
    except Exception as error:  # one that fails must not end the others
        yield failed(error)
    yield {"done": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=("cuda", "fake"), required=True)
    args = parser.parse_args()
    print(json.dumps({"ready": versions()}), flush=True)
    for line in sys.stdin:
        for answer in answers(json.loads(line), args.card):
            print(json.dumps(answer), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
