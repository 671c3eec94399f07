"""A step under DeepSpeed's ZeRO-3: the trace of one rank, which has its part of everything.

Follows `DeepSpeedZeroOptimizer_Stage3` of deepspeed/runtime/zero/stage3.py (0.19.8), with contiguous gradients that are
scattered. When weights are gathered and gradients scattered, `memplan.gathering` has.

- always: the rank's parts of the weights, each padded by itself, as one tensor (`lp_param_buffer`); the same in
  float32, a tensor for each sub-group of `sub_group_size` elements (`_create_fp32_partitions`), and what the user's
  optimizer keeps for it; the bucket and the parts of the gradients (`_setup_for_real_optimizer`).
- to the step, and anew behind it: small weights as a whole (`persistent_parameters`).
- step: a norm in float64 for each part of a gradient (`get_grad_norm_direct`), then for one sub-group after the other
  its gradients as one tensor, copied to float32 (`_prepare_fp32_grad_for_sub_group`), and the optimizer's step.

Collective libraries take memory of a card beside all that; it is not counted. Nor are the model's weights, which are
whole on each rank before they are spread.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from memplan.abstract import AbstractModel
from memplan.gathering import Gathers, Order, gathered
from memplan.kernels import Backend
from memplan.optimizer_step import PLAIN, Dropped, OptimizerPart, PrimedOptimizer
from memplan.tape import Tape
from memplan.trace import CATEGORIES, Trace
from memplan.zero import flattened

_PARAMS, _GRADS = CATEGORIES.index("params"), CATEGORIES.index("grads")


@dataclass(frozen=True, slots=True)
class Zero3:
    """How the ranks share a model.

    Attributes:
        trained: elements of the trained parameters, for each of the optimizer's groups, in its order.
        others: elements of all others.
        dtype: of the parameters and their gradients.
        sub_group: elements on a rank that are stepped at once (`sub_group_size`).
        gathers: when weights are gathered.
        stay: elements of the weights that stay whole.
    """

    trained: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]
    dtype: torch.dtype
    sub_group: int
    gathers: Gathers
    stay: tuple[int, ...]

    @property
    def weights_move(self) -> bool:
        """Whether weights come and go, by an order that all blocks have a part in."""
        return True

    @property
    def sub_groups(self) -> list[list[list[int]]]:
        """Elements of the rank's parts: by the optimizer's group, its sub-groups (`_create_fp16_sub_groups`)."""
        return [self._split([self.gathers.part(numel) for numel in group]) for group in self.trained]

    def _split(self, parts: Sequence[int]) -> list[list[int]]:
        if self.sub_group >= sum(parts):
            return [list(parts)]
        found: list[list[int]] = [[]]
        for part in parts:
            if sum(found[-1]) >= self.sub_group:
                found.append([])
            found[-1].append(part)
        return found

    # -- forward and backward ------------------------------------------------------------------------------------

    def during(self, model: nn.Module, tape: Tape, rehearse: Callable[[], Order]) -> AbstractContextManager[Dropped]:
        """Around the micro-steps that `tape` records."""
        return gathered(model, tape, self.gathers, rehearse())

    def on_a_rank(self, trace: Trace, rounded: Callable[[int], int]) -> Trace:
        """The micro-steps on a rank: its parts in the place of the weights.

        Args:
            trace: of the model with weights that come and go, without its optimizer.
            rounded: what the device's allocator makes of a size.
        """
        itemsize, part, ranks = self.dtype.itemsize, self.gathers.part, self.gathers.ranks
        trained = sum(part(numel) for group in self.trained for numel in group)
        stop = trace.ticks + 1  # what is let go of behind the last micro-step has a tick of its own
        rows = [
            (_PARAMS, trained, 0, stop),
            *((_PARAMS, part(numel), 0, stop) for numel in self.others),
            (_GRADS, self.gathers.bucket, 0, stop),
            (_GRADS, trained, 0, stop),
            # As if each step began with them: they are no leftovers that its first forward lets go of.
            *((_PARAMS, part(numel) * ranks, 1, trace.ticks) for numel in self.stay if ranks > 1),
        ]
        category, numel, born, died = np.array([row for row in rows if row[1]], dtype=np.int64).T
        sizes = np.array([rounded(each * itemsize) for each in numel.tolist()], dtype=np.int64)
        stay = (trace.storage_category != _PARAMS) | (trace.born > 0)
        nothing = np.zeros(len(sizes), dtype=np.int64)
        said = (
            f"DeepSpeed's ZeRO-3 over {ranks} ranks, with buckets of {self.gathers.bucket:,} elements, "
            f"{self.gathers.prefetch:,} fetched ahead"
        )
        return replace(
            trace,
            storage_bytes=np.concatenate([sizes, trace.storage_bytes[stay]]),
            storage_category=np.concatenate([category.astype(np.int8), trace.storage_category[stay]]),
            storage_module=np.concatenate([nothing.astype(np.int32), trace.storage_module[stay]]),
            born=np.concatenate([born, trace.born[stay]]),
            died=np.concatenate([died, np.where(trace.died >= trace.ticks, stop, trace.died)[stay]]),
            ticks=stop,
            assumptions=(*trace.assumptions, said),
        )

    # -- the step ------------------------------------------------------------------------------------------------

    def part(self, fake: FakeTensorMode, backend: Backend, optimizer: str | Optimizer) -> OptimizerPart:
        """The optimizer's step and state on a rank, with the master weights."""
        groups = [
            [nn.Parameter(torch.empty(sum(parts), device="meta")) for parts in group] for group in self.sub_groups
        ]
        flats = [flat for group in groups for flat in group]
        counts = [len(parts) for group in self.sub_groups for parts in group]
        largest = max(part for group in self.sub_groups for parts in group for part in parts)
        asked = optimizer if isinstance(optimizer, str) else flattened(optimizer, groups)
        with AbstractModel(nn.ParameterList(flats), fake) as abstract:
            shares = list(abstract.model.parameters())

            def gradients() -> Iterator[None]:
                torch.linalg.vector_norm(shares[0].new_empty(largest, dtype=torch.float64))
                for share, count in zip(shares, counts, strict=True):
                    if count > 1 or self.dtype != share.dtype:
                        share.grad = share.new_empty(share.shape, dtype=self.dtype).to(share.dtype)
                    else:
                        share.grad = share.new_empty(share.shape)
                    yield
                    share.grad = None

            part = PrimedOptimizer(abstract, fake, backend, asked, PLAIN).part(shares, make=gradients)
        masters = [flat.numel() * torch.float32.itemsize for flat in flats]
        return replace(part, state=[*masters, *part.state], before=len(masters) + part.before)
