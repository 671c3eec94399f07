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
    columns = getattr(data, "column_names", None)
    if isinstance(data, list | tuple) and data and all(isinstance(r, Mapping) and "input_ids" in r for r in data):
        inputs = [len(row["input_ids"]) for row in data]
        labels = [len(row["labels"]) if isinstance(row.get("labels"), list) else 0 for row in data]
        return Lengths(inputs, labels)
    if isinstance(data, IterableDataset) or not columns or data.format["type"] == "custom":  # a transform's rows
        return None
    found = (
        [int(n) for n in data[column]]
        if column is not None and column in columns
        else _column_lengths(data, "input_ids")
    )
    if not found:
        return None
    return Lengths(found, _column_lengths(data, "labels") or found)


def _column_lengths(data: Any, column: str) -> list[int] | None:
    """Of the lists in a column of a `datasets.Dataset`, by their offsets."""
    if column not in data.column_names:
        return None
    tables = data.select_columns(column).with_format("arrow").iter(batch_size=1000)
    chunks = [chunk for table in tables for chunk in table[column].chunks]
    if not all(hasattr(chunk, "value_lengths") for chunk in chunks):  # numbers: a class for each row
        return None
    return [n for chunk in chunks for n in chunk.value_lengths().to_pylist()]
