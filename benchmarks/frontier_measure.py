"""The real runs behind `frontier.py`, each kind in a process of its own: a request in JSON in, lines of JSON out.

    python frontier_measure.py '{"do": "peak", "workload": "W1", "setting": "full", "threads": 1, "plans": "build/..."}'

A peak has a process to itself, so that nothing of another setting is alive in it. Times are taken in one process for
all settings of a workload, switched on one live model. What fails is answered by a line with `error`; the rest goes on.
"""

import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import torch
import workloads
from accuracy import meter
from steps import make_optimizer, make_step
from torch import nn

import memplan
from memplan.device import resolve_gpu
from memplan.errors import DoesNotFit
from memplan.meter import reachable_storages
from memplan.optimizer_step import PLAIN
from memplan.plan_record import Verdict
from memplan.recipe import Recipe
from memplan.samples import Sample
from memplan.session import Session
from memplan.strategy import LEVERS, load_strategy

NONE = "none"  # no checkpointing: the unit of all times
TINY = "tiny"  # a workload for trying the benchmark itself
COMPILED = "compile "  # followed by the budget
UNIT_EVERY = 4  # the unit is run anew after so many other settings, for a busy machine drifts
SMALLEST_TRIES = 3

Answer = dict[str, Any]


def build(workload: str) -> tuple[nn.Module, workloads.Batch]:
    """A workload of `workloads.py`, or the tests' Llama."""
    if workload != TINY:
        return workloads.build(workload)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny  # type: ignore[import-not-found]  # beside the tests

    made: tuple[nn.Module, workloads.Batch] = tiny.llama(rows=4, length=64, use_cache=False)
    return made


def plan_file(plans: str, workload: str, setting: str) -> Path:
    """Where the plan of a setting is kept between the processes."""
    return Path(plans) / workload / f"{setting.replace('/', '-').replace(' ', '-')}.json"


class Bench:
    """One live model that is switched from setting to setting."""

    def __init__(self, workload: str, plans: str) -> None:
        self.workload, self.plans = workload, plans
        self.model, self.batch = build(workload)
        self.optimizer = make_optimizer(self.model)  # one for all settings: a plan may make it step otherwise
        self.rows = next(iter(self.batch.values())).shape[0]
        self._steps: dict[tuple[int, int], Callable[[], None]] = {}

    def switch(self, setting: str) -> tuple[Callable[[], None], Callable[[], object], Callable[[], None]]:
        """Its step of a whole batch, one forward of it, and how to take the setting out again."""
        sizes = (self.rows, 1)
        if setting == NONE:
            undo: Callable[[], None] = _nothing
        elif setting in peers.PEERS:
            undo = peers.PEERS[setting](self.model)
        elif setting.startswith(COMPILED):
            undo = peers.compiled(self.model, float(setting.removeprefix(COMPILED)))
        else:
            plan = memplan.Plan.load(plan_file(self.plans, self.workload, setting))
            fit = memplan.apply(self.model, plan, optimizer=self.optimizer)
            undo, sizes = fit.undo, (plan.micro_batch, plan.accumulation)
        micro = {name: tensor[: sizes[0]].clone() for name, tensor in self.batch.items()}
        if sizes not in self._steps:
            self._steps[sizes] = make_step(self.model, micro, optimizer=self.optimizer, accumulation=sizes[1])
        return self._steps[sizes], lambda: self.model(**micro), undo


def peak(workload: str, setting: str, plans: str) -> Iterator[Answer]:
    """`peak`: most bytes alive in a steady step. `static`: bytes of weights, optimizer state and batch."""
    bench = Bench(workload, plans)
    step, _, _ = bench.switch(setting)
    bench.batch = {}  # the step has the micro-batch that it needs
    measured = meter()(step)
    gc.collect()
    yield {"setting": setting, "peak": measured, "static": sum(reachable_storages().values())}


def plan(workload: str, budgets: dict[str, tuple[int, bool]], plans: str) -> Iterator[Answer]:
    """A plan for each budget in bytes, with the micro-batch fixed or (True) the batch left to be split."""
    model, batch = build(workload)
    recipe = Recipe(optimizer=make_optimizer(model))
    session = Session(model, Sample.of(batch), recipe, *resolve_gpu("cpu"))
    for setting, (budget_bytes, split) in budgets.items():
        begin = time.perf_counter()
        try:
            found = _planned(session, budget_bytes, split)
        except memplan.MemplanError as error:
            yield _failed(setting, error)
            continue
        seconds = time.perf_counter() - begin
        path = plan_file(plans, workload, setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        names = ("smallest_bytes", "peak_bytes", "slowdown", "samples_per_s", "verdict", "times", "stepping")
        entry = {name: getattr(found, name) for name in (*names, "micro_batch", "accumulation")}
        entry["budget_bytes"] = found.budget.total_bytes
        entry["smallest_bytes"] += found.budget.margin_bytes  # of a budget so much is kept free
        # An option's name means something within its plan only, so that plans are compared by what is dropped.
        entry["decisions"] = {path: found.selections.get(o, o) for path, o in found.decisions.items()}
        yield {"setting": setting, "plan": entry | {"options": _options(found), "planning_s": round(seconds, 1)}}


def _options(plan: memplan.Plan) -> dict[str, int]:
    """How many modules take each option; of a block that drops a part, how much of what autograd saves is held."""
    held = {
        layer.option: f"{layer.option} ({layer.held_bytes / layer.keep_bytes:.0%} held)"
        for layer in plan.layers
        if layer.option in plan.selections and layer.keep_bytes
    }
    counts = dict(Counter(held.get(option, option) for option in plan.decisions.values()))
    return counts if plan.stepping == PLAIN else counts | {plan.stepping: 1}


def _planned(session: Session, budget_bytes: int, split: bool) -> memplan.Plan:
    """The smallest budget that a plan promises may miss the plan's own trace by a little: then that is the smallest.

    Every lever may be used: this step clips no gradients, so it may be taken inside the backward.
    """
    rows, strategy = session.sample.batch_size, replace(load_strategy("balanced"), levers=LEVERS)
    sizes = {"effective_batch": rows, "micro_batch": None if split else rows}
    for _ in range(SMALLEST_TRIES):
        found = session.within(budget_bytes).plan(strategy, **sizes)
        if found.verdict is Verdict.FITS:
            return found
        budget_bytes = max(found.smallest_bytes + found.budget.margin_bytes, budget_bytes + 1)
    raise DoesNotFit(found.reason, found.smallest_bytes)


def laps(workload: str, settings: list[str], rounds: int, plans: str) -> Iterator[Answer]:
    """`round`: (setting, CPU seconds of a whole step) in the order in which they were run. The first one warms up.

    After each switch one forward runs uncounted: a lever may prepare itself in the first that it sees.
    """
    bench = Bench(workload, plans)
    order = random.Random(time.time_ns())  # where in a round a setting stands must not matter
    others = [setting for setting in settings if setting != NONE]
    for turn in range(rounds + 1):
        order.shuffle(others)
        done = []
        for setting in _with_units(others):
            try:
                done.append((setting, _lap(bench, setting)))
            except Exception as error:  # a peer that does not run is part of the answer
                others = [other for other in others if other != setting]
                yield _failed(setting, error)
        if turn:
            yield {"round": done}


def _with_units(settings: list[str]) -> list[str]:
    order = [NONE]
    for at, setting in enumerate(settings, start=1):
        order += [setting, NONE] if at % UNIT_EVERY == 0 or at == len(settings) else [setting]
    return order


def _lap(bench: Bench, setting: str) -> float:
    step, forward, undo = bench.switch(setting)
    try:
        if setting != NONE:
            forward()
        gc.collect()
        begin = time.process_time()
        step()
        return round(time.process_time() - begin, 4)
    finally:
        undo()
        for parameter in bench.model.parameters():
            parameter.grad = None  # a step that failed leaves some


def _failed(setting: str, error: Exception) -> Answer:
    return {"setting": setting, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _nothing() -> None:
    """What there is to undo where nothing was done."""


KINDS: dict[str, Callable[..., Iterator[Answer]]] = {"peak": peak, "plan": plan, "laps": laps}


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    answers = KINDS[request.pop("do")](**request)
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except Exception as error:  # a setting that cannot be measured must not end the whole run
            if "setting" not in request:
                raise
            answer = _failed(request["setting"], error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
