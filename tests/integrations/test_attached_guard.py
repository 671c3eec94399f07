"""An Accelerate loop whose memory runs out inside a step: it goes on, and ends with the weights it would have had."""

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from guarding import Fault, out_of_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader

import memplan
from integrations import scripts
from memplan.device import CpuDevice
from memplan.fake_memory import FakeMemory
from memplan.guard import Guard
from memplan.integrations.attached_guard import may_be_guarded

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
def resting(faults: tuple[Failing, ...], memory: FakeMemory | None) -> Iterator[None]:
    own = Guard._fall

    def fall(guard: Guard, *args: Any) -> bool:
        for fault in faults:
            fault.rests = True
        if memory is not None:
            memory.__exit__(None, None, None)
        try:
            return own(guard, *args)
        finally:
            for fault in faults:
                fault.rests = False
            if memory is not None:
                memory.__enter__()

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
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    memory: FakeMemory | None = None,
    precision: str = "no",
    **settings: Any,
) -> Ran:
    """Two epochs by a plan, under a cosine schedule and clipping. Faults are counted from the first step on.

    Args:
        trained: what is differentiated, of the output and the batch.
        begins: is called after `prepare`.
        between: before each optimizer step, with the micro-batch's number.
        memory: in which the steps are.
    """
    with scripts.fresh_accelerate(), ExitStack() as stack:
        set_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=own_accumulation, mixed_precision=precision)
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
        stack.enter_context(resting(faults, memory))
        for fault in faults:
            stack.enter_context(fault.on(model))
        set_seed(3)
        ran, number = Ran(accelerator), 0
        if memory is not None:
            stack.enter_context(memory)
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


@dataclass
class Tightening(Failing):
    """From the first time on there is less memory for all."""

    memory: FakeMemory = field(default_factory=FakeMemory)
    cap_bytes: int = 0

    def count(self, *args: object) -> None:
        try:
            super().count(*args)
        except torch.OutOfMemoryError:
            self.memory.cap_bytes = self.cap_bytes
            raise


def test_what_the_loop_holds_of_a_failed_backward_is_let_go(strategy: str) -> None:
    """The next plan has just room, and would not fit beside it: three falls without."""
    options: dict[str, Any] = {"make": lambda: tiny.llama(6, attention_dropout=0.2)[0], "micro_batch": 8}
    free = run(strategy, memory=(whole := FakeMemory()), **options)
    fault = Tightening("backward", 3, cap_bytes=int(0.8 * whole.peak_bytes))
    small = run(strategy, fault, memory=fault.memory, **options)
    small.check_same(free)
    assert len([line for line in small.plan.assumptions if "ran out of memory" in line]) == 1


def test_once_more_it_falls_once_more(plain: Ran, strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    first = run(strategy, Failing("backward", 10))
    twice = run(strategy, Failing("backward", 10, times=2))
    twice.check_same(plain, 0)
    assert len(twice.plan.changed) > len(first.plan.changed) > 0
    assert caplog.text.count("a step ran out of memory") == 3


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_no_plan_is_smaller_the_error_says_so(where: str, strategy: str) -> None:
    before: list[Tensor] = []
    models: list[nn.Module] = []

    def begins(_: Accelerator, model: nn.Module, __: Any) -> None:
        before.extend(p.detach().clone() for p in model.parameters())
        models.append(model)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(strategy, Failing(where, 3, times=1000), begins=begins)
    assert any("there is no smaller plan" in note and "Way out: " in note for note in caught.value.__notes__)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), before, strict=True))
    assert all(p.grad is None for p in models[0].parameters())


@pytest.mark.parametrize("name", ["gpt2", "bert", "lora"])
def test_other_models_and_a_lower_precision(name: str, strategy: str) -> None:
    """With dropout; logits that are views; few gradients. The last in bfloat16."""
    options: dict[str, Any] = {
        "make": lambda: getattr(tiny, name)()[0],
        "precision": "bf16" if name == "lora" else "no",
    }
    whole = run(strategy, **options)
    fault = Failing("forward" if name == "lora" else "backward", 11)  # in the middle of that one is a frozen weight
    faulty = run(strategy, Failing("forward", 6), fault, **options)
    faulty.check_same(whole)
    assert fault.calls > 11
    assert len([line for line in faulty.plan.assumptions if "ran out of memory" in line]) == 2


def test_loops_of_other_forms(strategy: str) -> None:
    """Without `accumulate`; with an accumulation of the script's own; whole batches; a loss times a number."""
    for options in (
        {"accumulate": False},
        {"own_accumulation": 2, "rows": 35},
        {"micro_batch": 8, "own_accumulation": 2},
        {"trained": lambda out, _: (out.loss * 0.5).mean()},
    ):
        for where in ("forward", "backward"):
            faulty = run(strategy, Failing(where, 4), **options)
            faulty.check_same(run(strategy, **options))
            assert faulty.plan.changed


def from_logits(model: nn.Module, batch: Any) -> Tensor:
    return entropy(model(**{name: batch[name] for name in ("input_ids", "attention_mask")}), batch)


def entropy(out: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_loss_of_the_script_s_own(where: str, strategy: str) -> None:
    options: dict[str, Any] = {"loss": from_logits, "trained": entropy}
    faulty = run(strategy, Failing(where, 10), **options)
    faulty.check_same(run(strategy, **options))
    assert faulty.plan.changed


def test_another_loss_than_the_output_s_is_not_guarded(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    """A penalty is no part of the output; steps go on as ever, and memory that runs out ends the run."""
    caplog.set_level(logging.INFO, "memplan")
    models: list[nn.Module] = []

    def penalised(out: Any, _: Any) -> Tensor:
        return out.loss + 1e-3 * models[-1].lm_head.weight.square().sum()

    options: dict[str, Any] = {"trained": penalised, "begins": lambda _, model, __: models.append(model)}
    run(strategy, **options)
    assert caplog.text.count("running out of memory ends this run, since it trains by another loss") == 1
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(strategy, Failing("backward", 3), **options)
    assert not hasattr(caught.value, "__notes__")


def test_a_sum_of_two_forwards_is_trained_as_ever(strategy: str) -> None:
    """The second one runs out while the first one's output waits: it is not run again."""
    again: list[nn.Module] = []

    def both(out: Any, batch: Any) -> Tensor:
        return (out.loss + again[-1](**batch).loss) / 2

    options: dict[str, Any] = {"trained": both, "micro_batch": 8, "begins": lambda _, model, __: again.append(model)}
    for fault in (Failing("forward", 2), Failing("forward", 4), Failing("backward", 1)):
        with pytest.raises(torch.OutOfMemoryError):
            run(strategy, fault, **options)
    run(strategy, **options)


def test_the_optimizer_s_step_is_finished(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = torch._foreach_addcdiv_, []

    def once(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            out_of_memory()
        own(*args)

    def between(number: int, *_: object) -> None:
        if number == 8:
            monkeypatch.setattr(torch, "_foreach_addcdiv_", once)

    together = partial(torch.optim.AdamW, foreach=True)
    faulty = run(strategy, optimizer=together, between=between)
    assert len(calls) > 1
    faulty.check_same(run(strategy, optimizer=together))
    assert not faulty.plan.changed


def test_an_evaluation_is_the_loop_s_own(plain: Ran, strategy: str) -> None:
    """Its error is raised there; in the middle of a step, which goes on as if it had not been."""
    failed = []

    def between(number: int, model: nn.Module, _: Any) -> None:
        if number != 6:
            return
        fault = Fault("forward", 1)
        with torch.no_grad(), fault.on(model), pytest.raises(torch.OutOfMemoryError) as caught:
            model.eval()(input_ids=torch.ones(2, 4, dtype=torch.int64))
        model.train()
        failed.append(caught.value)

    ran = run(strategy, between=between)
    assert not hasattr(failed[0], "__notes__")
    assert not ran.plan.changed
    ran.check_same(plain, 0)


class Close(CpuDevice):
    """Whose allocator has given back and asked again, once, in the second step."""

    asked = 0

    def pressure(self) -> tuple[int, int]:
        self.asked += 1
        return (1 if self.asked > 15 else 0), 0  # it is asked twice for each micro-batch


def test_a_step_that_was_close_falls_before_the_next(
    plain: Ran, strategy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("memplan.guard.device_of", lambda _: Close())
    close = run(strategy)
    close.check_same(plain, 0)
    assert close.plan.changed
    assert caplog.text.count("a step nearly ran out of memory; its plan falls") == 1


def test_the_second_step_is_measured_by_whatever_plan(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "memplan")
    run(strategy, Failing("forward", 2))
    assert caplog.text.count("peak of the second step") == 1
    run(strategy, Failing("forward", 6))  # in that step: of neither plan
    assert caplog.text.count("peak of the second step") == 1


def test_random_numbers_that_the_loop_draws(strategy: str) -> None:
    """Between micro-batches, and between a forward and its backward."""

    def between(*_: object) -> None:
        drawn.append(float(torch.rand(())))

    def drawing(out: Any, _: Any) -> Tensor:
        drawn.append(float(torch.rand(())))
        return out.loss

    runs, draws = [], []
    for faults in ((), (Failing("forward", 11),), (Failing("backward", 11),)):
        drawn: list[float] = []
        runs.append(run(strategy, *faults, between=between, trained=drawing))
        draws.append(drawn)
    assert draws[0] == draws[1] == draws[2]
    for faulty in runs[1:]:
        faulty.check_same(runs[0], 0)


def test_gradients_that_the_loop_changes_end_the_step_s_guard(strategy: str) -> None:
    """Of whole batches, in an accumulation of the script's own: it may, and what it did is not forgotten."""

    def between(number: int, model: nn.Module, _: Any) -> None:
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    options: dict[str, Any] = {"micro_batch": 8, "own_accumulation": 2, "between": between}
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(strategy, Failing("forward", 4), **options)
    assert not hasattr(caught.value, "__notes__")
    run(strategy, Failing("forward", 3), **options).check_same(run(strategy, **options))


def test_a_batch_that_the_loop_changes_is_found_out(strategy: str) -> None:
    """Behind its backward, before the next micro-batch runs out of memory."""
    batches: list[Any] = []

    def trained(out: Any, batch: Any) -> Tensor:
        batches.append(batch)
        return out.loss

    with pytest.raises(memplan.errors.ModelFailed, match="could not be run again: a micro-batch had the loss"):
        run(
            strategy,
            Failing("forward", 11),
            trained=trained,
            between=lambda *_: batches[-1]["input_ids"].copy_(batches[-1]["input_ids"].flip(1)),
        )


def test_labels_that_are_taken_out_of_a_batch(strategy: str) -> None:
    """The micro-batch is made again as the loader made it."""

    def taking(out: Any, batch: Any) -> Tensor:
        return entropy(out, {"labels": batch.pop("labels")})

    options: dict[str, Any] = {"loss": from_logits, "trained": taking}
    run(strategy, Failing("backward", 10), **options).check_same(run(strategy, **options))


class Unlabelled(scripts.Texts):
    """Rows of which most have a single token, from which a causal model learns nothing."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = [row if at % 4 == 0 else row[:1] for at, row in enumerate(self.rows)]


def test_a_micro_batch_that_is_a_mean_over_nothing(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "Texts", Unlabelled)
    seen = run(strategy)
    assert any(loss != loss for loss in seen.seen)
    seen.seen.clear()
    for at in (6, 7, 8):
        faulty = run(strategy, Failing("backward", at))
        faulty.seen.clear()
        faulty.check_same(seen)
        assert faulty.plan.changed


def test_undo_and_copies(strategy: str) -> None:
    """A copy of the model, as for averaged weights, runs by its own; behind the last step all is taken out."""
    kept: list[Any] = []

    def begins(accelerator: Accelerator, _: nn.Module, optimizer: Any) -> None:
        kept.extend((accelerator, optimizer))

    def between(number: int, model: nn.Module, out: Any) -> None:
        if number == 9:
            copied = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.zero_()
            logits = copied(input_ids=torch.ones(2, 4, dtype=torch.int64)).logits
            assert float(logits.detach().abs().max()) == 0 < float(out.logits.detach().abs().max())
            saved = pickle.loads(pickle.dumps(model))
            assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))
            saved(input_ids=torch.ones(2, 4, dtype=torch.int64))
        if number == 38:
            accelerator, optimizer = kept
            assert "forward" in vars(model)
            accelerator.memplan.undo()
            assert all("forward" not in vars(module) for module in model.modules())
            assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            assert "CarefulStep" not in optimizer.optimizer.step.__qualname__

    ran = run(strategy, Failing("forward", 3), begins=begins, between=between)
    assert ran.plan.changed


class Coupled(torch.optim.SGD):
    """All parameters take a step of one length together."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_([p.grad for p in held], torch.stack([p.grad.norm() for p in held]).norm())
        super().step(closure)


def from_file() -> dict[str, Any]:
    plan = scripts.plan_file("llama", 2, 8)
    return {"plan": plan, "gpu": None, "micro_batch": None, "make": partial(scripts.make_model, "llama")}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (from_file, "its plan was read from a file"),
        (lambda: {"optimizer": Coupled}, "the optimizer looks at all parameters at once"),
    ],
)
def test_what_is_not_guarded_is_said(
    settings: Callable[[], dict[str, Any]], why: str, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memplan")
    run(strategy, **settings())
    assert caplog.text.count(f"running out of memory ends this run, since {why}") == 1


def test_a_closure_steps_as_ever(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "memplan")
    made: list[Any] = []

    def between(_: int, __: nn.Module, out: Any) -> None:
        made[-1].step(lambda: out.loss)

    def begins(_: Accelerator, __: nn.Module, optimizer: Any) -> None:
        made.append(optimizer)

    run(strategy, micro_batch=8, begins=begins, between=between)
    assert caplog.text.count("running out of memory ends this run, since it steps by a closure") == 1


def test_several_processes_are_not_guarded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "memplan")
    several = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    assert not may_be_guarded(several)
    assert "running out of memory ends this run, since several processes train" in caplog.text
