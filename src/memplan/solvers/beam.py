"""Plans that copy to the host, built block by block with both queues in view.

A label is a choice for the blocks up to one, with what it holds and takes, and how far behind the link is: for the
forward the seconds that are still to be copied when the block ends; for the backward the seconds of copies that have to
be back before the block's own backward begins. Both follow the same recursion (Lindley, Proc. Cambridge Phil. Soc. 48,
1952), for a chain that is walked forwards is the backward's queue walked backwards:

    behind_i = copy_i + max(0, behind_{i-1} - seconds_i)

and what goes beyond the staging area is waited for at once. After the last block the rest of both is waited for. Where
copies differ in size the true queues wait for whole copies, so the judge (`Problem.step_s`) has the last word.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from memplan.link import staging_bytes
from memplan.problem import Choice
from memplan.solvers.labels import Bytes, Index, Link, Seconds
from memplan.solvers.priced import Priced, Prices, copying

# On twelve chains of 32 blocks of benchmarks/solver.py's own, 16, 64 and 256 labels left gaps of 0.5, 0.6 and 0.7 % on
# average, and to judge 1, 6 or 24 made no difference.
WIDTH = 64  # labels per block
ENDS = 6  # of the last labels, so many are judged, the fastest first


@dataclass(frozen=True, slots=True)
class _Queued:
    """A block's options, and the seconds of each in the forward, in the backward and on the link."""

    link: Link
    forward_s: Seconds
    backward_s: Seconds
    copy_s: Seconds


@dataclass(frozen=True, slots=True)
class _Labels:
    """Choices up to one block, as parallel arrays."""

    held: Bytes
    time: Seconds
    out: Seconds  # behind in the forward
    back: Seconds  # and in the backward
    copied: Seconds  # on the link all in all

    def taken(self, where: Index) -> "_Labels":
        return _Labels(self.held[where], self.time[where], self.out[where], self.back[where], self.copied[where])


def promising(priced: Priced, prices: Prices, least: int, most: int) -> Iterator[Choice]:
    """Choices that should wait little, the fastest by the recursion first; none where nothing fits.

    Args:
        priced: the problem.
        prices: of a second behind in the forward, in the backward, and of one on the link; what is still to come costs
            by the chain at the same prices.
        least: bytes of what a block copies at least, if anything.
        most: and at most; the staging area is as large as this one needs.
    """
    chain = priced.chain(most, most, prices, least)
    if chain is None:
        return
    staging_s = staging_bytes([most]) / priced.bytes_s
    zero = np.zeros(1)
    labels = _Labels(np.zeros(1, dtype=np.int64), zero, zero, zero, zero)
    trail: list[tuple[Index, Index]] = []  # per block, of each label: its parent and its option
    for i, block in enumerate(_queued(priced, least, most)):
        grown, own_s = _grown(block, labels, prices, staging_s)
        room = chain.budget - np.maximum(block.link.load, block.link.hold + chain.needs[i + 1])
        fits = np.repeat(room, len(labels.held)) >= np.tile(labels.held, len(room))
        kept = np.flatnonzero(fits & (grown.copied <= priced.host_s))
        kept = kept[np.lexsort((own_s[kept], grown.held[kept]))]
        best = np.minimum.accumulate(own_s[kept])
        kept = kept[np.append(True, best[1:] < best[:-1])[: len(kept)]]
        if len(kept) > WIDTH:
            score = own_s[kept] + chain.relaxed[i + 1].at(grown.held[kept])
            kept = kept[np.sort(np.argsort(score, kind="stable")[:WIDTH])]
        option, parent = np.divmod(kept, max(len(labels.held), 1))
        trail.append((parent, block.link.index[option]))
        labels = grown.taken(kept)
    for end in np.argsort(labels.time + labels.out + labels.back, kind="stable")[:ENDS]:
        at, choice = int(end), []
        for parents, picks in reversed(trail):
            choice.append(int(picks[at]))
            at = int(parents[at])
        yield tuple(reversed(choice))


def _queued(priced: Priced, least: int, most: int) -> Iterator[_Queued]:
    """Per block, the options that `Priced.staged` has."""
    for link, copies, forward_s in priced.options:
        where = copying(copies, least, most)
        part = replace(link, load=link.load + staging_bytes([most])).taken(where)
        yield _Queued(part, forward_s[where], part.time - forward_s[where], copies[where] / priced.bytes_s)


def _grown(block: _Queued, labels: _Labels, prices: Prices, staging_s: float) -> tuple[_Labels, Seconds]:
    """Each label with each option, options outermost, and what each costs at these prices."""
    copy_s = block.copy_s[:, None]
    out = copy_s + np.maximum(labels.out - block.forward_s[:, None], 0.0)
    back = copy_s + np.maximum(labels.back - block.backward_s[:, None], 0.0)
    wait = np.maximum(out - staging_s, 0.0) + np.maximum(back - staging_s, 0.0)
    out, back = np.minimum(out, staging_s), np.minimum(back, staging_s)
    time, copied = block.link.time[:, None] + labels.time + wait, copy_s + labels.copied
    own_s = time + prices.out * out + prices.back * back + prices.host * copied
    held = block.link.hold[:, None] + labels.held
    return _Labels(held.ravel(), time.ravel(), out.ravel(), back.ravel(), copied.ravel()), own_s.ravel()
