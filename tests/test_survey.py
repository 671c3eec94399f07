"""A survey of cards: what is shared between them is what each would have had alone, and a plan for it agrees."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan.device import CUDA_CONTEXT_BYTES
from memplan.gpus import Gpu, find_gpu
from memplan.offer import Offer
from memplan.plan_record import Verdict
from memplan.recorder import Recorder
from memplan.roofline import BAND
from memplan.survey import STRATEGY, survey

SAMPLES = 4


class Block(nn.Module):
    """Attention by four heads of 64, the kernel of which depends on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(256), nn.Linear(256, 768), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(self.norm(x)).unflatten(-1, (3, 4, 64)).transpose(1, 3).unbind(2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Stack().to("meta")


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return torch.zeros(2, 1024, 256)


@pytest.fixture(scope="module")
def roomy(model: nn.Module, sample: Tensor) -> Offer:
    """On a card with plenty."""
    (offer,) = survey(model, [find_gpu("rtx-3090")], SAMPLES, sample=sample)
    return offer


def with_room(name: str, room_bytes: int) -> Gpu:
    """A card of a name with so much for a program."""
    return replace(find_gpu(name), total_bytes=CUDA_CONTEXT_BYTES + room_bytes)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What traces are taken from now on, an entry each."""
    traces: list[int] = []
    record = Recorder.record

    def counting(self: Recorder, *args: object, **kwargs: object) -> object:
        traces.append(1)
        return record(self, *args, **kwargs)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(Recorder, "record", counting)
    return traces


def test_cards_that_share_traces_get_what_each_gets_alone(
    model: nn.Module, sample: Tensor, roomy: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = partial(survey, model, samples=SAMPLES, sample=sample, method="full")
    tight = roomy.least_bytes * 11 // 10
    cards = [
        with_room("rtx-3090", tight),
        with_room("a100-sxm-80gb", tight),  # runs the same operators in float32
        with_room("h100-sxm", tight),  # the same again, but its libraries keep more
        find_gpu("rtx-4090"),
    ]
    traces = counted(monkeypatch)
    together = ask(cards)
    shared = len(traces)
    alone = [ask([card])[0] for card in cards[1:]]
    assert list(together[1:]) == alone
    assert (len(traces) - shared) == 3 * shared
    assert [offer.verdict for offer in together] == [Verdict.FITS, Verdict.FITS, Verdict.DOES_NOT_FIT, Verdict.FITS]
    assert together[0].recomputed
    assert together[3].recomputed == 0


def test_cards_of_other_operators_are_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    half, sample = Stack().to("meta", torch.bfloat16), torch.zeros(2, 1024, 256, dtype=torch.bfloat16)
    cards = [find_gpu(name) for name in ("rtx-3090", "h100-sxm", "rtx-4090", "b200")]
    traces = counted(monkeypatch)
    (alone,) = survey(half, [cards[1]], SAMPLES, sample=sample)
    once = len(traces)
    together = survey(half, cards, SAMPLES, sample=sample)
    assert [offer.gpu for offer in together] == [card.name for card in cards]
    assert together[1] == alone
    assert len(traces) == 3 * once


@pytest.mark.parametrize(("share", "verdict"), [(1.1, Verdict.FITS), (0.9, Verdict.DOES_NOT_FIT)])
def test_a_plan_for_the_card_agrees(
    model: nn.Module, sample: Tensor, roomy: Offer, share: float, verdict: Verdict
) -> None:
    card = with_room("rtx-3090", int(roomy.least_bytes * share))
    (offer,) = survey(model, [card], SAMPLES, sample=sample)
    plan = memplan.plan(model, card, sample=sample, effective_batch=SAMPLES, strategy=STRATEGY)
    assert offer.verdict == plan.verdict == verdict
    if offer.fits:
        assert plan.needs_bytes <= plan.budget_bytes
        assert offer.least_bytes <= plan.budget_bytes


def test_a_card_that_is_uncertain_would_be_used_as_leanly_as_it_can(
    model: nn.Module, sample: Tensor, roomy: Offer
) -> None:
    """As a plan for it is; a faster one would be the likelier to fail."""
    card = with_room("rtx-3090", roomy.least_bytes)
    (offer,) = survey(model, [card], SAMPLES, sample=sample)
    plan = memplan.plan(model, card, sample=sample, effective_batch=SAMPLES, strategy=STRATEGY)
    assert offer.verdict == plan.verdict == Verdict.UNCERTAIN
    assert (offer.micro_batch, offer.recomputed) == (plan.micro_batch, len(plan.recomputed))
    assert offer.recomputed


def test_a_card_below_what_is_always_there_costs_one_trace(
    model: nn.Module, sample: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = counted(monkeypatch)
    (offer,) = survey(model, [with_room("rtx-3090", 2**20)], SAMPLES, sample=sample)
    assert (offer.verdict, offer.is_bound, offer.micro_batch) == (Verdict.DOES_NOT_FIT, True, None)
    assert offer.assumed.startswith("weights: ")
    assert offer.assumed.endswith("; adamw")
    assert sum(p.numel() for p in model.parameters()) * 12 <= offer.least_bytes
    assert len(traces) == 1


def test_a_card_whose_speed_is_unknown_gets_no_time(model: nn.Module, sample: Tensor, roomy: Offer) -> None:
    (offer,) = survey(model, [find_gpu("mi300x")], SAMPLES, sample=sample)
    assert offer.fits
    assert (offer.samples_per_s, offer.band) == (None, None)
    assert roomy.samples_per_s is not None
    assert roomy.band == (roomy.samples_per_s / BAND[1], roomy.samples_per_s / BAND[0])
