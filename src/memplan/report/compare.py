"""Two plans side by side: only what differs."""

from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from memplan.plan_record import Layer, Plan
from memplan.prediction import by_category
from memplan.problem import KEEP
from memplan.records import Record
from memplan.report.paths import path_range, pattern_of
from memplan.units import format_bytes, format_seconds

_FACTS = (
    "model",
    "verdict",
    "strategy",
    "optimizer",
    "autocast",
    "micro_batch",
    "accumulation",
    "effective_batch",
    "replicas",
    "shards",
    "mp_policy",
    "stepping",
    "peak_phase",
    "peak_module",
    "times",
    "how",
)
_SIZES = ("budget_bytes", "needs_bytes", "peak_bytes", "unplanned_needs_bytes", "smallest_bytes", "host_bytes")
_TIMES = ("step_s", "samples_per_s", "slowdown", "gap", "shadow_price")


class Blocks(Record):
    """Blocks that do one thing under the first plan and another under the second. Each, for one micro-batch.

    Those that read the same are together; their bytes and seconds are those of the first.
    """

    paths: str = Field(description="as a range")
    count: int
    options: tuple[str, str]
    held_bytes: tuple[int, int]
    extra_s: tuple[float, float]


class Comparison(Record):
    """What differs between two plans; a pair has the first plan's value first."""

    schema_version: int = 1
    same_model: bool = Field(description="whether modules and parameter shapes agree")
    facts: dict[str, tuple[str, str]] = Field(
        description='words and counts, by the plan\'s field; beside those "gpu", "loss_head" and "sample"'
    )
    sizes: dict[str, tuple[int, int]] = Field(description="bytes, by the plan's field")
    times: dict[str, tuple[float, float]] = Field(description="seconds and shares, by the plan's field")
    categories: dict[str, tuple[int, int]] = Field(description="bytes at the peak")
    blocks: tuple[Blocks, ...] = Field(description="of those that both models have")
    alone: tuple[int, int] = Field(description="blocks that only one of the models has")
    assumed: tuple[tuple[str, ...], tuple[str, ...]] = Field(description="lines that only one of the plans rests on")

    @property
    def is_empty(self) -> bool:
        """Whether the plans agree in everything that is compared."""
        tables = (self.facts, self.sizes, self.times, self.categories, self.blocks)
        return self.same_model and not any((*tables, *self.alone, *self.assumed))


def compare(first: Plan, second: Plan) -> Comparison:
    """What differs between two plans."""
    facts = [_facts(plan) for plan in (first, second)]
    mine, yours = ({layer.path: layer for layer in plan.layers} for plan in (first, second))
    categories = [Counter(by_category(plan.breakdown)) for plan in (first, second)]
    names = sorted({*categories[0], *categories[1]}, key=lambda name: -max(categories[0][name], categories[1][name]))
    return Comparison(
        same_model=first.signature == second.signature,
        facts={n: (facts[0][n], facts[1][n]) for n in facts[0] if facts[0][n] != facts[1][n]},
        sizes={n: (a, b) for n in _SIZES if (a := getattr(first, n)) != (b := getattr(second, n))},
        times={n: (a, b) for n in _TIMES if (a := getattr(first, n)) != (b := getattr(second, n))},
        categories={n: (a, b) for n in names if (a := categories[0][n]) != (b := categories[1][n])},
        blocks=_blocks(
            (layer, yours[path])
            for path, layer in mine.items()
            if path in yours and _does(first, layer) != _does(second, yours[path])
        ),
        alone=(len(mine.keys() - yours.keys()), len(yours.keys() - mine.keys())),
        assumed=(_only_in(first.assumptions, second.assumptions), _only_in(second.assumptions, first.assumptions)),
    )


def _only_in(lines: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(line for line in lines if line not in others)


def head_of(plan: Plan) -> str:
    """What a plan does to the loss head, which is none of its layers: "keep" or its option."""
    return next((option for option in plan.decisions.values() if option.startswith("chunked")), KEEP)


def _facts(plan: Plan) -> dict[str, str]:
    sample = ", ".join(f"{field.name}{list(field.shape)} {field.dtype}" for field in plan.sample)
    words = {name: str(getattr(plan, name)) for name in _FACTS}
    return {"gpu": plan.budget.gpu, **words, "loss_head": head_of(plan), "sample": sample or "not in the plan"}


def _does(plan: Plan, layer: Layer) -> tuple[str, tuple[str, ...]]:
    """An option, and what is dropped by it: a selection's name means something in its own plan only."""
    return layer.option, plan.selections.get(layer.option, ())


def _blocks(pairs: Iterable[tuple[Layer, Layer]]) -> tuple[Blocks, ...]:
    """Those together that read the same: times of equal blocks may differ in their last digits."""
    groups: dict[tuple[str, ...], list[tuple[Layer, Layer]]] = {}
    for a, b in pairs:
        groups.setdefault((pattern_of(a.path), *_reads(a), *_reads(b)), []).append((a, b))
    return tuple(
        Blocks(
            paths=path_range(a.path for a, _ in group),
            count=len(group),
            options=(group[0][0].option, group[0][1].option),
            held_bytes=(group[0][0].held_bytes, group[0][1].held_bytes),
            extra_s=(group[0][0].extra_s, group[0][1].extra_s),
        )
        for group in groups.values()
    )


def _reads(layer: Layer) -> tuple[str, str, str]:
    return layer.option, format_bytes(layer.held_bytes), format_seconds(layer.extra_s)
