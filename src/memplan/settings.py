"""What a run is asked to do, from four places: argument > `MEMPLAN_*` > `memplan.toml` or `[tool.memplan]` > default.

    MEMPLAN_GPU=24GiB accelerate launch train.py

Of the files, the first that is found from the working directory upwards counts, `memplan.toml` before `pyproject.toml`.
A flag of the command line is an argument. `Habits` are what memplan does whatever is run; they are no arguments.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from memplan.errors import UsageError

_TRUE: Final = ("1", "true", "yes", "on")
_FALSE: Final = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to plan inside somebody's training script.

    Attributes:
        enabled: False: the run stays as it is written.
        gpu: as for `memplan.plan`; "auto" is the device that the run uses.
        strategy: a shipped name or the path of a TOML file.
        plan: the file of a plan that is to be used; None: one is made.
        micro_batch: fixes the micro-batch.
        risk: on a card, the probability with which a plan that fits may still run out of memory.
        normalise: what the losses of micro-batches are weighted by, so that they add up to the loss of their batch: a
            word of `memplan.integrations.parts`, or "auto".
    """

    enabled: bool = True
    gpu: str = "auto"
    strategy: str = "balanced"
    plan: str | None = None
    micro_batch: int | None = None
    risk: float | None = None
    normalise: str = "auto"

    @classmethod
    def found(
        cls,
        arguments: Mapping[str, object] | None = None,
        environ: Mapping[str, str] = os.environ,
        folder: Path | None = None,
    ) -> "Settings":
        """The settings in force.

        Args:
            arguments: what the script says; None stands for nothing said.
            folder: where the search for a file begins; the working directory if left out.

        Raises:
            UsageError: an unknown name, or a value of the wrong kind; the message says where it stands.
        """
        values: dict[str, object] = {}
        for source, said in (
            _file_values(folder),
            ("the environment", _environment_values(environ)),
            ("the arguments", {name: value for name, value in (arguments or {}).items() if value is not None}),
        ):
            for name, value in said.items():
                if source == "the arguments" and name in _HABITS:
                    raise UsageError(f"{source} set {name!r}, which is for all runs: set MEMPLAN_{name.upper()}")
                values[name] = _checked(name, value, source)
        return cls(**{name: value for name, value in values.items() if name not in _HABITS})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Habits:
    """What memplan does on this machine, whatever is run.

    Attributes:
        cache: whether measured runs are kept, and correct later plans.
        cache_dir: where; None: in the user's cache folder.
        banner: whether a run begins with a few lines on its plan.
    """

    cache: bool = True
    cache_dir: str | None = None
    banner: bool = True

    @classmethod
    def found(cls, environ: Mapping[str, str] = os.environ, folder: Path | None = None) -> "Habits":
        """The habits in force, from the environment, a file or by default. Raises UsageError as `Settings.found`."""
        values: dict[str, object] = {}
        for source, said in (
            _file_values(folder),
            ("the environment", _environment_values(environ)),
        ):
            values |= {name: _checked(name, value, source) for name, value in said.items() if name in _HABITS}
        return cls(**values)  # type: ignore[arg-type]  # each is checked above


_HABITS: Final = frozenset(field.name for field in fields(Habits))
_KINDS: Final = {
    "enabled": (bool, "true or false"),
    "gpu": (str, "a text such as '24GiB'"),
    "strategy": (str, "a text such as 'balanced'"),
    "plan": (str, "the path of a plan file"),
    "micro_batch": (int, "a whole number"),
    "risk": (float, "a number such as 0.01"),
    "normalise": (str, "a text such as 'tokens'"),
    "cache": (bool, "true or false"),
    "cache_dir": (str, "the path of a folder"),
    "banner": (bool, "true or false"),
}
_LEAST: Final = {"micro_batch": 1, "risk": 0}
assert set(_KINDS) == {field.name for kind in (Settings, Habits) for field in fields(kind)}


def _environment_values(environ: Mapping[str, str]) -> dict[str, object]:
    return {
        key.removeprefix("MEMPLAN_").lower(): _parsed(key.removeprefix("MEMPLAN_").lower(), text)
        for key, text in environ.items()
        if key.startswith("MEMPLAN_")
    }


def _parsed(name: str, text: str) -> object:
    """A text of the environment as the kind that its setting has; what is none stays a text, to be refused."""
    kind = _KINDS.get(name, (str, ""))[0]
    if kind is bool:
        return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _file_values(folder: Path | None) -> tuple[str, dict[str, Any]]:
    """Where the nearest file with settings lies, and what it says."""
    try:
        begin = folder or Path.cwd()
        for place in (begin, *begin.parents):
            own, project = place / "memplan.toml", place / "pyproject.toml"
            if own.is_file():
                return str(own), _read(own)
            if project.is_file() and (said := _project_values(project)) is not None:
                return f"[tool.memplan] of {project}", said
    except OSError as error:  # the working directory was removed, or one may not look into it
        where = error.filename or "the working directory"
        raise UsageError(
            f"cannot look for settings from the working directory upwards: {where}: {error.strerror}. "
            "Start from another folder."
        ) from error
    return "", {}


def _project_values(project: Path) -> dict[str, Any] | None:
    """What a pyproject.toml says of memplan; None: nothing."""
    tools = _read(project).get("tool", {})
    said = tools.get("memplan") if isinstance(tools, dict) else None
    if said is None or isinstance(said, dict):
        return said
    raise UsageError(f"{project} has memplan = {said!r} under [tool], which has to be a table, [tool.memplan]")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the settings in {path}: {error}") from error


def _checked(name: str, value: object, source: str) -> object:
    if name not in _KINDS:
        raise UsageError(f"{source} set {name!r}, which is no setting of memplan: {', '.join(_KINDS)}")
    kind, example = _KINDS[name]
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        if name in _LEAST and not value >= _LEAST[name]:  # type: ignore[operator]  # a number
            raise UsageError(f"{source} set {name} = {value!r}, which has to be at least {_LEAST[name]}")
        return value
    raise UsageError(f"{source} set {name} = {value!r}, which has to be {example}")
