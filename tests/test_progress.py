"""A bar where somebody waits at a terminal, and nothing elsewhere."""

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny
from rich.console import Console

import memplan
from memplan.progress import STAGES, part, shown, stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def made_stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr; by the test itself, for pytest sets stderr anew after every fixture."""
    monkeypatch.setattr(sys, "stderr", fake := Terminal())
    return fake


def test_planning_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = made_stderr(monkeypatch)
    model, batch = tiny.plain(layers=2)
    memplan.plan(model, "cpu", sample=batch, micro_batch=8, strategy="recompute-only")
    drawn = terminal.getvalue()
    assert "planning" in drawn
    places = [drawn.index(name) for name in STAGES]
    assert places == sorted(places)


def test_it_never_goes_back_and_an_inner_one_is_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = made_stderr(monkeypatch)
    with shown("[outer]"):
        stage("checking")
        with shown("inner"):
            stage("tracing")
    assert "[outer]" in terminal.getvalue()
    assert "checking" in terminal.getvalue()
    assert "inner" not in terminal.getvalue()
    assert "tracing" not in terminal.getvalue()


def test_parts_come_after_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = made_stderr(monkeypatch)
    with shown("tuning"):
        stage("checking")
        part(1, 4, "trial")
        stage("solving")
        part(2, 4, "trial")
        part(1, 4, "trial")
    drawn = terminal.getvalue()
    places = [drawn.index(words) for words in ("checking", "trial 1 of 4", "trial 2 of 4")]
    assert places == sorted(places)
    assert drawn.count("trial 1 of 4") == 1
    assert "solving" not in drawn


def test_tuning_says_which_trial_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = made_stderr(monkeypatch)
    model, batch = tiny.plain(layers=2)
    memplan.tune(model, "cpu:1GiB", sample=batch, effective_batch=2, n_trials=1)
    assert "tuning" in terminal.getvalue()
    assert "trial 1 of 1" in terminal.getvalue()


@shown("work")
def failing() -> None:
    stage("solving")
    raise KeyError


def test_it_is_gone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = made_stderr(monkeypatch)
    with pytest.raises(KeyError):
        failing()
    drawn = terminal.getvalue()
    stage("solving")
    assert terminal.getvalue() == drawn
    assert drawn.endswith("\x1b[2K")  # the line is cleared


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with shown("work"):
        stage("solving")
    with shown("work", Console(file=sys.stderr)):
        stage("solving")
    assert capsys.readouterr() == ("", "")


class Cells:
    """What a notebook shows below its cells, as `IPython.display` changes it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.display = ModuleType("IPython.display")
        self.display.display = lambda html, display_id: self.update(html)
        self.display.HTML = str

    def update(self, html: str) -> "Cells":
        self.seen.append(html)
        return self


def test_in_a_notebook_it_is_below_the_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells, ipython = Cells(), ModuleType("IPython")
    shell = SimpleNamespace(kernel=None)
    ipython.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", cells.display)
    with shown("<planning>"):
        stage("tracing")
    with pytest.raises(KeyError):
        failing()
    assert cells.seen == [
        "",
        '&lt;planning&gt; <progress value="0" max="4"></progress> tracing',
        "",
        "",
        'work <progress value="2" max="4"></progress> solving',
        "",
    ]
    del shell.kernel  # a shell in a terminal
    with shown("work"):
        stage("solving")
    assert len(cells.seen) == 6
    assert capsys.readouterr() == ("", "")
