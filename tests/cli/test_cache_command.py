"""`memplan cache show` and `memplan cache clear`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memplan import cache
from memplan.cli import app
from memplan.corrections import Run

MIB = 2**20
KEY = cache.Key(
    card="a card",
    driver="1",
    torch="2",
    memplan="3",
    model="Llama",
    signature="4",
    sample="x[5] int64",
    loss="",
    optimizer="adamw",
    autocast=None,
    ranks="1 x 1",
)
RUN = Run(seconds={"keep": 1.0}, times="measured", step_s=1.25, predicted_bytes=90 * MIB, peak_bytes=91 * MIB)


def test_what_was_learned_is_shown_and_forgotten(cache_folder: Path) -> None:
    less = RUN.model_copy(update={"peak_bytes": 81 * MIB})
    cache.remember(KEY, RUN)
    cache.remember(KEY, less)
    shown = CliRunner().invoke(app, ["cache", "show", "--json"])
    assert shown.exit_code == 0
    told = [" ".join(line.split()) for line in shown.stderr.splitlines()]
    assert told[:4] == ["Llama, adamw", "on a card", "runs 2", "times, measured x1.21"]
    assert told[4] == "steps took +25.0% beside the prediction"
    assert told[5] == "peaks were -10.0% to +1.1% beside the prediction"
    assert told[6] == "kept free 1.00 MiB"
    assert f"2 runs in {cache_folder}" in shown.stderr
    (entry,) = json.loads(shown.stdout)["entries"]
    assert entry == {"key": KEY.model_dump(), "runs": [RUN.model_dump(), less.model_dump()]}
    assert CliRunner().invoke(app, ["cache", "clear"]).stderr == "forgot 2 runs\n"
    assert "0 runs in" in CliRunner().invoke(app, ["cache", "show"]).stderr


@pytest.mark.parametrize("command", ["show", "clear"])
def test_switched_off(command: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.remember(KEY, RUN)
    monkeypatch.setenv("MEMPLAN_CACHE", "off")
    found = CliRunner().invoke(app, ["cache", command])
    assert (found.exit_code, found.stdout) == (0, "")
    assert "switched off" in found.stderr
    monkeypatch.setenv("MEMPLAN_CACHE", "on")
    assert len(cache.runs_of(KEY)) == 1


def test_a_setting_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE", "perhaps")
    found = CliRunner().invoke(app, ["cache", "show"])
    assert found.exit_code == 2
    assert "cache = 'perhaps', which has to be true or false" in found.stderr
