"""How many tokens the rows of a data set have, where reading that takes no work on the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Any

from torch.utils.data import IterableDataset


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every row, and of its labels, which may be others (of a decoder)."""

    inputs: Sequence[int]
    labels: Sequence[int]

    def chosen(self) -> tuple[int, int, int]:
        """The rows with the longest inputs, the longest labels, and the shortest inputs."""
        places = range(len(self.inputs))
        longest = (max(places, key=lengths.__getitem__) for lengths in (self.inputs, self.labels))
        return (*longest, min(places, key=self.inputs.__getitem__))  # type: ignore[return-value]  # three

    def longest(self, count: int) -> list[int]:
        """So many rows, those with the most tokens and labels first."""
        return nlargest(count, range(len(self.inputs)), key=lambda at: self.inputs[at] + self.labels[at])


def lengths_in(data: Any, column: str | None = None) -> Lengths | None:
    """From the token ids (`input_ids`) of a `datasets.Dataset` or a list of rows; else None.

    Args:
        column: that has lengths, if there is one.
    """
    if isinstance(data, list | tuple) and data and all(isinstance(row, Mapping) and "input_ids" in row for row in data):
        inputs = [_length(row["input_ids"]) for row in data]
        if None in inputs:
            return None
        return Lengths(inputs, [_length(row.get("labels")) or 0 for row in data])  # type: ignore[arg-type]  # no None is in it
    columns, form = getattr(data, "column_names", None), getattr(data, "format", None)
    if isinstance(data, IterableDataset) or not columns or form is None:
        return None
    if form["type"] == "custom":  # a transform makes the rows
        return None
    named = column is not None and column in columns
    found = [int(n) for n in data[column]] if named else _column_lengths(data, "input_ids")
    if not found:
        return None
    return Lengths(found, _column_lengths(data, "labels") or found)


def _length(row: Any) -> int | None:
    """Of a list of numbers, or a tensor or array of one dimension."""
    if isinstance(row, list | tuple):
        return None if row and isinstance(row[0], list | tuple) else len(row)
    return len(row) if getattr(row, "ndim", None) == 1 else None


def _column_lengths(data: Any, column: str) -> list[int] | None:
    """Of the lists in a column of a `datasets.Dataset`, by their offsets."""
    if column not in data.column_names:
        return None
    tables = data.select_columns(column).with_format("arrow").iter(batch_size=1000)
    chunks = [chunk for table in tables for chunk in table[column].chunks]
    if not all(hasattr(chunk, "value_lengths") for chunk in chunks):  # numbers: a class for each row
        return None
    if any(hasattr(chunk.values, "value_lengths") for chunk in chunks):  # lists of lists
        return None
    return [n for chunk in chunks for n in chunk.value_lengths().to_pylist()]
