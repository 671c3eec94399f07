"""Seconds of a trace on a device that is not here: each operator is bound by arithmetic, by memory, or by its launch.

The roofline of Williams, Waterman and Patterson (CACM 52, 2009) with a constant efficiency per class of operators.
These are estimates, and a plan says so. Ratios (what is the cheapest block to recompute? is it worth it?) come out far
better than absolute times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memplan.gpus import Gpu
from memplan.graph import BlockGraph
from memplan.problem import KEEP, lever_of
from memplan.profile import Level
from memplan.trace import BlockRun, MicroStep, Span, Trace

# Shares of the datasheet's figures that large training operators reach in practice. Products: model FLOP utilisations
# of 50-70 % in Hagemann et al. 2023 (arXiv 2311.05610), over all operators, so a little more in the products alone.
# Memory: what copy kernels reach. Not yet measured by memplan.
PRODUCT_EFFICIENCY = 0.7
MEMORY_EFFICIENCY = 0.8
LAUNCH_S = 5e-6  # issuing one eager operator on CUDA; the host is the limit below that

# Times over estimates for a card that is not here. The fastest of twelve published runs on an A100 took 0.87 of the
# estimate, the slowest 1.07 (docs/fit.md); products at the lower end of those utilisations, 50 %, would take 1.4 times.
BAND = (0.87, PRODUCT_EFFICIENCY / 0.5)

# What a card is taken for that is given by its size alone: only ratios mean anything then.
NOMINAL_FLOPS = 100e12
NOMINAL_BANDWIDTH_BYTES_S = 1e12


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does per second, efficiencies included."""

    flops: Mapping[str, float]  # by dtype name; "other" for the rest
    bytes: float
    launch_s: float = LAUNCH_S

    @classmethod
    def of(cls, gpu: Gpu) -> "Rates":
        """A card's figures; a card without them gets nominal ones (see `is_nominal`)."""
        if is_nominal(gpu):
            return cls({"other": NOMINAL_FLOPS * PRODUCT_EFFICIENCY}, NOMINAL_BANDWIDTH_BYTES_S * MEMORY_EFFICIENCY)
        flops = {dtype: rate * PRODUCT_EFFICIENCY for dtype, rate in gpu.flops.items()}
        flops.setdefault("other", min(flops.values()))
        return cls(flops, (gpu.bandwidth_bytes_s or NOMINAL_BANDWIDTH_BYTES_S) * MEMORY_EFFICIENCY)


def is_nominal(gpu: Gpu) -> bool:
    """Whether nothing is known of a card's speed."""
    return not gpu.flops or gpu.bandwidth_bytes_s is None


def op_seconds(trace: Trace, rates: Rates) -> NDArray[np.float64]:
    """Seconds of every operator of a trace, shape [operators]. Views cost nothing."""
    per_dtype = np.array([rates.flops.get(dtype, rates.flops["other"]) for dtype in trace.dtypes])
    arithmetic = trace.op_flops / per_dtype[trace.op_dtype]
    memory = trace.op_bytes / rates.bytes
    seconds: NDArray[np.float64] = np.where(trace.op_bytes > 0, np.maximum(arithmetic, memory) + rates.launch_s, 0.0)
    return seconds


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of a step; implements `profile.Times`.

    Attributes:
        blocks: (path, option) -> micro-batch -> seconds.
        rest: variant -> micro-batch -> seconds of a micro-step outside the blocks.
        stepping: variant -> seconds of its optimizer step beyond the plain one's, where it steps otherwise.
        doubt: share by which measured times of one thing differed; see `laps.Laps`.
    """

    blocks: Mapping[tuple[str, str], Mapping[int, float]]
    rest: Mapping[str, Mapping[int, float]]
    optimizer_s: float
    how: str = field(default="estimate")  # or "measured"
    doubt: float = 0.0
    stepping: Mapping[str, float] = field(default_factory=dict)

    def block_s(self, path: str, option: str, micro_batch: int) -> float:
        return _affine(self.blocks[path, option], micro_batch)

    def rest_s(self, micro_batch: int, variant: str) -> float:
        return _affine(self.rest[variant], micro_batch)

    def stepping_s(self, variant: str) -> float:
        return self.stepping.get(variant, 0.0)


def estimated(levels: Mapping[int, Mapping[str, Sequence[Level]]], rates: Rates) -> StepTimes:
    """Times from traces (micro-batch -> variant -> levels, see `profile.Profile.of`), by the roofline."""
    blocks: dict[tuple[str, str], dict[int, float]] = {}
    rest: dict[str, dict[int, float]] = {}
    optimizer_s, stepping = 0.0, dict[str, float]()
    for micro_batch, by_variant in levels.items():
        plain_s: dict[str, float] = {}  # variant -> seconds of a step with everything kept, but for the optimizer's
        for variant, found in by_variant.items():
            plain = _without_stepping(variant)
            for level in found:
                total = np.concatenate([[0.0], np.cumsum(op_seconds(level.trace, rates))])
                step = level.trace.steps[0]
                own = {block.path: _block_seconds(total, block) for block in step.blocks}
                for path, seconds in own.items():
                    option = level.decisions.get(path, KEEP)
                    blocks.setdefault((path, option), {}).setdefault(micro_batch, seconds)
                step_s, after_s = _step_seconds(total, step), _between(total, level.trace.optimizer_ops)
                plain_s.setdefault(variant, step_s)
                if variant == KEEP:
                    optimizer_s = after_s
                if variant == plain:
                    rest.setdefault(variant, {}).setdefault(micro_batch, step_s - sum(own.values()))
                else:  # the optimizer's operators may be anywhere in the backward
                    rest.setdefault(variant, {}).setdefault(micro_batch, rest[plain][micro_batch])
                    stepping.setdefault(variant, step_s + after_s - plain_s[plain] - optimizer_s)
    return StepTimes(blocks, rest, optimizer_s, stepping=stepping)


def _without_stepping(variant: str) -> str:
    """The variant in which the optimizer steps plainly: its loss head's."""
    heads = [part for part in variant.split("+") if lever_of(part) not in ("optimizer", "step-in-backward")]
    return "+".join(heads) or KEEP


def node_seconds(graph: BlockGraph, rates: Rates) -> list[float]:
    """Seconds of every node of a block's graph, by the roofline."""
    flops = {node.dtype: rates.flops.get(node.dtype, rates.flops["other"]) for node in graph.nodes}
    return [max(node.flops / flops[node.dtype], node.bytes / rates.bytes) + rates.launch_s for node in graph.nodes]


def _block_seconds(total: NDArray[np.float64], block: BlockRun) -> float:
    return _between(total, block.forward_ops) + _between(total, block.backward_ops)


def _step_seconds(total: NDArray[np.float64], step: MicroStep) -> float:
    return sum(_between(total, span) for span in (step.forward_ops, step.loss_ops, step.backward_ops))


def _between(total: NDArray[np.float64], span: Span) -> float:
    return float(total[span.stop] - total[span.start])


def _affine(points: Mapping[int, float], micro_batch: int) -> float:
    """Through one or two points: a fixed part and a part per sample, neither below 0.

    So a noisy pair of measurements never claims that a larger batch costs more per sample, or less in all.
    """
    if len(points) == 1:
        return next(iter(points.values()))
    (low, first), (high, second) = sorted(points.items())
    slope = min(max(0.0, (second - first) / (high - low)), first / low)
    return first + slope * (micro_batch - low)


def origin_of(gpu: Gpu, times: StepTimes) -> str:
    """What times rest on: "measured", "estimate" from a card's figures, or "nominal" where it has none."""
    is_assumed = gpu.kind != "cpu" and is_nominal(gpu)
    return "nominal" if is_assumed and times.how == "estimate" else times.how
