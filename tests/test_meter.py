"""What the allocator's record says about single operators: their workspaces, and nothing that they return."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memplan.meter import allocator_record, reachable_storages, survivors, workspaces_of

Prepared = Callable[[], Callable[[], object]]
KIB = 2**10


def floats(count: int) -> Tensor:
    return torch.ones(count)


def test_what_an_operation_returns_is_no_workspace() -> None:
    def prepare() -> Callable[[], object]:
        x = floats(KIB)
        return lambda: (x.exp(), x + x, [x.clone()])

    assert workspaces_of([prepare]) == [0]


def test_what_it_frees_again_is() -> None:
    def prepare() -> Callable[[], object]:
        x = floats(KIB)
        return lambda: x.exp().sum()  # 4 KiB gone, 4 bytes returned

    assert workspaces_of([prepare]) == [4 * KIB]


def test_the_largest_moment_counts() -> None:
    def operation() -> Tensor:
        one, two = floats(KIB), floats(2 * KIB)
        del one, two
        three = floats(5 * KIB)
        return three[:1].clone()

    (size,) = workspaces_of([lambda: operation])
    assert size == 5 * 4 * KIB


def test_operands_belong_to_nobody() -> None:
    def prepare() -> Callable[[], object]:
        x = floats(64 * KIB)
        return x.abs

    assert workspaces_of([prepare, prepare]) == [0, 0]


def test_the_scratch_inside_one_operator() -> None:
    """A sum of booleans is taken of a copy in int64; that of floats is not."""

    def booleans() -> Callable[[], object]:
        return torch.ones(KIB, dtype=torch.bool).sum

    assert workspaces_of([booleans, lambda: floats(KIB).sum]) == [8 * KIB, 0]


def test_none_given_none_found() -> None:
    assert workspaces_of([]) == []


def test_an_error_passes() -> None:
    def prepare() -> Callable[[], object]:
        return lambda: floats(2) + floats(3)

    with pytest.raises(RuntimeError, match="must match"):
        workspaces_of([prepare])


def test_the_record_is_in_order_and_signed() -> None:
    with allocator_record() as record:
        first = floats(KIB)
        second = floats(2 * KIB)
        del first
    assert [change for _, change in record] == [4 * KIB, 8 * KIB, -4 * KIB]
    assert survivors(record) == {second.data_ptr(): 8 * KIB}


def test_reachable_storages_know_a_gradient_without_an_object() -> None:
    weight = torch.nn.Parameter(floats(KIB))
    before = sum(reachable_storages().values())
    weight.sum().backward()
    assert sum(reachable_storages().values()) - before == 4 * KIB
