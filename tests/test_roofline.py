"""Estimated times: the roofline's arithmetic on a trace made by hand, and on a real one for a real card."""

from collections.abc import Sequence

import numpy as np
import pytest
import tiny

from memplan import levers
from memplan.blocks import find_blocks
from memplan.gpus import Gpu, find_gpu
from memplan.profile import Level
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.roofline import (
    MEMORY_EFFICIENCY,
    NOMINAL_BANDWIDTH_BYTES_S,
    NOMINAL_FLOPS,
    PRODUCT_EFFICIENCY,
    Rates,
    StepTimes,
    estimated,
    is_nominal,
    op_seconds,
)
from memplan.samples import Sample
from memplan.trace import BlockRun, MicroStep, Span, Trace

RATES = Rates({"bfloat16": 1e12, "other": 1e11}, bytes=1e10, launch_s=1e-6)

Op = tuple[float, float, str]  # flops, bytes, dtype


def trace_of(ops: Sequence[Op], spans: Sequence[tuple[int, int]], blocks: Sequence[tuple[int, int, int, int]]) -> Trace:
    """A trace of operators alone: `spans` of forward, loss, backward and optimizer, `blocks` by their two spans."""
    dtypes = tuple(dict.fromkeys(dtype for *_, dtype in ops))
    nothing = np.zeros(0, dtype=np.int64)
    forward, loss, backward, optimizer = (Span(*span) for span in spans)
    runs = tuple(
        BlockRun(f"block.{i}", Span(0, 0), Span(0, 0), Span(a, b), Span(c, d)) for i, (a, b, c, d) in enumerate(blocks)
    )
    return Trace(
        how="fake",
        micro_batch=1,
        accumulation=1,
        modules=("",),
        storage_bytes=nothing,
        storage_category=nothing.astype(np.int8),
        storage_module=nothing.astype(np.int32),
        born=nothing,
        died=nothing,
        op_names=("op",),
        op_name=np.zeros(len(ops), dtype=np.int32),
        op_module=np.zeros(len(ops), dtype=np.int32),
        op_flops=np.array([flops for flops, *_ in ops], dtype=np.int64),
        op_bytes=np.array([moved for _, moved, _ in ops], dtype=np.int64),
        op_dtype=np.array([dtypes.index(dtype) for *_, dtype in ops], dtype=np.int8),
        dtypes=dtypes,
        ticks=0,
        steps=(MicroStep(Span(0, 0), Span(0, 0), Span(0, 0), forward, loss, backward, runs),),
        optimizer=Span(0, 0),
        optimizer_ops=optimizer,
    )


def test_an_operator_is_bound_by_arithmetic_by_memory_or_by_its_launch() -> None:
    ops: list[Op] = [
        (1e12, 1e6, "bfloat16"),  # a product in a type with a rate of its own
        (1e11, 1e6, "float64"),  # one in any other
        (1e6, 1e10, "bfloat16"),  # a copy
        (0, 1, "float32"),  # next to nothing
        (0, 0, "float32"),  # a view
    ]
    found = op_seconds(trace_of(ops, [(0, 5)] * 4, []), RATES)
    assert found == pytest.approx([1 + 1e-6, 1 + 1e-6, 1 + 1e-6, 1e-6, 0], rel=1e-9, abs=1e-9)


def test_a_step_is_split_into_blocks_the_rest_and_the_optimizer() -> None:
    seconds = [1, 2, 4, 8, 16, 32, 64, 128]  # embedding, two blocks, head, loss, two blocks back, optimizer
    ops: list[Op] = [(0, s * 1e10, "float32") for s in seconds]
    trace = trace_of(ops, [(0, 4), (4, 5), (5, 7), (7, 8)], [(1, 2, 6, 7), (2, 3, 5, 6)])
    times = estimated({3: {"keep": [Level({}, trace)]}}, RATES)
    assert times.block_s("block.0", "keep", 3) == pytest.approx(2 + 64, rel=1e-5)
    assert times.block_s("block.1", "keep", 3) == pytest.approx(4 + 32, rel=1e-5)
    assert times.rest_s(3, "keep") == pytest.approx(1 + 8 + 16, rel=1e-5)
    assert times.optimizer_s == pytest.approx(128, rel=1e-5)
    assert times.how == "estimate"


def test_another_way_to_step_costs_what_its_own_operators_take() -> None:
    """A block, a head; then an optimizer of two operators, of four, or inside the backward."""
    spans = [(0, 1), (1, 2), (2, 4)]

    def level(optimizer: list[int], *, inside: bool = False) -> list[Level]:
        seconds = [1, 2, 4, 8]  # block, head, head back, block back
        seconds = [*seconds[:3], optimizer[0], seconds[3], *optimizer[1:]] if inside else [*seconds, *optimizer]
        ops: list[Op] = [(0, s * 1e10, "float32") for s in seconds]
        end = len(seconds) if inside else 4
        return [Level({}, trace_of(ops, [*spans[:2], (2, end), (end, len(seconds))], [(0, 1, end - 1, end)]))]

    found = {"keep": level([16, 16]), "optimizer-single": level([16, 16, 16, 16]), "chunked-8": level([16, 16])}
    found |= {"in-backward": level([16, 16, 1], inside=True), "chunked-8+in-backward": level([40, 1], inside=True)}
    times = estimated({2: found}, RATES)
    assert times.optimizer_s == pytest.approx(32, rel=1e-5)
    steps = {name: times.optimizer_s + times.stepping_s(name) for name in found}
    wanted = {"keep": 32, "optimizer-single": 64, "chunked-8": 32, "in-backward": 33, "chunked-8+in-backward": 41}
    assert steps == pytest.approx(wanted, rel=1e-5)
    rest = {name: times.rest_s(2, name) for name in found}
    assert rest["in-backward"] == rest["optimizer-single"] == rest["keep"]
    assert rest["chunked-8+in-backward"] == rest["chunked-8"]


def test_times_between_and_beyond_two_micro_batches() -> None:
    times = StepTimes({("a", "keep"): {2: 1.0, 4: 1.5}}, {"keep": {2: 0.25, 4: 0.5}}, optimizer_s=0.0)
    assert [times.block_s("a", "keep", b) for b in (1, 2, 3, 4, 8)] == pytest.approx([0.75, 1.0, 1.25, 1.5, 2.5])
    assert times.rest_s(3, "keep") == pytest.approx(0.375)


def test_noise_never_makes_a_larger_batch_cheaper_or_dearer_per_sample() -> None:
    falling = StepTimes({("a", "keep"): {2: 1.0, 4: 0.5}}, {"keep": {2: 1.0, 4: 3.0}}, optimizer_s=0.0)
    assert falling.block_s("a", "keep", 8) == 1.0
    assert [falling.rest_s(b, "keep") for b in (1, 2, 4)] == [0.5, 1.0, 2.0]


def test_one_measurement_stands_for_every_micro_batch() -> None:
    assert StepTimes({("a", "keep"): {2: 1.0}}, {"keep": {2: 1.0}}, optimizer_s=0.0).block_s("a", "keep", 2) == 1.0


# --- cards ----------------------------------------------------------------------------------------------------------


def test_the_rates_of_a_card_are_a_share_of_its_datasheet() -> None:
    card = find_gpu("rtx-4090")
    rates = Rates.of(card)
    assert not is_nominal(card)
    assert card.bandwidth_bytes_s is not None
    assert rates.bytes == pytest.approx(card.bandwidth_bytes_s * MEMORY_EFFICIENCY)
    assert {k: rates.flops[k] for k in card.flops} == pytest.approx(
        {k: rate * PRODUCT_EFFICIENCY for k, rate in card.flops.items()}
    )
    assert rates.flops["other"] == min(rates.flops.values())


@pytest.mark.parametrize("gpu", [find_gpu("24GiB"), Gpu("mine", "cuda", 2**34, bandwidth_bytes_s=1e12)])
def test_a_card_without_figures_has_nominal_ones(gpu: Gpu) -> None:
    assert is_nominal(gpu)
    rates = Rates.of(gpu)
    assert rates.flops == {"other": NOMINAL_FLOPS * PRODUCT_EFFICIENCY}
    assert rates.bytes == NOMINAL_BANDWIDTH_BYTES_S * MEMORY_EFFICIENCY


def test_a_real_trace_costs_more_where_it_recomputes() -> None:
    model, batch = tiny.t5(use_cache=False)
    recorder, blocks = Recorder(model, Recipe()), find_blocks(model)
    every = [dict.fromkeys(blocks, option) for option in levers.OPTIONS]
    found = [Level(d, recorder.record(Sample.of(batch), lambda d=d: levers.decided(model, d))) for d in every]
    times = estimated({2: {"keep": found}}, Rates.of(find_gpu("h100-sxm")))
    for path in blocks:
        keep, recompute = (times.block_s(path, option, 2) for option in levers.OPTIONS)
        assert keep < recompute < 2 * keep
    assert times.rest_s(2, "keep") > 0
    assert times.optimizer_s > 0
