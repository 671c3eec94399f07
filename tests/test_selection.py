"""The frontier of what a block holds against what it runs again: against all subsets."""

from itertools import pairwise

import graphs as oracle
import pytest
from graphs import Priced, chain, graphs, points
from hypothesis import given, settings

from memplan.graph import BlockGraph
from memplan.selection import Selection, frontier, thinned

by_example = settings(max_examples=150, deadline=None)


def gaps(graph: BlockGraph, seconds: list[float]) -> list[str]:
    """Where the frontier is not the lower convex hull of all subsets, in words."""
    found = frontier(graph, seconds)
    possible = points(graph, seconds)
    wrong = [f"{s} is not what it says" for s in found if possible.get(tuple(sorted(s.dropped))) != s.point]
    fewest, least_s = min(possible.values()), min((s, held) for held, s in possible.values())
    if found[0].point != least_s[::-1]:
        wrong.append(f"{found[0]} is not the cheapest, which is {least_s[::-1]}")
    if found[-1].point != fewest:
        wrong.append(f"{found[-1]} does not hold the least, which is {fewest}")
    for left, right in pairwise(found):
        width, height = left.held_bytes - right.held_bytes, right.rerun_s - left.rerun_s
        for held, rerun_s in possible.values():
            if width * (rerun_s - left.rerun_s) < height * (left.held_bytes - held) - 1e-9 * width:
                wrong.append(f"({held}, {rerun_s}) is below the line between {left} and {right}")
    return wrong


@given(graphs())
@by_example
def test_the_frontier_is_the_convex_hull_of_all_subsets(priced: Priced) -> None:
    assert gaps(*priced) == []


@given(graphs())
@by_example
def test_it_falls_in_bytes_and_rises_in_seconds(priced: Priced) -> None:
    found = frontier(*priced)
    for left, right in pairwise(found):
        assert left.held_bytes > right.held_bytes
        assert left.rerun_s < right.rerun_s


@given(graphs())
@by_example
def test_thinning_keeps_the_ends_and_the_count(priced: Priced) -> None:
    found = frontier(*priced)
    for count in range(2, len(found) + 2):
        few = thinned(found, count)
        assert few[0] is found[0]
        assert few[-1] is found[-1]
        assert len(few) == min(count, len(found))
        assert [s for s in found if s in few] == few


def test_the_point_that_is_missed_least_goes_first() -> None:
    line = [Selection((), 100, 0.0), Selection((1,), 60, 1.0), Selection((2,), 50, 1.9), Selection((3,), 0, 9.0)]
    assert thinned(line, 3) == [line[0], line[1], line[3]]
    assert thinned(line, 1) == [line[0], line[3]]


def test_nothing_to_drop_is_one_point() -> None:
    assert frontier(chain((8, False)), [1.0]) == [Selection((), 0, 0.0)]


def test_what_costs_nothing_to_make_again_is_never_held() -> None:
    graph = chain((8, True), (4, True))
    assert [s.point for s in frontier(graph, [0.0, 0.0])] == [(0, 0.0)]
    assert [s.point for s in frontier(graph, [0.0, 3.0])] == [(4, 0.0), (0, 3.0)]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_unit_of_seconds_does_not_matter(scale: float) -> None:
    graph, seconds = chain((3, True), (9, True), (1, True), (40, True)), [5.0, 1.0, 8.0, 2.0]
    assert [s.dropped for s in frontier(graph, [scale * s for s in seconds])] == [
        s.dropped for s in frontier(graph, seconds)
    ]


def test_a_wrong_oracle_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read has to be made again too; an oracle that forgets it finds points below the frontier."""
    graph, seconds = chain((8, True), (8, False), (8, True)), [1.0, 2.0, 3.0]
    assert gaps(graph, seconds) == []
    monkeypatch.setattr(oracle, "closure", lambda graph, dropped: {graph.values[v].node for v in dropped})
    assert gaps(graph, seconds) != []
