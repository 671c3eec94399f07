"""Plans with a timeline and a frontier by hand, for the page and its pictures."""

from typing import Any

from records_made import GIB, MIB, layers_of, make_plan

from memplan.plan_record import FrontierPoint, Layer, Plan
from memplan.prediction import Timeline

NAMES = {"k": "keep", "r": "recompute", "s": "select-2"}
HELD = {"keep": 300 * MIB, "recompute": 16 * MIB, "select-2": 160 * MIB}
EXTRA = {"keep": 0.0, "recompute": 0.0123, "select-2": 0.004}


def timeline_of(held: list[int]) -> Timeline:
    """One step over blocks that hold so many bytes: up through the forward, down through the backward."""
    rising = [sum(held[:k]) for k in range(len(held) + 1)]
    activations = [*rising, rising[-1], *reversed(rising), 0]
    count = len(activations)
    phases = ("forward",) * len(rising) + ("loss",) + ("backward",) * len(rising) + ("optimizer",)
    return Timeline(
        phase=phases,
        bytes={
            "params": (16 * GIB,) * count,
            "buffers": (0,) * count,
            "optimizer": (2 * GIB,) * count,
            "grads": tuple(MIB * max(0, k - len(rising)) for k in range(count)),
            "activations": tuple(activations),
            "logits/loss": tuple(GIB if phase == "loss" else 0 for phase in phases),
        },
    )


def point(letters: str, peak_bytes: int, step_s: float, chosen: bool = False) -> FrontierPoint:
    options = tuple(NAMES[letter] for letter in letters)
    head = "chunked-512" if "r" in letters else "keep"
    return FrontierPoint(
        peak_bytes=peak_bytes, step_s=step_s, options=options, head=head, stepping="plain", chosen=chosen
    )


def with_options(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(layer.model_copy(update={"held": HELD, "extra": EXTRA}) for layer in layers)


def full_plan(letters: str = "rrskk", **changes: Any) -> Plan:
    """Three plans, the second chosen; its timeline; and a plain step above the budget."""
    layers = with_options(layers_of(letters))
    planned = timeline_of([layer.held_bytes for layer in layers])
    plain = timeline_of([layer.keep_bytes for layer in layers])
    values: dict[str, Any] = {
        "layers": layers,
        "frontier": (
            point("r" * len(letters), 18 * GIB, 1.4),
            point(letters, 19 * GIB, 1.234, chosen=True),
            point("k" * len(letters), 23 * GIB, 1.1),
        ),
        "timeline": planned,
        "unplanned_timeline": plain,
        "peak_bytes": max(planned.total),
        "unplanned_bytes": max(plain.total),
        "peak_module": "model.layers.4",
    }
    return make_plan(**(values | changes))
