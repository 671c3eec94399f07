"""`Prediction`: the memory of one training step as it stands, before anything is planned."""

from collections.abc import Mapping
from functools import cached_property
from importlib import import_module

from pydantic import Field, model_validator

from memplan.records import Described, Record
from memplan.units import format_bytes

_ACTIVATIONS = "activations"


def by_category(breakdown: Mapping[str, int]) -> dict[str, int]:
    """The bytes of a breakdown with all activations in one number, in the breakdown's order."""
    sizes: dict[str, int] = {}
    for name, size in breakdown.items():
        category = _ACTIVATIONS if name.startswith(f"{_ACTIVATIONS}/") else name
        sizes[category] = sizes.get(category, 0) + size
    return sizes


def activations_in(breakdown: Mapping[str, int]) -> dict[str, int]:
    """The activation bytes of a breakdown by module path."""
    prefix = f"{_ACTIVATIONS}/"
    return {name.removeprefix(prefix): size for name, size in breakdown.items() if name.startswith(prefix)}


class Timeline(Record):
    """Bytes of tensors over one step. Thinned to a few hundred moments; their peak is always among them."""

    phase: tuple[str, ...]  # of each moment: "forward", "loss", "backward", "optimizer"
    bytes: dict[str, tuple[int, ...]]  # category -> bytes at each moment

    @model_validator(mode="after")
    def _is_whole(self) -> "Timeline":
        if not self.phase or {len(sizes) for sizes in self.bytes.values()} != {len(self.phase)}:
            raise ValueError("a timeline has a phase and all bytes for each of its moments")
        return self

    @cached_property
    def total(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*self.bytes.values(), strict=True)))


class Prediction(Described):
    """What one steady-state step needs: optimizer state exists, gradients were dropped at the end of the last step.

    For a card also what a run of such steps takes from it, by a simulation of torch's caching allocator.
    """

    schema_version: int = 1
    peak_bytes: int = Field(
        description="largest number of bytes at any moment: on the CPU in tensors; on CUDA in the allocator's blocks "
        "(torch.cuda.max_memory_allocated), where a remainder too small to be split off counts with its block"
    )
    reserved_bytes: int | None = Field(
        default=None,
        description="CUDA: the most that the allocator takes from the card while memory is not short "
        "(torch.cuda.max_memory_reserved); the CUDA context and the libraries' own memory come on top; None on the CPU",
    )
    completes_bytes: int | None = Field(
        default=None,
        description="CUDA: the smallest cap on what the allocator reserves under which the run does not fail, however "
        "often it has to give back its cache; None on the CPU",
    )
    fits_bytes: int | None = Field(
        default=None,
        description="CUDA: the smallest cap under which it runs without having to give back its cache even once; "
        "None on the CPU",
    )
    phase: str = Field(description="where the peak is: forward, loss, backward or optimizer")
    module: str = Field(description="the module that was running at the peak; empty for the model itself")
    breakdown: dict[str, int] = Field(
        description="bytes at the peak by category, activations by module as `activations/<path>`; sums to the "
        "peak; on CUDA with `allocator`: what its blocks are larger than the tensors in them"
    )
    saved: dict[str, int] = Field(
        description="bytes that each module keeps from its forward for its backward, at the end of the forward"
    )
    timeline: Timeline
    how: str = Field(description='"fake": abstract, without memory or arithmetic; "recorded": a real step was run')
    micro_batch: int
    accumulation: int
    optimizer: str
    autocast: str | None
    assumptions: tuple[str, ...] = ()

    @property
    def activations(self) -> dict[str, int]:
        """Activation bytes at the peak by module path."""
        return activations_in(self.breakdown)

    def summary(self) -> dict[str, int]:
        """The breakdown with all activations in one number; sums to the peak."""
        sizes = by_category(self.breakdown)
        activations = sizes.pop(_ACTIVATIONS, 0)
        return {**sizes, _ACTIVATIONS: activations}

    def needs(self) -> str:
        """What the run takes from a card, in one line; empty on the CPU."""
        if self.reserved_bytes is None or self.completes_bytes is None or self.fits_bytes is None:
            return ""
        return (
            f"on the card: fits in {format_bytes(self.fits_bytes)}, reserves {format_bytes(self.reserved_bytes)}, "
            f"completes in {format_bytes(self.completes_bytes)}"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        text: str = import_module("memplan.report.html").prediction_html(self)  # it stands above this room
        return text

    def describe(self) -> str:
        """A few lines of plain text: the peak, where it is, and what it is made of."""
        parts = sorted(self.summary().items(), key=lambda part: -part[1])
        where = f"{self.phase} of {self.module}" if self.module else self.phase
        lines = [f"peak {format_bytes(self.peak_bytes)} in {where}"]
        lines += [f"  {name:<12} {format_bytes(size):>12}" for name, size in parts if size]
        lines += [self.needs()] if self.needs() else []
        return "\n".join([*lines, *(f"  assumed: {text}" for text in self.assumptions)])
