"""A training loop under a guard, and what makes it run out of memory where it is told to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from report.records_made import make_plan
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from memplan.blocks import signature
from memplan.fake_memory import FakeMemory
from memplan.guard import Guard
from memplan.plan_record import Budget, Plan

ROWS, LENGTH, VOCABULARY = 8, 6, 32
MICRO = 4
BLOCKS = 4


class Block(nn.Module):
    """Dropout draws and a batch norm counts, so that a step that is run twice is seen."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 2 * width, bias=False)  # the norm would take it out, and leave Adam with noise
        self.narrow = nn.Linear(2 * width, width)
        self.norm = nn.BatchNorm1d(2 * width) if norm else nn.Identity()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.norm(self.wide(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + self.dropout(self.narrow(wide.relu()))


class Texts(nn.Module):
    def __init__(self, norm: bool, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, norm) for _ in range(BLOCKS))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def texts(norm: bool = True) -> Texts:
    torch.manual_seed(0)
    return Texts(norm)


def plans_for(model: nn.Module, replicas: int = 1) -> tuple[Plan, ...]:
    """By hand: each recomputes one block more than the one before, and is said to need 1 MiB less."""
    paths = [f"blocks.{at}" for at in range(BLOCKS)]
    budget = Budget(gpu="cpu:1GiB", total_bytes=2**30, others_bytes=0, context_bytes=0, margin_bytes=0)
    return tuple(
        make_plan(
            (),
            decisions={path: "recompute" if at < changed else "keep" for at, path in enumerate(paths)},
            budget=budget,
            micro_batch=MICRO,
            accumulation=ROWS // MICRO,
            effective_batch=ROWS,
            peak_bytes=(20 - changed) * 2**20,
            autocast=None,
            signature=signature(model),
            replicas=replicas,
        )
        for changed in range(3)
    )


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@dataclass
class Fault:
    """Memory runs out `times` times, from the `at`-th call on of what is counted there."""

    where: str  # "forward", "backward", "optimizer"
    at: int
    times: int = 1
    calls: int = 0

    def count(self, *_: object) -> None:
        self.calls += 1
        if self.at <= self.calls < self.at + self.times:
            out_of_memory()

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """In the middle of the model: in a forward, or where a gradient arrives."""
        leaves = [module for module in model.modules() if not list(module.children()) and list(module.parameters())]
        leaf = leaves[len(leaves) // 2]
        if self.where == "forward":
            handle = leaf.register_forward_pre_hook(self.count)
        else:
            handle = next(leaf.parameters()).register_hook(self.count)
        try:
            yield
        finally:
            handle.remove()


class Faulty(torch.optim.AdamW):
    """Runs out at an allocation inside its step, with weights and states half changed.

    Attributes:
        fails: numbers of the calls of `step` that do, counted from 1, in which each parameter stepped alone is a call.
    """

    fails: tuple[int, ...] = ()
    at = 3
    calls = 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.calls += 1
        with FakeMemory(fails_at=self.at if self.calls in self.fails else None):
            super().step()


def batches(count: int = 6, lengths: tuple[int, ...] = (LENGTH,)) -> list[Tensor]:
    """Token ids, [ROWS, length]; lengths in turn."""
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(VOCABULARY, (ROWS, lengths[at % len(lengths)]), generator=draw) for at in range(count)]


@dataclass
class Loop:
    """A plain loop with dropout, a schedule, and gradient accumulation; by a guard where there is one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: Guard | None = None
    called: nn.Module | None = None  # in place of the model: its replica
    losses: list[float] = field(default_factory=list)
    fetched: int = 0

    def __post_init__(self) -> None:
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, data: list[Tensor], tokens: Callable[[Tensor], int] | None = None) -> None:
        for batch in data:
            self.fetched += 1

            def run(batch: Tensor = batch) -> float:
                return self.step(batch)

            count = None if tokens is None else tokens(batch)
            self.losses.append(run() if self.guard is None else self.guard.step(run, count))
            self.schedule.step()

    def step(self, batch: Tensor) -> float:
        micro = MICRO if self.guard is None else self.guard.plan.micro_batch
        total = 0.0
        for part in batch.split(micro):
            loss: Tensor = (self.called or self.model)(part) * (micro / ROWS)
            loss.backward()
            total += loss.item()
        if self.guard is not None:
            self.guard.exchange()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all that a step changes: weights, buffers, gradients, optimizer state, torch's random state."""
    tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        tensors += [torch.as_tensor(value) for value in optimizer.state.get(parameter, {}).values()]
    return [tensor.detach().clone() for tensor in tensors]


def differences(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest between two lists of tensors."""
    assert len(a) == len(b)
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
