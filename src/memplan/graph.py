"""`BlockGraph`: the operators of one block's forward, and what autograd saves of their results. Pure records.

A *value* is the content of one storage: what the operators of one node have made of it, seen through any view. Views
are no operators here; they cost nothing. A *node* is one operator that makes values, with the in-place operators that
go on writing to them, since none of these can be run again without the others.

Dropping a saved value means not to hold it from forward to backward, and to run nodes again in the backward instead:
its own, and those of every value that these read and that is neither given nor still held.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Value:
    """The content of one storage."""

    name: str  # of the module and the operator that made it, as "mlp.act_fn/silu"; unique in the block
    bytes: int  # 0 for what is there anyway
    node: int | None  # what makes it; None: given (inputs, parameters, buffers)
    saved: bool  # autograd holds it for the backward

    @property
    def is_given(self) -> bool:
        return self.node is None


@dataclass(frozen=True, slots=True)
class Node:
    """One operator and the in-place ones that follow on its results."""

    name: str
    reads: tuple[int, ...]  # values, each once
    writes: tuple[int, ...]  # values
    repeatable: bool  # run again on the same inputs, it gives the same results and leaves no other trace
    flops: int = 0
    bytes: int = 0  # read and written
    dtype: str = ""


@dataclass(frozen=True)
class BlockGraph:
    """The forward of one block. Nodes are in the order in which they ran, and read nothing that comes later."""

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    unlike: tuple[str, ...] = ()  # names of values that were made again, and came out differently

    def without(self, unlike: Collection[int]) -> "BlockGraph":
        """The graph in which what makes these values is not run again."""
        nodes = (replace(node, repeatable=node.repeatable and not set(unlike) & {*node.writes}) for node in self.nodes)
        return BlockGraph(self.values, tuple(nodes), tuple(self.values[v].name for v in sorted(unlike)))

    @property
    def droppable(self) -> tuple[int, ...]:
        """Saved values that could be made again in the backward."""
        own = (v for v, value in enumerate(self.values) if value.saved and not value.is_given)
        return tuple(v for v in own if self.can_rerun(v))

    def can_rerun(self, value: int) -> bool:
        """Whether a value can be made again from what is given, what is saved, and what can be made again itself."""
        return self._rerunnable[value]

    def reruns(self, dropped: Collection[int]) -> tuple[int, ...]:
        """The nodes that have to run again when these saved values are dropped, in order.

        Raises ValueError if one of them cannot be made again.
        """
        wanted = set(dropped)
        again: set[int] = set()
        for n in range(len(self.nodes) - 1, -1, -1):  # readers come later, so they are known by now
            node = self.nodes[n]
            if wanted.isdisjoint(node.writes):
                continue
            if not node.repeatable:
                raise ValueError(f"{node.name} cannot be run again, so what it makes cannot be dropped")
            again.add(n)
            wanted.update(v for v in node.reads if self._is_missing(v, dropped))
        return tuple(sorted(again))

    def sources(self, dropped: Collection[int]) -> tuple[int, ...]:
        """The values that the reruns read and that have to be held for them, the given ones among these."""
        again = self.reruns(dropped)
        return tuple(sorted({v for n in again for v in self.nodes[n].reads if not self._is_missing(v, dropped)}))

    def parts(self, dropped: Collection[int]) -> Iterator[tuple[int, ...]]:
        """The reruns in groups that share no value which is made again: each can be run without the others."""
        group_of: dict[int, set[int]] = {}
        maker = {v: n for n in self.reruns(dropped) for v in self.nodes[n].writes}
        for n in self.reruns(dropped):
            merged = {n}.union(*(group_of[maker[v]] for v in self.nodes[n].reads if v in maker))
            group_of.update(dict.fromkeys(merged, merged))
        yield from (tuple(sorted(group)) for group in {id(group): group for group in group_of.values()}.values())

    def named(self, names: Collection[str]) -> tuple[int, ...]:
        """Values by their names. Raises KeyError for one that is not here."""
        by_name = {value.name: v for v, value in enumerate(self.values)}
        return tuple(sorted(by_name[name] for name in names))

    def saved_bytes(self, dropped: Collection[int] = ()) -> int:
        """What autograd holds of the block's own values."""
        return sum(value.bytes for v, value in enumerate(self.values) if value.saved and v not in dropped)

    def _is_missing(self, value: int, dropped: Collection[int]) -> bool:
        found = self.values[value]
        return not found.is_given and (not found.saved or value in dropped)

    @cached_property
    def _rerunnable(self) -> tuple[bool, ...]:
        reachable = [value.is_given for value in self.values]
        for node in self.nodes:
            whole = node.repeatable and all(reachable[v] or self.values[v].saved for v in node.reads)
            for v in node.writes:
                reachable[v] = whole
        return tuple(reachable)
