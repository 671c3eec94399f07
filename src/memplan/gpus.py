"""The cards memplan knows without touching one: their memory and, for time estimates, their peak rates.

The figures are data, in `gpus.toml`, each row with its sources and date. An unknown card is an error that names the
nearest; it never borrows another card's figures.
"""

import datetime
import difflib
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from memplan.errors import UnknownGpu
from memplan.units import parse_bytes

# What can only have been meant as a size: it begins like a number, or it is one of the words for numbers that are none.
_MODEL_DIGITS: Final = 4  # of a number that names a card
_ALIKE: Final = 0.5  # share of common letters from which a name may have been meant
_LIKE_A_SIZE: Final = re.compile(r"[+-]?(?:[\d.].*|(?:nan|inf)\s*(?:[kmgt]?i?b)?)", re.IGNORECASE)


LIVE_CUDA: Final = re.compile(r"cuda(?::(\d+))?")
"""A card of this machine, by its index if there is one."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a plan is made for: a card, the CPU, or only an amount of memory.

    A "size" has no rates, so times planned for it are relative. A "cpu" has none either: they are measured.
    """

    name: str  # the card's short name, or what the user wrote
    kind: Literal["cuda", "cpu", "size"]
    total_bytes: int | None  # what `torch.cuda.mem_get_info` calls the total; None: ask the device
    driver_names: tuple[str, ...] = ()  # what the driver calls it, letter for letter
    bandwidth_bytes_s: float | None = None  # device memory, peak
    flops: Mapping[str, float] = field(default_factory=dict, hash=False)  # per second by dtype, dense, peak
    host_link_bytes_s: float | None = None  # one way, theoretical
    compute_capability: tuple[int, int] | None = None
    source: str | None = None  # where the figures come from; None where there are none
    date: datetime.date | None = None  # when they were last looked up

    @property
    def is_amd(self) -> bool:
        return any(name.startswith("AMD") for name in self.driver_names)


def find_gpu(text: str) -> Gpu:
    """The card, CPU or memory size that a text names, found without looking at this machine.

    Understands a card's short name ("rtx-4090") and driver name ("NVIDIA H100 80GB HBM3"), case and punctuation aside;
    a size ("24GiB"); "cpu"; and "cpu:2GiB", the CPU with a budget. Live devices ("auto", "cuda", "cuda:1") are no
    cards' names: `memplan.device` resolves them first.

    Raises:
        UnknownGpu: there is no such card; the message names the three nearest and how to give a size instead.
        BadBudget: a size that is zero, negative, not finite, without a unit or otherwise unreadable.
    """
    name = text.strip()
    device, colon, budget = name.partition(":")
    if device.lower() == "cpu":
        if not colon:
            return Gpu(name="cpu", kind="cpu", total_bytes=None)
        return Gpu(name=f"cpu:{budget}", kind="cpu", total_bytes=parse_bytes(budget))
    card = _cards_by_key().get(_key(name))
    if card is not None:
        return card
    if _LIKE_A_SIZE.fullmatch(name) and not _is_model_number(name):
        return Gpu(name=name, kind="size", total_bytes=parse_bytes(name))
    near = _nearest(name)
    known = f"the nearest names are {', '.join(near)}" if near else "`memplan gpus` lists those that are known"
    raise UnknownGpu(
        f"no card is called {text!r}; {known}. Any other card can be given by its memory, for example '24GiB', "
        "and the processor as 'cpu' or 'cpu:8GiB'"
    )


def check_named(gpu: str) -> None:
    """As `find_gpu` raises; what asks for a device of this machine passes."""
    name = gpu.strip().lower()
    if name != "auto" and not LIVE_CUDA.fullmatch(name):
        find_gpu(gpu)


def with_like_kernels(name: str, gpus: Iterable[Gpu]) -> list[Gpu]:
    """Those that a plan for the card of that name may hold for, if they are large enough.

    They are of the same maker, and have fused attention and bfloat16 or have not, as the card: NVIDIA's have them from
    compute capability 8.0 on. A size counts as one of those; of a live device ("cuda:0") it is not known: all are left.
    """
    if LIVE_CUDA.fullmatch(name):
        return list(gpus)
    own = next((_kind_of_kernels(gpu) for gpu in all_gpus() if gpu.name == name), (False, True))
    return [gpu for gpu in gpus if _kind_of_kernels(gpu) == own]


def _kind_of_kernels(gpu: Gpu) -> tuple[bool, bool]:
    """Whether a card is AMD's, and whether it is as new as Ampere."""
    return gpu.is_amd, gpu.compute_capability is None or gpu.compute_capability >= (8, 0)


@functools.cache
def all_gpus() -> tuple[Gpu, ...]:
    """Every card of the catalogue, in its order. The file is read on the first call."""
    text = (importlib.resources.files("memplan") / "gpus.toml").read_text(encoding="utf-8")
    return tuple(_card(name, row) for name, row in tomllib.loads(text).items())


def _card(name: str, row: dict[str, Any]) -> Gpu:
    major_minor = row.get("compute_capability")
    return Gpu(
        name=name,
        kind="cuda",
        total_bytes=row["total_bytes"],
        driver_names=tuple(row["driver_names"]),
        bandwidth_bytes_s=row.get("bandwidth_bytes_s"),
        flops=row.get("flops", {}),
        host_link_bytes_s=row.get("host_link_bytes_s"),
        compute_capability=tuple(major_minor) if major_minor else None,
        source=f"rates: {row['rates_from']}; memory: {row['memory_from']}",
        date=row["date"],
    )


@functools.cache
def _cards_by_key() -> dict[str, Gpu]:
    return {_key(name): card for card in all_gpus() for name in (card.name, *card.driver_names)}


def _key(name: str) -> str:
    """Letters and digits only, so that "RTX 4090", "rtx4090" and "rtx-4090" are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_model_number(name: str) -> bool:
    """Whether a number without a unit is how people call a card: 4090."""
    return len(name) >= _MODEL_DIGITS and name.isdecimal() and any(name in key for key in _cards_by_key())


def _nearest(name: str) -> list[str]:
    """Short names of the three cards nearest to `name`: those that have it in a name of theirs, then the most alike.

    None if it is like no card at all, and only those that have it in their name if it is a model's number.
    """
    wanted, cards = _key(name), _cards_by_key()

    def nearness(key: str) -> tuple[bool, float]:
        return wanted in key, difflib.SequenceMatcher(a=wanted, b=key).ratio()

    def is_near(key: str) -> bool:
        holds, alike = nearness(key)
        return holds or (alike >= _ALIKE and not _is_model_number(name))

    near = sorted(filter(is_near, cards), key=nearness, reverse=True) if wanted else []
    # A card has several keys and comes at the place of its nearest.
    return list(dict.fromkeys(cards[key].name for key in near))[:3]
