"""What a Lightning module logs of the parts of a batch, as the one value that it would log of the whole."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

_MEANS: Final = ("mean", "avg", torch.mean)  # what Lightning takes for a mean


@dataclass
class _Whole:
    """A value that is logged of each part so far."""

    call: inspect.BoundArguments  # the latest
    weighted: "Tensor | float" = 0.0
    weight: float = 0.0
    rows: int = 0

    def log(self, log: Callable[..., None]) -> None:
        """The mean; of a batch in which nothing counts, the last part's value."""
        if self.weight:
            self.call.arguments["value"] = self.weighted / self.weight
        self.call.arguments["batch_size"] = self.rows
        log(*self.call.args, **self.call.kwargs)


class PartLog:
    """Takes the place of a module's `log` while it is at a part of a batch.

    Numbers and tensors that are logged as means are held back and averaged by the weights of the parts, as their losses
    are. The mean is logged with the last part, for as many rows as the whole batch has, so that means over an epoch are
    right too. Anything else (metrics, sums, maxima) is logged part by part, which comes to the same.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._wholes: dict[str, _Whole] = {}

    @contextmanager
    def part(self, weight: float, rows: int, is_last: bool) -> Iterator[None]:
        """The module is at a part of so many rows."""
        instance, own, log = self._module.__dict__, self._module.__dict__.get("log"), self._module.log
        instance["log"] = partial(self._note, log, weight, rows)
        try:
            yield
        finally:
            if own is None:
                del instance["log"]
            else:
                instance["log"] = own
        if is_last:
            for whole in self._wholes.values():
                whole.log(log)
            self._wholes.clear()

    def _note(self, log: Callable[..., None], weight: float, rows: int, *args: Any, **options: Any) -> None:
        call = inspect.signature(log).bind(*args, **options)
        value = call.arguments["value"]
        if not isinstance(value, Tensor | int | float) or call.arguments.get("reduce_fx", "mean") not in _MEANS:
            log(*args, **options)
            return
        whole = self._wholes.setdefault(call.arguments["name"], _Whole(call))
        whole.call = call
        whole.rows += call.arguments.get("batch_size") or rows
        if weight:  # else it may be a mean over nothing, which is no number
            whole.weighted = whole.weighted + weight * (value.detach() if isinstance(value, Tensor) else value)
            whole.weight += weight
