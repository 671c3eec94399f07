"""DataLoaders whose batches are cut: the same samples in the same order, and the user's own object untouched."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from memplan.errors import UsageError
from memplan.integrations.lengths import lengths_in
from memplan.samples import Sample

_LOOKED_AT: Final = 512  # rows of a data set, to find the longest: enough to see its long ones, quick to read
_KEPT: Final = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "generator",
    "pin_memory_device",
)
_OF_WORKERS: Final = ("multiprocessing_context", "prefetch_factor", "persistent_workers", "in_order")


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Rows of its batches.

    Raises:
        UsageError: it makes no batches, or not by a number of rows, so that they cannot be split.
    """
    if isinstance(loader.sampler, BatchSampler):
        raise UsageError(
            "the loader's sampler makes the batches (sampler=BatchSampler(...)): pass it as batch_sampler="
        )
    size = loader.batch_size
    if size is None and loader.batch_sampler is not None:
        size = getattr(loader.batch_sampler, "batch_size", None)
        if type(size) is not int:
            raise UsageError(
                f"the loader's {type(loader.batch_sampler).__name__} has no batch_size, so its batches are made by "
                "something else than a number of rows, such as tokens: they cannot be split. Use a sampler with a "
                "batch_size, or plan by hand with memplan.autofit(model, sample=...)."
            )
    if size is None:
        raise UsageError(
            "the loader has batch_size=None: its data set makes the batches, so they cannot be split. Give the loader "
            "a batch_size, or plan by hand with memplan.autofit(model, sample=...)."
        )
    return size


class MicroBatches(BatchSampler):
    """The batches of another sampler, those of each step joined and cut into micro-batches.

    Whatever deals batches out to several processes goes on dealing out the same ones.
    """

    def __init__(self, batches: Any, own_batches: int, micro_batch: int) -> None:
        self.batch_sampler, self.own_batches, self.batch_size = batches, own_batches, micro_batch
        self.drop_last = getattr(batches, "drop_last", False)

    def __iter__(self) -> Iterator[list[Any]]:
        batches = self._whole()
        while own := list(islice(batches, self.own_batches)):
            rows = [row for batch in own for row in batch]
            for at in range(0, len(rows), self.batch_size):
                yield rows[at : at + self.batch_size]

    def _whole(self) -> Iterator[list[Any]]:
        """The other sampler's batches. Raises UsageError behind one of another size that is not the last."""
        size = odd = 0
        for batch in self.batch_sampler:
            if odd:
                raise UsageError(
                    f"the {type(self._innermost).__name__} made a batch of {odd} rows among those of {size}, as "
                    "samplers by length do, and steps would be cut elsewhere than by its own. Fix the script's own "
                    "batch with micro_batch=, or make all batches but the last of one size."
                )
            size = size or len(batch)
            odd = len(batch) if len(batch) != size else 0
            yield batch

    def __len__(self) -> int:
        """Exact for samplers that count as torch's own does; for others as if all their batches were whole, as
        Accelerate makes them."""
        inner, shared = self.batch_sampler, getattr(self.batch_sampler, "split_batches", False)
        size: int = inner.batch_size // (inner.num_processes if shared else 1)
        rows = len(inner) * size
        dealt = getattr(inner, "sampler", None)  # Accelerate's own has none
        if isinstance(dealt, Sized) and not self.drop_last and len(inner) == -(-len(dealt) // size):
            rows = len(dealt)
        step = self.own_batches * size
        whole, left = divmod(rows, step)
        return whole * -(-step // self.batch_size) - (-left // self.batch_size)

    @property
    def set_epoch(self) -> Callable[[int], None]:
        """The other sampler's, if it has one."""
        found: Callable[[int], None] = self.batch_sampler.set_epoch
        return found

    @property
    def sampler(self) -> Any:
        """Of single rows: the innermost."""
        return self._innermost.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self._innermost.sampler = sampler

    @property
    def _innermost(self) -> Any:
        inner = self.batch_sampler
        while hasattr(inner, "batch_sampler"):
            inner = inner.batch_sampler
        return inner


def cut(loader: DataLoader[Any], own_batches: int, micro_batch: int) -> DataLoader[Any]:
    """A loader like this one whose batches are cut: the same sampler, generator, worker settings and collator.

    Args:
        own_batches: of the loader in a step; they are joined before they are cut.

    Raises:
        UsageError: its class takes arguments that it does not keep as attributes.
    """
    arguments: dict[str, Any] = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    if loader.num_workers:
        arguments |= {name: getattr(loader, name) for name in _OF_WORKERS if hasattr(loader, name)}
    if isinstance(loader.dataset, IterableDataset):
        arguments |= {"batch_size": micro_batch, "drop_last": loader.drop_last}
    else:
        arguments["batch_sampler"] = MicroBatches(loader.batch_sampler, own_batches, micro_batch)
    try:
        return type(loader)(loader.dataset, **arguments)
    except TypeError as error:
        raise UsageError(
            f"cannot make another {type(loader).__name__} with batches of {micro_batch}: {error}. Use a plain "
            "DataLoader, or make it yourself with the plan's micro-batch (memplan.plan)."
        ) from error


def may_be_joined(loader: DataLoader[Any]) -> bool:
    """Whether batches of several of the loader's own leave out no other rows: of a stream with drop_last they would."""
    return not (isinstance(loader.dataset, IterableDataset) and loader.drop_last)


def is_cut_by_workers(loader: DataLoader[Any]) -> bool:
    """Whether several processes make batches of parts of a stream, each its own: then cut batches are of other rows."""
    return isinstance(loader.dataset, IterableDataset) and loader.num_workers > 1


def longest_batch(loader: DataLoader[Any]) -> tuple[Sample, str]:
    """A batch of the longest rows that were found, and a sentence that says how it was found.

    Of a data set that says how long its rows are, all are looked at; of another one that can be indexed, up to 512 rows
    in even distances; of a stream, its first batch is taken. The random state and the loader stay as they were.

    Raises:
        UsageError: a stream that can be read once only, or none that has rows.
    """
    size, collate, data = batch_size_of(loader), loader.collate_fn, loader.dataset
    with same_chance():
        if isinstance(data, IterableDataset):
            stream: object = iter(data)
            if stream is data:
                raise UsageError(
                    "the data set is a stream that can be read once, so no batch can be looked at before training. "
                    "Pass one: sample=..."
                )
            rows = list(islice(data, size))
            said = f"planned for {len(rows)} rows like the first of the stream; longer ones need more"
        else:
            if not isinstance(data, Sized):
                raise UsageError(
                    f"the data set, a {type(data).__name__}, does not say how many rows it has (no __len__), so no "
                    "batch can be made of its longest. Pass one: sample=..."
                )
            rows, looked_at = _longest(data, size)
            said = f"planned for a batch of the longest of {looked_at:,} rows looked at, of {len(data):,}"
        if not rows:
            raise UsageError("the data set has no rows, so there is nothing to train on")
        return collated(collate, rows), said


def _longest(data: Any, size: int) -> tuple[list[Any], int]:
    """So many of its longest rows, and how many were looked at."""
    count = len(data)
    lengths = lengths_in(data)
    if lengths is not None:
        return [row for _, row in _rows(data, lengths.longest(size))], count
    looked_at = range(0, count, -(-count // _LOOKED_AT)) if count else range(0)
    found = sorted(((row, at) for at, row in _rows(data, looked_at)), key=lambda r: (-_elements(r[0]), r[1]))
    return [row for row, _ in found[:size]], len(found)


def _rows(data: Any, places: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Rows of a data set with their places. Raises UsageError where those are not 0, 1, 2 and so on."""
    for at in places:
        try:
            yield at, data[at]
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(
                f"the data set, a {type(data).__name__}, has no row {at} ({type(error).__name__}: {error}), as one "
                "whose sampler gives it keys, so no batch can be made of its longest. Pass one: sample=..."
            ) from error


def collated(collate: Callable[[Any], Any], rows: Sequence[Any]) -> Sample:
    """The batch that a collator makes of rows. Raises UsageError where it has more rows than were put in."""
    sample = Sample.of(collate(rows))
    if sample.batch_size > len(rows):
        raise UsageError(
            f"the collator makes {sample.batch_size} rows of {len(rows)}, as those of preference pairs do, and a plan "
            "would be for as many as it is given. Make them in the data set or in the model, or plan by hand: "
            "memplan.plan(model, sample=...)."
        )
    return sample


def _elements(row: Any) -> int:
    """How much a row holds: elements of tensors and arrays, members of lists of numbers."""
    if isinstance(row, torch.Tensor):
        return row.numel()
    if isinstance(row, np.ndarray):
        return row.size
    if isinstance(row, dict):
        return sum(map(_elements, row.values()))
    if isinstance(row, list | tuple):
        return sum(map(_elements, row))
    return len(row) if isinstance(row, str) else 1


@contextmanager
def same_chance() -> Iterator[None]:
    """Random numbers of Python, numpy and torch go on afterwards as if none had been drawn."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # rows are made on the CPU
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
