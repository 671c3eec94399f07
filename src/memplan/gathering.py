"""Weights that come and go: what DeepSpeed's ZeRO-3 does around each module, done to abstract weights.

A rank has its part of a weight, and gathers the whole when a module with it runs. When it does so, for how long and in
how many copies depends on the order of all modules in a step, so the hooks of deepspeed/runtime/zero (0.19.8) are put
on the modules that are traced, and weights are really taken away: what autograd or a checkpoint holds of one stays.

- `_register_deepspeed_module` of parameter_offload.py: the hooks, around a module's forward and its backward. What was
  not released in a backward is at its end (`release_backward_leftovers`).
- `fetch_sub_module` of partitioned_param_coordinator.py: a module's own weights are gathered, then the next ones of the
  step, `stage3_prefetch_bucket_size` elements with each module, up to `stage3_max_live_parameters`.
- `release_sub_module` there: what is needed again within `stage3_max_reuse_distance` elements of weights stays.
- `all_gather_coalesced` of partition_parameters.py: one weight is gathered into its place, several into a flat buffer,
  out of which all are copied when the first is needed, and which stays until the last has been.
- `reduce_independent_p_g_buckets_and_remove_grads` of stage3.py: a gradient is moved into a bucket, which is scattered
  in a flat copy (`reduce_scatter_coalesced`) when it is full, and at the end of the backward.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from memplan.around import Hooks, holding_no_views
from memplan.errors import UsageError
from memplan.optimizer_step import Dropped
from memplan.tape import Tape


@dataclass(frozen=True, slots=True)
class Gathers:
    """When weights are gathered, in elements.

    Attributes:
        ranks: over which each weight is spread.
        bucket: of gradients that are scattered at once (`reduce_bucket_size`).
        prefetch: gathered ahead with each module (`stage3_prefetch_bucket_size`).
        live: gathered at once, as far as ahead (`stage3_max_live_parameters`).
        reuse: distance within which a weight is not released (`stage3_max_reuse_distance`).
        whole: a weight that is not larger stays whole (`stage3_param_persistence_threshold`).
        all_whole: of all that stay whole (`stage3_model_persistence_threshold`).
        holds_no_views: of the weights of linear layers (`memory_efficient_linear`).
    """

    ranks: int
    bucket: int
    prefetch: int
    live: int
    reuse: int
    whole: int
    all_whole: int
    holds_no_views: bool

    def part(self, numel: int) -> int:
        """Elements of a rank's part of a weight."""
        return -(-numel // self.ranks)

    def staying(self, numels: Sequence[int]) -> list[bool]:
        """Of each weight, in the model's order, whether it stays whole (`mark_persistent_parameters`)."""
        total, found = 0, []
        for numel in numels:
            found.append(numel <= self.whole and numel + total <= self.all_whole)
            total += numel * found[-1]
        return found


class State(Enum):
    AWAY = auto()
    COMING = auto()
    THERE = auto()


@dataclass(eq=False, slots=True)
class _Weight:
    name: str
    parameter: nn.Parameter
    place: int  # among the model's
    data: Tensor  # of the whole model
    stays: bool
    state: State
    users: set[nn.Module] = field(default_factory=set)

    @property
    def numel(self) -> int:
        return self.data.numel()


@dataclass(eq=False, slots=True)
class _Gathered:
    """Weights that come together."""

    weights: Sequence[_Weight]
    flat: Tensor | None  # out of which they are copied; None: it is in its place


@dataclass(frozen=True, slots=True)
class Order:
    """The modules of a micro-step in the order in which weights are fetched for them, and again in the backward."""

    modules: list[nn.Module] = field(default_factory=list)


class _Weights:
    """The weights of a model on a rank, and what is gathered of them now (`PartitionedParameterCoordinator`)."""

    def __init__(self, model: nn.Module, gathers: Gathers, order: Order, tape: Tape, rows: list[int]) -> None:
        self._gathers, self._tape, self._rows = gathers, tape, rows
        named = list(model.named_parameters())
        parameters = [parameter for _, parameter in named]
        stay = gathers.staying([p.numel() for p in parameters])
        self.all = {
            id(p): _Weight(name, p, place, p.data, stays, State.THERE if stays else State.AWAY)
            for place, ((name, p), stays) in enumerate(zip(named, stay, strict=True))
        }
        self._nothing = {p.dtype: p.new_empty(0) for p in parameters}
        self._of = {module: self._own(module) for module in model.modules()}
        fetched = [(weight, at) for at, module in enumerate(order.modules) for weight in self._of[module]]
        self._order = fetched
        self._uses: dict[_Weight, list[int]] = defaultdict(list)  # steps of the order
        for weight, at in fetched:
            self._uses[weight].append(at)
        passed = (sum(weight.numel for weight in self._of[module]) for module in order.modules)
        self._passed = list(accumulate(passed, initial=0))  # elements before each step of the order
        self._coming: dict[_Weight, _Gathered] = {}
        self._active: dict[nn.Module, None] = {}  # in whose backward we are, the last one last
        self._recomputed: dict[nn.Module, set[_Weight]] = defaultdict(set)
        for nothing in self._nothing.values():
            tape.pass_over(nothing)
        self.begin()

    def _own(self, module: nn.Module) -> list[_Weight]:
        """In the order of the model's."""
        own = {self.all[id(p)] for p in module._parameters.values() if p is not None}
        return sorted(own, key=lambda weight: weight.place)

    def _note(self, tensor: Tensor) -> None:
        row = self._tape.row_of(tensor)
        self._rows += [] if row is None else [row]

    def begin(self) -> None:
        """At the start of a forward (`reset_step`)."""
        for weight in list(self._coming):
            self._wait(self._coming.pop(weight))
            self._drop(weight)
        self._queue = deque(self._order)
        self._fetched: dict[_Weight, int] = {}  # for which step of the order
        self._step = self._there = 0

    # -- fetching ------------------------------------------------------------------------------------------------

    def fetch(self, module: nn.Module, forward: bool) -> None:
        if not forward:
            self._active[module] = None
        wanted = self._of[module]
        self._gather([weight for weight in wanted if weight.state is State.AWAY])
        recomputes = forward and torch._C._current_graph_task_id() != -1
        for weight in wanted:
            weight.users.add(module)
            if recomputes and self._active and not weight.parameter.requires_grad:
                owner = next(reversed(self._active))
                self._recomputed[owner].add(weight)
                weight.users.add(owner)
            if weight in self._coming:
                self._wait(self._coming.pop(weight))
        new = [weight for weight in wanted if self._fetched.get(weight, -1) < self._step]
        found: set[_Weight] = set()
        while self._queue and len(found) < len(new):
            weight, at = self._queue.popleft()
            self._fetched[weight] = at
            found.add(weight)
        self._fetch_ahead()
        self._step += 1

    def _fetch_ahead(self) -> None:
        limit = min(self._gathers.live - self._there, self._gathers.prefetch)
        ahead: dict[_Weight, None] = {}
        numel = 0
        while self._queue and numel < limit:
            weight, at = self._queue.popleft()
            self._fetched[weight] = max(self._fetched.get(weight, -1), at)
            if weight.state is State.AWAY and weight not in ahead:
                ahead[weight] = None
                numel += weight.numel
        self._gather(list(ahead))

    def _gather(self, weights: Sequence[_Weight]) -> None:
        if not weights:
            return
        self._there += sum(weight.numel for weight in weights)
        padded = sum(self._gathers.part(weight.numel) * self._gathers.ranks for weight in weights)
        alone = self._gathers.ranks == 1  # a rank that has all parts looks at them
        flat = None if alone else weights[0].data.new_empty(padded)
        if flat is not None:
            self._note(flat)
            _exchanged(flat, self._tape)
        if flat is None or len(weights) > 1:
            gathered = _Gathered(weights, flat)
        else:
            gathered = _Gathered(weights, None)
            weights[0].parameter.data = flat[: weights[0].numel].view(weights[0].data.shape)
        for weight in weights:
            weight.state = State.COMING
            self._coming[weight] = gathered

    def _wait(self, gathered: _Gathered) -> None:
        for weight in gathered.weights:
            if weight.state is not State.COMING:
                continue
            if gathered.flat is not None:
                weight.parameter.data = gathered.flat.new_empty(weight.data.shape)
                self._note(weight.parameter)
            elif self._gathers.ranks == 1:
                weight.parameter.data = weight.data
            weight.state = State.THERE

    # -- releasing -----------------------------------------------------------------------------------------------

    def release(self, module: nn.Module, forward: bool) -> None:
        own = {weight: self._may_go(weight) for weight in self._of[module]}
        if not forward:
            own |= {weight: not weight.stays for weight in self._recomputed.pop(module, set())}
            self._active.pop(module, None)
        for weight, goes in own.items():
            weight.users.discard(module)
            if goes:
                self._drop(weight)

    def _may_go(self, weight: _Weight) -> bool:
        """Unless it is used again soon (`__params_to_release`)."""
        if weight.stays or self._fetched.get(weight, -1) > self._step:
            return False
        uses = self._uses[weight]
        following = bisect_left(uses, self._step)
        if following == len(uses):
            return True
        return self._passed[uses[following]] - self._passed[self._step] >= self._gathers.reuse

    def end_backward(self) -> None:
        """What no module has released (`release_backward_leftovers`)."""
        while self._active:
            module, _ = self._active.popitem()
            for weight in (*self._of[module], *self._recomputed.pop(module, ())):
                weight.users.discard(module)
                if not weight.stays:
                    self._drop(weight)

    def _drop(self, weight: _Weight) -> None:
        if weight.state is State.THERE and not weight.users:
            self._take(weight)
            self._there -= weight.numel

    def _take(self, weight: _Weight) -> None:
        weight.parameter.data = self._nothing[weight.parameter.dtype]
        weight.state = State.AWAY

    # -- the model -----------------------------------------------------------------------------------------------

    @contextmanager
    def taken(self) -> Iterator[None]:
        """For as long as the `with` block lasts, weights are there when they are gathered, and read only then."""
        own = {module: module._parameters for module in self._of}
        for weight in self.all.values():
            if not weight.stays:
                self._take(weight)
        try:
            for module, parameters in own.items():
                module._parameters = _Read(self.all, parameters)
            yield
        finally:
            for module, parameters in own.items():
                module._parameters = parameters
            self._coming.clear()
            for weight in self.all.values():
                weight.parameter.data = weight.data


def _exchanged(flat: Tensor, tape: Tape) -> None:
    """On the CPU gloo has a copy while it sends (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp: `newLikeFlat` in
    `allgather`, `clone` in `_reduce_scatter_base`)."""
    if tape.backend.name == "cpu":
        flat.new_empty(flat.numel())


class _Read(dict[str, Any]):
    """A module's parameters, that may be read only while they are there."""

    def __init__(self, known: Mapping[int, _Weight], own: Mapping[str, Any]) -> None:
        super().__init__(own)
        self._known = known

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None and self._known[id(parameter)].state is not State.THERE:
            raise UsageError(
                f"the weight {self._known[id(parameter)].name} is read outside of its "
                "module's own forward. ZeRO-3 then gathers it for good, which is not counted. Use zero_stage=2, or "
                "FSDP2 (memplan.MemplanFSDPPlugin)."
            )
        return parameter


class _Bucket:
    """Gradients on their way to the ranks that keep a part of them."""

    def __init__(self, gathers: Gathers, tape: Tape, dropped: Dropped, at_end: Callable[[], None]) -> None:
        self._gathers, self._tape, self._dropped, self._at_end = gathers, tape, dropped, at_end
        self._like: Tensor | None = None
        self._numels: list[int] = []
        self._large: list[Tensor] = []  # that do not fit into the bucket

    def take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self._like is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            self._like = gradient.new_empty(0)
            self._tape.pass_over(self._like)
        row = self._tape.row_of(gradient)
        self._dropped.rows += [] if row is None else [row]
        self._dropped.parameters.add(id(parameter))
        if self._numels and sum(self._numels) + gradient.numel() > self._gathers.bucket:
            self._scatter()
        if gradient.numel() > self._gathers.bucket:
            self._large.append(gradient)
        self._numels.append(gradient.numel())
        parameter.grad = None

    def _end(self) -> None:
        with torch.no_grad():
            self._scatter()
            self._at_end()
        self._like = None

    def _scatter(self) -> None:
        """In a flat copy of all, but for a single one that is cut into equal parts where it lies."""
        assert self._like is not None
        padded = sum(self._gathers.part(numel) * self._gathers.ranks for numel in self._numels)
        if len(self._numels) > 1 or padded > sum(self._numels):
            flat = self._like.new_empty(padded)
            _exchanged(flat, self._tape)
        self._numels.clear()
        self._large.clear()


@contextmanager
def rehearsed(model: nn.Module) -> Iterator[Order]:
    """The order of a micro-step that is run while the `with` block lasts, with all weights there."""
    order = Order()
    with Hooks(lambda module, _: order.modules.append(module), lambda *_: None).on(model):
        yield order


@contextmanager
def gathered(model: nn.Module, tape: Tape, gathers: Gathers, order: Order) -> Iterator[Dropped]:
    """Weights come and go, and each gradient is scattered, in the micro-steps that `tape` records.

    Raises:
        UsageError: a module reads a weight that is not there.
    """
    dropped = Dropped()
    weights = _Weights(model, gathers, order, tape, dropped.weights)
    bucket = _Bucket(gathers, tape, dropped, weights.end_backward)

    def take(parameter: Tensor) -> None:
        with torch.no_grad():
            bucket.take(parameter)

    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        stack.enter_context(holding_no_views() if gathers.holds_no_views else nullcontext())
        stack.enter_context(weights.taken())
        stack.callback(model.register_forward_pre_hook(lambda *_: weights.begin()).remove)
        stack.enter_context(Hooks(weights.fetch, weights.release).on(model))
        yield dropped
