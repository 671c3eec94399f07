"""`Plan`: what to do with a model, why, and what it is predicted to cost. Frozen, JSON, schema-versioned."""

import json
from collections.abc import Iterator
from enum import StrEnum
from importlib import import_module
from pathlib import Path

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from memplan.errors import PlanSchema
from memplan.prediction import Timeline
from memplan.records import Described, Record, write_whole
from memplan.units import format_budget, format_bytes, format_rate, format_seconds, format_within

SCHEMA_VERSION = 3


class Verdict(StrEnum):
    """How a plan ends; the value is what the user reads."""

    FITS = "fits"
    UNCERTAIN = "uncertain"
    DOES_NOT_FIT = "does not fit"


class Budget(Record):
    """How the budget is made up, in bytes: total - others - context - margin = usable."""

    gpu: str
    total_bytes: int = Field(gt=0)
    others_bytes: int = Field(description="held by other processes")
    context_bytes: int = Field(description="taken by the CUDA context before any tensor")
    margin_bytes: int = Field(description="kept free: for the error of predictions (`risk`), the strategy's share")

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - self.context_bytes - self.margin_bytes

    def beyond(self, over_bytes: int) -> str:
        """What it means that a plan needs so much more than is usable, in words."""
        if over_bytes <= self.margin_bytes:
            return f"{format_bytes(over_bytes)} of the {format_bytes(self.margin_bytes)} margin are needed"
        missing = format_bytes(over_bytes - self.margin_bytes)
        return f"{missing} more than there is are needed, by a prediction that may be too high by as much"


class Layer(Record):
    """One block of the model in the plan's table. Bytes and seconds are for one micro-batch."""

    path: str
    option: str = Field(description='what the plan does: "keep", "recompute", or a key of `Plan.selections`')
    keep_bytes: int = Field(description="held for backward if all that autograd saves is kept")
    held_bytes: int = Field(description="held for backward under the plan")
    extra_s: float = Field(description="extra seconds under the plan")
    held: dict[str, int] = Field(default={}, description="option -> bytes held, for every option of the frontier")
    extra: dict[str, float] = Field(default={}, description="option -> extra seconds, for every option of the frontier")


class FrontierPoint(Record):
    """A plan for the same micro-batch and accumulation that needs more or less memory. Found, but not traced."""

    peak_bytes: int = Field(description="what it needs, as `Plan.needs_bytes`; as much above the profile as the plan")
    step_s: float
    options: tuple[str, ...] = Field(description="one for each of `Plan.layers`, in their order")
    head: str = Field(description='"keep", or the loss head\'s option')
    stepping: str = Field(description="as `Plan.stepping`")
    chosen: bool = Field(description="whether it is the plan itself")


class Measured(Described):
    """A real run beside its prediction."""

    peak_bytes: int = Field(gt=0)
    predicted_bytes: int
    reserved_bytes: int | None = Field(None, description="CUDA: what the allocator took from the card for it")
    step_s: float
    predicted_s: float
    budget_bytes: int
    device: str
    steps: int

    @property
    def needs_bytes(self) -> int:
        """What had to be within the budget: on a card what its allocator took, on a CPU the peak."""
        return self.peak_bytes if self.reserved_bytes is None else self.reserved_bytes

    @property
    def peak_error(self) -> float:
        """Signed relative error of the predicted peak: positive if more was predicted than used."""
        return self.predicted_bytes / self.peak_bytes - 1

    def describe(self) -> str:
        return (
            f"measured {format_bytes(self.peak_bytes)} (predicted {format_bytes(self.predicted_bytes)}, "
            f"{self.peak_error:+.2%}{self._reserved()}; budget {format_budget(self.budget_bytes)}), "
            f"{format_seconds(self.step_s)} per step (predicted {format_seconds(self.predicted_s)})"
        )

    def _reserved(self) -> str:
        return "" if self.reserved_bytes is None else f"; {format_bytes(self.reserved_bytes)} reserved"


class SampleField(Record):
    """One input tensor, without its batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    below: int | None = Field(None, description="integers lie in [0, below); None for floating point")


class Plan(Described):
    """The answer of the planner. `decisions` and `micro_batch` x `accumulation` are what to do; the rest says why."""

    schema_version: int = SCHEMA_VERSION
    verdict: Verdict
    reason: str = Field(description="one sentence behind the verdict")
    budget: Budget
    strategy: str
    objective: str = Field("samples-per-second", description='of the strategy; "peak" leaves memory unused')
    micro_batch: int = Field(gt=0)
    accumulation: int = Field(gt=0)
    effective_batch: int
    decisions: dict[str, str] = Field(description="module path -> option, in forward order")
    selections: dict[str, tuple[str, ...]] = Field({}, description="option -> names of the values that it drops")
    layers: tuple[Layer, ...]
    stepping: str = Field("plain", description='how the optimizer steps: "plain", "single" or "in-backward"')
    host_bytes: int = Field(0, description="held in host memory at once")
    peak_bytes: int = Field(gt=0, description="the most bytes at any moment of the step, as in Prediction")
    reserved_bytes: int | None = Field(None, description="CUDA: the most that its allocator reserves")
    fits_bytes: int | None = Field(None, description="CUDA: the least cap on that without a retry")
    peak_phase: str
    peak_module: str = Field("", description="the module that runs at the peak; empty for the model itself")
    breakdown: dict[str, int] = Field(description="bytes at the peak by category, as in Prediction")
    unplanned_bytes: int = Field(description="the peak at the same micro-batch with nothing recomputed")
    step_s: float = Field(gt=0)
    seconds: dict[str, float] = Field(
        {}, description='of a step by lever, "keep" for all that is none\'s; before corrections by measured runs'
    )
    samples_per_s: float
    slowdown: float = Field(description="step time against no recomputation at the same micro-batch, minus 1")
    gap: float = Field(description="relative distance of the step time to the proven lower bound")
    levers: tuple[str, ...] = Field((), description="of the plans that were compared, for which the bound is proven")
    shadow_price: float = Field(description="seconds per step that one GiB more would save")
    times: str = Field(
        description='"measured" on this device, "estimate" from the card\'s figures, "nominal" where there are none'
    )
    share_bytes: int | None = Field(
        default=None,
        description="of the budget, what the plan was solved for where `tune` chose it by measurement; None: all",
    )
    smallest_bytes: int = Field(description="the least usable budget that any plan of this strategy would fit")
    frontier: tuple[FrontierPoint, ...] = Field((), description="from the least memory to the least time")
    timeline: Timeline | None = Field(None, description="bytes by category over the step as planned")
    unplanned_timeline: Timeline | None = Field(None, description="the same with nothing done, as `unplanned_bytes`")
    ways_out: tuple[str, ...] = Field((), description="if it does not fit: the cheapest ways to make it fit")
    optimizer: str
    autocast: str | None
    replicas: int = Field(1, description="of the model, each with samples of its own")
    shards: int = Field(1, description="cards that share each replica, by FSDP2")
    mp_policy: str = Field("", description="FSDP2's mixed precision, in the words of its MixedPrecisionPolicy")
    how: str
    model: str = Field(description="the model's class")
    signature: str = Field(description="hash over module paths and parameter shapes, checked by apply")
    sample: tuple[SampleField, ...] = ()
    assumptions: tuple[str, ...] = ()
    _live: object = PrivateAttr(default=None)  # the sample and loss it was made with; not in the file

    @model_validator(mode="after")
    def _is_whole(self) -> "Plan":
        odd = [point for point in self.frontier if len(point.options) != len(self.layers)]
        if odd:
            raise ValueError(f"a plan of the frontier has {len(odd[0].options)} options for {len(self.layers)} blocks")
        return self

    def __eq__(self, other: object) -> bool:
        """Whether the two say the same, one of them perhaps read from a file."""
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    @property
    def basis(self) -> str:
        """What the planned times rest on, in words. Not to be taken for the measurement of a step."""
        words = {
            "measured": "from measured blocks",
            "nominal": "for a card of 100 TFLOP/s and 1 TB/s: only ratios count",
        }
        return words.get(self.times, self.times)

    @property
    def budget_bytes(self) -> int:
        return self.budget.usable_bytes

    @property
    def needs_bytes(self) -> int:
        """What has to be within the budget: on a card what its allocator has to reserve, on a CPU the peak."""
        return self.peak_bytes if self.fits_bytes is None else self.fits_bytes

    def beside_budget(self, n_bytes: int) -> str:
        """A need as text, which does not read as above the budget where it is within it."""
        return format_within(n_bytes, self.budget_bytes)

    @property
    def unplanned_needs_bytes(self) -> int:
        """What stands beside `needs_bytes` if nothing were done in the same batch; on a card an estimate.

        That is what the frontier says of keeping everything, else as much above `unplanned_bytes` as the plan needs
        above its own peak.
        """
        if self.fits_bytes is None:
            return self.unplanned_bytes
        kept = (p.peak_bytes for p in self.frontier if {*p.options, p.head} == {"keep"} and p.stepping == "plain")
        return next(kept, self.unplanned_bytes + self.needs_bytes - self.peak_bytes)

    @property
    def is_for_card(self) -> bool:
        """Whether an allocator's cache counts: what other plans of the frontier need is an estimate then."""
        return self.fits_bytes is not None

    @property
    def solved_bytes(self) -> int:
        """The budget that the plan was solved for."""
        return self.budget_bytes if self.share_bytes is None else self.share_bytes

    @property
    def faster_within_budget(self) -> FrontierPoint | None:
        """The fastest plan that would fit too, where the strategy wants less memory than it may have."""
        if self.objective != "peak":
            return None
        within = [p for p in self.frontier if p.peak_bytes <= self.budget_bytes and p.step_s < self.step_s]
        return min(within, key=lambda point: point.step_s, default=None)

    def save(self, path: "str | Path") -> None:
        """Write the plan as JSON. Raises PlanSchema if the file cannot be written; an older one is left as it was."""
        try:
            write_whole(Path(path), f"{self.model_dump_json(indent=1)}\n".encode())
        except OSError as error:
            raise PlanSchema(f"cannot write the plan file {path}: {error.strerror}. Name another one.") from error

    def settings(self, framework: str, plan_file: str = "plan.json") -> str:
        """The plan as lines to paste, for "trainer" (transformers), "trl", "accelerate", "axolotl" or "lightning".

        Where the framework has no arguments for it, the lines apply the plan that `save` wrote as `plan_file`. Layers
        are taken to be transformers' own. Raises UsageError for another framework.
        """
        report = import_module("memplan.report.settings")  # it stands above this room
        text: str = report.settings_text(self, plan_file, framework=framework)
        return text

    def assuming(self, *lines: str) -> "Plan":
        """The plan, with more that it takes for granted."""
        return self.model_copy(update={"assumptions": (*self.assumptions, *lines)})

    def record(self) -> dict[str, float]:
        """The plan as flat numbers, for TensorBoard, W&B and other trackers; bytes and seconds are predictions."""
        return {
            "memplan/micro_batch": self.micro_batch,
            "memplan/accumulation": self.accumulation,
            "memplan/changed_blocks": len(self.changed),
            "memplan/budget_bytes": self.budget_bytes,
            "memplan/predicted_peak_bytes": self.peak_bytes,
            "memplan/unplanned_peak_bytes": self.unplanned_bytes,
            "memplan/predicted_step_s": self.step_s,
            "memplan/predicted_samples_per_s": self.samples_per_s,
            "memplan/predicted_slowdown": self.slowdown,
        }

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        text: str = import_module("memplan.report.html").plan_html(self)  # it stands above this room
        return text

    @classmethod
    def load(cls, path: "str | Path") -> "Plan":
        """Read a plan. Raises PlanSchema if it cannot be read, is none, or is one of another schema version."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            version = record["schema_version"]
        except OSError as error:
            raise PlanSchema(f"cannot read the plan file {path}: {error.strerror}") from error
        except ValueError as error:
            raise PlanSchema(f"{path} is no plan, or one that was cut short: it is no JSON ({error}).") from error
        except (KeyError, TypeError) as error:
            raise PlanSchema(f"{path} is no memplan plan: no schema_version is in it. Plan.save makes one.") from error
        if version != SCHEMA_VERSION:
            raise PlanSchema(
                f"{path} has schema version {version!r}; this memplan reads version {SCHEMA_VERSION}. "
                "Plan again with this version, or install the version that wrote it."
            )
        try:
            plan = cls.model_validate(record)
        except ValidationError as error:
            first, count = error.errors(include_url=False)[0], error.error_count()
            where = ".".join(map(str, first["loc"])) or "the whole"
            more = f", and {count - 1} more" if count > 1 else ""
            raise PlanSchema(f"{path} is a damaged plan: {where}: {first['msg']}{more}. Plan again.") from error
        for fault in plan._faults():
            raise PlanSchema(f"{path} is a damaged plan: {fault}. Plan again.")
        return plan

    def _faults(self) -> Iterator[str]:
        """What a plan that was made cannot say of itself."""
        if sum(point.chosen for point in self.frontier) > 1:
            yield "more than one plan of the frontier is the chosen one"
        if self.micro_batch * self.accumulation != self.effective_batch:
            yield f"{self.micro_batch} x {self.accumulation} samples are not {self.effective_batch} per step"
        if (parts := sum(self.breakdown.values())) != self.peak_bytes:
            yield f"the parts of the peak are {parts:,} bytes together, and it is {self.peak_bytes:,}"

    @property
    def changed(self) -> tuple[str, ...]:
        """Paths of the modules that do not run as they did, in forward order."""
        return tuple(path for path, option in self.decisions.items() if option != "keep")

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Paths of the blocks that are recomputed whole, in forward order."""
        return tuple(path for path, option in self.decisions.items() if option == "recompute")

    @property
    def trained(self) -> str:
        """The weights by their type and the tokens of a sample, in words; empty where the plan does not say."""
        return next((text for text in self.assumptions if text.startswith("weights: ")), "")

    def describe(self) -> str:
        """The plan in a few lines of plain text."""
        b = self.budget
        spare = self.budget_bytes - self.needs_bytes
        room = f"{format_budget(spare)} spare" if spare >= 0 else f"{format_bytes(-spare)} too much"
        lines = [
            f"{self.verdict}: {self.reason}",
            f"  budget    {format_budget(self.budget_bytes)} on {b.gpu} = {format_budget(b.total_bytes)} total"
            f" - {format_bytes(b.others_bytes)} others - {format_bytes(b.context_bytes)} context"
            f" - {format_bytes(b.margin_bytes)} margin",
            f"  batch     {self.micro_batch} x {self.accumulation} accumulated = {self.effective_batch} per step",
            f"  blocks    {count_text(self)}",
            f"  peak      {self.beside_budget(self.peak_bytes)} in {self.peak_phase}, {room}; "
            f"{'' if self.fits_bytes is None else 'about '}{format_bytes(self.unplanned_needs_bytes)} without a plan",
            f"  time      {format_seconds(self.step_s)} per step ({self.basis}), "
            f"{format_rate(self.samples_per_s, 'samples')}, "
            f"{pace_text(self.slowdown)} than keeping everything, within {self.gap:.2%} of the proven bound",
        ]
        if self.fits_bytes is not None:
            lines.append(
                f"  card      {self.beside_budget(self.fits_bytes)} reserved by the allocator, fragmentation included"
            )
        if self.host_bytes > 0:
            lines.append(f"  host      {format_bytes(self.host_bytes)} of pinned memory")
        if self.shadow_price > 0 and self.faster_within_budget is None:
            lines.append(f"  one GiB more would save {format_seconds(self.shadow_price)} per step")
        lines += [f"  way out   {way}" for way in self.ways_out]
        lines += [f"  assumed   {text}" for text in self.assumptions]
        return "\n".join(lines)


def pace_text(slowdown: float) -> str:
    """A share of time lost as "2.0% slower", or gained as "2.0% faster"."""
    return f"{abs(slowdown):.1%} {'slower' if slowdown >= 0 else 'faster'}"


def count_text(plan: Plan) -> str:
    """How many blocks do what, as "4 of 12 recomputed, 8 in part"."""
    options = [layer.option for layer in plan.layers]
    whole, parts = options.count("recompute"), sum(option in plan.selections for option in options)
    texts = [f"{whole} of {len(options)} recomputed"] if whole or not parts else []
    texts += [f"{parts} of {len(options)} in part"] if parts else []
    return ", ".join(texts)
