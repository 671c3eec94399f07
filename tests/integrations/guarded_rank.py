"""One of two replicas that train under a guard, through every scenario in turn: what came of each, as JSON to a file.

python tests/integrations/guarded_rank.py RANK STORE FILE, where STORE is a file that both share.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from guarding import Fault, Faulty, Loop, batches, differences, out_of_memory, plans_for, state_of, texts
from two_ranks import leave

import memplan
from memplan.device import CpuDevice
from memplan.guard import Guard

PATIENCE_S, SHORT_S = 60.0, 5.0
GOOD_STEPS = 3


class Scene:
    """A fresh model, replica, guard and data for one scenario."""

    def __init__(self, rank: int, *, guarded: bool = True, last_plan: int = 3, patience_s: float = PATIENCE_S) -> None:
        self.rank, self.model = rank, texts()
        self.optimizer = Faulty(self.model.parameters(), lr=1e-2)
        self.plans = plans_for(self.model, replicas=2)[:last_plan]
        fit = memplan.apply(self.model, self.plans[0]) if guarded else None
        self.replica = DistributedDataParallel(self.model)
        self.guard = None
        if fit is not None:
            self.guard = Guard(fit, self.optimizer, self.plans, replica=self.replica, patience_s=patience_s)
        torch.manual_seed(1 + rank)
        self.loop = Loop(self.model, self.optimizer, self.guard, called=self.replica)
        self.data = batches(12)[rank::2]

    def ends(self) -> dict[str, Any]:
        loop, guard = self.loop, self.guard
        return {
            "weights": torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist(),
            "buffers": torch.cat([b.flatten() for b in self.model.buffers()]).tolist(),
            "losses": loop.losses,
            "fetched": loop.fetched,
            "falls": [] if guard is None else guard.falls,
            "plan": None if guard is None else self.plans.index(guard.plan),
        }

    def error(self, body: Callable[[], object]) -> dict[str, Any]:
        """What `body` raises, and how far the state then is from what it was before."""
        before = state_of(self.model, self.optimizer)
        try:
            body()
        except Exception as error:
            after = state_of(self.model, self.optimizer)
            off = differences(after, before) if len(after) == len(before) else None  # else gradients were left
            return {"error": f"{type(error).__name__}: {error}", "notes": getattr(error, "__notes__", []), "off": off}
        return {"error": None}


def trained(rank: int, *faults: tuple[int, Fault], guarded: bool = True) -> dict[str, Any]:
    scene = Scene(rank, guarded=guarded)
    with ExitStack() as stack:
        for on, fault in faults:
            if on == rank:
                stack.enter_context(fault.on(scene.model))
        scene.loop.train(scene.data)
    return scene.ends()


def optimizer(rank: int, good: int) -> dict[str, Any]:
    scene = Scene(rank)
    scene.loop.train(scene.data[:good])
    if rank == 1:
        scene.optimizer.fails = (scene.optimizer.calls + 1,)
    scene.loop.train(scene.data[good:])
    return scene.ends()


def evaluation(rank: int) -> dict[str, Any]:
    scene = Scene(rank)
    assert scene.guard is not None
    asked = []

    def evaluate(rows: int) -> None:
        asked.append(rows)
        if rank == 1 and rows > 2:
            out_of_memory()

    scene.loop.train(scene.data[:2])
    scene.guard.evaluate(evaluate, 8)
    scene.loop.train(scene.data[2:])
    return scene.ends() | {"asked": asked}


def gathering_evaluation(rank: int) -> dict[str, Any]:
    """Ranks wait for each other behind each of its parts; the second one runs out in its second."""
    scene = Scene(rank)
    guard = scene.guard
    assert guard is not None
    asked = []

    def evaluate(rows: int) -> float:
        asked.append(rows)
        found = torch.zeros(())
        for at in range(8 // rows):

            def part(at: int = at) -> torch.Tensor:
                if rank == 1 and rows == 4 and at == 1:
                    out_of_memory()
                return torch.tensor(float(rank + at))

            own = guard.evaluate_part(part)
            dist.all_reduce(own)
            found += own
        return found.item()

    scene.loop.train(scene.data[:2])
    found = guard.evaluate(evaluate, 4)
    scene.loop.train(scene.data[2:])
    return scene.ends() | {"asked": asked, "found": found}


def broken_evaluation(rank: int) -> dict[str, Any]:
    """The second rank fails of something else in a part, and the first one does not wait for it."""
    scene = Scene(rank)
    guard = scene.guard
    assert guard is not None

    def part() -> torch.Tensor:
        if rank == 1:
            raise KeyError("of rank 1")
        return torch.zeros(())

    def evaluate(_: int) -> None:
        dist.all_reduce(guard.evaluate_part(part))

    return scene.error(lambda: guard.evaluate(evaluate, 4))


def nearly(rank: int) -> dict[str, Any]:
    """Rank 1 has a retry in its second step; all learn of it in the third."""
    scene, own = Scene(rank), CpuDevice.pressure
    used, retries = [], 0
    CpuDevice.pressure = lambda _: (retries, 0)
    try:
        for at, batch in enumerate(scene.data):
            retries = int(rank == 1 and at >= 1)
            scene.loop.train([batch])
            used.append(scene.ends()["plan"])
    finally:
        CpuDevice.pressure = own
    return scene.ends() | {"used": used}


def the_end(rank: int) -> dict[str, Any]:
    scene = Scene(rank, last_plan=2)
    scene.loop.train(scene.data[:2])
    with ExitStack() as stack:
        if rank == 1:
            stack.enter_context(Fault("backward", 1, times=99).on(scene.model))
        return scene.error(lambda: scene.loop.train(scene.data[2:]))


def another_error(rank: int) -> dict[str, Any]:
    scene = Scene(rank)
    assert scene.guard is not None

    def broken() -> None:
        raise KeyError("of rank 1")

    step = broken if rank == 1 else lambda: scene.loop.step(scene.data[0])
    return scene.error(lambda: scene.guard.step(step))  # type: ignore[union-attr]


def too_late(rank: int) -> dict[str, Any]:
    """Rank 1 runs out between the exchange and the optimizer's step, when rank 0 has gone on."""
    scene = Scene(rank)
    guard = scene.guard
    assert guard is not None

    def step() -> None:
        scene.replica(scene.data[0]).backward()
        guard.exchange()
        if rank == 1:
            out_of_memory()
        scene.optimizer.step()
        scene.optimizer.zero_grad(set_to_none=True)

    def run() -> None:
        guard.step(step)
        guard.step(step)

    return scene.error(run)


def forgotten_exchange(rank: int) -> dict[str, Any]:
    scene = Scene(rank)
    assert scene.guard is not None

    def step() -> None:
        scene.replica(scene.data[0]).backward()
        scene.optimizer.step()

    return scene.error(lambda: scene.guard.step(step))  # type: ignore[union-attr]


def another_number(rank: int) -> dict[str, Any]:
    scene = Scene(rank, guarded=False)
    plans = plans_for(scene.model)
    fit = memplan.apply(scene.model, plans[0])
    return scene.error(lambda: Guard(fit, scene.optimizer, plans, replica=scene.replica, patience_s=PATIENCE_S))


def silent(rank: int) -> dict[str, Any]:
    """Rank 1 says nothing for longer than the others wait."""
    scene = Scene(rank, patience_s=SHORT_S)
    scene.loop.train(scene.data[:1])
    if rank == 1:
        time.sleep(3 * SHORT_S)
        return {}
    begun = time.monotonic()
    return scene.error(lambda: scene.loop.train(scene.data[1:2])) | {"seconds": time.monotonic() - begun}


def different_plans(rank: int) -> dict[str, Any]:
    scene = Scene(rank, guarded=False)
    fit, plans = memplan.apply(scene.model, scene.plans[0]), scene.plans[: 2 + rank]
    return scene.error(lambda: Guard(fit, scene.optimizer, plans, replica=scene.replica, patience_s=PATIENCE_S))


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda rank: trained(rank, guarded=False),
    "well": trained,
    "forward": lambda rank: trained(rank, (1, Fault("forward", 2))),
    "backward": lambda rank: trained(rank, (1, Fault("backward", 2))),
    "forward, later": lambda rank: trained(rank, (1, Fault("forward", 2 * GOOD_STEPS + 2))),
    "backward, later": lambda rank: trained(rank, (1, Fault("backward", 2 * GOOD_STEPS + 1))),
    "both": lambda rank: trained(rank, (0, Fault("backward", 3)), (1, Fault("forward", 4))),
    "optimizer": lambda rank: optimizer(rank, 0),
    "optimizer, later": lambda rank: optimizer(rank, GOOD_STEPS),
    "evaluation": evaluation,
    "gathering evaluation": gathering_evaluation,
    "broken evaluation": broken_evaluation,
    "nearly": nearly,
    "the end": the_end,
    "another error": another_error,
    "too late": too_late,
    "forgotten exchange": forgotten_exchange,
    "different plans": different_plans,
    "another number": another_number,
    "silent": silent,
}


def main() -> None:
    rank, store, file = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    warnings.simplefilter("ignore")
    wait = timedelta(seconds=PATIENCE_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    file.write_text(json.dumps({name: scenario(rank) for name, scenario in SCENARIOS.items()}))


if __name__ == "__main__":
    try:
        main()
    finally:
        leave()
