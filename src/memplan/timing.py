"""Seconds of each distinct block under each option, measured on the device: medians of real forwards and backwards."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from memplan import levers
from memplan._compat import is_cache
from memplan.abstract import preserved, to_training
from memplan.blocks import alike
from memplan.device import Device
from memplan.errors import ModelFailed
from memplan.problem import KEEP
from memplan.recorder import Recipe, loss_of
from memplan.repeat import long_runs, shortened
from memplan.roofline import Rates, StepTimes
from memplan.samples import Sample

_REPEATS = 3
_LEAST_SLOWDOWN = 1.01  # of a recomputed block against the same block kept
_ENOUGH_S = 2.0  # a block that takes this long is not run again


def measured(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    device: Device,
    blocks: Sequence[str],
    options: Sequence[str],
    estimate: StepTimes,
) -> StepTimes:
    """The estimate, with each block's times replaced by measured ones and the rest scaled to agree with them.

    Every distinct block is run by itself, on the inputs that it gets in a real forward; one of a run of alike blocks
    stands for all. Model, gradients, buffers and random state are as before afterwards.

    Args:
        samples: one per micro-batch at which the estimate was made.

    Raises:
        ModelFailed: the model raised where the abstract run did not; the cause is chained.
    """
    seconds: dict[tuple[str, str], dict[int, float]] = {}
    rest: dict[int, float] = {}
    scale = 1.0
    with preserved(model):
        to_training(model)
        for sample in samples:
            clock = _Clock(model, recipe, sample.to(device.torch_device), device)
            size = sample.batch_size
            found = _believable(clock.times(blocks, options))
            for key, value in found.items():
                seconds.setdefault(key, {})[size] = value
            keep = [key for key in found if key[1] == KEEP]
            guessed_s = sum(estimate.blocks[key][size] for key in keep)
            scale = sum(found[key] for key in keep) / guessed_s if guessed_s > 0 else 1.0
            rest[size] = estimate.rest[size] * scale
    return StepTimes(_steadied(seconds, estimate), rest, estimate.optimizer_s * scale, how="measured")


def _steadied(
    seconds: Mapping[tuple[str, str], Mapping[int, float]], estimate: StepTimes
) -> dict[tuple[str, str], dict[int, float]]:
    """Each option as a multiple of keeping, the same at every micro-batch: the median of those measured.

    It is at least half as far above 1 as by the estimate. So noise never makes the option that does more work the
    faster one, neither where it was measured nor at the micro-batches beyond.
    """
    steady = {}
    for (path, option), points in seconds.items():
        kept, guessed = seconds[path, KEEP], estimate.blocks
        shares = [points[size] / kept[size] for size in points]
        least = [(1 + guessed[path, option][size] / guessed[path, KEEP][size]) / 2 for size in points]
        share = max(median(shares), median(least))
        steady[path, option] = {size: kept[size] * share for size in points}
    return steady


def _believable(seconds: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Recomputing does all that keeping does, and more: where noise says otherwise, it costs the least that counts."""
    floor = {path: value * _LEAST_SLOWDOWN for (path, option), value in seconds.items() if option == KEEP}
    return {(p, o): value if o == KEEP else max(value, floor[p]) for (p, o), value in seconds.items()}


@dataclass(frozen=True, slots=True)
class _Call:
    """How a block was called: its arguments, cut off from what made them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        def kept(value: object) -> object:
            return None if is_cache(value) else value  # it would grow with every run

        given = tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}
        return cls(*tree_map_only(Tensor, cut, given))


class _AllCaptured(Exception):
    """Every block has shown its inputs; the head need not run."""


@dataclass(frozen=True)
class _Clock:
    model: nn.Module
    recipe: Recipe
    batch: Sample
    device: Device

    def times(self, blocks: Sequence[str], options: Sequence[str]) -> Mapping[tuple[str, str], float]:
        """(path, option) -> seconds of one forward and backward."""
        found = {}
        try:
            for group, call in self._calls(blocks, options).items():
                seconds = self._block(group[0], call, options)
                found.update({(path, option): seconds[option] for path in group for option in options})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything: it is the user's own model that runs
            raise ModelFailed(
                f"{type(self.model).__name__} can be traced, but raised {type(error).__name__} when its blocks were "
                f"run to be timed, at micro-batch {self.batch.batch_size}: {error}\nRun one step of it by hand."
            ) from error
        return found

    def _calls(self, blocks: Sequence[str], options: Sequence[str]) -> dict[tuple[str, ...], _Call]:
        """The inputs of the first block of each group of alike ones, from a forward of a short model if that goes."""
        groups = {group[0]: group for group in alike(self.model, blocks)}
        runs = long_runs(self.model, blocks)
        with levers.decided(self.model, dict.fromkeys(blocks, options[-1])):  # the one that holds the least memory
            try:
                with shortened(self.model, runs):
                    calls = self._captured(list(groups))
            except (IndexError, KeyError, AttributeError):  # a model that counts its blocks itself
                calls = self._captured(list(groups))
        return {groups[path]: call for path, call in calls.items()}

    def _captured(self, paths: Sequence[str]) -> dict[str, _Call]:
        calls: dict[str, _Call] = {}
        with _capturing(self.model, paths, calls), self._casting(), suppress(_AllCaptured):
            loss_of(self.model, self.batch, self.recipe.loss)
        return calls

    def _block(self, path: str, call: _Call, options: Sequence[str]) -> dict[str, float]:
        """Interleaved, so that a busy moment of the machine hits all options alike; the first round warms up."""
        laps: dict[str, list[float]] = {option: [] for option in options}
        for turn in range(_REPEATS + 1):
            for option in options:
                with levers.decided(self.model, {path: option}):
                    lap = self._lap(self.model.get_submodule(path), call)
                if turn or lap > _ENOUGH_S:
                    laps[option].append(lap)
            if all(found and found[0] > _ENOUGH_S for found in laps.values()):
                break
        for parameter in self.model.parameters():
            parameter.grad = None
        return {option: median(found) for option, found in laps.items()}

    def _lap(self, block: nn.Module, call: _Call) -> float:
        self.device.synchronize()
        begin = time.perf_counter()
        with self._casting():
            output = _first_tensor(block(*call.args, **call.kwargs))
        if output is not None and output.requires_grad:
            torch.autograd.backward(output, torch.ones_like(output))
        self.device.synchronize()
        return time.perf_counter() - begin

    def _casting(self) -> AbstractContextManager[Any]:
        if self.recipe.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.torch_device.type, self.recipe.autocast)


@contextmanager
def _capturing(model: nn.Module, paths: Sequence[str], calls: dict[str, _Call]) -> Iterator[None]:
    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(path, _Call.of(args, kwargs))
            if len(calls) == len(paths):
                raise _AllCaptured

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
