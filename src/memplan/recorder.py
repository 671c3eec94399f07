"""`Recorder`: one training step as a `Trace`, without memory and without arithmetic, or for real.

The abstract run executes the user's own Python, autograd and optimizer on tensors that have shapes but no data, so
whatever decides memory there (which attention kernel runs, what autograd saves, when a checkpoint recomputes, what a
foreach optimizer holds) decides it here. A model that reads values which an abstract run has not is run for real, if
its weights are. Either way the model, its gradients, buffers, hooks and the random state are left as they were.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from memplan import optimizers
from memplan.abstract import AbstractModel, preserved, to_training
from memplan.assembly import Border, MicroBorders, assemble, with_optimizer
from memplan.blocks import find_blocks
from memplan.errors import BadLoss, CannotTrace, MemplanError, ModelFailed, NothingToTrain
from memplan.kernels import Backend
from memplan.kernels.cpu import CpuBackend
from memplan.kernels.probes import probed_bytes
from memplan.repeat import NotPeriodic, Run, lengthened, long_runs, shortened
from memplan.samples import Sample
from memplan.tape import Tape
from memplan.trace import Trace

Loss = Callable[[nn.Module, object], Tensor]

_CPU = CpuBackend()

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one step is made, beside the model and its sample."""

    loss: Loss | None = None  # loss(model, batch) -> scalar; None: the output's `.loss`
    optimizer: "str | torch.optim.Optimizer" = "adamw"
    autocast: torch.dtype | None = None
    accumulation: int = 1


class Recorder:
    """Records steps of one model. What all of them share (the optimizer's step) is recorded once.

    Raises NothingToTrain if no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, backend: Backend = _CPU) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise NothingToTrain(
                f"no parameter of {type(model).__name__} requires a gradient, so there is no training step to plan. "
                "Set requires_grad on what is to be trained (a PEFT model: is_trainable=True), then call again."
            )
        self.model, self.recipe, self.backend = model, recipe, backend
        self.accumulation = recipe.accumulation
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._optimizer: tuple[Tape, list[int]] | None = None

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
        """
        self.accumulation = accumulation or self.recipe.accumulation
        try:
            with AbstractModel(self.model, self.fake) as abstract, installed():
                to_training(self.model)
                optimizer, state = self._optimizer_step(abstract)
                trace = self._traced(sample.map(abstract.imitate), state)
        except CannotTrace:
            if any(parameter.is_meta for parameter in self.model.parameters()):
                raise
            with preserved(self.model), installed():
                to_training(self.model)
                batch = sample.to(next(self.model.parameters()).device)
                trace = self._micro_steps(batch, find_blocks(self.model), self._static(batch, state), None)
        return with_optimizer(trace, optimizer)

    def _traced(self, batch: Sample, state: list[int]) -> Trace:
        """Abstractly: by a few blocks of each long run where that is the same, else whole."""
        blocks = find_blocks(self.model)
        runs = long_runs(self.model, blocks)
        static = self._static(batch, state)
        trace = self._shortened(batch, blocks, static, runs) if runs else None
        return trace or self._micro_steps(batch, blocks, static, self.fake)

    def _static(self, batch: Sample, state: list[int]) -> dict[str, list[int]]:
        """Sizes of what is there all the time, by category."""
        sizes = {
            "params": _sizes(self.model.parameters()),
            "buffers": _sizes(self.model.buffers()),
            "inputs": _sizes(batch.tensors()),
            "optimizer": state,
            "libraries": [self.backend.fixed_bytes()],
        }
        return {name: [self.backend.rounded(size) for size in found] for name, found in sizes.items()}

    def _shortened(
        self, batch: Sample, blocks: Sequence[str], static: dict[str, list[int]], runs: list[Run]
    ) -> Trace | None:
        """None if it cannot be shown to be the same."""
        omitted = {path for run in runs for path in run.omitted}
        try:
            with shortened(self.model, runs):
                short = self._micro_steps(batch, [path for path in blocks if path not in omitted], static, self.fake)
            return lengthened(short, runs)
        except (NotPeriodic, MemplanError):  # a true error of the model comes again when it is traced whole
            return None

    def _micro_steps(
        self, batch: Sample, blocks: Sequence[str], static: dict[str, list[int]], fake: FakeTensorMode | None
    ) -> Trace:
        tape = Tape(self.model, fake, self.backend)
        for tensor in (*self.model.parameters(), *self.model.buffers(), *batch.tensors()):
            tape.pass_over(tensor)
        borders, grads = [], []
        with tape, self.backend.kernels():
            for _ in range(min(self.accumulation, 2)):
                borders.append(self._micro_step(tape, batch))
                rows = [tape.row_of(p.grad) for p in self.model.parameters() if p.grad is not None]
                grads += [row for row in rows if row is not None]
        tape.forget()
        for parameter in self.model.parameters():
            parameter.grad = None
        _fill_probes(tape)
        return assemble(
            tape,
            borders,
            static,
            grads,
            blocks,
            how="recorded" if fake is None else "fake",
            micro_batch=batch.batch_size,
            accumulation=self.accumulation,
        )

    def _micro_step(self, tape: Tape, batch: Sample) -> MicroBorders:
        start = Border.of(tape)
        loss = self._loss(tape, batch)
        middle = Border.of(tape)
        tape.backward = True
        try:
            loss.backward()
        except _NEEDS_VALUES as error:
            raise CannotTrace(_values_message(self.model, error)) from error
        finally:
            tape.backward = False
        del loss
        return MicroBorders(start, middle, Border.of(tape))

    def _loss(self, tape: Tape, batch: Sample) -> Tensor:
        kind = next(self.model.parameters()).device.type
        try:
            with nullcontext() if self.recipe.autocast is None else torch.autocast(kind, self.recipe.autocast):
                loss = loss_of(self.model, batch, self.recipe.loss)
        except _NEEDS_VALUES as error:
            raise CannotTrace(_values_message(self.model, error)) from error
        except BadLoss:
            raise
        except Exception as error:  # anything: it is the user's own model that runs
            name, where = type(self.model).__name__, tape.last_entered
            raise ModelFailed(
                f"{name} raised {type(error).__name__}{f' in {where}' if where else ''}: {error}\n"
                "Run one step of it by hand on the same sample: memplan can plan what trains."
            ) from error
        return loss / self.accumulation if self.accumulation > 1 else loss

    def _optimizer_step(self, abstract: AbstractModel) -> tuple[Tape, list[int]]:
        """The tape of one optimizer step with its state in place, and the sizes of that state."""
        if self._optimizer is not None:
            return self._optimizer
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        with Tape(self.model, self.fake, self.backend, answer=1.0):
            optimizer = optimizers.build(
                self.recipe.optimizer, trainable, abstract.stand_in, abstract.imitate, foreach=self.backend.foreach
            )
            for parameter in trainable:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # lazily created state exists from here on, as in a steady run
        state = _tensors_in(list(optimizer.state.values()))
        tape = Tape(self.model, self.fake, self.backend, answer=1.0)
        for tensor in (*self.model.parameters(), *(p.grad for p in trainable if p.grad is not None), *state):
            tape.pass_over(tensor)
        with tape:
            optimizer.step()
        tape.forget()
        optimizer.zero_grad(set_to_none=True)
        self._optimizer = tape, _sizes(state)
        return self._optimizer


def loss_of(model: nn.Module, batch: Sample, loss: Loss | None) -> Tensor:
    """The scalar to differentiate: `loss(model, batch)`, else what the model's output calls its loss.

    Nothing else of the output is kept alive. Raises BadLoss, which says what to pass.
    """
    if loss is not None:
        return _checked(loss(model, batch.content), "loss(model, batch)")
    return _checked(_loss_in(batch.call(model)), f"the output of {type(model).__name__}")


def _loss_in(output: object) -> object:
    if isinstance(output, dict):  # also transformers' ModelOutput
        return output.get("loss")
    if isinstance(output, tuple) and output and not hasattr(output, "loss"):
        return output[0]
    return output if isinstance(output, Tensor) else getattr(output, "loss", None)


def _checked(loss: object, source: str) -> Tensor:
    way_out = "Pass loss=lambda model, batch: ... that returns one differentiable scalar, or labels in the sample."
    if not isinstance(loss, Tensor):
        raise BadLoss(f"{source} holds no loss (found {type(loss).__name__}). {way_out}")
    if loss.numel() != 1:
        raise BadLoss(f"{source} is no scalar but of shape {tuple(loss.shape)}. {way_out}")
    if not loss.requires_grad:
        raise BadLoss(f"{source} does not depend on a trainable parameter, so there is nothing to learn. {way_out}")
    return loss


def _fill_probes(tape: Tape) -> None:
    for probe, size in probed_bytes(tape.probes).items():
        for row in tape.probes[probe]:
            tape.bytes[row] = size


def _values_message(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__} asks for the value of a floating-point tensor in its step ({error}), and an abstract "
        "run has none. Give the model real weights and plan on the device itself, where one step can be run."
    )


def _sizes(tensors: Iterable[Tensor]) -> list[int]:
    """Bytes of the distinct storages behind some tensors."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return list(storages.values())


def _tensors_in(values: Iterable[object]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors_in(value)
        elif isinstance(value, dict):
            found += _tensors_in(value.values())
    return found
