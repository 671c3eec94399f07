"""How many cards train together, and the one plan of theirs."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import two_ranks
import world_rank
from guarding import texts
from torch.distributed.fsdp import MixedPrecisionPolicy

import memplan
from memplan.errors import PlanMismatch, UsageError
from memplan.samples import Sample
from memplan.world import Rooms, largest, odd_ranks, of_first, on_all, rooms_of_all

RANK = Path(__file__).with_name("world_rank.py")
BOUND_S = 240  # nothing may hang

Heard = list[dict[str, Any]]


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    """What each of two ranks has heard."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks.heard(RANK, folder, bound_s=BOUND_S)


@pytest.mark.parametrize("wrong", [{"shards": 0}, {"replicas": 1.5}])
def test_no_such_world(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="has to be a whole number and at least 1"):
        memplan.World(**wrong)


@pytest.mark.parametrize(
    ("mp_policy", "words"), [(torch.bfloat16, "mp_policy is a dtype"), (MixedPrecisionPolicy(), "has shards=1")]
)
def test_a_policy_is_that_of_fsdp2_and_needs_shards(mp_policy: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        memplan.World(mp_policy=mp_policy)


@pytest.mark.slow
def test_classes_of_lengths_are_the_same_on_all(heard: Heard) -> None:
    first, second = (found["by length"] for found in heard)
    assert first == second
    (short, less), (long, most) = first["needs"]["16"][0], first["needs"]["64"][0]
    assert (short, long) == (16, 64)
    assert less < most
    assert first["in force"] == [16, 64, 16]


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


@pytest.mark.parametrize("world", [memplan.World(replicas=2), memplan.World(shards=4)])
def test_a_plan_for_a_cluster_is_not_applied_by_a_process_alone(world: memplan.World) -> None:
    model, batch = tiny.llama()
    plan = memplan.plan(model, "cpu:1GiB", sample=batch, world=world)
    with pytest.raises(PlanMismatch, match=f"one of {world.cards} cards, World.* and this process trains alone"):
        memplan.apply(model, plan)
    memplan.apply(model, plan.model_copy(update={"replicas": 1, "shards": 1})).undo()


def test_without_ranks_everything_is_its_own() -> None:
    assert (of_first(3), on_all(lambda: 4), odd_ranks("a"), rooms_of_all(lambda: 5)) == (3, 4, [], Rooms())
    sample = Sample.of(tiny.tokens(2, 3))
    assert largest(sample, "it is long") == (sample, ("it is long",))


def test_a_plan_says_if_it_is_for_a_rank_with_less_memory() -> None:
    assert Rooms().said() == Rooms(most=1.01).said() == ()
    less, more = Rooms(least=0.75, most=2.0), Rooms(most=2.0)
    assert (less.share, more.share) == (0.75, 1.0)
    (words,) = less.said()
    assert words == "planned for 75.0% of the first rank's memory, which is what the rank with the least has"
    assert more.said() == ("planned for the first rank's memory, which is the least; another rank has 200.0% of it",)


@pytest.mark.slow
def test_what_two_ranks_tell_each_other(heard: Heard) -> None:
    first, second = heard
    for own in heard:
        assert (own["first"], own["least"], own["odd"], own["alike"]) == ("from 0", 0.75, [1], [])
    assert (first["all"], second["all"]) == (0, 1)
    words = "the loader has no batch size"
    assert second["failed"] == f"UsageError: {words}"
    assert first["failed"].startswith("ModelFailed: rank 1 failed, and the others cannot go on without it. UsageError:")
    assert words in first["failed"]


@pytest.mark.slow
def test_the_largest_sample_is_sent_as_it_is(heard: Heard) -> None:
    """By its rows, of which the first rank has more."""
    for own in heard:
        found = own["samples"]
        assert found["ids"] == [list(range(100, 116))]
        assert found["mask"] == [[n > 110 for n in range(100, 116)]]
        assert found["dtypes"] == ["torch.int64", "torch.bool", "torch.float32"]
        assert found["others"] is False
        assert found["said"][0] == "seen on rank 1"
        words = "planned for the batch of rank 1, whose rows are the largest: 144 B each, on the first rank 72 B"
        assert found["said"][1:] == [words]


@pytest.mark.slow
def test_of_equal_samples_none_is_sent(heard: Heard) -> None:
    for own in heard:
        assert own["samples"]["alike"] == [True, ["seen on rank 0"]]


@pytest.mark.slow
def test_a_sample_that_cannot_be_sent_is_everybodys_error(heard: Heard) -> None:
    first, second = (own["samples"]["unsent"] for own in heard)
    assert second.startswith("BadSample: the sample of this rank is the largest, and cannot be sent to the first")
    assert first.startswith("ModelFailed: rank 1 failed, and the others cannot go on without it. BadSample:")


@pytest.mark.slow
def test_one_plan_is_for_the_rank_with_the_longest_rows(heard: Heard) -> None:
    plans = [memplan.Plan.model_validate(own["fitted"]["plan"]) for own in heard]
    assert plans[0] == plans[1]
    sample = world_rank.ids(world_rank.LONG)
    alone = memplan.plan(texts(False), "cpu:1GiB", sample=sample, world=world_rank.WORLD, **world_rank.SIZES)
    assert not alone.changed
    assert plans[0].peak_bytes == alone.peak_bytes
    assert plans[0].sample == alone.sample
    assert "planned for the batch of rank 1, whose rows are the largest" in " ".join(plans[0].assumptions)


@pytest.mark.slow
def test_of_data_that_the_sample_is_not_of_nothing_is_said(heard: Heard) -> None:
    for own in heard:
        shape, said = own["fitted"]["told"]
        words = " ".join(said)
        assert shape == [world_rank.LONG]
        assert "planned for the batch of rank 1" in words
        assert "the worst batch that can come" not in words


@pytest.mark.slow
def test_a_bad_sample_of_one_rank_is_everybodys_error(heard: Heard) -> None:
    first, second = (own["fitted"]["refused"] for own in heard)
    assert second.startswith("BadSample: a sample is a dict, a tuple or a tensor, got str")
    assert first.startswith("ModelFailed: rank 1 failed, and the others cannot go on without it. BadSample:")


@pytest.mark.slow
def test_the_plan_is_for_the_rank_with_the_least_memory(heard: Heard) -> None:
    for own in heard:
        assert own["unequal"]["budget"] == pytest.approx(0.75 * 2**30, rel=1e-3)
        assert any("75.0% of the first rank's memory" in line for line in own["unequal"]["said"])


@pytest.mark.slow
def test_ranks_with_other_models_are_refused_on_both(heard: Heard) -> None:
    for own in heard:
        assert own["unequal"]["other model"].startswith("PlanMismatch: ranks 1 have another model than rank 0")


@pytest.mark.slow
def test_memory_that_is_taken_on_one_rank_is_everybodys_error_and_no_model_runs_by_the_plan(heard: Heard) -> None:
    first, second = (own["taken"] for own in heard)
    assert second["for good"].startswith("MemoryTaken: of 24 GiB only 3 are free")
    assert first["for good"].startswith("ModelFailed: rank 1 failed, and the others cannot go on without it. MemoryTak")


@pytest.mark.slow
def test_where_memory_was_taken_on_one_rank_all_plan_again(heard: Heard) -> None:
    for own in heard:
        assert own["taken"]["for a moment"] == "none: None"
        assert own["taken"]["tries"] == 2


@pytest.mark.slow
def test_a_guards_ladder_is_agreed_on(heard: Heard) -> None:
    needs = heard[0]["ladder"]["needs"]
    assert needs == heard[1]["ladder"]["needs"]
    assert len(needs) > 1
    assert needs == sorted(set(needs), reverse=True)
    assert heard[0]["ladder"]["changed"] == heard[1]["ladder"]["changed"] > 0
