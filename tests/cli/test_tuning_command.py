import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tuners
from torch import nn
from typer.testing import CliRunner, Result

from memplan.cli import app
from memplan.errors import DoesNotFit
from memplan.plan_record import Measured, Plan

MEASURED = tuners.measured(tuners.plan_of(1.0), 1.1)


class StandIn:
    """For `memplan.tuning`: notes what it was asked, and answers with one plan."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.asked, self.model = error, dict[str, Any](), nn.Module()

    def tune(self, model: nn.Module, gpu: str, **asked: Any) -> object:
        self.model, self.asked = model, {"gpu": gpu, **asked}
        if self.error is not None:
            raise self.error
        plan = tuners.plan_of(1.0)
        return SimpleNamespace(plan=plan, measured=MEASURED, describe=lambda: "measured 2 of 6 plans")


def run(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn, *arguments: object) -> Result:
    monkeypatch.setitem(sys.modules, "memplan.tuning", stand_in)  # type: ignore[arg-type]
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_a_model_with_weights_is_tuned_and_its_plan_written(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, file = StandIn(), config.parent / "plan.json"
    options = ("--gpu", "cpu:1GiB", "--effective-batch", 8, "--storage", "tune.log", "--trials", 4, "--save", file)
    result = run(monkeypatch, stand_in, "--config", config, *options, "--json")
    assert result.exit_code == 0, result.output
    assert {str(parameter.device) for parameter in stand_in.model.parameters()} == {"cpu"}
    assert all(parameter.isfinite().all() for parameter in stand_in.model.parameters())
    wanted = {"gpu": "cpu:1GiB", "effective_batch": 8, "storage": "tune.log", "n_trials": 4, "study": "memplan"}
    assert wanted.items() <= stand_in.asked.items()
    assert "measured 2 of 6 plans" in result.stderr
    assert Plan.model_validate_json(result.stdout) == Plan.load(file) == tuners.plan_of(1.0)


def test_what_was_measured_is_written_as_report_reads_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, took, page = (str(config.parent / name) for name in ("plan.json", "measured.json", "report.html"))
    asked = ("--config", config, "--gpu", "cpu", "--effective-batch", 8)
    result = run(monkeypatch, StandIn(), *asked, "--save", plan, "--measured", took)
    assert result.exit_code == 0, result.output
    assert Measured.model_validate_json(Path(took).read_text(encoding="utf-8")) == MEASURED
    result = CliRunner().invoke(app, ["report", plan, took, "--output", page])
    assert result.exit_code == 0, result.output
    assert "1.10 s" in Path(page).read_text(encoding="utf-8")
    result = run(monkeypatch, StandIn(), *asked, "--measured", config.parent / "missing" / "measured.json")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert "missing/measured.json: No such file or directory" in result.stderr


@pytest.mark.parametrize(
    ("options", "error", "code", "said"),
    [
        ((), DoesNotFit("no plan fits", 1), 3, "no plan fits"),
        (("--method", "qlora"), None, 2, "call memplan.tune on it"),
        ((), KeyboardInterrupt(), 130, "interrupted; what was measured is lost"),
        (
            ("--storage", "a.log"),
            KeyboardInterrupt(),
            130,
            "interrupted; started again with --storage a.log it goes on",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(
    options: tuple[str, ...],
    error: BaseException | None,
    code: int,
    said: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = run(monkeypatch, StandIn(error), "--config", config, "--gpu", "cpu", "--effective-batch", 2, *options)
    assert result.exit_code == code
    assert said in result.stderr
