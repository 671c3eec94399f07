"""Traces at another micro-batch, from those that were taken: the same arrays as a trace that is taken there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import peft
import pytest
import tiny
import torch

import memplan
from memplan import rescale, study
from memplan.profile import Level
from memplan.rescale import Scaling


def adapted() -> tiny.Made:
    """Adapters on a base as wide as two rows have tokens: a gradient to be added has the size of an activation."""
    sizes = {"hidden_size": 224, "intermediate_size": 608, "vocab_size": 1000}
    base, batch = tiny.llama(rows=2, length=112, **sizes)
    adapters = peft.LoraConfig(r=12, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base.to(torch.bfloat16), adapters).train(), batch  # which are of float32


MODELS: dict[str, Callable[[], tiny.Made]] = {
    "bert": tiny.bert,
    "vit": tiny.vit,
    "llama": tiny.llama,
    "adapted": adapted,
}
AMBIGUOUS = "llama"  # so small that weights and activations have sizes in common


def levels(monkeypatch: pytest.MonkeyPatch, name: str, gpu: str) -> tuple[list[Level], list[Level], list[Level], int]:
    """Of a plan: those at the first point, those at the other, those taken there for real, and how many were taken."""
    seen: list[tuple[list[Level], list[Level], list[Level], int]] = []

    def watched(firsts: Sequence[Level], teachers: Sequence[Level], take: Callable[[Level], Level]) -> list[Level]:
        taken = []

        def noted(first: Level) -> Level:
            taken.append(first)
            return take(first)

        found = rescale.levels_at(firsts, teachers, noted)
        seen.append((list(firsts), found, [take(first) for first in firsts], len(taken)))
        return found

    monkeypatch.setattr(study, "levels_at", watched)
    model, batch = MODELS[name]()
    memplan.plan(model.to("meta"), gpu, sample=batch, effective_batch=8 if name == "adapted" else None)
    return seen[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        *product(("bert", "vit", "llama"), ("cpu:1GiB", "rtx-4090")),
        pytest.param("adapted", "rtx-4090", marks=pytest.mark.slow),
    ],
)
def test_scaled_traces_are_those_that_would_be_taken(monkeypatch: pytest.MonkeyPatch, name: str, gpu: str) -> None:
    firsts, found, real, taken = levels(monkeypatch, name, gpu)
    assert len(firsts) > 4
    assert taken == (len(firsts) if name == AMBIGUOUS else 2)  # everything kept, everything recomputed
    for first, scaled, true in zip(firsts, found, real, strict=True):
        assert scaled.decisions == first.decisions == true.decisions
        assert scaled.trace.micro_batch == true.trace.micro_batch
        for column in ("storage_bytes", "born", "died", "op_flops", "op_bytes"):
            assert np.array_equal(getattr(scaled.trace, column), getattr(true.trace, column)), column


@pytest.mark.slow
def test_most_is_traced_where_the_batch_is_as_long_as_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, found, _, _ = levels(monkeypatch, "adapted", "rtx-4090")
    assert (firsts[0].trace.micro_batch, found[0].trace.micro_batch) == (4, 2)
    firsts, found, _, _ = levels(monkeypatch, "bert", "rtx-4090")
    assert (firsts[0].trace.micro_batch, found[0].trace.micro_batch) == (2, 4)


def test_what_was_not_seen_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, _, real, _ = levels(monkeypatch, "bert", "cpu:1GiB")
    kept, others = firsts[0].trace, real[0].trace
    scaling = Scaling.learned([(kept, others)])
    assert scaling is not None
    odd = kept.storage_bytes.copy()
    odd[-1] = 123_457
    assert scaling.of(replace(kept, storage_bytes=odd)) is None
    assert scaling.of(replace(kept, op_flops=kept.op_flops + 1)) is None


def test_sizes_that_became_different_ones_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, _, real, _ = levels(monkeypatch, "bert", "cpu:1GiB")
    kept, others = firsts[0].trace, real[0].trace
    doubled = replace(others, storage_bytes=others.storage_bytes * 2)
    scaling = Scaling.learned([(kept, others), (kept, doubled)])
    assert scaling is not None
    assert scaling.of(kept) is None


def test_traces_that_run_other_operators_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, _, real, _ = levels(monkeypatch, "bert", "cpu:1GiB")
    kept, recomputed = firsts[0].trace, real[-1].trace
    assert Scaling.learned([(kept, recomputed)]) is None
    assert Scaling.learned([]) is None
