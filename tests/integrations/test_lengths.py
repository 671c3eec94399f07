"""The rows that need the most memory are found among all, where their lengths can be read."""

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from integrations.scripts import padded
from memplan.integrations.lengths import Lengths, lengths_in
from memplan.integrations.loaders import longest_batch

ROWS = 2000
LONG = {777: 30, 1501: 25}  # which 512 rows in even distances pass by


def length(at: int) -> int:
    return LONG.get(at, 3 + at % 5)


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": [1] * length(at)} for at in range(ROWS)]


KINDS: dict[str, Callable[[], Any]] = {
    "a list": rows,
    "datasets": lambda: datasets.Dataset.from_list(rows()),
    "datasets of tensors": lambda: datasets.Dataset.from_list(rows()).with_format("torch"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_of_all_rows(kind: str) -> None:
    def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return padded([{"input_ids": list(map(int, row["input_ids"]))} for row in some])

    sample, said = longest_batch(DataLoader(KINDS[kind](), batch_size=2, collate_fn=collate))
    assert said == "planned for a batch of the longest of 2,000 rows looked at, of 2,000"
    assert sample.content["input_ids"].shape == (2, 30)
    assert sample.content["attention_mask"].sum(1).tolist() == [30, 25]


def test_others_are_looked_at_in_even_distances() -> None:
    class Hidden(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, at: int) -> Any:
            return {"input_ids": [1] * length(at)}

    assert lengths_in(Hidden()) is None
    sample, said = longest_batch(DataLoader(Hidden(), batch_size=2, collate_fn=padded))
    assert "of the longest of 500 rows looked at, of 2,000" in said
    assert sample.content["input_ids"].shape == (2, 7)


def test_a_transform_s_rows_are_not_read() -> None:
    data = datasets.Dataset.from_list(rows()).with_transform(lambda some: {"input_ids": some["input_ids"]})
    assert lengths_in(data) is None


def test_labels_of_a_decoder_count_too() -> None:
    data = datasets.Dataset.from_list([{"input_ids": [1] * 5, "labels": [1] * n} for n in (2, 9, 4)])
    assert lengths_in(data) == Lengths([5, 5, 5], [2, 9, 4])
    assert lengths_in(data).longest(2) == [1, 2]  # type: ignore[union-attr]  # the last line says so


def test_rows_of_tensors_count_and_nested_ones_are_looked_at_by_others() -> None:
    ones = torch.ones(7, dtype=torch.int64)
    assert lengths_in([{"input_ids": ones, "labels": ones[:5]}]) == Lengths([7], [5])
    assert lengths_in([{"input_ids": ones[None]}]) is None
    assert lengths_in([{"input_ids": [[1, 2], [3]]}]) is None
    assert lengths_in(datasets.Dataset.from_dict({"input_ids": [[[1, 2], [3]]]})) is None


def test_a_data_set_of_another_kind_that_has_columns() -> None:
    class Table(torch.utils.data.Dataset[Any]):
        column_names = ("input_ids",)

    assert lengths_in(Table()) is None


def test_a_column_of_lengths_that_is_named() -> None:
    data = datasets.Dataset.from_dict({"input_ids": [[1], [1, 2]], "length": [7, 8]})
    assert lengths_in(data, "length").inputs == [7, 8]  # type: ignore[union-attr]  # it has one
    assert lengths_in(data).inputs == [1, 2]  # type: ignore[union-attr]  # as above
