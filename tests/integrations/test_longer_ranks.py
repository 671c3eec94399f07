"""Two processes over gloo, of which one has longer rows than the other: one plan, for the longer ones."""

from pathlib import Path
from typing import Any

import pytest
import two_ranks

import memplan
from integrations import longer_rank, trainers

pytestmark = pytest.mark.slow

RANK = Path(__file__).with_name("longer_rank.py")
BOUND_S = 400  # nothing may hang
FROM_SECOND = "planned for the batch of rank 1, whose rows are the largest: "

Came = list[dict[str, Any]]


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> Came:
    """What each rank has come to."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks.heard(RANK, folder, bound_s=BOUND_S)


def plan_of(came: Came, name: str) -> memplan.Plan:
    """The one that both have."""
    first, second = (memplan.Plan.model_validate(own[name]) for own in came)
    assert first == second
    return first


def tokens(plan: memplan.Plan) -> int:
    ((length,),) = {field.shape for field in plan.sample}
    return length


LONGER, SHORTER = (max(trainers.lengths(longer_rank.ROWS, longest)) for longest in reversed(longer_rank.LONGEST))


@pytest.mark.parametrize("name", ["attached", "trained"])
def test_the_longest_rows_are_planned_for(came: Came, name: str) -> None:
    plan = plan_of(came, name)
    assert tokens(plan) == LONGER > SHORTER
    words = f"{FROM_SECOND}{24 * LONGER} B each, on the first rank {24 * SHORTER} B"  # ids, labels, mask
    assert words in plan.assumptions
    assert "the worst batch that can come" not in " ".join(plan.assumptions)  # of the first rank's data


def test_of_the_first_ranks_own_nothing_is_said(came: Came) -> None:
    plan = plan_of(came, "shown")
    assert tokens(plan) == max(trainers.lengths(4, longer_rank.LONGEST[1]))
    assert "planned for the batch" not in " ".join(plan.assumptions)


def test_a_plan_of_a_file_is_for_no_batch_of_the_run(came: Came) -> None:
    assert "planned for" not in " ".join(plan_of(came, "file").assumptions)


def test_an_error_before_is_everybodys(came: Came) -> None:
    first, second = (own["failed"] for own in came)
    assert second == "OutOfMemoryError: CUDA out of memory"
    assert first.startswith("ModelFailed: rank 1 failed, and the others cannot go on without it. OutOfMemoryError:")
