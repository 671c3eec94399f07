"""Strategies: what a plan should be good at, as data that a user can read, copy and change.

The shipped ones lie in `strategies/`, where the README says how to write one. Every key has a default, so a file states
only what it wants otherwise.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from memplan.errors import BadBudget, BadStrategy
from memplan.units import parse_bytes

Objective = Literal["samples-per-second", "micro-batch", "peak"]
Lever = Literal["recompute", "select", "offload", "loss-head", "optimizer", "step-in-backward"]
LEVERS: Final[tuple[Lever, ...]] = get_args(Lever)

# What needs no word of the user. A step inside the backward does: memplan cannot see whether gradients are clipped.
SAFE_LEVERS: Final[tuple[Lever, ...]] = tuple(lever for lever in LEVERS if lever != "step-in-backward")


@dataclass(frozen=True, slots=True)
class Strategy:
    """What the planner aims at, and how far it may go for it.

    Raises:
        BadStrategy: a value outside its range; the message gives the value and the range.
    """

    name: str
    summary: str = ""  # one sentence, shown in lists
    when_to_use: str = ""
    objective: Objective = "samples-per-second"  # most of it; "peak": the smallest peak
    levers: tuple[Lever, ...] = SAFE_LEVERS  # what a plan may use to save memory; without any, everything is kept
    levers_first: tuple[Lever, ...] = ()  # tried without the others; those join where these alone give no plan
    every_block: Literal["keep", "recompute"] | None = None  # what every block does; None: as the solver finds best
    host_memory: str | float = 0.25  # limit for offloading: a size ("32GiB"), or a share of the host's memory
    risk: float = 0.01  # the probability with which a plan that fits may still run out of memory
    budget_share: float = 1.0  # of the usable memory, what a plan may use
    tolerance: float = 0.01  # plans within this share of the best are equal; the larger micro-batch is taken
    max_slowdown: float | None = None  # share of time lost against keeping everything that is accepted; None: any

    def __post_init__(self) -> None:
        for key in ("name", "summary", "when_to_use"):
            if not isinstance(getattr(self, key), str):
                raise BadStrategy(f"{key} = {getattr(self, key)!r} has to be a text")
        _check_one_of("objective", self.objective, get_args(Objective))
        for key in ("levers", "levers_first"):
            object.__setattr__(self, key, _levers(key, getattr(self, key)))
        if not set(self.levers_first) <= set(self.levers):
            raise BadStrategy(f"levers_first = {list(self.levers_first)} has more than levers = {list(self.levers)}")
        if self.every_block is not None:
            _check_one_of("every_block", self.every_block, ("keep", "recompute"))
        _check_host_memory(self.host_memory)
        _check_number("risk", self.risk, "above 0 and at most 0.5", lambda risk: 0 < risk <= 0.5)
        _check_number("budget_share", self.budget_share, "above 0 and at most 1", lambda share: 0 < share <= 1)
        _check_number("tolerance", self.tolerance, "at least 0 and below 1", lambda share: 0 <= share < 1)
        if self.max_slowdown is not None:
            _check_number("max_slowdown", self.max_slowdown, "at least 0 and finite", lambda share: share >= 0)

    def host_bytes(self, total_bytes: int | None) -> int:
        """The limit on what is offloaded, on a host with `total_bytes` of memory; None: it is not known.

        A share of an unknown memory is nothing. A size is what it says, but never more than there is.
        """
        if isinstance(self.host_memory, str):
            size = parse_bytes(self.host_memory)
            return size if total_bytes is None else min(size, total_bytes)
        return 0 if total_bytes is None else int(total_bytes * self.host_memory)


def load_strategy(name_or_path: str | Path | Strategy) -> Strategy:
    """The strategy of a shipped name ("balanced"), of a TOML file ("mine.toml", or any `Path`), or the record itself.

    Raises:
        BadStrategy: an unknown name, an unreadable file, an unknown key or an impossible value.
    """
    if isinstance(name_or_path, Strategy):
        return name_or_path
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        return _read(Path(name_or_path))
    if name_or_path not in shipped_strategies():
        raise BadStrategy(
            f"no strategy is called {name_or_path!r}; the shipped ones are {', '.join(shipped_strategies())}. "
            "One of your own is given by its path, for example 'mine.toml'"
        )
    return _read(_shipped_dir() / f"{name_or_path}.toml")


def shipped_strategies() -> tuple[str, ...]:
    """The names that `load_strategy` understands, in alphabetical order."""
    return tuple(sorted(path.stem for path in _shipped_dir().glob("*.toml")))


def _shipped_dir() -> Path:
    here = Path(__file__).resolve().parent
    installed = here / "strategies"
    # A wheel carries the folder inside the package; in a source checkout it lies at the top, where readers look.
    return installed if installed.is_dir() else here.parents[1] / "strategies"


_KEYS: Final = tuple(field.name for field in dataclasses.fields(Strategy))


def _read(path: Path) -> Strategy:
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadStrategy(f"cannot read the strategy file {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadStrategy(f"{path} is not a TOML file: {error}") from error
    try:
        for key in values:
            _check_one_of("key", key, _KEYS)
        return Strategy(**{"name": path.stem, **values})
    except BadStrategy as error:
        raise BadStrategy(f"{path}: {error}") from None


def _check_one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    nearest = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise BadStrategy(f"{what} {value!r} is not one of {', '.join(allowed)}{hint}")


def _check_number(key: str, value: object, allowed: str, in_range: Callable[[float], bool]) -> None:
    # TOML's true is an int to isinstance, and its nan and inf are floats.
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and in_range(value):
        return
    raise BadStrategy(f"{key} = {value!r} is out of range: it has to be a number {allowed}")


def _levers(key: str, value: object) -> tuple[Lever, ...]:
    if not isinstance(value, list | tuple):
        raise BadStrategy(f"{key} = {value!r} has to be a list of {', '.join(LEVERS)}")
    for lever in value:
        _check_one_of(f"{key} entry", lever, LEVERS)
    return tuple(lever for lever in LEVERS if lever in value)


def _check_host_memory(value: object) -> None:
    if not isinstance(value, str):
        allowed = "from 0 to 1, or a size such as '32GiB'"
        _check_number("host_memory", value, allowed, lambda share: 0 <= share <= 1)
        return
    try:
        parse_bytes(value)
    except BadBudget as error:
        raise BadStrategy(f"host_memory: {error}") from None
