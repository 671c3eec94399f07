"""What would go wrong on this machine, and how to mend it. Needs neither a card nor torch: either may be broken."""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from packaging.requirements import Requirement

from memplan import cache, driver, main_memory, settings
from memplan.allocator import Settings
from memplan.errors import BadAllocatorSetting, MemplanError, NoDevice, UnknownGpu
from memplan.gpus import check_named, find_gpu
from memplan.report.diagnosis import Diagnosis, Finding, State
from memplan.strategy import load_strategy
from memplan.units import format_budget, format_bytes

if TYPE_CHECKING:
    from memplan.device import CudaDevice

_ASKED: Final = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
_ALLOCATOR: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_MUCH: Final = 0.05  # of a card, in the hands of others
_LEARNS_NOTHING: Final = "no plan learns from measured runs"
_LEAST_FREE_BYTES: Final = 2**26  # on the disk of the cache: some hundred thousand runs


def examine(environment: Mapping[str, str] = os.environ, cgroup: Path = main_memory.CGROUP) -> Diagnosis:
    """Look at versions, cards, the allocator's settings, main memory, memplan's settings and the cache.

    Args:
        environment: the variables of the process.
        cgroup: where Linux keeps the limits of a container.
    """
    return Diagnosis(
        findings=(
            *_versions(),
            _torch(),
            *_driver(environment),
            *_cards(),
            *_allocator(environment),
            _host(cgroup),
            *_settings(environment),
            *_cache(),
        )
    )


# --- versions -------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding(what="python", says=f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    needed = [Requirement(line) for line in metadata.requires("memplan") or ()]
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield _missing(requirement, "is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield _missing(requirement, f"is {version}")
        elif requirement.name in _ASKED:
            yield Finding(what=requirement.name, says=version)
    for name in _ASKED:
        if name not in {requirement.name for requirement in needed if requirement.marker is None}:
            with suppress(metadata.PackageNotFoundError):
                yield Finding(what=name, says=metadata.version(name))


def _missing(requirement: Requirement, why: str) -> Finding:
    return Finding(
        what=requirement.name,
        says=why,
        state=State.BROKEN,
        mend=f"pip install '{requirement.name}{requirement.specifier}'",
    )


def _torch() -> Finding:
    try:
        torch = import_module("torch")
    except Exception as error:  # anything: a half-installed torch fails in many ways
        says = f"cannot be imported: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return Finding(what="torch", says=says, state=State.BROKEN, mend="Install it anew: https://pytorch.org")
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "no GPU"
    )
    return Finding(what="torch's build", says=f"for {build}")


# --- cards ----------------------------------------------------------------------------------------------------------


def _driver(environment: Mapping[str, str]) -> Iterator[Finding]:
    cards = driver.cards()
    if version := driver.driver_version():
        yield Finding(what="NVIDIA's driver", says=f"{version}, {len(cards)} cards")
    for card in cards:
        if card.total_bytes is None:
            yield Finding(
                what=card.name,
                says="the driver tells no memory of its own: it is shared with the processor (Jetson, GB10)",
                state=State.CARE,
                mend="Give the part of main memory that a step may take as the budget, such as --gpu 64GiB.",
            )
        if card.has_mig:
            yield Finding(
                what=card.name,
                says="is cut into MIG slices, whose memory the driver does not tell by process",
                state=State.CARE,
                mend="Give the slice's memory as the budget, such as --gpu 20GiB, if others run on it too.",
            )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        hidden = visible.strip() in ("", "-1")
        says = f"{visible!r} hides every card" if hidden else f"{visible!r}: cuda:0 is the first of these"
        mend = "Unset it to use a card." if hidden else ""
        yield Finding(
            what="CUDA_VISIBLE_DEVICES", says=says, state=State.CARE if hidden and cards else State.FINE, mend=mend
        )
    if len({card.name for card in cards}) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        yield Finding(
            what="CUDA_DEVICE_ORDER",
            says="unset: torch counts the fastest card first, nvidia-smi counts by slot, so cuda:0 may be another card",
            state=State.CARE,
            mend="export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )


def _cards() -> Iterator[Finding]:
    """The cards that torch can use."""
    try:
        device = import_module("memplan.device")  # not at the top: torch may be broken
    except Exception:  # anything; `_torch` has said why
        return
    count = 0
    try:
        while True:
            yield from _card(f"cuda:{count}", device.resolve_gpu(f"cuda:{count}")[1])
            count += 1
    except NoDevice as error:
        if count == 0:
            here = driver.cards()
            why = str(error).partition(", but ")[2].partition(";")[0]
            yield Finding(
                what="cards for torch",
                says=f"none: {why}. Plans for the CPU and for cards elsewhere can be made",
                state=State.CARE if here else State.FINE,
                mend="The driver knows a card: install a build of torch for CUDA, https://pytorch.org" if here else "",
            )
    except Exception as error:  # anything: CUDA's own errors, of a driver that is too old for instance
        says = f"does not answer: {next(iter(str(error).splitlines()), type(error).__name__)}"
        yield Finding(
            what=f"cuda:{count}", says=says, state=State.CARE, mend="Update the driver, or restart the machine."
        )


def _card(name: str, card: "CudaDevice") -> Iterator[Finding]:
    now = card.memory()
    says = (
        f"{card.name}, {format_budget(now.total_bytes)}, of which {format_budget(now.free_bytes)} are free and "
        f"{format_bytes(now.others_bytes)} are held by others"
    )
    is_shared = now.others_bytes > _MUCH * now.total_bytes
    mend = "nvidia-smi names who holds it; a plan counts with what is left at that moment." if is_shared else ""
    yield Finding(what=name, says=says, state=State.CARE if is_shared else State.FINE, mend=mend)
    if card.cap_bytes < now.total_bytes:
        yield Finding(what=name, says=f"this process may reserve {format_budget(card.cap_bytes)} of it")
    for warning in card.warnings():
        yield Finding(what=name, says=warning, state=State.CARE)
    try:
        find_gpu(card.name)
    except UnknownGpu:
        yield Finding(what=name, says="is not in the catalogue: without weights on it, times are only ratios")


def _allocator(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Of torch's caching allocator. What memplan does not model it refuses, so that no plan for a live card is made."""
    for name in _ALLOCATOR:
        text = environment.get(name)
        if not text:
            continue
        try:
            Settings.from_conf(text)
            yield Finding(what=name, says=text)
        except BadAllocatorSetting as error:
            says, _, mend = str(error).partition(". ")
            yield Finding(what=name, says=says, state=State.CARE, mend=mend or f"Take it out of {text!r}.")
    if not any(environment.get(name) for name in _ALLOCATOR):
        yield Finding(what="allocator", says="torch's own settings")


# --- the host -------------------------------------------------------------------------------------------------------


def _host(cgroup: Path) -> Finding:
    memory = psutil.virtual_memory()
    says = f"{format_budget(memory.total)}, of which {format_budget(memory.available)} are free"
    limit = main_memory.limit_bytes(cgroup)
    if limit is not None and limit < memory.total:
        return Finding(
            what="main memory",
            says=f"{says}, and this container may have {format_budget(limit)}: gpu='cpu' would plan for more",
            state=State.CARE,
            mend=f"Pass the limit: --gpu 'cpu:{limit}B'.",
        )
    if "microsoft" in platform.release().lower():
        return Finding(
            what="main memory",
            says=f"{says}; in WSL little of it can be pinned, and copies to the host need pinned memory",
            state=State.CARE,
            mend="Give the strategy's host_memory a size, or take offload out of its levers.",
        )
    return Finding(what="main memory", says=says)


# --- memplan itself -------------------------------------------------------------------------------------------------


def _settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Of runs, and of memplan itself. A file that cannot be read stops both, and is told once."""
    said: dict[str, object] = {}
    wrong: dict[str, None] = {}
    for kind in (settings.Settings, settings.Habits):
        try:
            found = kind.found(environ=environment)
            if isinstance(found, settings.Settings):
                load_strategy(found.strategy)
                check_named(found.gpu)
        except MemplanError as error:
            wrong[str(error)] = None
        else:
            said |= {name: value for name, value in asdict(found).items() if value != getattr(kind(), name)}
    for text in wrong:
        mend = "Put it right there, or take it out: what is not set has a default."
        yield Finding(what="settings", says=text, state=State.BROKEN, mend=mend)
    if not wrong:
        texts = ", ".join(f"{name} = {value!r}" for name, value in said.items())
        yield Finding(what="settings", says=texts or "memplan's own")


def _cache() -> Iterator[Finding]:
    try:
        settings.Habits.found()
    except MemplanError:  # `_settings` has said why, and whether there is a cache cannot be told
        return
    try:
        folder = cache.folder()
    except MemplanError as error:
        yield _useless(str(error).partition(". ")[0])
        return
    if folder is None:
        yield Finding(what="cache", says=f"switched off: {_LEARNS_NOTHING}")
        return
    says, is_fine = _room_in(folder)
    yield Finding(what="cache", says=f"{folder}, {says}") if is_fine else _useless(f"{folder} {says}")


def _useless(why: str) -> Finding:
    mend = "Set MEMPLAN_CACHE_DIR to another folder, or MEMPLAN_CACHE=off."
    return Finding(what="cache", says=f"{why}: {_LEARNS_NOTHING}", state=State.CARE, mend=mend)


def _room_in(folder: Path) -> tuple[str, bool]:
    """How much room there is where a folder is or would be made, or why it is of no use."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
    except OSError as error:  # in another user's home for instance
        return f"cannot be looked at ({error.strerror})", False
    if not os.access(there, os.W_OK | os.X_OK):
        return "cannot be written to", False
    if free < _LEAST_FREE_BYTES:
        return f"has {format_budget(free)} left on its disk", False
    return f"{format_budget(free)} free", True
