"""The peers of the benchmark train as the plain model does, and leave it as it was; its arithmetic and its store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frontier
import frontier_report as report
import peers
import pytest
import tiny
import torch
from frontier_measure import NONE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def gradients(model: nn.Module, batch: tiny.Batch) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one step, dropout falling as it does after seed 1."""
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def attributes(model: nn.Module) -> list[dict[str, int]]:
    return [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]


MODELS: dict[str, Callable[[], tiny.Made]] = {
    "llama": lambda: tiny.llama(layers=3, use_cache=False),
    "gpt2": lambda: tiny.gpt2(use_cache=False),
    "resnet": tiny.resnet,
}


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("name", MODELS)
def test_peer_changes_no_gradient_and_leaves_no_trace(name: str, peer: str) -> None:
    model, batch = MODELS[name]()
    before, hooks = attributes(model), sum(len(module._forward_hooks) for module in model.modules())
    loss, plain = gradients(model, batch)
    undo = peers.PEERS[peer](model)
    assert attributes(model) != before
    its_loss, its = gradients(model, batch)
    undo()
    assert attributes(model) == before
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert torch.equal(loss, its_loss)
    assert all(torch.equal(a, b) for a, b in zip(plain, its, strict=True))


class Counting(TorchDispatchMode):
    """Counts the matrix products that run; what a selective checkpoint has saved does not come here again."""

    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function in peers.LINEAR
        return function(*args, **(kwargs or {}))


def count_of_products(model: nn.Module, batch: tiny.Batch) -> int:
    with Counting() as counting:
        gradients(model, batch)
    return counting.products


def test_selective_peers_recompute_what_they_say() -> None:
    model, batch = tiny.llama(layers=2, use_cache=False)
    plain = count_of_products(model, batch)
    extra = {}
    for peer in (peers.FULL, "attention only", "every 2nd matmul", "matmuls + attention"):
        undo = peers.PEERS[peer](model)
        extra[peer] = count_of_products(model, batch) - plain
        undo()
    # q, k, v, o, gate, up, down in each of 2 layers; the last is never run again
    assert extra == {peers.FULL: 12, "attention only": 12, "every 2nd matmul": 6, "matmuls + attention": 0}


# --- the arithmetic -------------------------------------------------------------------------------------------------


def record(**changes: object) -> dict[str, Any]:
    """1000 bytes without checkpointing, 500 with, 100 static; full is 30 % slower; the machine slows in between."""
    plan = {"budget_bytes": 500, "smallest_bytes": 400, "peak_bytes": 480, "slowdown": 0.05, "micro_batch": 4}
    plan |= {"accumulation": 1, "options": {"keep": 3, "recompute": 1}, "same_as": None}
    rounds = [
        [(NONE, 1.0), (peers.FULL, 1.3), (report.AT_FULL, 1.06), (NONE, 1.0)],
        [(NONE, 2.0), (report.AT_FULL, 2.12), (peers.FULL, 2.6), (NONE, 2.0)],
    ]
    base: dict[str, Any] = {
        "batch": 4,
        "threads": 1,
        "static": 100,
        "errors": {},
        "plans": {report.AT_FULL: plan},
        "rounds": rounds,
    }
    return base | {"peaks": {NONE: 1000, peers.FULL: 500, report.AT_FULL: 480}} | changes


def judged(workload: str = "W1", **changes: object) -> dict[str, tuple[bool, str]]:
    return {v.what: (v.passed, v.numbers) for v in report.verdicts(workload, record(**changes))}


def test_laps_are_compared_with_the_unit_beside_them() -> None:
    laps = [[(NONE, 1.0), ("a", 3.0), (NONE, 2.0), ("b", 3.0), (NONE, 4.0)]]
    assert report.ratios(laps) == {NONE: [0.5, 0.8, 2.0], "a": [2.0], "b": [1.0]}


def test_slowdowns_are_free_of_the_machines_drift() -> None:
    slowdowns = {row.setting: row.slowdown for row in report.rows_of(record())}
    assert slowdowns == pytest.approx({NONE: 0.0, peers.FULL: 0.3, report.AT_FULL: 0.06})


def test_targets_are_judged() -> None:
    found = judged()
    assert found["at full checkpointing's peak at most 0.25 of its extra time"][0]
    assert found["slowdown predicted within 5 points"][0]
    assert found["at least 15% less transient memory than full checkpointing"] == (
        False,
        "0.0 against 0.0 MB, 5.0% less (memplan at full)",
    )
    assert "at full checkpointing's peak at most 0.25 of its extra time" not in judged("W5")


def test_a_peak_above_the_budget_fails() -> None:
    found = judged(peaks={NONE: 1000, peers.FULL: 500, report.AT_FULL: 501})
    assert found["measured peak never above the budget"] == (False, "1 of 1 plans over, worst +1 (memplan at full)")


def test_a_rival_must_take_no_more_memory() -> None:
    rounds = [[(NONE, 1.0), (peers.FULL, 1.01), (report.AT_FULL, 1.06), (NONE, 1.0)]]
    found = judged(rounds=rounds)
    assert found["no slower than the fastest peer within the same measured peak"][0]  # full takes 20 bytes more
    assert found["no slower than the fastest peer within the budget"] == (
        False,
        "1 plans have a rival; worst +5.0 points (memplan at full against full), noise 0.0",
    )


def test_what_is_not_measured_yet_is_not_judged() -> None:
    assert judged(peaks={NONE: 1000}, plans={}, rounds=[]) == {}
    assert "W1" in report.document({"W1": record(rounds=[])}, {"W1": "a Llama"})


def test_a_plan_that_equals_another_has_its_measurements() -> None:
    plan = record()["plans"][report.AT_FULL]
    rows = report.rows_of(
        record(plans={report.AT_FULL: plan, report.SPLIT_AT_FULL: plan | {"same_as": report.AT_FULL}})
    )
    assert {row.setting: row.peak_bytes for row in rows}[report.SPLIT_AT_FULL] == 480


# --- the store ------------------------------------------------------------------------------------------------------


def test_store_keeps_the_records_of_others(tmp_path: Path) -> None:
    store = frontier.Store(tmp_path / "new" / "frontier.json")
    first, second = json.loads(json.dumps(record())), frontier.fresh("W6", threads=1)
    store.save("W1", first)
    frontier.Store(store.path).save("W6", second)
    assert store.load() == {"W1": first, "W6": second}
    assert [path.name for path in store.path.parent.iterdir()] == ["frontier.json"]


def test_replanning_keeps_what_the_peers_took() -> None:
    kept = record(errors={"memplan 0/8": "DoesNotFit: 1", "every 2 layers": "ValueError: 2"})
    frontier.forget_plans(kept)
    assert (kept["peaks"], kept["plans"], kept["rounds"]) == ({NONE: 1000, peers.FULL: 500}, {}, [])
    assert kept["errors"] == {"every 2 layers": "ValueError: 2"}
