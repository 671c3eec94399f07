"""Real steps of a small model. Whatever happens in a trial, the model is afterwards what it was before."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import tuners
from imprint import Imprint
from torch import nn

import memplan
from memplan import tuning
from memplan.division import Division
from memplan.errors import AlreadyApplied, DoesNotFit, ModelFailed, NoDevice, PlanMismatch, UsageError
from memplan.fitting import Fit, Live
from memplan.plan_record import Budget, FrontierPoint, Measured, Plan, Verdict
from memplan.recipe import Recipe
from memplan.report.answers import answers
from memplan.report.charts import frontier_svg, timeline_svg
from memplan.storages import storage_of
from memplan.strategy import Strategy, load_strategy
from memplan.trials import Candidate, Trials
from memplan.tuning import Tuned, tune

ROWS = 2
BUDGET = "cpu:600KiB"


def model_and_batch() -> tiny.Made:
    return tiny.llama(layers=2, rows=ROWS, use_cache=False)


def tuned(model: nn.Module, storage: Path | None, **more: Any) -> Tuned:
    arguments: dict[str, Any] = {"sample": model_and_batch()[1], "effective_batch": ROWS, "budget_shares": (1.0, 0.8)}
    return tune(model, BUDGET, storage=storage, **(arguments | more))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned]:
    """A study of which one trial was run. A copy of its file goes on without planning.

    The plans are the planner's, but predicted to be almost equally fast, so that the clock decides which are let go.
    """
    planned = tuning._candidates

    def alike(*asked: Any) -> list[Candidate]:
        return [
            replace(one, plan=one.plan.model_copy(update={"step_s": 0.02 + 1e-5 * place}))
            for place, one in enumerate(planned(*asked))
        ]

    file = tmp_path_factory.mktemp("study") / "tune.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_candidates", alike)
        return file, tuned(model_and_batch()[0], file, n_trials=1)


@pytest.fixture
def study(first: tuple[Path, Tuned], tmp_path: Path) -> Path:
    return Path(shutil.copy(first[0], tmp_path / "tune.log"))


def states(found: Tuned) -> list[str]:
    return [trial.state for trial in found.trials]


def test_the_best_is_measured_within_the_budget(first: tuple[Path, Tuned]) -> None:
    _, found = first
    assert states(found).count("complete") == 1
    assert states(found).count("waiting") == len(found.trials) - 1 >= 2
    assert {trial.micro_batch for trial in found.trials} == {1, 2}
    assert found.measured.peak_bytes <= found.plan.budget.usable_bytes
    taken = found.trials[found.number]
    assert taken.measured is not None
    assert found.measured == taken.measured.model_copy(update={"budget_bytes": found.plan.budget_bytes})
    assert found.plan.decisions == taken.plan.decisions
    assert found.gap == 1  # one run says nothing of the others
    text = found.describe()
    assert str(found) == text
    assert len(repr(found)) < 300
    assert f"measured 1 of {len(found.trials)} plans" in text
    assert f"{found.plan.micro_batch} x {found.plan.accumulation} accumulated" in text


def test_what_was_found_can_be_drawn_also_by_another_process(first: tuple[Path, Tuned], study: Path) -> None:
    again = Trials(storage_of(study), "memplan", {}, list, 300.0)
    best = again.best(again.all)
    assert best is not None
    assert best.plan == first[1].plan
    assert timeline_svg(best.plan, best.measured)
    assert frontier_svg(best.plan, best.measured)
    assert any(layer.held for layer in best.plan.layers)


@pytest.mark.slow
def test_it_goes_on_and_leaves_the_model_as_it_was(study: Path) -> None:
    model, _ = model_and_batch()
    before = Imprint(model)
    more = tuned(model, study, n_trials=2)
    assert before.differences() == []
    assert states(more).count("complete") == 2
    best = min((trial.measured for trial in more.trials if trial.measured), key=lambda one: one.step_s)
    assert more.measured == best
    assert tuned(model, study, n_trials=1).measured == best  # nothing more to run
    with more.apply(model) as fit:
        assert fit.measured == best
        assert fit.plan.decisions == more.plan.decisions


Spoil = Callable[[type[BaseException], int], None]


@pytest.fixture
def made() -> tiny.Made:
    """A model in the middle of a run: with gradients."""
    model, batch = model_and_batch()
    model(**batch).loss.backward()
    return model, batch


@pytest.fixture
def spoil(made: tiny.Made, monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Makes runs change all that they can reach and then raise; the first few run as ever."""

    def install(error: type[BaseException], good: int) -> None:
        measure, left = Fit.measure, iter(range(good))

        def spoilt(fit: Fit, steps: int, **more: Any) -> Measured:
            if next(left, None) is not None:
                return measure(fit, steps, **more)
            with torch.no_grad():
                for tensor in (*made[0].parameters(), *made[0].buffers()):
                    tensor.mul_(-3)
            torch.rand(1)
            random.random()
            np.random.rand()
            raise error("spoilt")

        monkeypatch.setattr(Fit, "measure", spoilt)

    return install


@pytest.mark.slow
def test_after_ctrl_c_the_model_is_restored_and_the_study_goes_on(
    made: tiny.Made, spoil: Spoil, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Imprint(made[0])
    spoil(KeyboardInterrupt, 0)
    with pytest.raises(KeyboardInterrupt):
        tuned(made[0], study, n_trials=2)
    assert before.differences() == []
    monkeypatch.undo()
    found = tuned(made[0], study, n_trials=2)
    assert states(found).count("complete") == 2
    assert "running" not in states(found)


@pytest.mark.parametrize(("error", "state"), [(MemoryError, "pruned"), (ValueError, "fail")])
def test_a_trial_that_fails_costs_that_trial_alone(
    error: type[Exception], state: str, made: tiny.Made, spoil: Spoil, study: Path
) -> None:
    before = Imprint(made[0])
    spoil(error, 0)
    found = tuned(made[0], study, n_trials=2)
    assert before.differences() == []
    assert [trial.state for trial in found.trials if trial.why == f"{error.__name__}: spoilt"] == [state]
    assert states(found).count("complete") == 1


def test_where_none_can_be_measured_that_is_said(
    made: tiny.Made, spoil: Spoil, first: tuple[Path, Tuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_candidates", lambda *_: first[1].trials[:2])
    spoil(ValueError, 0)
    with pytest.raises(ModelFailed, match=r"none of 2 plans could be measured.*ValueError: spoilt"):
        tuned(made[0], None)


def test_laps_beside_the_best_are_not_remembered() -> None:
    def run(plan: Plan, *, remembered: bool = True) -> Measured:
        asked.append(remembered)
        return tuners.measured(plan, 3.0)  # seconds: two laps are enough

    asked, bench = list[bool](), SimpleNamespace(run=run)
    trials = trials_of(tuners.candidate(1.0), tuners.candidate(1.001))
    for _ in range(2):
        trial = trials.claim(2)
        assert trial is not None
        tuning._try(trial, trials, bench)  # type: ignore[arg-type]
    assert asked == [True, True, False, False, False, False]


def trials_of(*queue: Candidate) -> Trials:
    return Trials(storage_of(None), "shared", tuners.MADE_FOR, lambda: queue, 300.0)


def found_in(trials: Trials, torch_device: str = "cpu") -> Tuned:
    device: Any = SimpleNamespace(torch_device=torch.device(torch_device))
    return tuning._tuned(trials, Live(Recipe(), None), device)


def test_the_gap_is_one_to_plans_that_can_be_run() -> None:
    trials = trials_of(*(tuners.candidate(1 + 0.001 * number) for number in range(3)))
    fits, over, out = (trials.claim(3) for _ in range(3))
    assert fits is not None
    assert over is not None
    assert out is not None
    trials.measured(fits, tuners.measured(fits.plan, 1.0))
    trials.measured(over, tuners.measured(over.plan, 0.5, peak_bytes=tuners.BUDGET_BYTES + 1))
    trials.ran_out(out, "out of memory")
    assert found_in(trials).gap == 0


def test_the_plan_found_is_for_the_card_here() -> None:
    budget = tuners.plan_of(1.0).budget.model_copy(update={"gpu": "cuda:0"})
    trials = trials_of(Candidate(4, 1.0, "balanced", "any", tuners.plan_of(1.0, budget=budget)))
    trial = trials.claim(1)
    assert trial is not None
    trials.measured(trial, tuners.measured(trial.plan, 1.0))
    assert found_in(trials, "cuda:1").plan.budget.gpu == "cuda:1"


def test_the_plan_found_has_the_whole_budget() -> None:
    """It was made for a share, and what it leaves is spare."""
    budget = tuners.plan_of(1.0).budget.model_copy(update={"margin_bytes": 100 + (tuners.BUDGET_BYTES - 100) // 4})
    trials = trials_of(Candidate(4, 0.75, "balanced", "any", tuners.plan_of(1.0, budget=budget, peak_bytes=600)))
    trial = trials.claim(1)
    assert trial is not None
    trials.measured(trial, tuners.measured(trial.plan, 1.0, peak_bytes=600))
    found = found_in(trials)
    assert (found.plan.budget.margin_bytes, found.plan.budget_bytes) == (100, 900)
    assert found.measured.budget_bytes == 900
    assert found.plan.reason == "nothing is recomputed, 300 B to spare"
    assert found.plan.share_bytes == found.plan.solved_bytes == 675
    assert found.number == 0


def test_a_plan_of_a_share_is_not_told_as_one_that_wants_little() -> None:
    """Faster ones by prediction lie between the share and the whole; the price was that of the share's last bytes."""
    of = {"options": ("keep",), "head": "keep", "stepping": "plain"}
    points = tuple(FrontierPoint(peak_bytes=b, step_s=s, chosen=s == 1.0, **of) for b, s in ((600, 1.0), (800, 0.9)))
    made = tuners.plan_of(1.0, verdict=Verdict.UNCERTAIN, peak_bytes=600, frontier=points, shadow_price=0.5)
    less = made.budget.model_copy(update={"margin_bytes": tuners.BUDGET_BYTES - 550})
    plan = tuning._of_the_whole(made.model_copy(update={"budget": less}), 900)
    assert (plan.verdict, plan.budget_bytes, plan.shadow_price) == (Verdict.FITS, 900, 0.0)
    said = " ".join(sentence for answer in answers(plan) for sentence in answer.sentences)
    assert "for this batch and 550 B of the budget" in said
    assert "tune chose it by measurement: that others are faster is a prediction" in said
    assert "takes as little as it can" not in said
    assert tuning._of_the_whole(made, made.budget_bytes) is made


def test_a_study_of_another_model_is_refused(study: Path) -> None:
    with pytest.raises(PlanMismatch, match="was made for signature"):
        tuned(tiny.llama(layers=3, use_cache=False)[0], study)
    other = {name: values.flip(0) % 7 for name, values in model_and_batch()[1].items()}
    assert states(tuned(model_and_batch()[0], study, sample=other, n_trials=1)).count("complete") == 1  # of its shapes
    with pytest.raises(PlanMismatch, match=r"budget_shares \[1.0, 0.8\], not \[0.5\]"):
        tuned(model_and_batch()[0], study, budget_shares=(0.5,))


def test_what_cannot_be_tuned_is_refused_before_there_is_a_study(first: tuple[Path, Tuned], tmp_path: Path) -> None:
    (model, _), file = model_and_batch(), tmp_path / "tune.log"
    with pytest.raises(NoDevice, match="its weights are on meta"):
        tuned(model_and_batch()[0].to("meta"), file)
    with pytest.raises(NoDevice, match="rtx-4090"):
        tune(model, "rtx-4090", effective_batch=ROWS, storage=file)
    with pytest.raises(UsageError, match="at least one strategy"):
        tuned(model, file, strategies=())
    with pytest.raises(UsageError, match="and one trial"):
        tuned(model, file, n_trials=0)
    with memplan.apply(model, first[1].plan), pytest.raises(AlreadyApplied, match="Call undo"):
        tuned(model, file)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DoesNotFit, match="below what is always there"):
        tune(model, "cpu:10KiB", effective_batch=ROWS, storage=file)
    assert file.read_bytes() == b""  # what is planned for in vain is no study either


# --- the candidates -------------------------------------------------------------------------------------------------


class Planner:
    """Stands in for a session: its plans take all of the budget that helps, and what pulls no lever needs 800 bytes."""

    def __init__(self, option: str) -> None:
        self.model, self.option, self.asked = nn.Linear(1, 1), option, list[tuple[int, float]]()
        self.division = Division()

    def micro_batches(self, effective_batch: int) -> list[int]:
        return [size for size in range(1, effective_batch + 1) if effective_batch % size == 0]

    def solve(self, strategy: Strategy, effective_batch: int, micro_batch: int) -> Plan:
        assert effective_batch == 8
        self.asked.append((micro_batch, strategy.budget_share))
        usable = int(tuners.BUDGET_BYTES * strategy.budget_share)
        budget = Budget(gpu="cpu", total_bytes=usable, others_bytes=0, context_bytes=0, margin_bytes=0)
        decisions = {"block": self.option if usable < 800 else "keep"}
        return tuners.plan_of(1.0, micro_batch, budget=budget, decisions=decisions, peak_bytes=min(usable, 800))


def test_a_smaller_share_is_planned_for_where_it_changes_the_plan() -> None:
    planner = Planner("recompute")
    found = tuning._candidates(planner, [load_strategy("recompute-only")], [1.0, 0.9, 0.7, 0.5], 8)  # type: ignore[arg-type]
    assert planner.asked == [(size, share) for size in (1, 2, 4, 8) for share in (1.0, 0.7, 0.5)]
    assert [(one.micro_batch, one.budget_share) for one in found] == [
        (size, share)
        for size in (1, 2, 4, 8)
        for share in (1.0, 0.7)  # that for 0.5 does the same as that for 0.7
    ]
    assert {one.whole_bytes for one in found} == {tuners.BUDGET_BYTES}


def test_levers_that_a_strategy_has_not_are_not_pulled() -> None:
    planner, nothing = Planner("chunked-512"), Strategy(name="nothing", levers=())
    (found,) = {one.budget_share for one in tuning._candidates(planner, [nothing], [1.0, 0.7], 8)}  # type: ignore[arg-type]
    assert found == 1.0
    with pytest.raises(DoesNotFit, match=r"no plan by the levers of nothing fits 700 B.*it would take loss-head too"):
        tuning._candidates(planner, [nothing], [0.7], 8)  # type: ignore[arg-type]
