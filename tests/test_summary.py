"""What no trace shows: how many Python numbers a real step wraps in tensors, against what torch's allocator says."""

import pytest
import tiny
import torch
from real import peak_of
from torch import Tensor, nn

import memplan
from memplan.plan_record import Verdict
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.summary import timeline_of, unseen_bytes

NUMBER = 8


class Scaling(nn.Module):
    """Multiplies by Python numbers many times; autograd holds each till the backward. The forward's end is the peak."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(8, 8), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for n in range(self.times):
            x = x * (n + 0.5) if n % 2 else x / (n + 0.5)
        return x.sum() + torch.zeros(2**16).sum()


@pytest.mark.parametrize("times", [0, 10, 300])
def test_each_number_that_is_multiplied_by_is_kept_free(times: int) -> None:
    model, batch = Scaling(times), torch.randn(4, 8)
    trace = Recorder(model, Recipe(optimizer="sgd")).record(Sample.of(batch))
    beyond = peak_of(model, Sample.of(batch), Recipe(optimizer="sgd")) - trace.peak_bytes
    assert NUMBER * times <= beyond <= unseen_bytes(trace) <= NUMBER * (times + 8)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert, tiny.t5, tiny.lora])
def test_a_step_of_a_real_model_never_has_more(make: "type[tiny.Made]") -> None:
    model, batch = make()
    trace = Recorder(model, Recipe()).record(Sample.of(batch))
    assert 0 <= peak_of(model, Sample.of(batch)) - trace.peak_bytes <= unseen_bytes(trace)


def test_a_plan_fits_from_the_budget_on_that_has_room_for_them() -> None:
    model, batch = Scaling(300), torch.randn(4, 8)
    trace = Recorder(model, Recipe(optimizer="sgd")).record(Sample.of(batch))
    least = trace.peak_bytes + unseen_bytes(trace)
    verdicts = [
        memplan.plan(model, f"cpu:{size}B", sample=batch, optimizer="sgd", micro_batch=4).verdict
        for size in (least, least - 1)
    ]
    assert verdicts == [Verdict.FITS, Verdict.UNCERTAIN]


@pytest.mark.parametrize("layers", [2, 12])
def test_a_timeline_has_the_highest_moment_of_each_micro_batch(layers: int) -> None:
    """Also where it is a short one in a long step, as that of the logits is."""
    model, batch = tiny.llama(layers=layers)
    trace = Recorder(model, Recipe(accumulation=2)).record(Sample.of(batch))
    timeline = timeline_of(trace)
    assert len(timeline.total) <= 802
    assert {int(trace.live[s.forward.start : s.backward.stop].max()) for s in trace.steps} <= set(timeline.total)
    assert max(timeline.total) == trace.peak_bytes
