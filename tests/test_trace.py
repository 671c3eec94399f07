"""The table that a step leaves behind: peaks, phases and breakdowns are sums over it, and JSON keeps all of it."""

from dataclasses import fields, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import tiny

from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import CATEGORIES, Span, Trace


@cache
def recorded(accumulation: int = 1) -> Trace:
    model, batch = tiny.gpt2()
    return Recorder(model, Recipe(accumulation=accumulation)).record(Sample.of(batch))


def by_hand() -> Trace:
    """Weights of 100 bytes; activations of 10 and 20; an optimizer's temporary of 1000 after the backward."""
    trace = recorded()
    columns = {
        "storage_bytes": [100, 10, 20, 1000],
        "storage_category": [CATEGORIES.index(n) for n in ("params", "activations", "activations", "temporaries")],
        "storage_module": [0, 1, 2, 0],
        "born": [0, 1, 2, 6],
        "died": [8, 5, 4, 7],
    }
    arrays = {n: np.array(v, dtype=getattr(trace, n).dtype) for n, v in columns.items()}
    step = replace(trace.steps[0], forward=Span(1, 3), loss=Span(3, 4), backward=Span(4, 6), blocks=())
    return replace(trace, **arrays, ticks=8, steps=(step,), optimizer=Span(6, 8), modules=("", "a", "b"))


class TestByHand:
    def test_live(self) -> None:
        assert by_hand().live.tolist() == [100, 110, 130, 130, 110, 100, 1100, 100]

    def test_peaks(self) -> None:
        trace = by_hand()
        assert (trace.peak_bytes, trace.peak_tick) == (1100, 6)
        assert trace.peak_in(Span(0, 6)) == 130
        assert trace.peak_in(Span(4, 6)) == 110

    def test_an_empty_range_has_what_is_alive_at_its_start(self) -> None:
        assert by_hand().peak_in(Span(5, 5)) == by_hand().live_at(5) == 110
        assert by_hand().live_at(0) == 0

    def test_phases(self) -> None:
        phases = [by_hand().phase_of(tick) for tick in range(8)]
        assert phases == ["forward", "forward", "forward", "loss", "backward", "backward", "optimizer", "optimizer"]

    def test_breakdown_splits_activations_by_module(self) -> None:
        parts = {name: size for name, size in by_hand().breakdown(2).items() if size}
        assert parts == {"params": 100, "activations/a": 10, "activations/b": 20}


class TestRecorded:
    def test_breakdown_sums_to_what_is_alive_at_every_tick(self) -> None:
        trace = recorded()
        for tick in range(trace.ticks):
            assert sum(trace.breakdown(tick).values()) == trace.live[tick]

    def test_phases_come_in_order(self) -> None:
        trace = recorded()
        seen = list(dict.fromkeys(trace.phase_of(tick) for tick in range(trace.ticks)))
        assert seen == ["forward", "loss", "backward", "optimizer"]

    def test_two_micro_steps_stand_for_all(self) -> None:
        trace = recorded(accumulation=5)
        assert (len(trace.steps), trace.accumulation) == (2, 5)
        seen = [trace.phase_of(tick) for tick in range(trace.ticks)]
        changes = [b for a, b in pairwise(seen) if a != b]
        assert changes == ["loss", "backward", "forward", "loss", "backward", "optimizer"]

    def test_gradients_are_resident_in_the_second(self) -> None:
        trace = recorded(accumulation=2)
        first, second = (trace.breakdown(step.loss.start)["grads"] for step in trace.steps)
        assert first == 0
        assert second == trace.breakdown(0)["params"]

    def test_spans_of_blocks_lie_in_their_phase_and_in_order(self) -> None:
        (step,) = recorded().steps
        starts = [block.forward.start for block in step.blocks]
        backs = [block.backward.start for block in step.blocks]
        assert [block.path for block in step.blocks] == [f"transformer.h.{i}" for i in range(3)]
        assert starts == sorted(starts)
        assert backs == sorted(backs, reverse=True)
        for block in step.blocks:
            assert step.forward.start <= block.forward.start < block.forward.stop <= step.forward.stop
            assert step.backward.start <= block.backward.start < block.backward.stop <= step.backward.stop

    def test_nothing_lives_outside_the_step(self) -> None:
        trace = recorded()
        assert (trace.born < trace.died).all()
        assert (trace.died <= trace.ticks).all()
        assert not trace.alive(trace.ticks).any()


class TestJson:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_there_and_back(self, accumulation: int) -> None:
        before = recorded(accumulation)
        after = Trace.from_json(before.to_json())
        for field in fields(Trace):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if isinstance(old, np.ndarray):
                assert old.dtype == new.dtype
                assert np.array_equal(old, new)
            else:
                assert old == new
                assert type(old) is type(new)
        assert after.peak_bytes == before.peak_bytes

    def test_another_schema_version_is_refused(self) -> None:
        text = recorded().to_json().replace('"schema": 1', '"schema": 999')
        with pytest.raises(ValueError, match="schema version 1"):
            Trace.from_json(text)
