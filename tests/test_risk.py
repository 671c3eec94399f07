"""What is kept free on a card, against the distribution that it is drawn from; and the verdicts that follow."""

import dataclasses
import random
import statistics

import pytest
import tiny
import torch

import memplan
from memplan import risk
from memplan.device import CUDA_CONTEXT_BYTES
from memplan.errors import BadStrategy
from memplan.gpus import Gpu
from memplan.plan_record import Plan, Verdict

MIB = 2**20


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),  # from published tables of the distribution
    [(0.95, 10, 1.812), (0.99, 10, 2.764), (0.99, 15, 2.602), (0.995, 15, 2.947), (0.9, 30, 1.310), (0.5, 12, 0.0)],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, expected: float) -> None:
    assert risk.student_t(probability, freedom) == pytest.approx(expected, abs=2e-3)
    assert risk.student_t(1 - probability, freedom) == pytest.approx(-expected, abs=2e-3)


def test_a_next_run_exceeds_the_interval_as_often_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the residuals and the next run from one normal distribution, many times."""
    draw = random.Random(0)
    exceeded = 0
    for _ in range(2000):
        drawn = tuple(draw.gauss(-0.002, 0.015) for _ in range(16))
        monkeypatch.setattr(risk, "measured_residuals", lambda drawn=drawn: drawn)
        exceeded += draw.gauss(-0.002, 0.015) > risk.excess_share(0.95)
    assert 0.035 < exceeded / 2000 < 0.065


def test_less_risk_keeps_more_free() -> None:
    room = 10**9
    fits = [risk.usable_bytes(room, share)[0] for share in (0.001, 0.01, 0.1, 0.5)]
    assert fits == sorted(fits)
    assert all(fit <= possible for fit, possible in (risk.usable_bytes(room, share) for share in (0.001, 0.01, 0.5)))


def test_the_shipped_residuals_are_measurements() -> None:
    residuals = risk.measured_residuals()
    assert len(residuals) >= 16
    assert statistics.median(map(abs, residuals)) < 0.02


@pytest.fixture(scope="module")
def needed() -> Plan:
    """A plan with everything kept, on a card that has plenty."""
    return planned(Gpu("a card", "cuda", 2**34, compute_capability=(8, 9)))


def planned(card: Gpu, **asked: float) -> Plan:
    model, batch = tiny.llama(rows=2, layers=2)
    return memplan.plan(model.to("meta"), card, sample=batch, micro_batch=2, strategy=strategy(**asked))


def strategy(**asked: float) -> memplan.Strategy:
    return memplan.Strategy("nothing may be done", levers=(), **asked)  # type: ignore[arg-type]


def card_with(room_bytes: float) -> Gpu:
    return Gpu("a card", "cuda", int(room_bytes) + CUDA_CONTEXT_BYTES, compute_capability=(8, 9))


def test_a_card_has_to_hold_what_its_allocator_reserves(needed: Plan) -> None:
    assert needed.fits_bytes is not None
    assert needed.reserved_bytes is not None
    assert needed.peak_bytes <= needed.fits_bytes == needed.reserved_bytes
    assert sum(needed.breakdown.values()) == needed.peak_bytes
    assert needed.fits_bytes % (2 * MIB) == 0  # whole segments


def test_the_verdict_is_by_the_risk_that_is_taken(needed: Plan) -> None:
    most = 1 + risk.excess_share(0.99)
    least = 1 + risk.excess_share(0.01)
    assert planned(card_with(needed.needs_bytes * most * 1.001)).verdict is Verdict.FITS
    between = planned(card_with(needed.needs_bytes * (most + least) / 2))
    assert between.verdict is Verdict.UNCERTAIN
    assert between.needs_bytes > between.budget_bytes
    assert planned(card_with(needed.needs_bytes * least * 0.999)).verdict is Verdict.DOES_NOT_FIT


def test_who_takes_more_risk_gets_more_of_the_card(needed: Plan) -> None:
    card = card_with(needed.needs_bytes * (1 + risk.excess_share(0.8)))
    assert planned(card).verdict is Verdict.UNCERTAIN
    assert planned(card, risk=0.25).verdict is Verdict.FITS


WAYS = memplan.Strategy("ways", levers=("recompute", "select", "loss-head"))


def wide(card: Gpu, objective: str = "samples-per-second") -> Plan:
    model, batch = tiny.llama(rows=1, layers=4, length=64, vocab_size=2048)
    strategy = dataclasses.replace(WAYS, objective=objective)
    return memplan.plan(model.to("meta", torch.bfloat16), card, sample=batch, effective_batch=4, strategy=strategy)


@pytest.fixture(scope="module")
def leanest() -> Plan:
    return wide(card_with(2**34), "peak")


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 1.01, 1.05, 1.3])
def test_where_the_leanest_plan_fits_a_plan_fits(leanest: Plan, share: float) -> None:
    """However unlike the allocator's part in the plans between it and the fastest."""
    made = wide(card_with((leanest.needs_bytes + 1) * share * (1 + risk.excess_share(0.99)) + 1))
    assert made.verdict is Verdict.FITS
    assert made.needs_bytes <= made.budget_bytes
    assert made.smallest_bytes == leanest.needs_bytes


@pytest.mark.slow
def test_a_plan_that_may_fail_is_the_one_that_is_the_likeliest_to_fit(leanest: Plan) -> None:
    made = wide(card_with(leanest.needs_bytes))
    assert made.verdict is Verdict.UNCERTAIN
    assert made.needs_bytes == made.smallest_bytes == leanest.needs_bytes
    assert "of the" in made.reason
    assert "margin are needed" in made.reason


def test_a_plan_that_fails_says_from_where_on_one_fits(leanest: Plan) -> None:
    made = wide(card_with(leanest.needs_bytes / 2))
    assert (made.verdict, made.smallest_bytes) == (Verdict.DOES_NOT_FIT, leanest.needs_bytes)


def test_fewer_bytes_of_tensors_may_need_more_of_a_card() -> None:
    """By its segments: keeping everything needs 46 MiB here, and the plan of the smallest peak 48."""

    def on(mib: int) -> Plan:
        model = tiny.llama(rows=1, layers=2, length=64, vocab_size=8192)[0].to("meta", torch.bfloat16)
        return memplan.plan(model, card_with(mib * MIB), seq_len=64, micro_batch=1, strategy=WAYS)

    tight, roomy = on(46), on(64)
    assert (tight.verdict, roomy.verdict) == (Verdict.UNCERTAIN, Verdict.FITS)
    assert tight.needs_bytes == tight.smallest_bytes == roomy.smallest_bytes == 46 * MIB
    assert set(tight.decisions.values()) == {"keep"}


@pytest.mark.parametrize("wrong", [0, -0.1, 0.6, float("nan"), True])
def test_a_risk_that_is_no_probability(wrong: float) -> None:
    with pytest.raises(BadStrategy, match="risk ="):
        planned(card_with(2**30), risk=wrong)
