"""Seconds of the parts of a step, measured on the device: each distinct block, each option, medians of real runs."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from memplan import levers
from memplan.abstract import preserved
from memplan.blocks import alike
from memplan.device import Device
from memplan.errors import MemplanError
from memplan.recorder import Recipe, loss_of
from memplan.repeat import Run, long_runs, shortened
from memplan.roofline import Rates, StepTimes
from memplan.samples import Sample

_REPEATS = 3
_ENOUGH_S = 2.0  # a step longer than this is measured once


def measured(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    device: Device,
    blocks: Sequence[str],
    options: Sequence[str],
    optimizer_s: float,
) -> StepTimes:
    """Run real forward and backward passes and time their parts.

    Of a run of alike blocks a few are run and their median stands for all; so the memory that this takes is that of a
    short model. Model, gradients, buffers and random state are as before afterwards.

    Args:
        samples: one per micro-batch at which to measure.
        optimizer_s: the optimizer's share, which is not run here: it would train.
    """
    watch = _Watch(model, recipe, device)
    with preserved(model):
        model.train()
        runs = long_runs(model, blocks)
        try:
            return watch.times(samples, blocks, options, runs, optimizer_s)
        except (IndexError, KeyError, MemplanError):
            if not runs:
                raise
            return watch.times(samples, blocks, options, [], optimizer_s)  # the model counts its blocks itself


@dataclass(frozen=True, slots=True)
class _Lap:
    """One micro-step: seconds of each block's forward and backward, and of the whole."""

    blocks: Mapping[str, float]
    total_s: float


class _Watch:
    def __init__(self, model: nn.Module, recipe: Recipe, device: Device) -> None:
        self.model, self.recipe, self.device = model, recipe, device

    def times(
        self,
        samples: Sequence[Sample],
        blocks: Sequence[str],
        options: Sequence[str],
        runs: Sequence[Run],
        optimizer_s: float,
    ) -> StepTimes:
        omitted = {path for run in runs for path in run.omitted}
        present = [path for path in blocks if path not in omitted]
        groups = alike(self.model, blocks)
        seconds: dict[tuple[str, str], dict[int, float]] = {}
        rest: dict[int, float] = {}
        with shortened(self.model, runs):
            for sample in samples:
                batch = sample.to(self.device.torch_device)
                laps = self._laps(batch, present, options)
                outside = []
                for option, found in laps.items():
                    own = {path: median(lap.blocks[path] for lap in found) for path in present}
                    for group in groups:
                        typical = median(own[path] for path in group if path in own)
                        for path in group:
                            seconds.setdefault((path, option), {})[sample.batch_size] = typical
                    outside.append(median(lap.total_s - sum(lap.blocks.values()) for lap in found))
                rest[sample.batch_size] = max(0.0, min(outside))
        return StepTimes(seconds, rest, optimizer_s, how="measured")

    def _laps(self, batch: Sample, blocks: Sequence[str], options: Sequence[str]) -> dict[str, list[_Lap]]:
        """Interleaved, so that a busy moment of the machine hits all options alike; the first round warms up."""
        laps: dict[str, list[_Lap]] = {option: [] for option in options}
        for turn in range(_REPEATS + 1):
            for option in options:
                with levers.decided(self.model, dict.fromkeys(blocks, option)):
                    lap = self._lap(batch, blocks)
                if turn or lap.total_s > _ENOUGH_S:
                    laps[option].append(lap)
            if all(found and found[0].total_s > _ENOUGH_S for found in laps.values()):
                break
        return laps

    def _lap(self, batch: Sample, blocks: Sequence[str]) -> _Lap:
        casting = (
            nullcontext()
            if self.recipe.autocast is None
            else torch.autocast(self.device.torch_device.type, self.recipe.autocast)
        )
        with _stamps(self.model, blocks, self._now) as stamps:
            begin = self._now()
            with casting:
                loss = loss_of(self.model, batch, self.recipe.loss)
            stamps.forward_stop = self._now()
            loss.backward()
            end = self._now()
        for parameter in self.model.parameters():
            parameter.grad = None
        return _Lap(stamps.seconds(end), end - begin)

    def _now(self) -> float:
        self.device.synchronize()
        return time.perf_counter()


class _Stamps:
    """When each block's forward began and ended, and when the gradient of its output was there."""

    def __init__(self) -> None:
        self.entered: dict[str, float] = {}
        self.left: dict[str, float] = {}
        self.gradient: dict[str, float] = {}
        self.forward_stop = 0.0

    def seconds(self, end: float) -> dict[str, float]:
        """A block's backward lasts from its output's gradient to that of the block before it, or to the end."""
        order = sorted(self.gradient, key=self.gradient.__getitem__)
        stops = [self.gradient[path] for path in order[1:]] + [end]
        backward = {path: stop - self.gradient[path] for path, stop in zip(order, stops, strict=True)}
        return {path: self.left[path] - self.entered[path] + backward.get(path, 0.0) for path in self.left}


@contextmanager
def _stamps(model: nn.Module, blocks: Sequence[str], now: Any) -> Iterator[_Stamps]:
    stamps = _Stamps()

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: object) -> None:
            stamps.entered.setdefault(path, now())

        return hook

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if path in stamps.left:
                return  # recomputation
            stamps.left[path] = now()
            first = _first_tensor(output)
            if first is not None and first.requires_grad:
                first.register_hook(lambda grad: stamps.gradient.setdefault(path, now()) and None)

        return hook

    with ExitStack() as stack:
        for path in blocks:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(enter(path)).remove)
            stack.callback(module.register_forward_hook(leave(path)).remove)
        yield stamps


def _first_tensor(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def cpu_rates() -> Rates:
    """What this machine's processor does per second: one matrix product and one copy, the best of a few."""
    size = 768
    left, right = torch.ones(size, size), torch.ones(size, size)
    block = torch.ones(8 * 2**20)
    product_s = min(_seconds(lambda: left @ right) for _ in range(4))
    copy_s = min(_seconds(lambda: block + 1) for _ in range(4))
    return Rates({"other": 2 * size**3 / product_s}, 2 * block.nbytes / copy_s, launch_s=2e-6)


def _seconds(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
