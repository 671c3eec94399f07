"""`Recorder`: one training step as a `Trace`, without memory and without arithmetic, or for real.

The abstract run executes the user's own Python, autograd and optimizer on tensors that have shapes but no data, so
whatever decides memory there (which attention kernel runs, what autograd saves, when a checkpoint recomputes, what a
foreach optimizer holds) decides it here. A model that reads values which an abstract run has not is run for real, if
its weights are. Either way the model, its gradients, buffers, hooks and the random state are left as they were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from memplan import buckets
from memplan.abstract import AbstractModel, preserved, to_training
from memplan.assembly import Static, with_leftovers, with_optimizer
from memplan.blocks import find_blocks, units
from memplan.errors import (
    CannotTrace,
    MemplanError,
    NoStepInBackward,
    NothingToTrain,
    UsageError,
)
from memplan.kernels import Backend
from memplan.kernels.cpu import CpuBackend
from memplan.micro_steps import MicroSteps
from memplan.optimizer_step import (
    IN_BACKWARD,
    OptimizerPart,
    PrimedOptimizer,
    check_stepping,
)
from memplan.recipe import AFTER_FORWARD, AFTER_STEP, Recipe
from memplan.repeat import NotPeriodic, lengthened, same_events
from memplan.runs import ENOUGH, FEWEST, Run, long_runs, shortened
from memplan.samples import Sample
from memplan.sharding import sharded
from memplan.trace import CATEGORIES, Trace
from memplan.units import format_bytes

_CPU = CpuBackend()

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class Recorder:
    """Records steps of one model. What they share (a step of the optimizer behind them) is recorded once.

    Raises:
        NothingToTrain: no parameter requires a gradient.
        UsageError: the recipe's `stepping` or `drops` is no word for it.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, backend: Backend = _CPU) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise NothingToTrain(
                f"no parameter of {type(model).__name__} requires a gradient, so there is no training step to plan. "
                "Set requires_grad on what is to be trained (a PEFT model: is_trainable=True), then call again."
            )
        self.model, self.recipe, self.backend = model, recipe, backend
        self.accumulation, self.fake = recipe.accumulation, FakeTensorMode(allow_non_fake_inputs=True)
        check_stepping(recipe.stepping)
        if recipe.drops not in (AFTER_STEP, AFTER_FORWARD):
            raise UsageError(f"gradients are dropped {AFTER_STEP} or {AFTER_FORWARD}, got {recipe.drops!r}")
        if recipe.replicas < 1 or (recipe.bucket_view and recipe.replicas == 1):
            asked = f"replicas={recipe.replicas}, bucket_view={recipe.bucket_view}"
            raise UsageError(f"{asked}: there is one at least, and only several have buckets")
        self._by_enough = False  # whether a trace was made of `ENOUGH` blocks of each long run
        self._few_do: bool | None = None  # whether one of `FEWEST` is the same; the second trace tells
        self._repeatable: set[str] = set()  # see `MicroSteps.record`
        self._parts: dict[tuple[int, ...], OptimizerPart] = {}  # by the places of the stepped parameters
        self._fakes: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # see `AbstractModel`

    def on(self, backend: Backend) -> "Recorder":
        """For another card: what was found out about the model holds there too."""
        other = Recorder(self.model, self.recipe, backend)
        other.fake, other._fakes = self.fake, self._fakes
        other._by_enough, other._few_do = self._by_enough, self._few_do
        other._repeatable = self._repeatable
        if type(backend) is type(self.backend):  # no operator of an optimizer depends on a card's capability
            other._parts = self._parts
        return other

    def record(
        self,
        sample: Sample,
        installed: Callable[[], AbstractContextManager[object]] = nullcontext,
        accumulation: int | None = None,
    ) -> Trace:
        """Trace one steady-state step on a micro-batch.

        Args:
            sample: only its shapes count, and the values of its integers and booleans.
            installed: a context in which the model runs as planned.
            accumulation: micro-steps per optimizer step, if not the recipe's.

        Raises:
            BadLoss: no scalar that can be differentiated was returned.
            ModelFailed: the model raised; the cause is chained.
            CannotTrace: the model asks for the value of a tensor that has none here.
            NoStepInBackward: the recipe steps in the backward, and what else it does leaves no room for that.
        """
        self.accumulation = accumulation or self.recipe.accumulation
        in_backward = self.recipe.stepping == IN_BACKWARD
        if in_backward and (why := self.recipe.not_in_backward(self.accumulation)):
            raise NoStepInBackward(why)
        try:
            with AbstractModel(self.model, self.fake, self._fakes) as abstract, installed():
                to_training(self.model)
                primed = self._primed(abstract) if in_backward else None
                trace, stepped = self._traced(sample.map(abstract.imitate), primed)
                part = self._part(abstract, stepped, primed)
        except CannotTrace:
            if in_backward or self._weights_move or any(parameter.is_meta for parameter in self.model.parameters()):
                raise
            with preserved(self.model), installed():
                to_training(self.model)
                batch = sample.to(next(self.model.parameters()).device)
                trace, graded = self._micro_steps(batch, find_blocks(self.model), self._static(batch), None)
                stepped = _places(self.model, graded)
            with AbstractModel(self.model, self.fake) as abstract:
                part = self._part(abstract, stepped, None)
        trace = trace if self.recipe.zero is None else self.recipe.zero.on_a_rank(trace, self.backend.rounded)
        trace = with_optimizer(self._with_state(trace, part), part.notes)
        if self.recipe.shards > 1:
            recipe = self.recipe
            cut = units(self.model, find_blocks(self.model), recipe.shards, recipe.mixed)
            trace = sharded(trace, cut, recipe.shards, recipe.replicas, self.backend.rounded)
            if recipe.mixed is not None and str(recipe.mixed):
                trace = replace(trace, assumptions=(*trace.assumptions, f"FSDP2's mixed precision: {recipe.mixed}"))
        return with_leftovers(trace, grads=self.recipe.drops == AFTER_FORWARD, others=self.recipe.keeps_output)

    @property
    def _weights_move(self) -> bool:
        return self.recipe.zero is not None and self.recipe.zero.weights_move

    @property
    def _has_buckets(self) -> bool:
        return self.recipe.replicas > 1 and self.recipe.shards == 1

    def _traced(self, batch: Sample, primed: PrimedOptimizer | None) -> tuple[Trace, tuple[int, ...]]:
        """Abstractly: by a few blocks of each long run where that is the same, else whole.

        Also the places, among the model's parameters, of those that were given a gradient.
        """
        blocks, static = find_blocks(self.model), self._static(batch)
        found = self._shortened(batch, blocks, static, FEWEST, primed) if self._few_do else None
        if found is None:
            found = self._shortened(batch, blocks, static, ENOUGH, primed)
            if self._few_do:
                self._few_do = False  # what one trace of a model shows, others will
            elif found is not None and primed is None and self._few_do is None:
                if self._by_enough:
                    few = self._shortened(batch, blocks, static, FEWEST, primed)
                    self._few_do = few is not None and same_events(few[0], found[0])
                self._by_enough = True
        trace, graded = found or self._micro_steps(batch, blocks, static, self.fake, primed)
        return trace, _places(self.model, graded)

    def _static(self, batch: Sample) -> list[Static]:
        """What is there all the time but for the optimizer's state, in the order in which a program asks for it."""
        sizes: dict[int, Static] = {}  # by storage: tied weights are one
        for name, tensor in (*_as_moved(self.model), *(("inputs", tensor) for tensor in batch.tensors())):
            storage = tensor.untyped_storage()
            sizes.setdefault(storage._cdata, (name, self.backend.rounded(storage.nbytes())))
        exchanged = buckets.bucket_bytes(self.model.parameters()) if self._has_buckets else []
        return [
            *sizes.values(),
            *(("grads", self.backend.rounded(size)) for size in exchanged),
            *(("libraries", size) for size in self.backend.fixed_bytes()),
        ]

    def _shortened(
        self,
        batch: Sample,
        blocks: Sequence[str],
        static: list[Static],
        kept: int,
        primed: PrimedOptimizer | None,
    ) -> tuple[Trace, set[int]] | None:
        """By so many blocks of each long run. None if there is none, or it cannot be shown to be the same."""
        runs = long_runs(self.model, blocks, kept)
        if not runs or self._weights_move:
            return None
        omitted = {path for run in runs for path in run.omitted}
        rest = [path for path in blocks if path not in omitted]
        try:
            with shortened(self.model, runs):
                short, graded = self._micro_steps(batch, rest, static, self.fake, primed)
            trace = lengthened(short, runs)
        except (NotPeriodic, MemplanError):  # a true error of the model comes again when it is traced whole
            return None
        return trace, graded | _likewise(self.model, graded, runs)

    def _micro_steps(
        self,
        batch: Sample,
        blocks: Sequence[str],
        static: list[Static],
        fake: FakeTensorMode | None,
        primed: PrimedOptimizer | None = None,
    ) -> tuple[Trace, set[int]]:
        """The trace without the optimizer, and the ids of the parameters that were given a gradient.

        With `primed`, these are stepped where their gradients come.
        """
        steps = MicroSteps(self.model, self.recipe, self.backend, fake, self.accumulation)
        return steps.record(batch, blocks, static, primed, self._repeatable)

    def _primed(self, abstract: AbstractModel) -> PrimedOptimizer:
        recipe = self.recipe
        return PrimedOptimizer(abstract, self.fake, self.backend, recipe.optimizer, recipe.stepping, recipe.kept)

    def _part(self, abstract: AbstractModel, stepped: tuple[int, ...], primed: PrimedOptimizer | None) -> OptimizerPart:
        """What the optimizer adds when these of the model's parameters are stepped; with `primed` they were already."""
        if self.recipe.zero is not None:
            return self.recipe.zero.part(self.fake, self.backend, self.recipe.optimizer)
        if stepped not in self._parts:
            parameters = list(self.model.parameters())
            optimizer = primed or self._primed(abstract)
            chosen = [parameters[at] for at in stepped]
            self._parts[stepped] = optimizer.part(chosen, done=primed is not None, clips=self.recipe.clips)
        return self._parts[stepped]

    def _with_state(self, trace: Trace, part: OptimizerPart) -> Trace:
        """The optimizer's state, there all the time. It comes first, with what else is static."""
        count, said = len(part.state), trace.assumptions
        if self.recipe.clips:
            said += ("gradients are clipped by their norm (clip_grad_norm_) between backward and step",)
        if self._has_buckets:
            place = "in" if self.recipe.bucket_view else "beside"
            said += (f"{self.recipe.replicas} replicas: gradients lie {place} buckets of DistributedDataParallel",)
        if part.paged_bytes:
            said += (f"{format_bytes(part.paged_bytes)} of paged optimizer state are in host memory between steps",)
        code, nowhere = CATEGORIES.index("optimizer"), np.zeros(count, dtype=np.int64)
        sizes = np.array([self.backend.rounded(size) for size in part.state], dtype=np.int64)
        return replace(
            trace,
            storage_bytes=np.concatenate([sizes, trace.storage_bytes]),
            storage_category=np.concatenate([np.full(count, code, dtype=np.int8), trace.storage_category]),
            storage_module=np.concatenate([nowhere.astype(np.int32), trace.storage_module]),
            born=np.concatenate([nowhere, trace.born]),
            died=np.concatenate([np.full(count, trace.ticks, dtype=np.int64), trace.died]),
            assumptions=said,
            early_state=part.before,
        )


def _as_moved(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(category, tensor) of all weights and buffers, in the order in which `module.to(device)` moves them."""
    for child in module.children():
        yield from _as_moved(child)
    yield from (("params", parameter) for parameter in module._parameters.values() if parameter is not None)
    yield from (("buffers", buffer) for buffer in module._buffers.values() if buffer is not None)


def _places(model: nn.Module, graded: set[int]) -> tuple[int, ...]:
    return tuple(at for at, parameter in enumerate(model.parameters()) if id(parameter) in graded)


def _likewise(model: nn.Module, graded: set[int], runs: Sequence[Run]) -> set[int]:
    """Ids of the parameters of omitted blocks whose fellows in the template block were given a gradient."""
    found: set[int] = set()
    for run in runs:
        template = [id(p) in graded for p in model.get_submodule(run.template).parameters()]
        for path in run.omitted:
            own = model.get_submodule(path).parameters()
            found |= {id(p) for p, is_graded in zip(own, template, strict=True) if is_graded}
    return found
