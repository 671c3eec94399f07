"""A loader prepared by Accelerate that hands out the micro-batches of a step as one group.

A group is fetched before its first micro-batch is handed out, so that each can be weighted by its part of the whole.
Accelerate's synchronisation flag is set with every micro-batch; its optimizers and schedulers obey it, with and without
`accelerator.accumulate`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch import Tensor

from memplan.errors import UsageError
from memplan.integrations.parts import LastOutput, Split, mapped, nothing_to_learn
from memplan.integrations.trained_loss import OutputLoss
from memplan.integrations.watching import SecondStep

_log = logging.getLogger("memplan")

_PAIR: Final = 2  # micro-batches, between which there is one place only where a rate can change


@dataclass
class Group:
    """The step that is under way: which micro-batch it is at, and what the loop has done with it.

    Attributes:
        split: how a step is cut into micro-batches.
        drop_last: whether a stream's rows that make no whole batch of the script's are left out; samplers see to it.
        models, optimizers: as prepared.
        device: where they are.
        weight: the part of the step's loss that the micro-batch at hand has; None outside of a step.
        is_last: whether the optimizer steps after the micro-batch at hand.
        backwards: through micro-batches of this step so far.
        stepped: whether the optimizer has stepped since the group was begun.
        loss: of the step so far, as the script would have seen it for its own batches; detached.
        steps: finished so far, with those that the loop has left out.
        before: of those, the ones of earlier epochs.
        skipped: steps that the next epoch leaves out at its beginning.
        has_trained: whether a step has gone as those of Accelerate's loops do.
        left_out: whether the loop has left out the latest step.
        by_engine: whether DeepSpeed takes the steps.
        second: what measures the second step, if anything does; given up where the loop ends before that.
        output_loss: what looks whether the loop trains by the loss in the model's output.
        last_output: of the model, where a part without labels needs it: ranks wait for the gradients of every block.
        to_step: the ids of the optimizers that have not stepped in this step.
        asks: whether the loop asks when a step ends, so that it need not call `step` for every batch.
        asked_zero: whether the loop has called `zero_grad` behind the last micro-batch, without a step.
        handed: micro-batches of this step so far.
        calls: of `step` in this step, by the ids of the optimizers.
        rates: the learning rates at the last of them, and of those before; they may be of the step before.
        moves: how often they have changed since the first call of this step, and whether they had before that.
        changes: of the gradients, as counted after the last backward.
        batch: the micro-batch at hand, as the loader made it and as the loop got it.
        end_guard: ends the guard of the steps, if there is one, for a reason.
        is_left: whether the loop has left the loader in the middle of a step.
    """

    split: Split
    drop_last: bool
    models: list[Any]
    optimizers: list[Any]
    device: torch.device
    weight: float | None = None
    is_last: bool = True
    backwards: int = 0
    stepped: bool = False
    loss: "Tensor | float" = 0.0
    steps: int = 0
    before: int = 0
    skipped: int = 0
    has_trained: bool = False
    left_out: bool = False
    by_engine: bool = False
    second: SecondStep | None = None
    output_loss: OutputLoss | None = None
    last_output: LastOutput | None = None
    to_step: set[int] = field(default_factory=set)
    asks: bool = False
    asked_zero: bool = False
    handed: int = 0
    calls: Counter[int] = field(default_factory=Counter)
    rates: dict[int, list[float]] = field(default_factory=dict)
    moves: Counter[int] = field(default_factory=Counter)
    moved_before: set[int] = field(default_factory=set)
    changes: tuple[int, int] | None = None
    batch: tuple[Any, Any] = (None, None)
    end_guard: Callable[[str], None] | None = None
    is_left: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether a micro-batch was trained on."""
        return self.has_trained or self.backwards > 0

    @property
    def in_epoch(self) -> int:
        """Steps taken in the epoch under way, with those that it has skipped."""
        return self.steps - self.before + self.stepped

    def begin(self) -> None:
        """A new step. What is left of the last one's gradients would only take memory in the next forward."""
        if self.is_left:
            self._drop_left()
        self.backwards, self.stepped, self.loss = 0, False, 0.0
        self.asks, self.handed, self.changes = False, 0, None
        self.calls.clear()
        self.moves.clear()
        self.moved_before.clear()
        self.to_step = {id(optimizer) for optimizer in self.optimizers}
        if self.asked_zero or (self.has_trained and not (self.split.is_own and self.left_out)):
            for optimizer in self.optimizers:
                optimizer.optimizer.zero_grad(set_to_none=True)
        self.asked_zero = False
        self._measure()

    def _measure(self) -> None:
        if self.second is not None:
            self.second.begin(self.steps, self.models[0], self.optimizers, self.device)

    def replanned(self, second: SecondStep) -> None:
        """The step under way goes on by another plan, of which the next may be the second."""
        if self.second is not None:
            self.second.stop()
            self.second = None if self.steps else second
            self._measure()

    def _drop_left(self) -> None:
        done, self.backwards, self.is_left = self.backwards, 0, False
        for optimizer in self.optimizers:
            optimizer.optimizer.zero_grad(set_to_none=True)
        raise UsageError(
            f"the loop left the training loader in the middle of a step, after {done} micro-batches of "
            f"{self.split.micro_batches}; their gradients are dropped now. Leave it where accelerator.sync_gradients "
            "is true, or fix the script's own batch with micro_batch=."
        )

    def at(self, weight: float, is_last: bool) -> None:
        """The next micro-batch is handed out.

        Raises:
            UsageError: the loop has not trained on the one before, and never has: it is out of step with the weights.
        """
        if self.handed and not (self.backwards or self.has_trained or self.split.is_own):
            raise UsageError(
                "no accelerator.backward(loss) was called for the first micro-batch before the second was fetched. Use "
                "it in place of loss.backward(); fetch each when it is trained on, since workers of the loader fetch "
                "ahead (num_workers); and leave batches out by accelerator.skip_first_batches(loader, n)."
            )
        if self.last_output is not None:
            self.last_output.forget()  # of a micro-batch that was left out
        self.weight, self.is_last, self.handed = weight, is_last, self.handed + 1
        GradientState()._set_sync_gradients(is_last)
        for model in self.models:
            if hasattr(model, "require_backward_grad_sync"):  # DistributedDataParallel's own flag, as `no_sync` sets it
                model.require_backward_grad_sync = is_last

    def end(self) -> None:
        """The loop asks for the next step.

        Raises:
            UsageError: it has not trained by this one as Accelerate's loops do, and never has.
        """
        self.weight = None
        calls = max(self.calls.values(), default=0)
        if self._is_left_out:
            self._leave_out()
        elif not self.backwards:
            raise UsageError(
                "no accelerator.backward(loss) was called for a step of the training loader, so its losses were not "
                "weighted. Use it in place of loss.backward()."
            )
        elif not self.stepped or (self.calls and calls < min(self.backwards, self.handed) and not self.asks):
            raise UsageError(
                f"optimizer.step() was called for {calls} of the {self.handed} micro-batches of a step, so the loop "
                "seems to accumulate by a counter of its own. Pass gradient_accumulation_steps to the Accelerator, and "
                "call optimizer.step() for every batch or inside accelerator.accumulate(model)."
            )
        else:
            self.has_trained, self.left_out = True, False
        self.steps, self.stepped, self.backwards = self.steps + 1, False, 0

    @property
    def _is_left_out(self) -> bool:
        """Whether the loop has not taken the step and may do without: it has taken one before, or its batches are its
        own. Not by DeepSpeed: ZeRO-2 has gradients in a place of its own, from which they are not dropped."""
        if self.stepped:
            return False
        if self.split.is_own:
            return self.has_trained or self.asks or not self.backwards
        return self.has_trained and not (self.by_engine and self.backwards)

    def _leave_out(self) -> None:
        """The loop has left out a step, as for a loss that is no number; what it has of gradients is dropped next."""
        if self.has_trained and not self.left_out:
            _log.warning("the loop left out step %d: no optimizer.step() behind its last micro-batch", self.steps + 1)
        self.left_out = True

    def let_go(self) -> None:
        """What watches the run ends."""
        if self.second is not None:
            self.second.stop()
            self.second = None
        if self.output_loss is not None:
            self.output_loss.forget()
        if self.last_output is not None:
            self.last_output.undo()

    def note_backward(self, loss: Tensor) -> None:
        """Before the backward of a loss.

        Raises:
            UsageError: it is not the one that micro-batches are weighted for; or the micro-batch at hand, a part of the
                loop's batch, has had a backward: what the second loss is a mean over is not known.
        """
        if self.output_loss is not None:
            self.output_loss.check(loss)
        if self.backwards >= self.handed and not self.split.is_own:
            raise UsageError(
                "accelerator.backward was called a second time for one micro-batch. Add the losses up and call it "
                "once, with memplan.attach(accelerator, loss=...) where not all of them are in the model's output, or "
                "fix the script's own batch with micro_batch=."
            )
        self.backwards += 1

    def learned(self, loss: Tensor) -> Tensor:
        """The loss of the micro-batch at hand. Of one that is a mean over nothing, which is no number, a loss whose
        gradients are zeros: replicas wait for them."""
        through = self.last_output
        if not self.weight:
            loss = nothing_to_learn(self.models) if through is None else through.nothing_to_learn(loss)
        if through is not None:
            through.forget()
        return loss

    def check_gradients(self) -> None:
        """Before a backward. Raises UsageError if the gradients of the step so far were changed since the last one."""
        if self.changes is not None and self.gradient_changes() != self.changes:
            raise UsageError(
                "gradients were changed between two micro-batches of a step, as torch.nn.utils.clip_grad_norm_ and "
                "model.zero_grad() do, to parts of what they are meant for. Use accelerator.clip_grad_norm_ (with an "
                "infinite norm to log it), clip_grad_value_ and optimizer.zero_grad(), which wait for the whole, or do "
                "it where accelerator.sync_gradients is true."
            )

    def note_gradients(self) -> None:
        """After a backward that is not the last of its step."""
        self.changes = None if self.is_last else self.gradient_changes()

    def gradient_changes(self) -> tuple[int, int]:
        """How many gradients there are, and how often they were written to in place."""
        return changes_of(parameter for model in self.models for parameter in model.parameters())

    def is_stepping(self, optimizer: Any) -> None:
        """The loop calls an optimizer's step.

        Raises:
            UsageError: its learning rate changes with the micro-batches. Once in a step is what a loop may do that asks
                when it ends; in a step of two it is told by what happened before it.
        """
        key = id(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups if isinstance(group.get("lr"), float | int)]
        before = self.rates.get(key, rates)
        changed = [(old, new) for old, new in zip(before, rates, strict=False) if old != new]
        if changed:
            self.moves[key] += bool(self.calls[key])
            self.moved_before |= set() if self.calls[key] else {key}
        self.rates[key] = rates
        self.calls[key] += 1
        self.stepped |= self.is_last
        moves = self.moves[key] + (self.handed == _PAIR and key in self.moved_before)
        if self.is_last and changed and moves > 1:
            raise UsageError(
                f"the learning rate goes on changing between the micro-batches of a step, now from {changed[0][0]:g} "
                f"to {changed[0][1]:g}, so a schedule would run that much faster. Pass the scheduler to "
                "accelerator.prepare, or set the rate where accelerator.sync_gradients is true."
            )

    def has_stepped(self, optimizer: Any) -> None:
        """An optimizer has taken the gradients of the step under way, if they are all there."""
        if self.is_last:
            self.to_step.discard(id(optimizer))
        if self.second is not None and not self.to_step:
            self.second.end()


def changes_of(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """How many gradients they have, and how often those were written to in place."""
    versions = [parameter.grad._version for parameter in parameters if parameter.grad is not None]
    return len(versions), sum(versions)


class _Grouped:
    """What iterates a prepared loader in groups. Mixed in before Accelerate's own class."""

    group: Group
    own_length: int | None
    end_of_dataloader: bool
    _non_blocking: bool

    def __len__(self) -> int:
        """Of the script's own batches until one is trained on, and of micro-batches then: see `counting`."""
        if self.own_length is None or self.group.has_begun:
            return super().__len__()  # type: ignore[misc,no-any-return]  # of the class that this is mixed into
        return self.own_length

    def __iter__(self) -> Iterator[Any]:
        group, device = self.group, self.__dict__.get("device")
        if device is not None:
            self.device = None  # what is fetched ahead waits on the host, where it can be counted at once
        inner = super().__iter__()  # type: ignore[misc]  # of the class that this is mixed into
        group.before, group.skipped, group.stepped = group.steps - group.skipped, 0, False
        try:
            while batches := self._fetched(inner):
                ended = self.end_of_dataloader
                self.end_of_dataloader = False
                group.begin()
                for at, (batch, weight) in enumerate(zip(batches, group.split.weights(batches), strict=True), start=1):
                    last = at == len(batches)
                    self.end_of_dataloader = ended and last
                    group.at(weight, last)
                    made = mapped(lambda part: part, batch)  # from which a loop takes no labels away
                    if device is not None:
                        batch = send_to_device(batch, device, non_blocking=self._non_blocking)
                    group.batch = made, batch
                    yield batch
                group.end()
                if ended:
                    break
            for _ in inner:  # what Accelerate does behind the last batch
                pass
        finally:
            inner.close()
            group.weight, group.batch = None, (None, None)
            group.is_left = group.split.micro_batches > 1 and group.backwards > 0 and not group.stepped
            if group.second is not None:
                group.second.stop()
            if device is not None:
                self.device = device

    def _fetched(self, inner: Iterator[Any]) -> list[Any]:
        """The micro-batches of the next step; not past the loader's last, where Accelerate closes it.

        Those that make no whole batch of the script's are left out where its loader would leave them out.
        """
        batches: list[Any] = []
        for batch in inner:
            batches.append(batch)
            if len(batches) == self.group.split.micro_batches or self.end_of_dataloader:
                break
        if self.group.drop_last and (inside := self.group.split.inside):
            del batches[len(batches) - len(batches) % inside :]
        return batches


class GroupedShard(_Grouped, DataLoaderShard):  # type: ignore[misc]  # Accelerate ships no types
    """A loader of which each process reads its own part."""


class GroupedDispatcher(_Grouped, DataLoaderDispatcher):  # type: ignore[misc]  # as above
    """A loader that the first process reads for all."""


def grouped(loader: Any, group: Group, own_length: int | None) -> Any:
    """A prepared loader, made to hand out groups. It stays the same object, which the Accelerator knows.

    Args:
        own_length: in batches of the script's own; None for a stream that does not say.
    """
    kind = _KINDS.get(type(loader))
    if kind is None:
        raise UsageError(f"Accelerate prepared the loader as a {type(loader).__name__}, which memplan cannot drive")
    object.__dict__["__class__"].__set__(loader, kind)  # Accelerate hides an object's own class behind a property
    loader.group, loader.own_length = group, own_length
    return loader


_KINDS: Final = {DataLoaderShard: GroupedShard, DataLoaderDispatcher: GroupedDispatcher}
