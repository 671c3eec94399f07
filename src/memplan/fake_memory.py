"""A small memory on the CPU: counts what operators allocate, refuses what is beyond a cap, and fails where it is told.

For dry runs and tests of what has to survive an out-of-memory error on a card, where there is no card.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memplan.units import format_bytes


class FakeMemory(TorchDispatchMode):
    """While entered, counts the storages that operators on this thread make and drop.

    A storage that an operator only reads is older than the mode: it is held from then on, and is no allocation. What
    operators take and give back inside is not seen.

    Attributes:
        cap_bytes: an operator after which more would be held raises torch.OutOfMemoryError; None: no limit. May be set
            between steps.
        fails_at: the number of the one allocation that raises whatever the cap, counted from 1 over the object's life.
        held_bytes, peak_bytes: in storages now, and at most since `reset_peak`.
        allocations: how many storages were made so far.
        events: (number of the storage, bytes) in time order, bytes negative when it is dropped.
    """

    def __init__(self, cap_bytes: int | None = None, fails_at: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.cap_bytes = cap_bytes
        self.fails_at = fails_at
        self.held_bytes = 0
        self.peak_bytes = 0
        self.allocations = 0
        self.events: list[tuple[int, int]] = []
        self._held: dict[int, weakref.ref[Any]] = {}  # address of the storage's record -> itself
        self._numbers = 0

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def reset_peak(self) -> None:
        self.peak_bytes = self.held_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._hold(tensor)
        made = func(*args, **kwargs)
        for tensor in _tensors(made):
            if self._hold(tensor):
                self.allocations += 1
                self._refuse(tensor.untyped_storage().nbytes())
        return made

    def _hold(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage was not known."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or not size:
            return False
        self._numbers += 1
        self._held[key] = weakref.ref(storage, self._death_of(key, self._numbers, size))
        self._book(self._numbers, size)
        return True

    def _death_of(self, key: int, number: int, size: int) -> Callable[[object], None]:
        def died(_: object) -> None:
            self._held.pop(key, None)
            self._book(number, -size)

        return died

    def _book(self, number: int, change: int) -> None:
        self.events.append((number, change))
        self.held_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _refuse(self, size: int) -> None:
        if self.allocations == self.fails_at:
            why = f"allocation {self.allocations} was told to fail"
        elif self.cap_bytes is not None and self.held_bytes > self.cap_bytes:
            why = f"the cap is {format_bytes(self.cap_bytes)}"
        else:
            return
        raise torch.OutOfMemoryError(
            f"fake device out of memory. Tried to allocate {format_bytes(size)} beside "
            f"{format_bytes(self.held_bytes - size)}: {why}"
        )


def _tensors(tree: object) -> list[Tensor]:
    """The plain tensors in arguments or results."""
    found = (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
    return [tensor for tensor in found if tensor.layout is torch.strided]
