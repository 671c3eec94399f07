"""What a selection costs beside what it runs again is in its price: a tiny block is better run again whole."""

import time

import pytest
import tiny

import memplan
from memplan.levers import replay
from memplan.plan_record import Plan

HOOK_S = 2e-3  # of each saved tensor, where the block itself takes a few milliseconds


@pytest.mark.slow
def test_where_hooks_cost_more_than_the_block_it_is_recomputed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replay.Saved.__init__

    def slower(self: replay.Saved, *args: object) -> None:
        time.sleep(HOOK_S)
        slow(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(replay.Saved, "__init__", slower)
    assert not tight_plan().selections
    assert tight_plan().recomputed


def tight_plan() -> Plan:
    """For a model on the device, within what recomputing one of two blocks leaves."""
    model, batch = tiny.llama(layers=2, rows=4, length=64, use_cache=False)
    strategy = memplan.Strategy("blocks", levers=("recompute", "select"))
    plenty = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=4, strategy=strategy)
    budget = plenty.smallest_bytes + (plenty.peak_bytes - plenty.smallest_bytes) // 2
    return memplan.plan(model, f"cpu:{budget}B", sample=batch, micro_batch=4, strategy=strategy)
