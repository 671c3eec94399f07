"""Which of its saved values a block should drop: the frontier of bytes held against seconds of running again.

For a price of a byte, in seconds, the best set to drop is a minimum cut. Let a node be on the far side if it runs again
in the backward, and a value if the backward needs it there. Then

    source -> node     costs the node's seconds, if it runs again; without end, if it cannot
    node -> value      costs the value's bytes x price, if it is needed and its node does not run again: it is held.
                       Without end for what autograd does not save: nobody would hold it
    value -> node      without end: what a rerun node reads is needed
    value -> sink      without end: what autograd saves is needed

(as torch.compile cuts its joint graph, here over the operators of an eager block).
Sweeping the price gives every vertex of the lower convex hull: Eisner and Severance, JACM 23 (1976).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from memplan.graph import BlockGraph

_FINEST = 10**15  # capacities are integers, so that the cut is exact: shares of the whole block's cost


@dataclass(frozen=True, slots=True)
class Selection:
    """A set of saved values to drop."""

    dropped: tuple[int, ...]  # indices into the graph's values
    held_bytes: int  # what autograd still holds of the block's own
    rerun_s: float  # running again what that takes

    @property
    def point(self) -> tuple[int, float]:
        return self.held_bytes, self.rerun_s


def frontier(graph: BlockGraph, node_s: Sequence[float]) -> list[Selection]:
    """The convex frontier from dropping nothing to dropping all that can be, ascending in seconds.

    Args:
        node_s: seconds of running each node again.
    """
    nothing, all_of_it = _selection(graph, node_s, ()), _selection(graph, node_s, graph.droppable)
    if not graph.droppable:
        return [nothing]
    least = _best(graph, node_s, _price_above_all(graph, node_s))
    ends = [nothing, least if least.point < all_of_it.point else all_of_it]
    found = {selection.dropped: selection for selection in [*ends, *_between(graph, node_s, *ends)]}
    return _pareto(list(found.values()))


def thinned(selections: Sequence[Selection], count: int) -> list[Selection]:
    """At most `count` of a frontier, both ends among them; those go first whose loss is missed least.

    What is missed without a point is how far the line between its neighbours passes above it, in seconds.
    """
    kept = list(selections)
    while len(kept) > max(count, 2):
        del kept[min(range(1, len(kept) - 1), key=lambda i: _missed(*kept[i - 1 : i + 2]))]
    return kept


def _missed(left: Selection, point: Selection, right: Selection) -> float:
    across = (left.held_bytes - point.held_bytes) / (left.held_bytes - right.held_bytes)
    return left.rerun_s + across * (right.rerun_s - left.rerun_s) - point.rerun_s


def _between(graph: BlockGraph, node_s: Sequence[float], left: Selection, right: Selection) -> list[Selection]:
    """The vertices strictly below the line between two."""
    if left.held_bytes <= right.held_bytes:
        return []
    price = (right.rerun_s - left.rerun_s) / (left.held_bytes - right.held_bytes)
    found = _best(graph, node_s, price)
    if found.dropped in (left.dropped, right.dropped):
        return []
    cost = [s.rerun_s + price * s.held_bytes for s in (left, found)]
    if cost[1] >= cost[0] * (1 - 1e-9):
        return []
    return [*_between(graph, node_s, left, found), found, *_between(graph, node_s, found, right)]


def _best(graph: BlockGraph, node_s: Sequence[float], price: float) -> Selection:
    """The least seconds + price x bytes, by a minimum cut."""
    unit = (sum(node_s) + price * graph.saved_bytes()) / _FINEST or 1.0
    network = nx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    for n, node in enumerate(graph.nodes):
        limit = {"capacity": round(node_s[n] / unit)} if node.repeatable else {}
        network.add_edge("source", ("node", n), **limit)
        for v in node.writes:
            held = {"capacity": round(graph.values[v].bytes * price / unit)} if graph.values[v].saved else {}
            network.add_edge(("node", n), ("value", v), **held)
        for v in node.reads:
            if not graph.values[v].is_given:
                network.add_edge(("value", v), ("node", n))
    for v, value in enumerate(graph.values):
        if value.saved and not value.is_given:
            network.add_edge(("value", v), "sink")
    _, (_, far) = nx.minimum_cut(network, "source", "sink")
    again = {n for kind, n in (key for key in far if isinstance(key, tuple)) if kind == "node"}
    dropped = [v for v in graph.droppable if graph.values[v].node in again]
    return _selection(graph, node_s, dropped)


def _selection(graph: BlockGraph, node_s: Sequence[float], dropped: Sequence[int]) -> Selection:
    seconds = sum(node_s[n] for n in graph.reruns(dropped))
    return Selection(tuple(dropped), graph.saved_bytes(dropped), seconds)


def _price_above_all(graph: BlockGraph, node_s: Sequence[float]) -> float:
    """At this price the smallest value is worth running everything again."""
    smallest = min((graph.values[v].bytes for v in graph.droppable if graph.values[v].bytes), default=1)
    return (2 * sum(node_s) or 1.0) / smallest


def _pareto(selections: list[Selection]) -> list[Selection]:
    rising: list[Selection] = []
    for selection in sorted(selections, key=lambda s: (s.rerun_s, s.held_bytes)):
        if not rising or selection.held_bytes < rising[-1].held_bytes:
            rising.append(selection)
    return rising
