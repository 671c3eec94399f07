"""Cross-entropy of a linear head without its logits: a few rows at a time, gradients at once.

The gradient of cross-entropy needs the logits' softmax and nothing of what comes after it but one factor. So each chunk
of rows goes through the head, is turned into its own gradient in place, is multiplied into the gradients of the hidden
states and of the head, and is forgotten. The backward has only the factor left to apply: the head's products are three,
as without chunks.

At any time there are, beside the gradients, two float32 tensors of [rows, vocabulary], plus one for each step between
the head and the loss that changes values (a soft cap has three).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memplan.errors import ModelError

Step = Callable[[Tensor], Tensor]
"""What happens to each logit between the head and the loss; for [rows, vocabulary], row by row."""


@dataclass(frozen=True, slots=True)
class Cast:
    """The step that changes nothing but the type."""

    dtype: torch.dtype

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """How a cross-entropy is to be computed. `dtype` is what the head computes in, `result` the type of the loss."""

    rows: int
    dtype: torch.dtype
    steps: tuple[Step, ...]
    result: torch.dtype
    ignore_index: int
    smoothing: float
    mean: bool


def chunked_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, loss: Loss) -> Tensor:
    """The cross-entropy of `hidden` [n, h] through a head [vocabulary, h] against class numbers [n].

    Raises what torch's own raises, as for a class number out of range; its backward raises ModelError where the
    gradient is to be differentiated again.
    """
    learns = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    apply: Callable[..., Tensor] = _ChunkedLoss.apply
    return apply(hidden, weight, bias, target, loss, learns)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, steps: Sequence[Step]) -> Tensor:
    """The logits as they reach the loss; types as autocast would cast them."""
    logits = functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    for step in steps:
        logits = step(logits)
    return logits


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        loss: Loss,
        learns: tuple[bool, bool, bool],
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # the types are decided
            work = _Work(hidden, weight, bias, target, loss, learns)
            for start in range(0, len(hidden), loss.rows):
                work.add(slice(start, start + loss.rows))
            count = (target != loss.ignore_index).sum() if loss.mean else None
            # Where every label is ignored torch's mean is not a number, but its gradient is zero.
            gradients, shrunk = zip(*work.gradients(), strict=True)
            ctx.save_for_backward(*gradients, *shrunk, None if count is None else count.clamp(min=1))
            return (work.total if count is None else work.total / count).to(loss.result)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ModelError(
                "A gradient is to be differentiated again (create_graph=True), which a chunked loss head cannot do: "
                "its logits are gone. Plan without the chunked loss head."
            )
        *saved, count = ctx.saved_tensors
        gradients, shrunk = saved[:3], saved[3:]
        factor = grad_output.to(torch.promote_types(grad_output.dtype, torch.float32))
        factor = factor if count is None else factor / count
        # Autograd hands these on as they are, and a parameter keeps what it gets: in place, if nobody comes again.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        scale = torch.mul if again else Tensor.mul_
        factors = [factor if by is None else factor * by for by in shrunk]
        scaled = (None if g is None else scale(g, by) for g, by in zip(gradients, factors, strict=True))
        return (*scaled, None, None, None)


class _Work:
    """The sums over the chunks: of the loss, and of its gradients where something learns.

    Sums in float32 at least: in bfloat16 each chunk would round them anew.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        loss: Loss,
        learns: tuple[bool, bool, bool],
    ) -> None:
        self.hidden, self.target, self.loss = hidden, target, loss
        self.weight, self.bias = weight.to(loss.dtype), None if bias is None else bias.to(loss.dtype)
        self.types = weight.dtype, None if bias is None else bias.dtype
        self.exact = torch.promote_types(loss.dtype, torch.float32)
        self.total = torch.zeros((), dtype=self.exact, device=hidden.device)
        self.to_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if learns[0] else None
        self.to_weight = torch.zeros_like(weight, dtype=self.exact) if learns[1] else None
        self.to_bias = torch.zeros_like(bias, dtype=self.exact) if bias is not None and learns[2] else None
        self.learns = any(learns)
        self.steps = loss.steps
        while self.steps and self.steps[-1] == Cast(self.exact):  # the loss computes in this type anyway
            self.steps = self.steps[:-1]

    def gradients(self) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """Of the hidden states, the weight and the bias: of the sum over all rows, and by what each was shrunk."""
        for_weight, for_bias = self.types
        return (self.to_hidden, None), _in_range(self.to_weight, for_weight), _in_range(self.to_bias, for_bias)

    def add(self, part: slice) -> None:
        """One chunk of rows."""
        hidden = self.hidden[part].to(self.loss.dtype)
        grad = self._grad_of_logits(hidden, self.target[part])
        if grad is None:
            return
        if self.to_hidden is not None:
            _product(grad, self.weight, self.to_hidden[part])
        if self.to_weight is not None:
            _add_product(grad, hidden, self.to_weight)
        if self.to_bias is not None:
            self.to_bias += grad.sum(0, dtype=self.exact)

    def _grad_of_logits(self, hidden: Tensor, target: Tensor) -> Tensor | None:
        """Of the head's own output, in its type."""
        if not (self.learns and self.steps):
            logits = [logits_of(hidden, self.weight, self.bias, self.loss.dtype, self.steps)]
            grad = self._grad_of_loss(logits, target)
            return None if grad is None else grad.to(self.loss.dtype)
        first = logits_of(hidden, self.weight, self.bias, self.loss.dtype, ())
        with torch.enable_grad():
            last = first.requires_grad_()
            for step in self.steps:
                last = step(last)
        grad = self._grad_of_loss([last.detach()], target)
        (grad,) = torch.autograd.grad(last, first, None if grad is None else grad.to(last.dtype))
        return grad

    def _grad_of_loss(self, logits: list[Tensor], target: Tensor) -> Tensor | None:
        """Add the loss of some rows; return its gradient by their logits, which are taken out of the list and freed."""
        loss, smoothing = self.loss, self.loss.smoothing
        logs = torch.log_softmax(logits.pop(), -1, dtype=self.exact)
        counted = target != loss.ignore_index
        factors = counted.to(self.exact)[:, None]
        picked = functional.nll_loss(logs, target, ignore_index=loss.ignore_index, reduction="sum")
        self.total += picked * (1 - smoothing)
        if smoothing:
            self.total -= (logs.sum(-1, keepdim=True) * factors).sum() * (smoothing / logs.shape[-1])
        if not self.learns:
            return None
        grad = logs.exp_().mul_(factors)
        grad.scatter_add_(1, torch.where(counted, target, 0)[:, None], factors * (smoothing - 1))
        return grad.sub_(factors * (smoothing / grad.shape[-1])) if smoothing else grad


def _in_range(total: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    """A sum in the type of its parameter, and by what it was shrunk to have room there, if it was.

    In float16 there is no number above 65504, which thousands of rows of one class pass, though their mean does not.
    The mean alone would be too small in turn for numbers that the loss is scaled up to keep. So the largest decides.
    """
    if total is None or dtype is None:
        return None, None
    if dtype != torch.float16:
        return total.to(dtype), None
    by = (torch.linalg.vector_norm(total, torch.inf) / 2**15).clamp(min=1)
    return total.div_(by).to(dtype), by


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(grad: Tensor, hidden: Tensor, total: Tensor) -> None:
    """Add grad.T @ hidden; where that has another type, by pieces that are no larger than `grad`."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), hidden)
        return
    rows, vocabulary = grad.shape
    piece = max(1, rows * vocabulary // hidden.shape[-1])
    for start in range(0, vocabulary, piece):
        part = slice(start, start + piece)
        total[part] += grad[:, part].t() @ hidden
