"""How many cards train together, and the one plan of theirs."""

import json
from pathlib import Path

import pytest
import tiny
import two_ranks

import memplan
from memplan.errors import UsageError
from memplan.world import least_share, odd_ranks, of_first, on_all, said_of

RANK = Path(__file__).with_name("world_rank.py")
BOUND_S = 120  # nothing may hang


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


def test_without_ranks_everything_is_its_own() -> None:
    assert (of_first(3), on_all(lambda: 4), odd_ranks("a"), least_share(lambda: 5)) == (3, 4, [], 1.0)


def test_a_plan_says_if_it_is_for_a_rank_with_less_memory() -> None:
    assert said_of(1.0) == ()
    assert said_of(0.75) == ("planned for 75.0% of the first rank's memory, which is what the rank with the least has",)


@pytest.mark.slow
def test_what_two_ranks_tell_each_other(tmp_path: Path) -> None:
    two_ranks.run(RANK, tmp_path, bound_s=BOUND_S)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for heard in (first, second):
        assert (heard["first"], heard["share"], heard["odd"], heard["alike"]) == ("from 0", 0.75, [1], [])
    assert (first["all"], second["all"]) == (0, 1)
    words = "the loader has no batch size"
    assert second["failed"] == f"UsageError: {words}"
    assert first["failed"].startswith("ModelFailed: rank 1 failed, and the others cannot go on without it. UsageError:")
    assert words in first["failed"]
