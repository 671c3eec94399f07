"""Argument > environment > file > default, and a clear word for what cannot be used."""

from pathlib import Path

import pytest

from memplan.errors import UsageError
from memplan.settings import Habits, Settings


def test_defaults(tmp_path: Path) -> None:
    assert Settings.found({}, {}, tmp_path) == Settings()


def test_precedence(tmp_path: Path) -> None:
    (tmp_path / "memplan.toml").write_text('gpu = "24GiB"\nstrategy = "throughput"\nrisk = 0.05\n')
    found = Settings.found(
        {"gpu": "16GiB", "risk": None}, {"MEMPLAN_GPU": "12GiB", "MEMPLAN_STRATEGY": "balanced"}, tmp_path
    )
    assert (found.gpu, found.strategy, found.risk) == ("16GiB", "balanced", 0.05)


def test_the_nearest_file_counts(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "memplan.toml").write_text('gpu = "24GiB"')
    (inside / "pyproject.toml").write_text("[tool.other]\n")
    assert Settings.found({}, {}, inside).gpu == "24GiB"
    (inside / "pyproject.toml").write_text('[tool.memplan]\ngpu = "48GiB"\n')
    assert Settings.found({}, {}, inside).gpu == "48GiB"


def test_environment_texts_become_values(tmp_path: Path) -> None:
    environ = {"MEMPLAN_ENABLED": "off", "MEMPLAN_MICRO_BATCH": "4", "MEMPLAN_RISK": "0.1", "PATH": "x"}
    found = Settings.found({}, environ, tmp_path)
    assert (found.enabled, found.micro_batch, found.risk) == (False, 4, 0.1)


@pytest.mark.parametrize(
    ("arguments", "environ", "toml", "words"),
    [
        ({"cache": False}, {}, "", "the arguments set 'cache', which is for all runs: set MEMPLAN_CACHE"),
        ({"gpu": 24}, {}, "", "the arguments set gpu = 24, which has to be a text"),
        ({}, {"MEMPLAN_MICRO_BATCH": "four"}, "", "the environment set micro_batch = 'four', which has to be a whole"),
        ({}, {"MEMPLAN_ENABLED": "perhaps"}, "", "enabled = 'perhaps', which has to be true or false"),
        ({}, {"MEMPLAN_CARD": "x"}, "", "set 'card', which is no setting of memplan: enabled, gpu"),
        ({}, {}, "micro_batch = true", "memplan.toml set micro_batch = True"),
        ({}, {}, "gpu = ", "cannot read the settings in"),
        ({}, {}, "micro_batch = -2", "micro_batch = -2, which has to be at least 1"),
    ],
)
def test_what_cannot_be_used(
    tmp_path: Path, arguments: dict[str, object], environ: dict[str, str], toml: str, words: str
) -> None:
    (tmp_path / "memplan.toml").write_text(toml)
    with pytest.raises(UsageError, match=words):
        Settings.found(arguments, environ, tmp_path)


def test_a_folder_that_cannot_be_looked_into(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot look for settings from .*File name too long. Start from another"):
        Habits.found({}, tmp_path / ("x" * 300))


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="the working directory: No such file or directory"):
        Settings.found({}, {})


@pytest.mark.parametrize(("toml", "words"), [("tool.memplan = 3", "has memplan = 3 under"), ("tool = 3", "")])
def test_a_project_file_without_a_table_of_settings(toml: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(toml)
    if not words:
        assert Settings.found({}, {}, tmp_path) == Settings()
        return
    with pytest.raises(UsageError, match=words):
        Settings.found({}, {}, tmp_path)


def test_habits_come_from_the_environment_before_a_file(tmp_path: Path) -> None:
    assert Habits.found({}, tmp_path) == Habits(cache=True, cache_dir=None, banner=True)
    (tmp_path / "memplan.toml").write_text('cache_dir = "/a"\nbanner = false\nrisk = 0.05\n')
    assert Habits.found({"MEMPLAN_CACHE": "off", "MEMPLAN_CACHE_DIR": "/b"}, tmp_path) == Habits(False, "/b", False)
    assert Settings.found({}, {"MEMPLAN_CACHE": "off"}, tmp_path) == Settings(risk=0.05)


def test_habits_do_not_mind_what_else_is_set(tmp_path: Path) -> None:
    assert Habits.found({"MEMPLAN_GPU": "", "MEMPLAN_OTHER": "x"}, tmp_path) == Habits()
    with pytest.raises(UsageError, match="the environment set banner = 'perhaps', which has to be true or false"):
        Habits.found({"MEMPLAN_BANNER": "perhaps"}, tmp_path)
