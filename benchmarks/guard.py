"""What a guard costs a step in which nothing happens, on the CPU: `python benchmarks/guard.py --write`.

A plain loop and a guarded one take steps in turn, each on a model of its own with the same weights; the difference is
taken step by step, and its median is told. Times are the process's own (`time.process_time`), with one thread, so that
what else the machine does is not in them. The table is put into docs/guard.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from pages import DOCS, written
from torch import Tensor, nn
from torch.nn import functional

import memplan
from memplan.guard import Guard
from memplan.plan_record import Plan
from memplan.strategy import Strategy

ROUNDS = 40
WARM_UP = 5
VOCABULARY, LENGTH, ROWS = 1024, 64, 8


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.dropout = nn.BatchNorm1d(4 * width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.norm(self.wide(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + self.dropout(self.narrow(wide.relu()))


class Texts(nn.Module):
    """Small on purpose: what a guard does is the same for any step, so it weighs most on a short one."""

    def __init__(self, width: int = 128, blocks: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def seconds_of(body: Callable[[], object]) -> float:
    begin = time.process_time()
    body()
    return time.process_time() - begin


def paired(plain: Callable[[], object], guarded: Callable[[], object]) -> tuple[float, float]:
    """Medians of the first's seconds, and of the second's less the first's; they begin in turn."""
    for _ in range(WARM_UP):
        plain(), guarded()
    base, more = [], []
    for at in range(ROUNDS):
        first, second = (plain, guarded) if at % 2 else (guarded, plain)
        took = {first: seconds_of(first), second: seconds_of(second)}
        base.append(took[plain])
        more.append(took[guarded] - took[plain])
    return statistics.median(base), statistics.median(more)


def alone(body: Callable[[], object]) -> float:
    """Median seconds."""
    return statistics.median(seconds_of(body) for _ in range(ROUNDS))


class Loop:
    def __init__(self, ids: Tensor, plans: list[Plan] | None, fused: bool) -> None:
        torch.manual_seed(0)
        self.model, self.ids = Texts(), ids
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused)
        fit = memplan.apply(self.model, plans[0]) if plans else None
        self.guard = Guard(fit, self.optimizer, {ROWS * LENGTH: plans[:1], 2**40: plans[1:]}) if fit else None

    def __call__(self) -> None:
        if self.guard is None:
            self.run()
        else:
            self.guard.step(self.run, self.ids.numel())

    def run(self) -> None:
        self.model(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step_only(self) -> None:
        """The optimizer's step, with gradients that stay."""
        self.optimizer.step()


def plans_for(ids: Tensor) -> list[Plan]:
    """With everything kept, and with every block recomputed."""
    asked = {"sample": ids, "effective_batch": ROWS, "micro_batch": ROWS}
    with torch.device("meta"):
        model = Texts()
    kept = Strategy(name="keep-all", levers=())
    again = Strategy(name="all", levers=("recompute",), every_block="recompute")
    return [memplan.plan(model, "cpu:1GiB", strategy=one, **asked) for one in (kept, again)]


def measure() -> list[tuple[str, float, float]]:
    """(what, seconds, share of the plain step)."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    plans = plans_for(ids)
    rows = []
    for name, fused in (("AdamW", False), ("AdamW, fused", True)):
        plain, guarded = Loop(ids, None, fused), Loop(ids, plans, fused)
        base, more = paired(plain, guarded)
        rows += [(f"{name}: the plain step", base, 1.0), (f"{name}: what the guard adds", more, more / base)]
        for loop in (plain, guarded):
            loop.model(ids).backward()
        _, careful = paired(plain.step_only, guarded.step_only)
        rows.append((f"{name}: of that, copies in the optimizer's step", careful, careful / base))
    guard = guarded.guard
    assert guard is not None

    def switch() -> None:
        guard._follow(plans[1])
        guard._follow(plans[0])

    for what, body in (
        ("of that, buffers and random states noted", guard._before.note),
        ("of that, the watching", guard._watch),
        ("to another plan and back, between steps", switch),
    ):
        seconds = alone(body)
        rows.append((what, seconds, seconds / base))
    return rows


def table(rows: list[tuple[str, float, float]]) -> str:
    lines = ["| what | time | of the step |", "|---|--:|--:|"]
    lines += [f"| {what} | {1e6 * seconds:,.0f} us | {share:.2%} |" for what, seconds, share in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/guard.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = table(measure())
    print(found)
    if asked.write:
        written("table", found, DOCS / "guard.md")


if __name__ == "__main__":
    main()
