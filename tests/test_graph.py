"""What has to run again when saved values are dropped, against working it out by repetition."""

import pytest
from graphs import Priced, chain, closure, graphs, is_there, own_saved, subsets
from hypothesis import given, settings

from memplan.graph import BlockGraph, Node, Value

by_example = settings(max_examples=150, deadline=None)


@given(graphs())
@by_example
def test_the_reruns_are_the_closure(priced: Priced) -> None:
    graph, _ = priced
    for dropped in subsets(own_saved(graph)):
        wanted = closure(graph, dropped)
        if wanted is None:
            with pytest.raises(ValueError, match="cannot be run again"):
                graph.reruns(dropped)
        else:
            assert graph.reruns(dropped) == tuple(sorted(wanted))


@given(graphs())
@by_example
def test_a_value_can_be_dropped_if_and_only_if_it_can_be_alone(priced: Priced) -> None:
    graph, _ = priced
    assert graph.droppable == tuple(v for v in own_saved(graph) if closure(graph, {v}) is not None)


@given(graphs())
@by_example
def test_all_that_can_be_dropped_can_be_dropped_together(priced: Priced) -> None:
    graph, _ = priced
    assert set(graph.reruns(graph.droppable)) == closure(graph, graph.droppable)


@given(graphs())
@by_example
def test_dropping_more_never_runs_less(priced: Priced) -> None:
    graph, _ = priced
    for dropped in subsets(graph.droppable):
        for more in graph.droppable:
            assert set(graph.reruns(dropped)) <= set(graph.reruns({*dropped, more}))


@given(graphs())
@by_example
def test_parts_share_nothing_that_is_made_again(priced: Priced) -> None:
    graph, _ = priced
    for dropped in subsets(graph.droppable):
        parts = list(graph.parts(dropped))
        assert sorted(n for part in parts for n in part) == list(graph.reruns(dropped))
        for part in parts:
            made = {v for n in part for v in graph.nodes[n].writes}
            missing = {v for n in part for v in graph.nodes[n].reads if not is_there(graph, dropped, v)}
            assert missing <= made
            for value in made:
                readers = {n for n in graph.reruns(dropped) if value in graph.nodes[n].reads}
                assert readers <= set(part) or is_there(graph, dropped, value)


@given(graphs())
@by_example
def test_the_sources_and_what_is_made_are_all_that_is_read(priced: Priced) -> None:
    graph, _ = priced
    for dropped in subsets(graph.droppable):
        read = {v for n in graph.reruns(dropped) for v in graph.nodes[n].reads}
        assert set(graph.sources(dropped)) == {v for v in read if is_there(graph, dropped, v)}


def test_what_is_held_ends_the_chain() -> None:
    graph = chain((8, True), (8, False), (8, True), (8, True))
    assert graph.reruns({3}) == (1, 2)
    assert graph.sources({3}) == (1,)
    assert graph.reruns({3, 1}) == (0, 1, 2)
    assert list(graph.parts({1, 4})) == [(0,), (3,)]
    assert (graph.saved_bytes(), graph.saved_bytes({1, 4})) == (24, 8)


def test_values_by_their_names() -> None:
    graph = chain((1, True), (1, True))
    assert graph.named(["v1", "x"]) == (0, 2)
    with pytest.raises(KeyError, match="v9"):
        graph.named(["v9"])


def test_the_one_that_cannot_is_named() -> None:
    graph = BlockGraph((Value("v", 1, 0, True),), (Node("item", (), (0,), False),))
    with pytest.raises(ValueError, match="item cannot be run again"):
        graph.reruns({0})
