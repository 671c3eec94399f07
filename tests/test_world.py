"""How many cards train together, and the one plan of theirs."""

import pytest
import tiny

import memplan
from memplan.errors import UsageError


@pytest.mark.parametrize("wrong", [{"shards": 0}, {"replicas": 1.5}])
def test_no_such_world(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="has to be a whole number and at least 1"):
        memplan.World(**wrong)


def test_a_card_by_itself_agrees_with_itself() -> None:
    model, batch = tiny.llama()
    plan = memplan.World().agreed(lambda: memplan.plan(model, "cpu:1GiB", sample=batch))
    assert plan.verdict == "fits"


def test_a_plan_for_more_cards_than_there_are_ranks_is_refused() -> None:
    def make() -> memplan.Plan:
        raise AssertionError("nothing is planned")

    with pytest.raises(UsageError, match="is 4 cards, but the process group has 1 ranks"):
        memplan.World(replicas=2, shards=2).agreed(make)


def test_several_ranks_are_fitted_where_they_run() -> None:
    model, batch = tiny.llama()
    with pytest.raises(UsageError, match=r"Start one process for each .* after init_process_group"):
        memplan.autofit(model, "cpu:1GiB", sample=batch, world=memplan.World(replicas=2))
