"""The worst batch that can come, against every batch that can; and a plan for it."""

from itertools import combinations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import memplan
from memplan.data import Data
from memplan.errors import BadSample, UsageError
from memplan.samples import Sample

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def area(batch: tuple[int, ...]) -> int:
    return len(batch) * max(batch)


@given(lengths, st.integers(1, 4))
def test_no_batch_that_a_random_sampler_draws_is_larger(found: list[int], micro_batch: int) -> None:
    worst = Data(found).worst(micro_batch)
    drawn = [batch for k in range(1, micro_batch + 1) for batch in combinations(found, k)]
    assert worst.rows * worst.tokens == max(map(area, drawn))
    assert found[worst.samples[0]] == worst.tokens


@given(lengths, st.integers(1, 4))
def test_in_order_it_is_the_batch_of_the_most_padded_tokens(found: list[int], micro_batch: int) -> None:
    worst = Data(found, shuffled=False).worst(micro_batch)
    batches = [tuple(found[i : i + micro_batch]) for i in range(0, len(found), micro_batch)]
    assert tuple(found[i] for i in worst.samples) in batches
    assert worst.rows * worst.tokens == max(map(area, batches))


@given(lengths, st.integers(1, 50), st.integers(1, 16))
def test_long_samples_are_cut_and_lengths_padded_up(found: list[int], cut_to: int, multiple_of: int) -> None:
    tokens = Data(found, cut_to=cut_to, multiple_of=multiple_of).tokens
    assert tokens % multiple_of == 0
    assert 0 <= tokens - min(max(found), cut_to) < multiple_of


def test_packed_rows_have_one_length_whatever_the_samples_have() -> None:
    data = Data([5, 900], packed_to=128)
    assert (data.tokens, data.worst(4).rows, data.worst(4).samples) == (128, 4, ())
    assert "packed" in data.describe(4)


def test_it_says_which_batch_is_the_worst() -> None:
    data = Data([10, 20, 3000, 20, 30])
    assert data.describe(2) == (
        "the worst batch that can come has 2 rows of 3,000 tokens: that of sample 2 of 5, whose median is 20 tokens"
    )
    assert "samples 2 to 3 of 5" in Data(data.lengths, shuffled=False).describe(2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lengths": []}, "no lengths"),
        ({"lengths": [3, 0, 2]}, "sample 1 of the data has 0 tokens"),
        ({"lengths": [3], "packed_to": 0}, "packed_to = 0"),
        ({"lengths": [3], "cut_to": -1}, "cut_to = -1"),
        ({"lengths": [3], "multiple_of": 0}, "multiple_of = 0"),
    ],
)
def test_impossible_data_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(BadSample, match=said):
        Data(**wrong)  # type: ignore[arg-type]


def test_a_plan_is_made_for_the_worst_batch_of_the_data() -> None:
    model, batch = tiny.llama(rows=2, length=16)
    model.to("meta")
    data = Data([4, 9, 40, 7])
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=2, data=data)
    longer = Sample.of(batch).lengthened(40).content
    assert plan.peak_bytes == memplan.plan(model, "cpu:1GiB", sample=longer, micro_batch=2).peak_bytes
    assert plan.assumptions[-1] == data.describe(2)
    assert {field.shape for field in plan.sample} == {(40,)}


def test_length_is_said_once() -> None:
    model, _ = tiny.llama()
    with pytest.raises(UsageError, match="pass one of them"):
        memplan.plan(model.to("meta"), "cpu:1GiB", seq_len=16, data=Data([4]))
    with pytest.raises(UsageError, match="a sample and seq_len=16 were given"):
        memplan.plan(model, "cpu:1GiB", sample=tiny.llama()[1], seq_len=16)
    with pytest.raises(UsageError, match=r"a memplan\.Data of the lengths of all samples, not a list"):
        memplan.plan(model, "cpu:1GiB", data=[4, 5])  # type: ignore[arg-type]  # what is refused
