"""Measured runs, kept from one process to the next: what `corrections` learns from.

Every run is a file of its own, written aside and then renamed, in a folder for each `Key`. So nothing is read, changed
and written back: two processes at once lose nothing, and a crash in the middle of a write leaves a file that nobody
reads. The folder is the user's cache folder, or the setting `cache_dir`; with `cache` off nothing is read or written.

A cache that cannot be used is no reason for a run to fail: it is said once, in the log, and the run goes on without.
"""

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Final, Literal

import platformdirs
from pydantic import ValidationError

from memplan.corrections import Run
from memplan.errors import UsageError
from memplan.records import Record, write_whole
from memplan.settings import Habits

RUNS_KEPT: Final = 50  # the newest, of each key

_log = logging.getLogger("memplan")


class Key(Record):
    """What a run has to have in common with another for the one to say something about the other."""

    card: str
    driver: str
    torch: str
    memplan: str
    model: str
    signature: str
    sample: str
    loss: str
    optimizer: str
    autocast: str | None
    ranks: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:24]


class _Entry(Record):
    """A file of the cache."""

    schema_version: Literal[1] = 1
    key: Key
    run: Run


class _NoHome(UsageError):
    """The folder is in a home that nobody knows."""

    def __init__(self, where: str) -> None:
        self.why = f"cannot tell where {where} is: the home folder is not known"
        super().__init__(f"{self.why}. Set MEMPLAN_CACHE_DIR to another folder, or MEMPLAN_CACHE=off.")


def folder() -> Path | None:
    """Where the runs are kept; None if the cache is switched off.

    Raises:
        UsageError: a setting that cannot be used, or a folder in a home that nobody knows.
    """
    habits = Habits.found()
    if not habits.cache:
        return None
    try:
        place = Path(habits.cache_dir or platformdirs.user_cache_dir("memplan", appauthor=False)).expanduser()
    except RuntimeError as error:  # neither HOME nor an entry among the users, as in some containers
        raise _NoHome(habits.cache_dir or "the user's cache folder") from error
    return place / "runs"


def runs_of(key: Key) -> tuple[Run, ...]:
    """The runs kept under a key, oldest first."""
    place = _place()
    return () if place is None else tuple(run for found, run in _entries(place / key.digest) if found == key)


def all_runs() -> dict[Key, tuple[Run, ...]]:
    """Everything that is kept, by key."""
    found: dict[Key, list[Run]] = {}
    for each in _inside(_place(), Path.is_dir):
        for key, run in _entries(each):
            found.setdefault(key, []).append(run)
    return {key: tuple(runs) for key, runs in found.items()}


def remember(key: Key, run: Run) -> None:
    """Keep a run, and of its key only the newest `RUNS_KEPT`."""
    place = _place()
    if place is None:
        return
    own = place / key.digest
    name = f"{time.time_ns():020d}-{os.getpid()}.json"
    try:
        own.mkdir(parents=True, exist_ok=True)
        write_whole(own / name, _Entry(key=key, run=run).model_dump_json().encode())
        for old in sorted(own.glob("*.json"))[:-RUNS_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(f"cannot keep what was measured in {place}: {error.strerror}")


def clear() -> int:
    """Remove everything that is kept; how many runs that were. Raises UsageError if it cannot be removed."""
    count = 0
    try:
        for each in _inside(folder(), Path.is_dir):
            for file in each.iterdir():
                file.unlink(missing_ok=True)
                count += file.suffix == ".json"
            if not any(each.iterdir()):  # else another process has kept a run meanwhile
                each.rmdir()
    except OSError as error:
        raise UsageError(f"cannot clear the cache: {error}. Remove the folder yourself, or name another.") from error
    return count


@cache
def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _place() -> Path | None:
    """As `folder`; a home that nobody knows is no reason for a run to fail."""
    try:
        return folder()
    except _NoHome as error:
        _warn_once(error.why)
        return None


def _inside(place: Path | None, is_wanted: Callable[[Path], bool]) -> list[Path]:
    try:
        return [] if place is None else sorted(filter(is_wanted, place.iterdir()))
    except FileNotFoundError:
        return []
    except OSError as error:
        _warn_once(f"cannot read what was measured, in {place}: {error.strerror}")
        return []


def _entries(own: Path) -> Iterator[tuple[Key, Run]]:
    """What one folder holds, in order; what is damaged is set aside, and what another version wrote passed over."""
    for path in _inside(own, lambda file: file.suffix == ".json"):
        try:
            entry = _Entry.model_validate_json(path.read_bytes())
        except FileNotFoundError:  # another process has removed it meanwhile
            continue
        except OSError as error:
            _warn_once(f"cannot read what was measured, in {path}: {error.strerror}")
        except ValidationError as error:
            if all(one["loc"] != ("schema_version",) for one in error.errors()):
                _set_aside(path, error.errors()[0]["msg"])
        else:
            yield entry.key, entry.run


def _set_aside(path: Path, why: str) -> None:
    try:
        path.replace(path.with_suffix(".bad"))
    except OSError:  # then it is passed over
        _warn_once(f"passed over {path}, which is damaged ({why})")
        return
    _log.warning("memplan's cache: %s was damaged (%s), and is set aside", path, why)


@cache
def _warn_once(text: str) -> None:
    _log.warning("memplan's cache: %s. MEMPLAN_CACHE_DIR names another folder, MEMPLAN_CACHE=off does without", text)
