"""The cache: found again, by the right key only; crashes, damage, two processes, and disks that take nothing."""

import logging
import os
import pathlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny

import memplan
from memplan import cache
from memplan.corrections import Run
from memplan.device import CpuDevice
from memplan.errors import UsageError

RUN = Run(seconds={"keep": 1.0}, times="measured", step_s=1.5, predicted_bytes=1000, peak_bytes=1001)


def key(**changes: Any) -> cache.Key:
    values: dict[str, Any] = {
        "card": "a card",
        "driver": "1",
        "torch": "2",
        "memplan": "3",
        "model": "Llama",
        "signature": "4",
        "sample": "x[5] int64",
        "loss": "",
        "optimizer": "adamw",
        "autocast": None,
        "ranks": "1 x 1",
    }
    return cache.Key(**(values | changes))


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def _each_test_is_warned_anew() -> None:
    cache._warn_once.cache_clear()


def test_what_is_remembered_is_found_again_oldest_first(cache_folder: Path) -> None:
    later = RUN.model_copy(update={"step_s": 2.5})
    cache.remember(key(), RUN)
    cache.remember(key(), later)
    assert cache.runs_of(key()) == (RUN, later)
    assert cache.all_runs() == {key(): (RUN, later)}
    assert files(cache_folder) == [".json", ".json"]


@pytest.mark.parametrize("name", list(cache.Key.model_fields))
def test_each_part_of_the_key_counts(name: str, cache_folder: Path) -> None:
    cache.remember(key(), RUN)
    assert cache.runs_of(key(**{name: "another"})) == ()


def test_only_the_newest_are_kept(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.cache.RUNS_KEPT", 2)
    runs = [RUN.model_copy(update={"peak_bytes": peak}) for peak in (1, 2, 3)]
    for each in runs:
        cache.remember(key(), each)
    assert cache.runs_of(key()) == tuple(runs[1:])


def test_switched_off_it_neither_reads_nor_writes(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.remember(key(), RUN)
    monkeypatch.setenv("MEMPLAN_CACHE", "off")
    assert cache.folder() is None
    assert cache.runs_of(key()) == ()
    cache.remember(key(), RUN)
    monkeypatch.setenv("MEMPLAN_CACHE", "on")
    assert len(cache.runs_of(key())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\xff\x00" * 9,
        lambda text: text.replace('"predicted_bytes":1000', '"predicted_bytes":-1'),
    ],
    ids=["cut off", "empty", "no text", "an impossible value"],
)
def test_what_is_damaged_is_set_aside_with_a_word(
    damage: Any, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.remember(key(), RUN)
    cache.remember(key(), RUN)
    broken = min(cache_folder.rglob("*.json"))
    broken.write_text(damage(broken.read_text()), encoding="latin-1")
    assert cache.runs_of(key()) == (RUN,)
    assert "set aside" in caplog.text
    assert files(cache_folder) == [".bad", ".json"]
    caplog.clear()
    assert cache.runs_of(key()) == (RUN,)
    assert caplog.text == ""


def test_what_another_version_keeps_is_left_to_it(cache_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.remember(key(), RUN)
    cache.remember(key(model="GPT"), RUN)
    (theirs,) = (cache_folder / "runs" / key(model="GPT").digest).iterdir()
    theirs.write_text(theirs.read_text().replace('"schema_version":1', '"schema_version":99'))
    assert cache.all_runs() == {key(): (RUN,)}
    assert theirs.is_file()
    assert not caplog.text


def test_a_run_that_comes_while_the_cache_is_cleared_stays(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.remember(key(), RUN)
    own, later = Path.unlink, RUN.model_copy(update={"step_s": 2.5})

    def unlink(path: Path, missing_ok: bool = False) -> None:
        own(path, missing_ok=missing_ok)
        monkeypatch.setattr(Path, "unlink", own)
        cache.remember(key(), later)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert cache.clear() == 1
    assert cache.runs_of(key()) == (later,)


def test_a_crash_in_the_middle_of_a_write_leaves_what_was_there(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.remember(key(), RUN)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("memplan.cache.os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.remember(key(), RUN)
    assert cache.runs_of(key()) == (RUN,)
    (cache_folder / "runs" / key().digest / "1-1.part").write_text('{"schema_ver')  # a process that died there
    assert cache.runs_of(key()) == (RUN,)


def test_a_full_disk_is_said_once_and_stops_nothing(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memplan.cache.os.fsync", full)
    cache.remember(key(), RUN)
    cache.remember(key(), RUN)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "No space left on device. MEMPLAN_CACHE_DIR names another folder" in caplog.text
    assert files(cache_folder) == []


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path / "a file"))
    cache.remember(key(), RUN)
    assert cache.runs_of(key()) == ()
    assert "cannot keep what was measured" in caplog.text


def test_a_read_only_folder(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The administrator may write everywhere, so it is the calls that are refused."""
    cache.remember(key(), RUN)

    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        for call in ("replace", "unlink"):
            patched.setattr(pathlib.Path, call, refused)
        cache.remember(key(), RUN)
        assert cache.runs_of(key()) == (RUN,)
        with pytest.raises(UsageError, match="cannot clear the cache"):
            cache.clear()
    assert "cannot keep what was measured" in caplog.text
    assert "Permission denied" in caplog.text


def folder_of_another(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As where HOME is another user's: what is inside cannot even be asked for."""
    true_stat, true_listdir = os.stat, os.listdir

    def refused(call: Any) -> Any:
        def ask(path: Any = ".", *more: Any, **named: Any) -> Any:
            if not isinstance(path, int) and cache_folder in Path(os.fspath(path)).parents:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return call(path, *more, **named)

        return ask

    monkeypatch.setattr(os, "stat", refused(true_stat))
    monkeypatch.setattr(os, "listdir", refused(true_listdir))
    return "Permission denied"


def folder_with_too_long_a_name(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    cache_folder.mkdir()
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(cache_folder / ("x" * 300)))
    return "File name too long"


def folder_of_a_user_whom_nobody_knows(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", "~no-such-user/cache")
    return "cannot tell where ~no-such-user/cache is: the home folder is not known"


def folder_without_a_home(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pwd = pytest.importorskip("pwd")

    def unknown(_: int) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "MEMPLAN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return "cannot tell where the user's cache folder is"


USELESS = (
    folder_of_another,
    folder_with_too_long_a_name,
    folder_of_a_user_whom_nobody_knows,
    folder_without_a_home,
)


@pytest.mark.parametrize("make", USELESS)
def test_a_folder_of_no_use_is_said_once_and_stops_nothing(
    make: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = make(cache_folder, monkeypatch)
    for _ in range(2):
        assert cache.runs_of(key()) == ()
        assert cache.all_runs() == {}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(set(told)) > 0
    assert all(words in text and "MEMPLAN_CACHE=off does without" in text for text in told)
    cache.remember(key(), RUN)
    assert all(words in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("make", USELESS)
def test_a_plan_is_made_without_a_cache(make: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.plain(layers=3)
    make(cache_folder, monkeypatch)
    assert memplan.plan(model, "cpu", sample=batch, micro_batch=8, strategy="recompute-only").verdict == "fits"


def test_where_the_folder_is_cannot_always_be_told(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", "~no-such-user/cache")
    for asked in (cache.folder, cache.clear):
        with pytest.raises(UsageError, match="Set MEMPLAN_CACHE_DIR to another folder, or MEMPLAN_CACHE=off"):
            asked()


def test_clear(cache_folder: Path) -> None:
    assert cache.clear() == 0
    cache.remember(key(), RUN)
    cache.remember(key(card="another"), RUN)
    assert cache.clear() == 2
    assert cache.all_runs() == {}


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing(cache_folder: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from memplan.cache import Key, remember, runs_of
        from memplan.corrections import Run
        key, run, first = Key.model_validate_json(sys.argv[1]), Run.model_validate_json(sys.argv[2]), int(sys.argv[3])
        for at in range(20):
            remember(key, run.model_copy(update={"peak_bytes": first + at}))
            assert runs_of(key)
    """)
    given = [sys.executable, "-c", script, key().model_dump_json(), RUN.model_dump_json()]
    begun = [subprocess.Popen([*given, str(first)]) for first in (100, 200)]
    try:
        assert [process.wait(300) for process in begun] == [0, 0]
    finally:
        for process in begun:
            process.kill()
            process.wait()
    assert sorted(run.peak_bytes for run in cache.runs_of(key())) == [*range(100, 120), *range(200, 220)]


# --- from a run to the next plan ------------------------------------------------------------------------------------


def test_the_next_plan_starts_from_what_was_measured(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that is really measured is a slow one, whatever else the machine does: no clock decides."""
    monkeypatch.setattr(CpuDevice, "seconds_of", lambda _, step, repeats: [step() or 10.0 for _ in range(repeats)])
    model, batch = tiny.plain(layers=3)
    with memplan.autofit(model, "cpu:1GiB", sample=batch, micro_batch=8, strategy="recompute-only") as fit:
        assert fit.measured is not None
        first = fit.plan
        for _ in range(3):
            fit.remember(first.peak_bytes + 4096, 1.5 * sum(first.seconds.values()))
    assert not any("measured run" in text for text in first.assumptions)
    assert sum(first.seconds.values()) == pytest.approx(first.step_s)
    ((_, runs),) = cache.all_runs().items()
    assert runs[0].step_s == fit.measured.step_s
    again = memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=8, strategy="recompute-only")
    corrected = [text for text in again.assumptions if "measured run" in text]
    assert corrected[0].startswith("times corrected by 4 measured runs on this machine: x1.")
    assert corrected[1].startswith("4.00 KiB at least are kept free")
    assert again.step_s > sum(again.seconds.values())
    assert again.budget_bytes == 2**30 - 4096
    assert again.peak_bytes == first.peak_bytes


def test_a_plan_that_only_fitted_without_the_correction_becomes_uncertain(cache_folder: Path) -> None:
    model, batch = tiny.plain(layers=3)
    asked: dict[str, Any] = {"sample": batch, "micro_batch": 8, "strategy": memplan.Strategy("none", levers=())}
    needs = memplan.plan(model, "cpu:1GiB", **asked).peak_bytes
    margin = 2**30 - memplan.plan(model, "cpu:1GiB", **asked).budget_bytes
    tight = f"cpu:{needs + margin}B"
    with memplan.apply(model, memplan.plan(model, tight, **asked)) as fit:
        assert fit.plan.verdict is memplan.Verdict.FITS
        fit.remember(needs + margin + 1)
    found = memplan.plan(model, tight, **asked)
    assert found.verdict is memplan.Verdict.UNCERTAIN
    assert found.peak_bytes == needs


def test_a_run_with_another_sample_is_no_run_of_the_plan(cache_folder: Path) -> None:
    model, batch = tiny.plain(layers=3)
    with memplan.apply(
        model, memplan.plan(model, "cpu", sample=batch, micro_batch=8, strategy="recompute-only")
    ) as fit:
        fit.measure(1, sample=batch)
        assert cache.all_runs() == {}
        fit.measure(1)
    assert len(cache.all_runs()) == 1


def test_a_plan_for_another_model_or_optimizer_learns_nothing(cache_folder: Path) -> None:
    model, batch = tiny.plain(layers=3)
    with memplan.apply(
        model, memplan.plan(model, "cpu", sample=batch, micro_batch=8, strategy="recompute-only")
    ) as fit:
        fit.remember(fit.plan.peak_bytes, 9.0)
    other, _ = tiny.plain(layers=4)
    for found in (
        memplan.plan(other, "cpu", sample=batch, micro_batch=8, strategy="recompute-only"),
        memplan.plan(model, "cpu", sample=batch, micro_batch=8, strategy="recompute-only", optimizer="sgd"),
        memplan.plan(model, "24GiB", sample=batch, micro_batch=8, strategy="recompute-only"),
    ):
        assert not any("measured run" in text for text in found.assumptions)
