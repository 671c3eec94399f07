"""An Accelerate loop whose memory runs out inside a step: it goes on, and ends with the weights it would have had."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from guarding import Fault, out_of_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader

import memplan
from integrations import scripts
from memplan.guard import Guard

pytestmark = pytest.mark.slow

CLOSE = 1e-5
STEPS = 10  # of two epochs of 37 rows by 8

BLOCKS = """
summary = "whole blocks"
when_to_use = "in tests"
levers = ["recompute"]
"""


@pytest.fixture(scope="module")
def strategy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """By which nothing is recomputed at first, and smaller plans recompute whole blocks."""
    path = tmp_path_factory.mktemp("strategy") / "blocks.toml"
    path.write_text(BLOCKS)
    return str(path)


@dataclass
class Failing(Fault):
    """Memory that runs out in the loop's own steps, and not where a smaller plan is made for them."""

    rests: bool = False

    def count(self, *_: object) -> None:
        if not self.rests and (self.where == "backward" or torch.is_grad_enabled()):
            super().count()


@contextmanager
def resting(faults: tuple[Failing, ...]) -> Iterator[None]:
    own = Guard._fall

    def fall(guard: Guard, *args: Any) -> bool:
        for fault in faults:
            fault.rests = True
        try:
            return own(guard, *args)
        finally:
            for fault in faults:
                fault.rests = False

    Guard._fall = fall  # type: ignore[method-assign]
    try:
        yield
    finally:
        Guard._fall = own  # type: ignore[method-assign]


@dataclass
class Ran:
    """What a run leaves."""

    accelerator: Accelerator
    weights: list[Tensor] = field(default_factory=list)
    logged: list[tuple[float, float]] = field(default_factory=list)  # of each optimizer step: its loss, its rate
    seen: list[float] = field(default_factory=list)  # the loss of each micro-batch
    norms: list[float] = field(default_factory=list)

    @property
    def plan(self) -> memplan.Plan:
        return self.accelerator.memplan.plan  # type: ignore[no-any-return]

    def check_same(self, other: "Ran", close: float = CLOSE) -> None:
        assert len(self.logged) == len(other.logged)
        assert self.logged == [pytest.approx(step, abs=close) for step in other.logged]
        assert self.seen == pytest.approx(other.seen, abs=close)
        assert self.norms == pytest.approx(other.norms, abs=close)
        assert max(float((a - b).abs().max()) for a, b in zip(self.weights, other.weights, strict=True)) <= close


def dropping() -> nn.Module:
    return tiny.llama(3, attention_dropout=0.2)[0]


def run(
    strategy: str,
    *faults: Failing,
    make: Callable[[], nn.Module] = dropping,
    rows: int = 37,
    own_accumulation: int = 1,
    accumulate: bool = True,
    trained: Callable[[Any, Any], Tensor] = lambda out, _: out.loss,
    begins: Callable[[Accelerator, nn.Module, Any], object] = lambda *_: None,
    between: Callable[[int, nn.Module, Any], object] = lambda *_: None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **settings: Any,
) -> Ran:
    """Two epochs by a plan, under a cosine schedule and clipping. Faults are counted from the first step on.

    Args:
        trained: what is differentiated, of the output and the batch.
        begins: is called after `prepare`.
        between: before each optimizer step, with the micro-batch's number.
    """
    with scripts.fresh_accelerate(), ExitStack() as stack:
        set_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=own_accumulation)
        memplan.attach(accelerator, **({"gpu": "cpu:1GiB", "micro_batch": 2, "strategy": strategy} | settings))
        model = make()
        data = DataLoader(
            scripts.Texts(rows),
            scripts.BATCH,
            collate_fn=scripts.padded,
            shuffle=True,
            generator=torch.Generator().manual_seed(2),
        )
        made = optimizer(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, STEPS)
        model, made, data, schedule = accelerator.prepare(model, made, data, schedule)
        begins(accelerator, model, made)
        stack.enter_context(resting(faults))
        for fault in faults:
            stack.enter_context(fault.on(model))
        set_seed(3)
        ran, number = Ran(accelerator), 0
        for _ in range(2):
            for batch in data:
                with accelerator.accumulate(model) if accumulate else nullcontext():
                    number += 1
                    out = model(**batch)
                    loss = trained(out, batch)
                    accelerator.backward(loss)
                    ran.seen.append(float(loss.detach()))
                    if accelerator.sync_gradients:
                        ran.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                    between(number, model, out)
                    rate = schedule.get_last_lr()[0]
                    made.step()
                    schedule.step()
                    made.zero_grad()
                    if accelerator.sync_gradients:
                        ran.logged.append((float(accelerator.memplan.loss), rate))
        ran.weights = [p.detach().clone() for p in model.parameters()]
        return ran


@pytest.fixture(scope="module")
def plain(strategy: str) -> Ran:
    ran = run(strategy)
    assert not ran.plan.changed
    assert ran.plan.accumulation == 4
    return ran


# Of the third step the second micro-batch, of four; in a backward, with half of its gradients there. Then the very
# first one, and the ragged end of an epoch.
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [10, 1, 19])
def test_the_step_is_taken_again_by_a_smaller_plan(
    where: str, at: int, plain: Ran, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = run(strategy, fault := Failing(where, at))
    assert fault.calls > at
    faulty.check_same(plain, 0)
    assert faulty.plan.changed
    assert faulty.plan.micro_batch == 2
    assert faulty.accelerator.memplan.fit.plan.changed == faulty.plan.changed
    assert "a step ran out of memory; its plan falls from" in caplog.text
    assert any("ran out of memory" in line for line in faulty.plan.assumptions)
