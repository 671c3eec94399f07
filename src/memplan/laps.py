"""Seconds of several ways to do one thing, on a machine that does other things too.

Whatever else it does only adds to a lap. So each way counts by its least lap, and laps go on until that is worth
something: until the two least of each way agree. A busy moment has to last for all of the laps to be believed, and then
`Laps.doubt` says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

AGREE = 0.03  # share by which the two least laps of a way may differ; two on an idle machine differ by 0.2 to 2 %
_BUSY = 0.1  # from here on the reader is told
_LEAST = 3  # laps of each
_FEW = 8  # are enough where all together are brief
_MOST = 24
_BRIEF_S = 2.0
_ENOUGH_S = 2.0  # what takes this long needs no warming up, and two laps of it are enough if they agree
_PATIENCE_S = 40.0  # after this no turn is begun, if each has two laps


@dataclass(frozen=True, slots=True)
class Laps:
    """What was timed.

    Attributes:
        seconds: way -> its least lap.
        doubt: the largest share by which the two least laps of a way differ. Above `AGREE` the machine was busy.
    """

    seconds: Mapping[str, float]
    doubt: float


def doubted(doubt: float) -> tuple[str, ...]:
    """What a reader of times with such a doubt has to know; nothing on a machine that was not busy."""
    if doubt <= _BUSY:
        return ()
    return (
        f"the machine was busy while blocks were timed: the best two laps of one differ by {doubt:.0%}, so the times "
        "may be as wrong. Plan again when it is idle.",
    )


def by_turns(ways: Mapping[str, Callable[[], float]]) -> Laps:
    """Runs all ways in turn, so that a busy moment hits all alike. Each call is one lap and returns its seconds."""
    laps: dict[str, list[float]] = {name: [] for name in ways}
    spent_s = 0.0
    for turn in range(_MOST + 1):
        for name, lap in ways.items():
            seconds = lap()
            spent_s += seconds
            if turn or seconds > _ENOUGH_S:  # else it was warming up
                laps[name].append(seconds)
        if not all(found[1:] for found in laps.values()):
            continue
        least = 2 if all(min(found) > _ENOUGH_S for found in laps.values()) else _LEAST
        agreed = max(map(_apart, laps.values())) <= AGREE and all(len(found) >= least for found in laps.values())
        if agreed or spent_s > _PATIENCE_S or (turn >= _FEW and spent_s < _BRIEF_S):
            break
    return Laps({name: min(found) for name, found in laps.items()}, max(map(_apart, laps.values())))


def _apart(laps: list[float]) -> float:
    least, second = sorted(laps)[:2]
    return second / least - 1
