"""A step under DeepSpeed's ZeRO-2: the trace of one rank, from that of the whole model.

Every rank keeps all weights and, of float32 master weights, optimizer state and averaged gradients, its part. Follows
`DeepSpeedZeroOptimizer` of deepspeed/runtime/zero/stage_1_and_2.py (0.19.8), with contiguous gradients:

- always: the master weights of the rank's part (`single_partition_of_fp32_groups`), and what the user's optimizer keeps
  for them. It steps one flat tensor for each of its parameter groups.
- backward: with the first gradient come the buckets (`setup_buckets`), which are there until the backward ends. A
  gradient is moved into one as soon as it is complete. When the bucket is full, and at the end, it is averaged over the
  ranks in a flat copy (`allreduce_bucket`). The rank keeps the gradients of which it owns a part, whole, from then on
  (`grads_in_partition`); those of further micro-steps are kept beside them until they are added.
- step: norms of the kept gradients in float64 (`get_grad_norm_direct`), then the rank's part of them as a flat tensor,
  which is copied to float32 (`step`).

Sizes are those of the rank that keeps most gradients. Collective libraries take memory of a card beside all that; it is
not counted. Nor are the model's weights while they are flattened before the first step, twice for a moment.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from memplan import optimizers
from memplan.abstract import AbstractModel
from memplan.kernels import Backend
from memplan.optimizer_step import PLAIN, Dropped, OptimizerPart, PrimedOptimizer
from memplan.tape import Tape
from memplan.trace import CATEGORIES, MicroStep, Trace

_GRADS: Final = CATEGORIES.index("grads")
_TEMPORARIES: Final = CATEGORIES.index("temporaries")
_ALIGNMENT: Final = 2  # elements a rank, to which a group is padded: `nccl_start_alignment_factor`

_Row = tuple[int, int, int, int]  # category, bytes, born, died


@dataclass(frozen=True, slots=True)
class Zero:
    """How the ranks share a model.

    Attributes:
        ranks: each on samples of its own.
        numels: elements of the trained parameters, for each of the optimizer's groups, in its order.
        dtype: of these parameters and their gradients.
        bucket_numel: elements of a bucket (`reduce_bucket_size`).
        buckets: 1, or 2 if one is filled while the other is sent (`overlap_comm`).
    """

    ranks: int
    numels: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    bucket_numel: int
    buckets: int

    @property
    def parts(self) -> tuple[int, ...]:
        """Elements of a rank's part of each group."""
        unit = _ALIGNMENT * self.ranks
        return tuple(-(-sum(group) // unit) * _ALIGNMENT for group in self.numels)

    @property
    def kept(self) -> tuple[int, ...]:
        """Elements of each gradient of which the rank that keeps most owns a part; they are kept whole."""
        numels = np.concatenate(self.numels)
        owned = np.concatenate([_owned(*group, self.ranks) for group in zip(self.numels, self.parts, strict=True)], 1)
        most = int(np.argmax(owned @ numels))
        return tuple(numels[owned[most]].tolist())

    @property
    def weights_move(self) -> bool:
        """Whether weights come and go, by an order that all blocks have a part in."""
        return False

    # -- forward and backward ------------------------------------------------------------------------------------

    def during(self, model: nn.Module, tape: Tape, _rehearse: object) -> AbstractContextManager[Dropped]:
        """Around the micro-steps that `tape` records."""
        return letting_go(model, tape)

    def on_a_rank(self, trace: Trace, rounded: Callable[[int], int]) -> Trace:
        """The micro-steps on a rank.

        Args:
            trace: of the whole model, without its optimizer, by `letting_go`.
            rounded: what the device's allocator makes of a size.
        """
        rows = [row for number in range(len(trace.steps)) for row in self._rows(trace, number)]
        category, size, born, died = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        sizes = np.array([rounded(each) for each in size.tolist()], dtype=np.int64)
        stop = trace.ticks + 1  # what is let go of behind the last micro-step has a tick of its own
        said = f"DeepSpeed's ZeRO-2 over {self.ranks} ranks, with buckets of {self.bucket_numel:,} elements"
        return replace(
            trace,
            storage_bytes=np.concatenate([trace.storage_bytes, sizes]),
            storage_category=np.concatenate([trace.storage_category, category.astype(np.int8)]),
            storage_module=np.concatenate([trace.storage_module, np.zeros(len(rows), dtype=np.int32)]),
            born=np.concatenate([trace.born, born]),
            died=np.concatenate([np.where(trace.died >= trace.ticks, stop, trace.died), died]),
            ticks=stop,
            assumptions=(*trace.assumptions, said),
        )

    def _rows(self, trace: Trace, number: int) -> Iterator[_Row]:
        """Buckets, their copies and what is kept, of one micro-step. The last two ticks stand for its end."""
        step, itemsize = trace.steps[number], self.dtype.itemsize
        complete, numels = self._completed(trace, step)
        end = step.backward.stop
        for _ in range(self.buckets):
            yield _GRADS, self.bucket_numel * itemsize, complete[0], end
        reductions = list(self._reductions(complete, numels, end - 2))
        for (at, filled), (following, _) in zip(reductions, [*reductions[1:], (end - 1, 0)], strict=True):
            # A copy that is sent beside the backward is in use for longer, at most until the next one is.
            yield _TEMPORARIES, filled * itemsize, at, at + 1 if self.buckets == 1 else max(following, at + 1)
        for tick, numel in zip(complete, numels, strict=True):
            if numel > self.bucket_numel:  # too large for a bucket: it stays where it is until it is sent
                until = next((at for at, _ in reductions if at > tick), end - 2)
                yield _GRADS, numel * itemsize, tick, until + 1
        yield _GRADS, sum(self.kept) * itemsize, reductions[0][0] + 1, trace.ticks if number == 0 else end

    def _completed(self, trace: Trace, step: MicroStep) -> tuple[list[int], list[int]]:
        """When each gradient is complete, in order, and its elements."""
        born_here = (trace.born >= step.backward.start) & (trace.born < step.backward.stop)
        rows = np.flatnonzero(born_here & (trace.storage_category == _GRADS))
        rows = rows[np.argsort(trace.died[rows], kind="stable")]
        ticks = np.minimum(trace.died[rows], step.backward.stop - 2)
        return ticks.tolist(), (trace.storage_bytes[rows] // self.dtype.itemsize).tolist()

    def _reductions(self, complete: list[int], numels: list[int], end: int) -> Iterator[tuple[int, int]]:
        """When a bucket is sent, and what it holds then (`reduce_independent_p_g_buckets_and_remove_grads`)."""
        filled = 0
        for tick, numel in zip(complete, numels, strict=True):
            if filled and filled + numel > self.bucket_numel:
                yield tick, filled
                filled = 0
            filled += numel
        yield end, filled

    # -- the step ------------------------------------------------------------------------------------------------

    def part(self, fake: FakeTensorMode, backend: Backend, optimizer: str | Optimizer) -> OptimizerPart:
        """The optimizer's step and state on a rank, with the master weights."""
        flats = [nn.Parameter(torch.empty(part, device="meta")) for part in self.parts]
        asked = optimizer if isinstance(optimizer, str) else flattened(optimizer, [[flat] for flat in flats])
        with AbstractModel(nn.ParameterList(flats), fake) as abstract:
            shares = list(abstract.model.parameters())

            def gradients() -> Iterator[None]:
                kept = shares[0].new_empty(sum(self.kept), dtype=self.dtype)
                largest = min(max(self.kept), max(self.parts))
                torch.linalg.vector_norm(kept[:largest].to(torch.float64))
                for share in shares:
                    share.grad = kept.new_empty(share.shape).to(share.dtype)
                del kept  # before the step, as `step` lets go of them
                yield

            part = PrimedOptimizer(abstract, fake, backend, asked, PLAIN).part(shares, make=gradients)
        masters = [numel * torch.float32.itemsize for numel in self.parts]
        return replace(part, state=[*masters, *part.state], before=len(masters) + part.before)


def _owned(numels: Sequence[int], part: int, ranks: int) -> NDArray[np.bool_]:
    """Whether a rank owns some of a parameter, shape [ranks, parameters]."""
    stops, begins = np.cumsum(numels), part * np.arange(ranks)[:, None]
    owned: NDArray[np.bool_] = (stops > begins) & (stops - numels < begins + part)
    return owned


@contextmanager
def letting_go(model: nn.Module, tape: Tape) -> Iterator[Dropped]:
    """Each gradient is gone as soon as it is complete, in the backwards that `tape` records."""
    dropped = Dropped()

    def drop(parameter: torch.Tensor) -> None:
        row = None if parameter.grad is None else tape.row_of(parameter.grad)
        dropped.rows += [] if row is None else [row]
        dropped.parameters.add(id(parameter))
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        yield dropped
    finally:
        for hook in hooks:
            hook.remove()


def flattened(optimizer: Optimizer, flats: Sequence[list[nn.Parameter]]) -> Optimizer:
    """One like it, that has not stepped yet, with flat tensors in each of its groups."""
    live = optimizers.unwrapped(optimizer)
    flat: Optimizer = type(live).__new__(type(live))
    groups = [{**group, "params": shares} for group, shares in zip(live.param_groups, flats, strict=True)]
    flat.__dict__.update(vars(live), param_groups=groups, state=defaultdict(dict))
    return flat
