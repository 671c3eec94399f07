"""Module paths with numbers in them, told as ranges: thirty-two layers are one line."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Share:
    """What some modules of one kind hold together."""

    name: str  # "model.layers.0-31"
    count: int
    kept_bytes: int  # from their forward for their backward
    largest_bytes: int  # of `kept_bytes`, in the one module that keeps most
    peak_bytes: int  # alive at the peak of the step
    inner: tuple["Share", ...] = ()  # the kinds of modules inside repeated ones, largest first

    @property
    def alike(self) -> bool:
        """Whether each module keeps the same."""
        return self.largest_bytes * self.count == self.kept_bytes


def module_shares(kept: Mapping[str, int], at_peak: Mapping[str, int]) -> tuple[Share, ...]:
    """Bytes by module path as shares of modules that differ only in a number, largest first; without those of 0 bytes.

    A stack of repeated modules ("layers.0", "layers.1", ...) is one share; the kinds of modules in it are its `inner`.
    """
    paths = [path for path in {**kept, **at_peak} if kept.get(path) or at_peak.get(path)]

    def share(units: Mapping[str, list[str]]) -> Share:
        sizes = [sum(kept.get(path, 0) for path in members) for members in units.values()]
        peak_bytes = sum(at_peak.get(path, 0) for members in units.values() for path in members)
        return Share(path_range(units), len(units), sum(sizes), max(sizes), peak_bytes)

    shares: list[Share] = []
    for stack in _grouped(paths, lambda path: (_split(path)[0], _split(path)[1] == "")).values():
        blocks = _grouped(stack, lambda path: ".".join(part for part in _split(path)[:2] if part))
        kinds = [(kind, share({path: [path] for path in kind})) for kind in _grouped(stack, pattern_of).values()]
        if len(blocks) == 1:
            shares += [kind for _, kind in kinds]
        else:
            inner = [replace(kind, name=path_range(_split(path)[2] for path in members)) for members, kind in kinds]
            shares.append(replace(share(blocks), inner=_by_size(inner)))
    return _by_size(shares)


def pattern_of(path: str) -> str:
    """The path with a star for each number: "layers.3.experts.0" -> "layers.*.experts.*"."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def path_range(paths: Iterable[str]) -> str:
    """One name for paths of one pattern: "layers.0", "layers.1", "layers.2" -> "layers.0-2"."""
    columns = [list(dict.fromkeys(column)) for column in zip(*(path.split(".") for path in paths), strict=True)]
    return ".".join(numbers_text(map(int, column)) if len(column) > 1 else column[0] for column in columns)


def numbers_text(numbers: Iterable[int]) -> str:
    """Ranges of whole numbers: 0, 1, 2, 5, 7, 8 -> "0-2,5,7-8"."""
    return ",".join(str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}" for run in number_runs(numbers))


def number_runs(numbers: Iterable[int]) -> list[range]:
    """Whole numbers as ranges without gaps: 0, 1, 2, 5 -> [range(0, 3), range(5, 6)]."""
    runs: list[range] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1].stop:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _split(path: str) -> tuple[str, str, str]:
    """Before, at and after the first number: "model.layers.3.mlp" -> ("model.layers", "3", "mlp"); else all before."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
    return path, "", ""


def _grouped(paths: Iterable[str], key: Callable[[str], _Key]) -> dict[_Key, list[str]]:
    groups: dict[_Key, list[str]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return groups


def _by_size(shares: Iterable[Share]) -> tuple[Share, ...]:
    return tuple(sorted(shares, key=lambda share: (-share.kept_bytes, -share.peak_bytes)))
