"""Which blocks copy to the host, chosen block by block with both queues in view, at a price on memory.

A label is a choice for the blocks up to one: what it costs with the bytes that it holds at their price, and how far
behind the link is. For the forward that is the seconds still to be copied when the block ends; for the backward the
seconds of copies that have to be back before the block's own backward begins. Both follow the same recursion (Lindley,
Proc. Cambridge Phil. Soc. 48, 1952), for a chain that is walked forwards is the backward's queue walked backwards:

    behind_i = copy_i + max(0, behind_{i-1} - seconds_i)

and what goes beyond the staging area is waited for at once: in the forward until whole copies are made, as the judge
has it; of the backward's queue only the length is followed. After the last block the rest of both is waited for. A
label that another would still match after waiting until it is no further behind is out; so few are left. How much all
the blocks hold is not looked at: what the others than the copying ones do is chosen again, exactly, within the budget.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from memplan.solvers.bounds import Bounds, Prices
from memplan.solvers.labels import SLACK, Index, Seconds

WIDTH = 48  # labels per block
FOLLOWED = 8  # copies in the queue, the newest, whose ends are told apart
# Prices of a second behind, as shares of the way from the bound's to 1.
RISING = np.array([0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])


@dataclass(frozen=True, slots=True)
class _Dear:
    """What a second behind costs: at the bound's price as long as there is time to catch up, up to 1 at the end.

    At any price a label may be behind for that price and what is still to come costs the least at it; the dearest of
    these bounds counts.
    """

    prices: Seconds
    after: Seconds  # by [price, block]: what is still to come costs

    @classmethod
    def of(cls, bounds: Bounds, at: int, own: Prices, axis: str) -> Self:
        least: float = getattr(own, axis)
        prices = least + (1 - least) * RISING
        return cls(prices, np.stack([bounds.after(at, replace(own, **{axis: float(price)})) for price in prices]))

    def more(self, i: int, behind: Seconds) -> Seconds:
        """Than what is still to come at the bound's price, before block i."""
        more: Seconds = (self.prices[:, None] * behind + self.after[:, i, None]).max(axis=0) - self.after[0, i]
        return more


def copying(bounds: Bounds, at: int, prices: Prices) -> list[int]:
    """Per block the position of the option that copies, or -1: those of the choice that is cheapest by the recursion.

    Args:
        bounds: of the problem.
        at: number of the size of the largest copy; the staging area is as large as this one needs.
        prices: of a second behind and of the bytes held.
    """
    staging_s = bounds.staging_s(at)
    dear = [_Dear.of(bounds, at, prices, axis) for axis in ("out", "back")]
    cost = out = back = queued = np.zeros(1)
    ends = np.zeros((1, FOLLOWED))  # of the last copies queued, in seconds of copying since the first
    trail: list[tuple[Index, Index]] = []  # per block, of each label: its parent and its option
    for i, (time, forward_s, backward_s, copy_s, index) in enumerate(bounds.worthwhile(at, prices)):
        grown_out = (copy_s + np.maximum(out - forward_s, 0.0)).ravel()  # options outermost
        grown_back = (copy_s + np.maximum(back - backward_s, 0.0)).ravel()
        grown_queued = (copy_s + queued).ravel()
        room = grown_queued - staging_s * (1 + SLACK)  # what ends by then has to be copied
        past = np.tile(ends, (len(copy_s), 1))
        until = np.where(past >= room[:, None], past, grown_queued[:, None]).min(axis=1)
        wait_out = np.maximum(np.where(room > 0, until - (grown_queued - grown_out), 0.0), 0.0)
        wait_back = np.maximum(grown_back - staging_s, 0.0)
        grown = (time + cost).ravel() + wait_out + wait_back
        grown_out, grown_back = grown_out - wait_out, grown_back - wait_back
        hosted = grown_queued if bounds.is_limited else np.zeros(len(grown))
        score = grown + prices.host * hosted + dear[0].more(i + 1, grown_out) + dear[1].more(i + 1, grown_back)
        allowed = np.flatnonzero(grown_queued <= bounds.host_s)
        kept = allowed[np.argsort(score[allowed], kind="stable")[: 2 * WIDTH]]
        kept = kept[~_is_matched(grown[kept], grown_out[kept], grown_back[kept], hosted[kept])][:WIDTH]
        option, parent = np.divmod(kept, len(cost))
        trail.append((parent, index[option]))
        cost, out, back, queued = grown[kept], grown_out[kept], grown_back[kept], grown_queued[kept]
        copies = (queued > past[kept, -1])[:, None]
        ends = np.where(copies, np.column_stack([past[kept, 1:], queued]), past[kept])
    label, pattern = int(np.argmin(cost + out + back)), list[int]()
    for parents, options in reversed(trail):
        pattern.append(int(options[label]))
        label = int(parents[label])
    return pattern[::-1]


def _is_matched(cost: Seconds, out: Seconds, back: Seconds, hosted: Seconds) -> np.ndarray:
    """Which labels an earlier one matches at the latest when it has waited until it is no further behind."""
    behind = np.maximum(out[:, None] - out, 0.0) + np.maximum(back[:, None] - back, 0.0)
    matches = (cost[:, None] + behind <= cost) & (hosted[:, None] <= hosted)
    found: np.ndarray = np.triu(matches, 1).any(axis=0)
    return found
