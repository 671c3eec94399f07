"""A trainer whose memory runs out inside a step: the run goes on, and ends with the weights it would have had."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from guarding import Fault, out_of_memory

import memplan
from integrations.trainers import Begins, Run, dataset, run, sft_trainer, trainer
from memplan.fitting import Fit
from memplan.strategy import load_strategy

# TRL sets the old name of activation_checkpointing, which transformers 5.23 has renamed
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]

BLOCKS = replace(load_strategy("recompute-only"), levers=("recompute",))
EVERYTHING = {"gpu": "cpu:1GiB", "micro_batch": 2, "strategy": BLOCKS}  # nothing is recomputed at first


def planned(fits: list[Fit], *faults: Fault) -> Any:
    """A plan, and memory that runs out."""

    def plan(made: transformers.Trainer) -> None:
        fits.append(memplan.autofit(made, **EVERYTHING))
        assert not fits[0].plan.changed
        made.add_callback(Begins(*faults))

    return plan


def dropping(folder: Path) -> transformers.Trainer:
    return trainer(folder, tiny.llama(3, attention_dropout=0.2)[0], max_grad_norm=0.5)


# Of the third step the second micro-batch, of four; in a backward, with half of its gradients there.
@pytest.mark.parametrize(("where", "at"), [("forward", 10), ("backward", 10), ("forward", 1)])
def test_the_step_is_taken_again_by_a_smaller_plan(
    where: str, at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fits: list[Fit] = []
    caplog.set_level(logging.INFO, "memplan")
    plain = run(lambda: dropping(tmp_path), planned([]))
    faulty = run(lambda: dropping(tmp_path), planned(fits, Fault(where, at)))
    assert caplog.text.count("peak of the second step") == 2  # of each run, by whatever plan it takes that
    assert faulty.logged == plain.logged
    assert faulty.steps == plain.steps
    assert faulty.distance(plain) == 0
    assert fits[0].plan.changed
    assert fits[0].plan.micro_batch == 2
    assert "a step ran out of memory; its plan falls from" in caplog.text
    assert any("ran out of memory" in line for line in fits[0].plan.assumptions)


def test_the_optimizer_s_step_is_finished(tmp_path: Path) -> None:
    def made() -> transformers.Trainer:
        return trainer(tmp_path, tiny.llama(3, attention_dropout=0.2)[0], optim="adamw_torch")

    fits: list[Fit] = []
    plain = run(made, planned([]))

    def fails(trainer: transformers.Trainer) -> None:
        fits.append(memplan.autofit(trainer, **EVERYTHING))
        trainer.add_callback(_FailsInside())

    assert run(made, fails).distance(plain) == 0
    assert not fits[0].plan.changed


class _FailsInside(transformers.TrainerCallback):
    """In the second step's update, once."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        if state.global_step == 1:
            own, calls = torch._foreach_addcdiv_, []

            def once(*args: Any) -> None:
                calls.append(1)
                if len(calls) == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                own(*args)

            torch._foreach_addcdiv_ = once

            self._own = own

    def on_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 1:
            torch._foreach_addcdiv_ = self._own


def test_what_trl_logs_is_counted_once(tmp_path: Path) -> None:
    logs = []
    for faults in ((), (Fault("backward", 10),)):
        made = sft_trainer(tmp_path)
        torch.manual_seed(0)
        planned([], *faults)(made)
        Run.of(made)
        logs.append([r for r in made.state.log_history if "mean_token_accuracy" in r and "memplan/peak_bytes" not in r])
    assert len(logs[0]) > 2
    for one, other in zip(*logs, strict=True):
        timed = {name for name in one if "runtime" in name or "second" in name}
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_where_no_plan_is_smaller_the_error_says_so(tmp_path: Path) -> None:
    made = dropping(tmp_path)
    fits: list[Fit] = []
    planned(fits, Fault("forward", 3, times=1000))(made)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with pytest.raises(torch.OutOfMemoryError) as caught:
        made.train()
    assert any("there is no smaller plan" in note for note in caught.value.__notes__)
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert all(p.grad is None for p in made.model.parameters())
    forwards = [type(m).forward for m in made.model.modules()]
    fits[0].undo()
    assert [m.forward.__func__ for m in made.model.modules()] == forwards


def test_undo_and_a_second_run_after_a_fall(tmp_path: Path) -> None:
    made = dropping(tmp_path)
    fits: list[Fit] = []
    own, forwards = made.training_step, [m.forward for m in made.model.modules()]
    planned(fits, Fault("forward", 3))(made)
    made.train()
    made.train()  # by the smaller plan, with another optimizer
    assert fits[0].plan.changed
    fits[0].undo()
    assert made.training_step == own
    assert [m.forward for m in made.model.modules()] == forwards
    made.train()


def test_an_evaluation_is_taken_again_in_smaller_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second one of a run fails, in its second batch; the training goes on as if it had not been."""
    asked = {"eval_dataset": dataset(12), "per_device_eval_batch_size": 4, "eval_strategy": "epoch"}

    def made() -> transformers.Trainer:
        return trainer(tmp_path, tiny.llama(3, attention_dropout=0.2)[0], num_train_epochs=3, **asked)

    evaluated: list[int] = []

    def fails(trainer: transformers.Trainer) -> None:
        memplan.autofit(trainer, **EVERYTHING)
        own = trainer.prediction_step

        def prediction_step(model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            evaluated.append(len(inputs["input_ids"]))
            if len(evaluated) == 5:
                out_of_memory()
            return own(model, inputs, *args, **kwargs)

        trainer.prediction_step = prediction_step

    plain, faulty = run(made, planned([])), run(made, fails)
    assert faulty.distance(plain) == 0
    assert faulty.logged == plain.logged
    assert evaluated == [4] * 5 + [2] * 6 + [2] * 6
    assert "an evaluation ran out of memory in batches of 4; it goes on with 2" in caplog.text
