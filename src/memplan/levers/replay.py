"""What a block's forward leaves for its backward: what is held, and how the rest is made again when it is asked for."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memplan import packed
from memplan.levers.capture import RANDOM_STATE, Captured, View


class Held:
    """A tensor that is held for the backward, as it was: autograd's own check against writing to it, done here."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # else an operator that saves its own result would hold itself
        self.version = _version(self.tensor)

    def at_start(self, view: View) -> "Held":
        """The same, as the tensor by which its value became known began: what offsets are counted from."""
        if not view.offset:
            return self
        start = Held(self.tensor.as_strided((), (), self.tensor.storage_offset() - view.offset))
        start.version = self.version
        return start

    def give(self) -> Tensor:
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward needs has been written to in place "
                f"since the forward: it is at version {self.tensor._version} instead of {self.version}. Do not write "
                "to it, or clone it first."
            )
        return self.tensor


@dataclass(frozen=True)
class Part:
    """Values that are made again together, in every step: worked out once.

    Attributes:
        maker: value that is made again -> its node.
        uses: how often each of them is asked for in one backward, by autograd or by another node.
        sources: the values that this takes, and whence: see `_source`.
        entries: what autograd saves of them: places among all that it saves, and views.
        draws: whether it takes the random state in which the block began.
    """

    captured: Captured
    maker: Mapping[int, int]
    uses: Counter[int]
    sources: tuple[tuple[int, int | None], ...]
    entries: tuple[tuple[int, View], ...]
    draws: bool

    @property
    def gives(self) -> set[int]:
        """The saved values among them."""
        return {view.value for _, view in self.entries}


def parts_of(captured: Captured, dropped: Collection[int]) -> tuple[Part, ...]:
    """How to make these values of a captured forward again."""
    graph = captured.graph
    views = [(n, entry.view) for n, entry in enumerate(captured.saved) if entry.view is not None]
    place = {view.value: n for n, view in reversed(views)}
    found = []
    for nodes in graph.parts(dropped):
        maker = {value: n for n in nodes for value in graph.nodes[n].writes}
        entries = tuple((n, view) for n, view in views if view.value in maker and view.value in dropped)
        read = [value for n in nodes for value in graph.nodes[n].reads]
        uses = Counter(value for value in read if value in maker) + Counter(view.value for _, view in entries)
        sources = tuple((value, place.get(value)) for value in sorted({*read} - maker.keys()))
        found.append(Part(captured, maker, uses, sources, entries, any(n in captured.states for n in nodes)))
    return tuple(found)


class Rerun:
    """A part in one step, with the sources that it holds.

    Everything is made at most once in a backward, when it is first asked for, and let go when nobody is left to ask.
    The sources live as long as anything that was saved through this part, so a graph that is retained can be run
    backward again.
    """

    __slots__ = ("left", "made", "part", "sources")

    def __init__(self, part: Part, sources: Mapping[int, Held]) -> None:
        self.part = part
        self.sources = sources
        self.left: Counter[int] = Counter()
        self.made: dict[int, Tensor] = {}

    def give(self, view: View) -> Tensor:
        if view.value in self.made:
            return view.on(self._use(view.value))
        with torch.no_grad(), _uncast(self.part.captured.device.type):
            return view.on(self._use(view.value))

    def _use(self, value: int) -> Tensor:
        """A value, one use of it done."""
        if value in self.sources:
            return self.sources[value].give()
        if value not in self.made:
            self._run(self.part.maker[value])
        tensor = self.made[value]
        self.left[value] -= 1
        if self.left[value] <= 0:
            del self.made[value]
        return tensor

    def _run(self, node: int) -> None:
        read = {v: self._use(v) for v in self.part.captured.graph.nodes[node].reads}
        made = rerun(self.part.captured, node, read)
        for value, tensor in made.items():
            if self.part.uses[value]:
                self.made[value], self.left[value] = tensor, self.part.uses[value]


class Saved:
    """One tensor that autograd has saved: held, or to be made again by the part that it belongs to."""

    __slots__ = ("held", "rerun", "view")

    def __init__(self, tensor: Tensor) -> None:
        self.held: Held | None = Held(tensor)
        self.rerun: Rerun | None = None
        self.view: View | None = None

    def give(self) -> Tensor:
        """What autograd asks for in the backward."""
        if self.held is not None:
            return self.held.give()
        assert self.rerun is not None
        assert self.view is not None
        return self.rerun.give(self.view)


def rerun(captured: Captured, node: int, read: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Run one node again on what it reads. Returns what it makes; the global random state is left alone."""
    made: dict[int, Tensor] = {}

    def base_of(value: int) -> Tensor:
        return made[value] if value in made else read[value]

    state = captured.states.get(node)
    outside = None if state is None else random_state(captured.device)
    if state is not None:
        set_random_state(captured.device, read[state[0]])
    try:
        for call in captured.calls[node]:
            made.update(call.run(base_of))
        if state is not None:
            made[state[1]] = random_state(captured.device)
    finally:
        if outside is not None:
            set_random_state(captured.device, outside)
    return made


def leave(
    parts: Sequence[Part], saved: Sequence[Saved], block: nn.Module, inputs: Sequence[Tensor], state: Tensor | None
) -> None:
    """Let go of what is dropped, after a forward that saved what the captured one did.

    Args:
        saved: everything that autograd saved, in order.
        inputs: the tensors that the block was called with.
        state: of the generator when the block began, where a part draws from it.
    """
    reruns = [_begun(part, saved, block, inputs, state) for part in parts]
    for part, again in zip(parts, reruns, strict=True):
        for n, view in part.entries:
            saved[n].rerun, saved[n].view, saved[n].held = again, view, None


def unlike(
    parts: Sequence[Part], saved: Sequence[Saved], block: nn.Module, inputs: Sequence[Tensor], state: Tensor | None
) -> set[int]:
    """Those of the dropped values that are not the same, to the bit, when they are made again; all else that their
    part drops is among them, for it was made from the same. Takes the arguments of `leave`, and is called before it."""
    found: set[int] = set()
    for part in parts:
        again = _begun(part, saved, block, inputs, state)
        try:  # the last first, as the backward asks
            same = all(_is_same(again.give(view), saved[n].held) for n, view in reversed(part.entries))
        except torch.OutOfMemoryError:
            raise  # it says nothing about the operators
        except RuntimeError:  # an operator that cannot be run again after all: better held than met in the backward
            same = False
        if not same:
            found |= part.gives
    return found


def _begun(
    part: Part, saved: Sequence[Saved], block: nn.Module, inputs: Sequence[Tensor], state: Tensor | None
) -> Rerun:
    return Rerun(part, {v: _source(part, v, place, saved, block, inputs, state) for v, place in part.sources})


def _source(
    part: Part,
    value: int,
    place: int | None,
    saved: Sequence[Saved],
    block: nn.Module,
    inputs: Sequence[Tensor],
    state: Tensor | None,
) -> Held:
    """A value as it is held: the block was called with it or owns it, it is the state, or autograd saved it there."""
    captured = part.captured
    if value in captured.inputs:
        return Held(inputs[captured.inputs[value]])
    if value in captured.owned:
        return Held(packed.at(block, captured.owned[value]))
    if captured.graph.values[value].name.startswith(RANDOM_STATE):
        assert state is not None
        return Held(state)
    assert place is not None
    held, view = saved[place].held, captured.saved[place].view
    assert held is not None
    assert view is not None
    return held.at_start(view)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what was made in inference mode counts none


def _is_same(tensor: Tensor, held: Held | None) -> bool:
    if held is None:
        return False
    other = held.tensor
    return torch.equal(tensor, other) or torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)


def _uncast(kind: str) -> AbstractContextManager[object]:
    """Casts are operators of the captured forward; in the backward they must not be made twice."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
