"""`MicroSteps`: forward and backward of a step, once or twice, as a `Trace` without its optimizer."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from memplan import buckets
from memplan.accumulation import repeated
from memplan.assembly import Border, MicroBorders, Static, assemble
from memplan.errors import BadLoss, CannotTrace, ModelFailed, UsageError
from memplan.gathering import Order, rehearsed
from memplan.kernels import Backend
from memplan.kernels.probes import probed_bytes
from memplan.losses import forward
from memplan.notes import Notes
from memplan.optimizer_step import Dropped, PrimedOptimizer
from memplan.recipe import Recipe
from memplan.repeat import same_step
from memplan.samples import Sample
from memplan.tape import Tape
from memplan.trace import Trace

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class MicroSteps:
    """To be recorded once, abstractly where there is a mode of fakes, else for real.

    Of many micro-steps two are recorded; the second stands for all that follow. Where operators are known of which it
    was shown, that one is taken from the first.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, backend: Backend, fake: FakeTensorMode | None, accumulation: int
    ) -> None:
        self.model, self.recipe, self.backend, self.fake = model, recipe, backend, fake
        self.accumulation = accumulation
        self.tape = Tape(model, fake, backend)
        self.borders: list[MicroBorders] = []
        self.grads: list[int] = []  # storages
        self.held: list[object] = []  # the output of the last forward, if the loop keeps it

    def record(
        self,
        batch: Sample,
        blocks: Sequence[str],
        static: list[Static],
        primed: PrimedOptimizer | None,
        repeatable: set[str],
    ) -> tuple[Trace, set[int]]:
        """The trace, and the ids of the parameters that were given a gradient.

        Args:
            blocks, static: as for `assemble`.
            primed: steps parameters where their gradients come.
            repeatable: operators of micro-steps whose second was shown to follow from the first. More are added.
        """

        def traced(notes: Notes, borders: Sequence[MicroBorders]) -> Trace:
            for probe, size in probed_bytes(notes.probes).items():
                for row in notes.probes[probe]:
                    notes.bytes[row] = size
            how = "recorded" if self.fake is None else "fake"
            sizes = {"micro_batch": batch.batch_size, "accumulation": self.accumulation}
            return assemble(notes, borders, static, self.grads, blocks, weights=dropped.weights, how=how, **sizes)

        dropped, again = self._run(batch, primed, repeatable)
        graded = {id(p) for p in self.model.parameters() if p.grad is not None} | dropped.parameters
        for parameter in self.model.parameters():
            parameter.grad = None
        kept = list(dict.fromkeys(self.grads))
        self.grads += dropped.rows
        if again is not None:
            return traced(again[0], [*self.borders, again[1]]), graded
        trace = traced(self.tape.notes, self.borders)
        if len(self.borders) > 1 and self._is_plain:
            again = repeated(self.tape.notes, self.borders[0], kept)
            if again is not None and same_step(traced(again[0], [self.borders[0], again[1]]), trace):
                repeatable.update(self.tape.notes.op_names)
        return trace, graded

    @property
    def _is_plain(self) -> bool:
        """Whether nobody but autograd touches the gradients of abstract micro-steps, and no lever prepares in them."""
        own = self.recipe.zero is None and not self.recipe.bucket_view
        return self.fake is not None and own and not self.tape.prepares

    def _run(
        self, batch: Sample, primed: PrimedOptimizer | None, repeatable: set[str]
    ) -> tuple[Dropped, tuple[Notes, MicroBorders] | None]:
        """What was dropped, and the second micro-step where it was taken from the first."""
        tape, again = self.tape, None
        self._pass_over(batch)
        views = buckets.views_for(self.model.parameters(), tape) if self.recipe.bucket_view else {}
        zero = self.recipe.zero
        without = nullcontext(Dropped()) if zero is None else zero.during(self.model, tape, lambda: self._order(batch))
        stepping = primed.in_backward(tape) if primed else without
        with tape, self.backend.kernels(), stepping as dropped:
            for later in reversed(range(min(self.accumulation, 2))):
                with nullcontext() if later else buckets.filled(views, tape, dropped):
                    self.borders.append(self._micro_step(batch))
                rows = [tape.row_of(p.grad) for p in self.model.parameters() if p.grad is not None]
                self.grads += [row for row in rows if row is not None]
                if later and self._is_plain and repeatable.issuperset(tape.notes.op_names):
                    again = repeated(tape.notes, self.borders[0], self.grads)
                    if again is not None:
                        break
        tape.forget()
        return dropped, again

    def _pass_over(self, batch: Sample) -> None:
        for tensor in (*self.model.parameters(), *self.model.buffers(), *batch.tensors()):
            self.tape.pass_over(tensor)

    def _order(self, batch: Sample) -> Order:
        """In which modules want their weights, from a micro-step that is not recorded."""
        other = MicroSteps(self.model, self.recipe, self.backend, self.fake, self.accumulation)
        other._pass_over(batch)
        with other.tape, self.backend.kernels(), rehearsed(self.model) as order:
            other._micro_step(batch)
        for parameter in self.model.parameters():
            parameter.grad = None
        return order

    def _micro_step(self, batch: Sample) -> MicroBorders:
        start = Border.of(self.tape.notes)
        loss = self._loss(batch)
        middle = Border.of(self.tape.notes)
        self.tape.backward = True
        try:
            loss.backward()
        except _NEEDS_VALUES as error:
            raise CannotTrace(_values_message(self.model, error)) from error
        finally:
            self.tape.backward = False
        del loss
        return MicroBorders(start, middle, Border.of(self.tape.notes))

    def _loss(self, batch: Sample) -> Tensor:
        kind = next(self.model.parameters()).device.type
        try:
            with self.recipe.casting(kind):
                output, loss = forward(self.model, batch, self.recipe.loss)
                self.held[:] = [output] if self.recipe.keeps_output else []
                del output
        except _NEEDS_VALUES as error:
            raise CannotTrace(_values_message(self.model, error)) from error
        except (BadLoss, UsageError):
            raise
        except Exception as error:  # anything: it is the user's own model that runs
            name, where = type(self.model).__name__, self.tape.last_entered
            raise ModelFailed(
                f"{name} raised {type(error).__name__}{f' in {where}' if where else ''}: {error}\n"
                "Run one step of it by hand on the same sample: memplan can plan what trains."
            ) from error
        return loss / self.accumulation if self.accumulation > 1 else loss


def _values_message(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__} asks for the value of a floating-point tensor in its step ({error}), and an abstract "
        "run has none. Give the model real weights and plan on the device itself, where one step can be run."
    )
