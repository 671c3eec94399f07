"""A plan and a prediction by hand, for the reports."""

from typing import Any

from memplan.plan_record import Budget, Layer, Plan, Verdict
from memplan.prediction import Prediction, Timeline

GIB = 2**30
MIB = 2**20


def layers_of(options: str, stack: str = "model.layers") -> tuple[Layer, ...]:
    """One layer per letter: k for keep, r for recompute, s for a selection."""
    names = {"k": "keep", "r": "recompute", "s": "select-2"}
    held = {"k": 300 * MIB, "r": 16 * MIB, "s": 160 * MIB}
    return tuple(
        Layer(
            path=f"{stack}.{i}",
            option=names[letter],
            keep_bytes=300 * MIB,
            held_bytes=held[letter],
            extra_s=0.0 if letter == "k" else 0.0123,
        )
        for i, letter in enumerate(options)
    )


def make_plan(layers: tuple[Layer, ...] = layers_of("rrrkk"), **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "verdict": Verdict.FITS,
        "reason": "3 of 5 blocks are recomputed",
        "budget": Budget(
            gpu="rtx-4090",
            total_bytes=24 * GIB,
            others_bytes=GIB,
            context_bytes=512 * MIB,
            margin_bytes=512 * MIB,
        ),
        "strategy": "balanced",
        "micro_batch": 2,
        "accumulation": 4,
        "effective_batch": 8,
        "decisions": {layer.path: layer.option for layer in layers},
        "layers": layers,
        "peak_bytes": 21 * GIB,
        "peak_phase": "backward",
        "breakdown": {
            "params": 16 * GIB,
            "optimizer": 2 * GIB,
            "grads": 0,
            "activations/model.layers.3": 2 * GIB,
            "activations/lm_head": GIB,
        },
        "unplanned_bytes": 30 * GIB,
        "step_s": 1.234,
        "samples_per_s": 6.48,
        "slowdown": 0.12,
        "gap": 0.001,
        "shadow_price": 0.03,
        "times": "estimate",
        "smallest_bytes": 20 * GIB,
        "optimizer": "adamw",
        "autocast": "bfloat16",
        "how": "fake",
        "model": "LlamaForCausalLM",
        "signature": "0",
    }
    return Plan(**(values | changes))


def make_prediction(**changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "peak_bytes": 3 * GIB,
        "phase": "backward",
        "module": "model.layers.1",
        "breakdown": {"params": 2 * GIB, "activations/model.layers.1.mlp": GIB},
        "saved": {f"model.layers.{i}.{name}": 100 * MIB for i in range(2) for name in ("attn", "mlp")}
        | {"lm_head": MIB},
        "timeline": Timeline(phase=("backward",), bytes={"params": (3 * GIB,)}),
        "how": "fake",
        "micro_batch": 2,
        "accumulation": 4,
        "optimizer": "adamw",
        "autocast": None,
    }
    return Prediction(**(values | changes))
