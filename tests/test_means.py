from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from memplan.errors import UsageError
from memplan.means import rows_in


@dataclass
class Pair:
    name: str
    images: Tensor


@dataclass(slots=True)
class Slotted:
    kind: type
    images: Tensor


ROWS = torch.zeros(3, 5)


@pytest.mark.parametrize(
    "batch",
    [
        ROWS,
        (torch.tensor(1.0), ROWS),
        {"labels": ROWS},
        BatchEncoding({"input_ids": ROWS}),
        [BatchEncoding({"input_ids": ROWS})],
        Pair("x", ROWS),
        Slotted(Pair, ROWS),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_rows_are_counted_in_whatever_a_collator_returns(batch: Any) -> None:
    assert rows_in(batch) == 3


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(UsageError, match="a str in which no tensor is found"):
        rows_in("words")
