"""`explain`, `compare` and `doctor` on the command line: exit codes, what goes where, bad files."""

import json
from pathlib import Path

import pytest
import tiny
from test_cli import GIB, a_plan, run
from torch import nn

from memplan.plan_record import Plan
from memplan.report.diagnosis import Diagnosis, Finding, State
from memplan.report.explain import Again


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    a_plan().save(path)
    return path


def test_explain_answers_on_stderr_and_with_json_on_stdout(saved: Path) -> None:
    told = run("explain", saved)
    assert (told.exit_code, told.stdout) == (0, "")
    assert "Where the memory goes" in told.stderr
    record = json.loads(run("explain", saved, "--json").stdout)
    assert sum(record["categories"].values()) == a_plan().peak_bytes


def test_explain_solves_again_where_the_model_is_named(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.llama(layers=2)[0].config.save_pretrained(tmp_path)
    asked = []

    def again(model: nn.Module, plan: Plan, by_bytes: int, strategy: str | None) -> Again:
        asked.append((type(model).__name__, plan, by_bytes, strategy))
        return Again(None, plan, plan.model_copy(update={"step_s": plan.step_s / 2}), None)

    monkeypatch.setattr("memplan.resolving.solved_again", again)
    told = run("explain", saved, "--config", tmp_path, "--json")
    assert told.exit_code == 0, told.stderr
    assert asked == [("LlamaForCausalLM", a_plan(), 2 * GIB, None)]
    record = json.loads(told.stdout)
    assert record["less"] == {"by_bytes": -2 * GIB, "step_s": None, "more_s": None, "exact": True}
    assert record["more"] == {"by_bytes": 2 * GIB, "step_s": 0.5, "more_s": -0.5, "exact": True}


def test_compare(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    a_plan(micro_batch=4, accumulation=2).save(other)
    told = run("compare", saved, other, "--json")
    assert told.exit_code == 0
    assert json.loads(told.stdout)["facts"] == {"micro_batch": ["2", "4"], "accumulation": ["4", "2"]}
    assert "micro batch" in told.stderr
    assert "other" in told.stderr
    assert "do not differ" in run("compare", saved, saved).stderr


def test_plans_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / name / "plan.json" for name in "ab"]
    for path, micro_batch in zip(paths, (2, 4), strict=True):
        path.parent.mkdir()
        a_plan(micro_batch=micro_batch, accumulation=8 // micro_batch).save(path)
    heading, *_ = run("compare", *paths, COLUMNS="400").stderr.splitlines()
    assert heading.split() == [str(path) for path in paths]


@pytest.mark.parametrize(("state", "code"), [(State.FINE, 0), (State.CARE, 0), (State.BROKEN, 2)])
def test_doctor(state: State, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Diagnosis(findings=(Finding(what="torch", says="is 1.0", state=state),))
    monkeypatch.setattr("memplan.doctor.examine", lambda: found)
    told = run("doctor", "--json")
    assert told.exit_code == code
    assert Diagnosis.model_validate_json(told.stdout) == found
    assert f"{state:<6} torch: is 1.0" in told.stderr


def test_doctor_names_a_setting_that_cannot_be_used() -> None:
    told = run("doctor", MEMPLAN_CACHE="perhaps", COLUMNS="400")
    assert isinstance(told.exception, SystemExit)
    assert told.exit_code == 2
    assert "broken settings: the environment set cache = 'perhaps', which has to be true or false" in told.stderr


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema_version": 2}', '{"schema_version": 3}'])
def test_a_file_that_is_no_plan_is_one_line_and_exit_code_2(text: str | None, saved: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    for arguments in (("explain", bad), ("compare", saved, bad)):
        told = run(*arguments)
        assert (told.exit_code, told.stdout) == (2, "")
        assert told.stderr.startswith("memplan: ")
        assert told.stderr.count("\n") == 1


def test_no_colour_and_forty_columns(saved: Path) -> None:
    told = run("explain", saved, NO_COLOR="1", COLUMNS="40")
    assert "\x1b" not in told.stderr
    assert max(map(len, told.stderr.splitlines())) <= 40
