"""Seconds of each distinct block under each option, measured on the device by real forwards and backwards."""

import time
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Final
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from memplan import levers
from memplan._compat import is_cache
from memplan.abstract import preserved, to_training
from memplan.blocks import alike
from memplan.device import Device
from memplan.errors import ModelFailed, PlanNotFollowed
from memplan.graph import BlockGraph
from memplan.laps import by_turns
from memplan.levers.replay import random_state
from memplan.levers.select import capturing, proved
from memplan.losses import loss_of
from memplan.menu import Menu
from memplan.problem import KEEP, RECOMPUTE
from memplan.recipe import Recipe
from memplan.roofline import Rates, StepTimes
from memplan.runs import FEWEST, long_runs, shortened
from memplan.samples import Sample
from memplan.skipping import skipped

LEAST_SLOWDOWN: Final = 1.01
"""Of a recomputed block against the same block kept: below that all is noise."""

_REPEATS = 8  # of each operator; one that is timed wrongly spoils every selection that has it
_MOST_SCALED = 3.0  # single operators run colder than among others; by more than this, noise is measured


def captured(
    model: nn.Module, recipe: Recipe, sample: Sample, device: Device, blocks: Sequence[str]
) -> dict[str, tuple[BlockGraph, list[float]]]:
    """First path of each group of alike blocks -> its graph, and each node's seconds on the device: the least of a few.

    Raises:
        ModelFailed: the model raised where the abstract run did not; the cause is chained.
    """
    with preserved(model):
        to_training(model)
        return _Clock(model, recipe, sample.to(device.torch_device), device).graphs(blocks)


def measured(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    device: Device,
    menu: Menu,
    head: Mapping[str, str],
    estimate: StepTimes,
) -> StepTimes:
    """The estimate, with each block's times replaced by measured ones and the rest scaled to agree with them.

    Every distinct block is run by itself, on the inputs that it gets in a real forward; one of a run of alike blocks
    stands for all. Of the selections only the two that run least and most again are run; the others are priced between
    them by the seconds of the operators that they run again. What lies outside the blocks is run, as it is and with
    its option, where the loss head has one. Model, gradients, buffers and random state are as before afterwards.

    Args:
        samples: one per micro-batch at which the estimate was made.
        head: path of the loss head -> its option; empty if it has none.

    Raises:
        ModelFailed: the model raised where the abstract run did not; the cause is chained.
    """
    seconds: dict[tuple[str, str], dict[int, float]] = {}
    scales: dict[int, float] = {}
    around: Mapping[str, float] = {}
    doubts: list[float] = []
    with preserved(model):
        to_training(model)
        for sample in samples:
            clock = _Clock(model, recipe, sample.to(device.torch_device), device, doubts)
            size = sample.batch_size
            if head and not around:
                around = clock.around(menu, head)
            found = _believable(clock.times(menu))
            for key, value in found.items():
                seconds.setdefault(key, {})[size] = value
            keep = [key for key in found if key[1] == KEEP]
            guessed_s = sum(estimate.blocks[key][size] for key in keep)
            scales[size] = sum(found[key] for key in keep) / guessed_s if guessed_s > 0 else 1.0
    rest = _scaled(estimate.rest, scales, around)
    blocks = {**_guessed(seconds, menu, estimate), **_steadied(seconds, estimate), **_selected(seconds, menu)}
    scale = scales[samples[-1].batch_size]
    stepping = {variant: extra_s * scale for variant, extra_s in estimate.stepping.items()}
    doubt = max(doubts, default=0.0)
    return StepTimes(blocks, rest, estimate.optimizer_s * scale, how="measured", doubt=doubt, stepping=stepping)


def _scaled(
    rest: Mapping[str, Mapping[int, float]], scales: Mapping[int, float], around: Mapping[str, float]
) -> dict[str, dict[int, float]]:
    """Each variant's seconds outside the blocks: by its loss head where that was run, else as the blocks' own."""
    at = next(iter(scales))  # the micro-batch at which it was run
    factors = {head: seconds / rest[head][at] for head, seconds in around.items() if rest[head][at] > 0}
    scaled = {}
    for variant, points in rest.items():
        head = variant.partition("+")[0]
        factor = factors.get(head if head in factors else KEEP)
        scaled[variant] = {size: value * (factor or scales[size]) for size, value in points.items()}
    return scaled


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
        share = max(median(shares), median(least)) if option == RECOMPUTE else median(shares)
        steady[path, option] = {size: kept[size] * share for size in points}
    return steady


def _guessed(
    seconds: Mapping[tuple[str, str], Mapping[int, float]], menu: Menu, estimate: StepTimes
) -> dict[tuple[str, str], dict[int, float]]:
    """What is not run: as many times as long as keeping, as by the estimate."""
    guessed, blocks = {}, estimate.blocks
    for path, names in menu.options.items():
        for name in names:
            if name not in menu.selections and (path, name) not in seconds:
                shares = {size: blocks[path, name][size] / blocks[path, KEEP][size] for size in seconds[path, KEEP]}
                guessed[path, name] = {size: value * shares[size] for size, value in seconds[path, KEEP].items()}
    return guessed


def _selected(
    seconds: Mapping[tuple[str, str], Mapping[int, float]], menu: Menu
) -> dict[tuple[str, str], dict[int, float]]:
    """The selections of each block: keeping, and what the least and the most of them were measured to cost beyond it.

    Those between lie on the line through the two, by the seconds of what they run again. So what each of them costs
    whatever it drops, its hooks on every saved tensor, is in the price: in a tiny block that is most of it.
    """
    priced = {}
    for path, names in menu.options.items():
        chosen = [name for name in names if name in menu.selections]
        if not chosen:
            continue
        kept = seconds[path, KEEP]
        first = min(kept)  # the micro-batch at which operators were timed
        rerun_s = {name: menu.selections[name].rerun_s for name in chosen}
        extra_s = {
            name: max(
                median((seconds[path, name][size] - kept[size]) * kept[first] / kept[size] for size in kept),
                rerun_s[name] / _MOST_SCALED,
            )
            for name in (chosen[0], chosen[-1])
        }
        low, high = rerun_s[chosen[0]], rerun_s[chosen[-1]]
        fixed_s, whole_s = extra_s[chosen[0]], max(extra_s.values())
        for name in chosen:
            along = (rerun_s[name] - low) / (high - low) if high > low else 0.0
            share = 1 + (fixed_s + along * (whole_s - fixed_s)) / kept[first]
            priced[path, name] = {size: value * share for size, value in kept.items()}
    return priced


def _believable(seconds: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Recomputing does all that keeping does, and more: where noise says otherwise, it costs the least that counts."""
    floor = {path: value * LEAST_SLOWDOWN for (path, option), value in seconds.items() if option == KEEP}
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
            if isinstance(value, UserDict):  # in which transformers' blocks hand keys and values on to later ones
                shared = copy(value)
                shared.data = tree_map_only(Tensor, cut, value.data)
                return shared
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
    doubts: list[float] = field(default_factory=list)  # of each group of laps; see `Laps`

    def times(self, menu: Menu) -> Mapping[tuple[str, str], float]:
        """(path, option) -> seconds of one forward and backward; of the selections only the least and the most."""
        found = {}
        with self._own_errors():
            for group, call in self._calls(tuple(menu.options), menu.recomputable).items():
                names = menu.options[group[0]]
                selected = [name for name in names if name in menu.selections]
                options = [n for n in names if n in (KEEP, RECOMPUTE, *selected[:1], *selected[-1:])]
                seconds = self._block(group[0], call, options, menu)
                found.update({(path, option): seconds[option] for path in group for option in options})
        return found

    def around(self, menu: Menu, head: Mapping[str, str]) -> Mapping[str, float]:
        """Variant of the loss head -> seconds of a forward and backward without the blocks' work."""
        (option,) = head.values()
        blocks = tuple(menu.options)
        kept = levers.decided(self.model, {**dict.fromkeys(blocks, KEEP), **dict.fromkeys(head, KEEP)})
        with kept, skipped(self.model, alike(self.model, blocks)):
            try:
                self._step_lap({})  # with the blocks' own first run
                self._step_lap({})  # and without
            except torch.OutOfMemoryError:
                raise
            except Exception:  # what lies around the blocks wants more than they hand on, as a router's loss does
                return {}
            return self._by_turns({KEEP: partial(self._step_lap, {}), option: partial(self._step_lap, head)})

    def graphs(self, blocks: Sequence[str]) -> dict[str, tuple[BlockGraph, list[float]]]:
        with self._own_errors():
            calls = self._calls(blocks, False)
            kept = dict.fromkeys(blocks, KEEP)  # also where the model checkpoints them itself
            with levers.decided(self.model, kept):
                return {group[0]: self._graph(group[0], call) for group, call in calls.items()}

    def _graph(self, path: str, call: _Call) -> tuple[BlockGraph, list[float]]:
        """The first run warms up; what the last one saves is made again, and has to be the same."""
        block = self.model.get_submodule(path)
        inputs = [leaf for leaf in tree_iter((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        laps = []
        for _ in range(_REPEATS + 1):
            state = random_state(self.device.torch_device)
            with self._casting():
                captured, saved, _ = capturing(block, block.forward, call.args, call.kwargs, self.device.synchronize)
            laps.append(captured.node_s)
        graph = proved(block, captured, saved, inputs, state)
        return graph, [min(node) for node in zip(*laps[1:], strict=True)]

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What a selection warns of here is not what is planned; at one sample some tensors are not saved at all."""
        try:
            with catch_warnings():
                simplefilter("ignore", PlanNotFollowed)
                yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything: it is the user's own model that runs
            raise ModelFailed(
                f"{type(self.model).__name__} can be traced, but raised {type(error).__name__} when its blocks were "
                f"run to be timed, at micro-batch {self.batch.batch_size}: {error}\nRun one step of it by hand."
            ) from error

    def _calls(self, blocks: Sequence[str], recomputable: bool) -> dict[tuple[str, ...], _Call]:
        """The inputs of the first block of each group of alike ones, from a forward of a short model if that goes."""
        groups = {group[0]: group for group in alike(self.model, blocks)}
        runs = long_runs(self.model, blocks, FEWEST)
        with levers.decided(self.model, dict.fromkeys(blocks, RECOMPUTE if recomputable else KEEP)):  # holds less
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

    def _block(self, path: str, call: _Call, options: Sequence[str], menu: Menu) -> Mapping[str, float]:
        block = self.model.get_submodule(path)

        def lap(option: str) -> float:
            with levers.decided(self.model, {path: option}, menu.of_decisions({path: option})):
                if option in menu.selections:
                    self._lap(block, call)  # the first forward is captured
                return self._lap(block, call)

        return self._by_turns({option: partial(lap, option) for option in options})

    def _by_turns(self, ways: Mapping[str, Callable[[], float]]) -> Mapping[str, float]:
        laps = by_turns(ways)
        for parameter in self.model.parameters():
            parameter.grad = None
        self.doubts.append(laps.doubt)
        return laps.seconds

    def _lap(self, block: nn.Module, call: _Call) -> float:
        self.device.synchronize()
        begin = time.perf_counter()
        with self._casting():
            output = _first_tensor(block(*call.args, **call.kwargs))
        if output is not None and output.requires_grad:
            torch.autograd.backward(output, torch.ones_like(output))
        self.device.synchronize()
        return time.perf_counter() - begin

    def _step_lap(self, decisions: Mapping[str, str]) -> float:
        with levers.decided(self.model, decisions):
            self.device.synchronize()
            begin = time.perf_counter()
            with self._casting():
                loss = loss_of(self.model, self.batch, self.recipe.loss)
            loss.backward()
            self.device.synchronize()
            return time.perf_counter() - begin

    def _casting(self) -> AbstractContextManager[object]:
        return self.recipe.casting(self.device.torch_device.type)


@contextmanager
def _capturing(model: nn.Module, paths: Sequence[str], calls: dict[str, _Call]) -> Iterator[None]:
    shared: dict[int, tuple[UserDict[Any, Any], dict[Any, Any]]] = {}  # each with what it held at first

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(path, _Call.of(args, kwargs))
            for value in (*args, *kwargs.values()):
                if isinstance(value, UserDict):
                    shared.setdefault(id(value), (value, dict(value.data)))
            if len(calls) == len(paths):
                raise _AllCaptured

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        # Under checkpointing they hold the graph that holds them, until a backward that never comes.
        for value, before in shared.values():
            value.data.clear()
            value.data.update(before)


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
