"""The options of each block, by groups of alike ones."""

from graphs import chain

from memplan.graph import BlockGraph
from memplan.menu import MOST_SELECTIONS, Menu, Selected
from memplan.problem import KEEP, RECOMPUTE

GROUPS = [["a.0", "a.1"], ["b.0"]]
GRAPH, SECONDS = chain((8, True), (4, True)), [1.0, 4.0]


def test_alike_blocks_have_the_same_options_and_others_their_own() -> None:
    menu = Menu.of(GROUPS, {"a.0": (GRAPH, SECONDS), "b.0": (GRAPH, SECONDS)}, recompute=True)
    own = (KEEP, RECOMPUTE, "select-1", "select-2")
    assert menu.options == {"a.0": own, "a.1": own, "b.0": (KEEP, RECOMPUTE, "select-3", "select-4")}
    assert menu.recomputable
    assert menu.selections["select-1"] == Selected("select-1", ("v0",), 1.0)
    assert menu.selections["select-2"] == Selected("select-2", ("v0", "v1"), 5.0)


def test_a_group_without_a_graph_is_kept_or_recomputed_whole() -> None:
    menu = Menu.of(GROUPS, {"b.0": (GRAPH, SECONDS)}, recompute=False)
    assert menu.options == {"a.0": (KEEP,), "a.1": (KEEP,), "b.0": (KEEP, "select-1", "select-2")}
    assert not menu.recomputable


def test_the_levels_show_every_block_in_each_of_its_options() -> None:
    menu = Menu.of(GROUPS, {"a.0": (GRAPH, SECONDS)}, recompute=True)
    levels = menu.levels
    assert levels[0] == dict.fromkeys(("a.0", "a.1", "b.0"), KEEP)
    for path, names in menu.options.items():
        assert set(names) == {level[path] for level in levels}
    assert Menu({}, {}).levels == [{}]


def test_decisions_name_what_they_drop() -> None:
    menu = Menu.of(GROUPS, {"a.0": (GRAPH, SECONDS)}, recompute=True)
    decisions = {"a.0": "select-2", "a.1": KEEP, "b.0": RECOMPUTE}
    assert menu.of_decisions(decisions) == {"select-2": ("v0", "v1")}


def many(count: int) -> tuple[BlockGraph, list[float]]:
    """Pieces of one size at rising prices, each held again at another: a frontier of `count` + 1 points."""
    links = [link for _ in range(count) for link in ((0, True), (8, True))]
    return chain(*links), [float(n) for n in range(2 * count)]


def test_there_are_at_most_so_many() -> None:
    menu = Menu.of([["a"]], {"a": many(12)}, recompute=False)
    assert len(menu.selections) == MOST_SELECTIONS
    assert menu.selections[f"select-{MOST_SELECTIONS}"].dropped[-1] == "v23"
