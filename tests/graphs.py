"""Small random block graphs, and what the planner says of them worked out the long way."""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

from hypothesis import strategies as st

from memplan.graph import BlockGraph, Node, Value

Priced = tuple[BlockGraph, list[float]]  # and the seconds of each node


@st.composite
def graphs(draw: st.DrawFn, most_nodes: int = 7) -> Priced:
    """Some values are given, most nodes can be run again, about half of the values are saved."""
    values = [Value(f"given {i}", 0, None, draw(st.booleans())) for i in range(draw(st.integers(0, 2)))]
    nodes: list[Node] = []
    for n in range(draw(st.integers(1, most_nodes))):
        reads = draw(st.sets(st.integers(0, len(values) - 1), max_size=3)) if values else set()
        count = draw(st.integers(1, 2))
        writes = tuple(range(len(values), len(values) + count))
        values += [Value(f"{n}/{v}", draw(st.integers(0, 9)), n, draw(st.booleans())) for v in writes]
        nodes.append(Node(f"op {n}", tuple(sorted(reads)), writes, draw(st.integers(0, 4)) > 0))
    seconds = draw(st.lists(st.integers(0, 9).map(float), min_size=len(nodes), max_size=len(nodes)))
    return BlockGraph(tuple(values), tuple(nodes)), seconds


def chain(*links: tuple[int, bool]) -> BlockGraph:
    """One node after the other: (bytes of what it makes, whether that is saved)."""
    values = [Value("x", 0, None, True)]
    values += [Value(f"v{n}", size, n, saved) for n, (size, saved) in enumerate(links)]
    nodes = [Node(f"op {n}", (n,), (n + 1,), True) for n in range(len(links))]
    return BlockGraph(tuple(values), tuple(nodes))


def is_there(graph: BlockGraph, dropped: Collection[int], value: int) -> bool:
    """Whether the backward finds a value without running anything."""
    found = graph.values[value]
    return found.node is None or (found.saved and value not in dropped)


def closure(graph: BlockGraph, dropped: Collection[int]) -> set[int] | None:
    """The nodes that run again, found by repeating until nothing is added; None if one of them cannot."""
    again: set[int] = set()
    wanted = set(dropped)
    while True:
        more = {graph.values[v].node for v in wanted} - {None}
        found = again | {n for n in more if n is not None}
        wanted |= {v for n in found for v in graph.nodes[n].reads if not is_there(graph, dropped, v)}
        if found == again and {graph.values[v].node for v in wanted} <= again:
            return again if all(graph.nodes[n].repeatable for n in again) else None
        again = found


def subsets(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for size in range(len(items) + 1):
        yield from combinations(items, size)


def own_saved(graph: BlockGraph) -> list[int]:
    return [v for v, value in enumerate(graph.values) if value.saved and value.node is not None]


def points(graph: BlockGraph, seconds: Sequence[float]) -> dict[tuple[int, ...], tuple[int, float]]:
    """(held bytes, seconds of running again) of every set of saved values that can be dropped together."""
    found = {}
    for dropped in subsets(own_saved(graph)):
        again = closure(graph, dropped)
        if again is not None:
            held = sum(graph.values[v].bytes for v in range(len(graph.values)) if is_held(graph, dropped, v))
            found[dropped] = held, sum(seconds[n] for n in again)
    return found


def is_held(graph: BlockGraph, dropped: Collection[int], value: int) -> bool:
    return graph.values[value].saved and value not in dropped
