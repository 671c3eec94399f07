"""oneDNN's LSTM layers on the CPU: at how few steps a long one can be run, to learn what it takes.

Each buffer of the library grows by the same with every step and is then rounded up to a page (oneDNN,
cpu/rnn/rnn_utils.cpp). By as many steps as make whole pages of every buffer the sum grows evenly, so that two short
sequences tell what a long one takes, to the byte.
"""

from math import gcd
from typing import Final

FORWARD: Final = "aten::mkldnn_rnn_layer"
BACKWARD: Final = "aten::mkldnn_rnn_layer_backward"
LAYERS: Final = frozenset({FORWARD, BACKWARD})

# Arguments whose first dimension are the steps: input; output, its gradient. The last argument of the backward is what
# the forward kept for it.
OVER_TIME: Final = {FORWARD: (0,), BACKWARD: (0, 7, 10)}
FORWARD_ARGUMENTS: Final = 7  # tensors that both have in front: input, four weights, two states
STATE: Final = 6

_PAGE_BYTES: Final = 4096
_SMALLEST_BYTES: Final = 2  # of an element
_PADDED_TO: Final = 32  # elements: rows of a buffer are as long as the hidden size or padded to a multiple of these


def lengths(steps: int, rows: int, hidden: int) -> dict[int, float]:
    """Numbers of steps to run instead of `steps`, with weights: what grows evenly by whole pages sums up to theirs."""
    period = _PAGE_BYTES // _SMALLEST_BYTES
    period //= gcd(period, rows * gcd(hidden, _PADDED_TO))
    first = steps % period or period
    more = (steps - first) // period
    return {steps: 1.0} if more < 2 else {first: 1.0 - more, first + period: float(more)}
