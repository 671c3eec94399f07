"""Plans for batches of several lengths, under a guard. Ladders of one length are tested with the guard itself."""

from typing import Any

import pytest
import tiny
import torch

import memplan
from memplan.errors import AlreadyApplied, UsageError
from memplan.guard import Guard
from memplan.plan_record import Plan
from memplan.rungs import ladders
from memplan.strategy import Strategy

pytestmark = pytest.mark.slow

WHOLE = Strategy(name="whole", levers=("recompute",))
ROWS, LONG = 4, 128


@pytest.fixture(scope="module")
def made() -> tuple[Any, Plan]:
    """A model, and a plan for rows so long that some blocks have to be recomputed."""
    model, batch = tiny.llama(layers=3, rows=ROWS, length=LONG, use_cache=False)
    asked = {"sample": batch, "micro_batch": ROWS, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    plenty = memplan.plan(model, "cpu:1GiB", strategy=WHOLE, **asked)
    budget = (plenty.needs_bytes + plenty.smallest_bytes) // 2
    return model, memplan.plan(model, f"cpu:{budget}B", strategy=WHOLE, **asked)


def test_short_batches_keep_what_long_ones_drop(made: tuple[Any, Plan]) -> None:
    model, plan = made
    found = ladders(model, plan, [LONG // 4, LONG // 2], WHOLE)
    assert list(found) == [LONG, LONG // 2, LONG // 4]
    with memplan.apply(model, plan) as fit:
        guard = Guard(fit, plan._live.recipe.optimizer, found)  # type: ignore[attr-defined]
        drops: dict[int, int] = {}
        for length in (LONG, LONG // 4, LONG // 2, LONG // 4 - 1, LONG):
            rows = torch.randint(tiny.VOCABULARY, (ROWS, length))

            def run(rows: torch.Tensor = rows) -> torch.Tensor:
                loss: torch.Tensor = model(input_ids=rows, labels=rows).loss
                loss.backward()
                model.zero_grad(set_to_none=True)
                return loss.detach()

            assert guard.step(run, length).isfinite()
            drops[length] = len(guard.plan.recomputed)
            assert guard.plan.needs_bytes <= plan.budget_bytes
        guard.undo()
    assert drops[LONG] > drops[LONG // 2] >= drops[LONG // 4] == drops[LONG // 4 - 1] == 0


def test_each_class_falls_by_itself(made: tuple[Any, Plan]) -> None:
    model, plan = made
    found = ladders(model, plan, [LONG // 2], WHOLE)
    needs = {length: [one.needs_bytes for one in plans] for length, plans in found.items()}
    assert all(falling == sorted(set(falling), reverse=True) for falling in needs.values())
    assert len(needs[LONG // 2]) > 1
    assert needs[LONG // 2][-1] < needs[LONG][-1]


def test_what_is_no_shorter_class_is_refused(made: tuple[Any, Plan]) -> None:
    model, plan = made
    for length in (LONG, 0, 1.5):
        with pytest.raises(UsageError, match=f"for rows of {LONG} tokens, and {length} is no smaller"):
            ladders(model, plan, [length])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="read from a file"):
        ladders(model, Plan.model_validate_json(plan.model_dump_json()), [8])
    with memplan.apply(model, plan), pytest.raises(AlreadyApplied):
        ladders(model, plan, [8])


def test_a_class_keeps_to_the_division_and_to_the_budget_of_the_plan() -> None:
    model, _ = tiny.contrastive()
    rows = torch.randn(2, 64, 64)
    made = memplan.plan(
        model,
        "cpu:1GiB",
        sample={"x": rows, "mask": torch.ones(2, 64, dtype=torch.long)},
        loss=lambda module, batch: module(batch["x"])["loss"],
        effective_batch=8,
        micro_batch=2,
        strategy=Strategy(name="half", budget_share=0.5),
    )
    (_, short) = ladders(model, made, [32]).values()
    first = next(iter(short))
    assert (first.micro_batch, first.accumulation) == (2, 4)
    assert first.budget_bytes <= made.budget_bytes
    assert first.budget_bytes > 0.99 * made.budget_bytes
