"""No test reads or writes what the user's own runs were measured to need; a test of the cache switches it on."""

import os
from pathlib import Path

import pytest

os.environ["MEMPLAN_CACHE"] = "off"  # also for the processes that tests start


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache switched on, empty, in a folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEMPLAN_CACHE", "on")
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(folder))
    return folder
