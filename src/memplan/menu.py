"""`Menu`: what each block of a model may do about its activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.graph import BlockGraph
from memplan.problem import KEEP, RECOMPUTE
from memplan.selection import Selection, frontier, thinned

SELECT = "select"  # "select-3" drops some of what the block saves

# Every one of them is traced and, on a device, priced. With 24 the predicted slowdown at 15 budgets (12-layer Llama,
# GPT-2, ViT-B/16, from everything kept down to almost the smallest peak) is at most 0.2 points less.
MOST_SELECTIONS = 8


@dataclass(frozen=True)
class Selected:
    """A selection by its names, as it travels in a plan."""

    name: str
    dropped: tuple[str, ...]  # names of values in the block's graph
    rerun_s: float  # by the times that the selection was found with


@dataclass(frozen=True)
class Menu:
    """The options of every block.

    Attributes:
        options: block path -> option names, "keep" first.
        selections: option name -> the selection that it stands for.
    """

    options: Mapping[str, tuple[str, ...]]
    selections: Mapping[str, Selected]

    @classmethod
    def of(
        cls,
        groups: Sequence[Sequence[str]],
        graphs: Mapping[str, tuple[BlockGraph, Sequence[float]]],
        recompute: bool,
        others: Sequence[str] = (),
    ) -> "Menu":
        """For groups of alike blocks.

        Args:
            graphs: first path of a group -> its graph and each node's seconds; groups may be missing.
            recompute: whether a whole block may be run again.
            others: further options of every block, such as to offload.
        """
        options: dict[str, tuple[str, ...]] = {}
        selections: dict[str, Selected] = {}
        for group in groups:
            names: tuple[str, ...] = (KEEP, RECOMPUTE) if recompute else (KEEP,)
            for selection in _chosen(*graphs[group[0]]) if group[0] in graphs else ():
                name = f"{SELECT}-{len(selections) + 1}"
                dropped = tuple(graphs[group[0]][0].values[v].name for v in selection.dropped)
                selections[name] = Selected(name, dropped, selection.rerun_s)
                names += (name,)
            names += tuple(others)
            options.update(dict.fromkeys(group, names))
        return cls(options, selections)

    @property
    def recomputable(self) -> bool:
        """Whether whole blocks may be run again."""
        return all(RECOMPUTE in names for names in self.options.values())

    @property
    def levels(self) -> list[dict[str, str]]:
        """Decisions for all blocks that together show each block in each of its options; the first keeps all."""
        most = max((len(names) for names in self.options.values()), default=1)
        return [{path: names[min(n, len(names) - 1)] for path, names in self.options.items()} for n in range(most)]

    def of_decisions(self, decisions: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        """What the selections among some decisions drop."""
        used = dict.fromkeys(option for option in decisions.values() if option in self.selections)
        return {name: self.selections[name].dropped for name in used}


def _chosen(graph: BlockGraph, node_s: Sequence[float]) -> list[Selection]:
    """The frontier without its first point, which is to keep everything."""
    return thinned(frontier(graph, node_s), MOST_SELECTIONS + 1)[1:]
