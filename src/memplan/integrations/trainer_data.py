"""The batch that a trainer's run needs the most memory for, made of its own rows by its own collator.

Nothing of the run is used up: rows are read by their number, and the random state is as it was. Where the lengths of
all rows can be read off a column, the batch has the longest of them, and the shortest, so that there is padding if any
comes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from memplan.data import Data
from memplan.errors import UsageError
from memplan.integrations.lengths import Lengths, lengths_in
from memplan.integrations.loaders import batch_size_of, collated, same_chance
from memplan.samples import Sample
from memplan.world import largest

_UNKNOWN_ROWS: Final = 16  # are enough to see what a batch is like, where nothing says which rows are long


@dataclass(frozen=True, slots=True)
class Rows:
    """What comes in a run.

    Attributes:
        sample: what the collator made of some rows; of rows that it joins, of one.
        pair: what it made of two rows, of different lengths where there are any, and of each of them.
        is_joined: rows are joined to one without padding (`padding_free`, packing).
        data: the lengths of all rows, where they are known and are those of the sample.
        said: what has to be assumed about rows that were not seen, else nothing.
    """

    sample: Sample
    pair: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
    is_joined: bool
    data: Data | None
    said: tuple[str, ...]

    def of_all(self) -> "Rows":
        """The same, with the largest sample of all ranks and what is said of it. To be called on every rank."""
        sample, said = largest(self.sample, *self.said)
        return replace(self, sample=sample, data=self.data if sample is self.sample else None, said=said)


def rows_of(trainer: Any) -> Rows:
    """The longest rows of a trainer's data, collated.

    Raises:
        UsageError: no training data, a stream that can be read once only, a loader without data set and collator, or
            one of a subclass whose batches have another size than the arguments say.
        BadSample: the collator makes something else than tensors whose first dimension is the batch.
    """
    with same_chance(), _loader_of(trainer) as loader:
        lengths = lengths_in(trainer.train_dataset, getattr(trainer.args, "length_column_name", "length"))
        rows = _chosen(loader.dataset, lengths, trainer.args.per_device_train_batch_size)
        first, last = rows[0], rows[-1]
        collate = loader.collate_fn
        both = dict(collate([first, last]))
        is_joined = "position_ids" in both and both["position_ids"].shape[0] == 1
        if is_joined:
            pair = both, dict(collate([first])), dict(collate([last]))
            sample = Sample.of({name: pair[1][name] for name in _tokens(pair[1])})
        else:
            pair = both, _part(both, 0), _part(both, 1)
            sample = collated(lambda some: dict(collate(some)), rows)
    data = None if lengths is None else _data(trainer, lengths)
    seen = max((t.shape[1] for t in sample.tensors() if t.dim() == 2), default=0)
    if data is not None and data.tokens == seen:
        return Rows(sample, pair, is_joined, data, ())
    said = f"batches are like that of {len(rows)} rows of the data set, of which the longest has {seen:,} tokens"
    if not seen:
        said = f"batches are like that of {len(rows)} rows of the data set"
    why = "" if lengths is None else f"; its column of lengths says {data.tokens:,}" if data is not None else ""
    return Rows(sample, pair, is_joined, None, (said + (why or "; nothing says how long the others are"),))


def joined(batch: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Any]:
    """Rows [b, tokens] as one row [1, b x tokens], with the borders of sequences that the collator states for it.

    Args:
        like: what the collator made of one row.
    """
    made: dict[str, Any] = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    places = made["position_ids"][0]
    borders = torch.cat([(places == 0).nonzero().flatten(), places.new_tensor([len(places)])]).to(torch.int32)
    lengths = borders.diff()
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=places.device)
    stated = {
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders),
        **dict.fromkeys(("max_length_q", "max_length_k"), int(lengths.max())),
        "seq_idx": torch.repeat_interleave(numbers, lengths)[None],
    }
    return {**made, **{name: value for name, value in stated.items() if name in like}}


@contextmanager
def _loader_of(trainer: Any) -> Iterator[Any]:
    """The loader that the run will make, to be looked at. The trainer and Accelerate, which keep notes, forget it."""
    if trainer.train_dataset is None:
        raise UsageError("the trainer has no train_dataset, so there is no batch to plan for. Pass it one.")
    before, kept = dict(vars(trainer)), list(trainer.accelerator._dataloaders)
    try:
        loader = trainer.get_train_dataloader()
        if not (hasattr(loader, "dataset") and hasattr(loader, "collate_fn")):
            raise UsageError(
                f"the trainer's loader is a {type(loader).__name__} without dataset and collate_fn, so no batch can be "
                "made before training. Use a DataLoader, or plan by hand: memplan.autofit(model, sample=...)."
            )
        _check_follows(trainer, loader)
        yield loader
    finally:
        trainer.accelerator._dataloaders[:] = kept
        vars(trainer).clear()
        vars(trainer).update(before)


def _check_follows(trainer: Any, loader: Any) -> None:
    """That batches of the run will have as many rows as a plan says, also where a subclass makes the loader."""
    makers = ("get_train_dataloader", "_get_dataloader")
    if all(getattr(type(trainer), n) is getattr(Trainer, n) and n not in vars(trainer) for n in makers):
        return
    args, rows = trainer.args, trainer.args.per_device_train_batch_size
    found = [batch_size_of(loader)]
    try:
        args.per_device_train_batch_size = trainer._train_batch_size = rows + 1
        found.append(batch_size_of(trainer.get_train_dataloader()))
    finally:
        args.per_device_train_batch_size = rows  # of the trainer all is put back
    if found != [rows, rows + 1]:
        raise UsageError(
            f"{type(trainer).__name__} makes a training loader of its own, whose batches do not follow "
            f"per_device_train_batch_size: asked for {rows} and {rows + 1} it makes {found[0]} and {found[1]} rows, so "
            "that a plan for another micro-batch would train something else. Have it use self._train_batch_size."
        )


def _chosen(data: Any, lengths: Lengths | None, batch: int) -> list[Any]:
    """At least two rows, the longest first and the shortest last."""
    if isinstance(data, IterableDataset):
        stream = iter(data)
        if stream is data:
            raise UsageError(
                "the data is a stream that can be read once, so no batch can be looked at without using it up. Give "
                "the trainer a data set with rows by number, or plan by hand: memplan.autofit(model, sample=...)."
            )
        rows = list(islice(stream, min(batch, _UNKNOWN_ROWS)))
    elif lengths is not None:
        rows = [data[at] for at in dict.fromkeys(lengths.chosen())]
    else:
        rows = [data[at] for at in range(min(len(data), batch, _UNKNOWN_ROWS))]
    if not rows:
        raise UsageError("the trainer's train_dataset has no rows, so there is nothing to train on")
    return rows if len(rows) > 1 else rows * 2


def _data(trainer: Any, lengths: Lengths) -> Data:
    args = trainer.args
    packed_to = max(lengths.inputs) if getattr(args, "packing", False) else None
    multiple = getattr(trainer.data_collator, "pad_to_multiple_of", None) or 1
    shuffled = getattr(args, "train_sampling_strategy", "random") != "sequential"
    return Data(lengths.inputs, shuffled=shuffled, packed_to=packed_to, multiple_of=multiple)


def _tokens(batch: Mapping[str, Any]) -> list[str]:
    """What a joined batch has for every token, but for what follows from the positions."""
    return [name for name, t in batch.items() if isinstance(t, Tensor) and t.dim() == 2 and name != "seq_idx"]


def _part(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch of two."""
    rows = slice(row, row + 1)
    return {n: v[rows] if isinstance(v, Tensor) and v.dim() and len(v) == 2 else v for n, v in batch.items()}
