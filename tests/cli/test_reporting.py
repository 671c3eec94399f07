import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from memplan.cli import app
from memplan.plan_record import Budget, Layer, Measured, Plan, Verdict
from memplan.prediction import Timeline
from memplan.report.charts import timeline_svg
from memplan.report.page import page_html

GIB = 2**30


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def a_plan(timeline: Timeline | None = None) -> Plan:
    layers = (Layer(path="blocks.0", option="keep", keep_bytes=GIB, held_bytes=GIB, extra_s=0.0),)
    return Plan(
        verdict=Verdict.FITS,
        reason="nothing is recomputed",
        budget=Budget(gpu="24GiB", total_bytes=24 * GIB, others_bytes=0, context_bytes=0, margin_bytes=GIB),
        strategy="balanced",
        micro_batch=2,
        accumulation=1,
        effective_batch=2,
        decisions={"blocks.0": "keep"},
        layers=layers,
        peak_bytes=20 * GIB,
        peak_phase="backward",
        breakdown={"params": 20 * GIB},
        unplanned_bytes=20 * GIB,
        step_s=1.0,
        samples_per_s=2.0,
        slowdown=0.0,
        gap=0.0,
        shadow_price=0.0,
        times="estimate",
        smallest_bytes=10 * GIB,
        timeline=timeline,
        optimizer="adamw",
        autocast=None,
        how="fake",
        model="Net",
        signature="0",
    )


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    a_plan(Timeline(phase=("forward", "backward"), bytes={"params": (20 * GIB, 20 * GIB)})).save(path)
    return path


@pytest.fixture
def measured_file(tmp_path: Path) -> Path:
    path = tmp_path / "measured.json"
    measured = Measured(
        peak_bytes=19 * GIB,
        predicted_bytes=20 * GIB,
        step_s=1.1,
        predicted_s=1.0,
        budget_bytes=23 * GIB,
        device="cpu",
        steps=2,
    )
    path.write_text(measured.model_dump_json(), encoding="utf-8")
    return path


def test_the_page_is_written_where_it_was_asked_for(plan_file: Path, measured_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    result = run(plan_file, measured_file, "-o", page)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"wrote {page}" in result.stderr
    measured = Measured.model_validate_json(measured_file.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == page_html(Plan.load(plan_file), measured)


def test_pictures_alone_and_what_cannot_be_drawn(plan_file: Path, tmp_path: Path) -> None:
    result = run(plan_file, "-o", tmp_path / "page.html", "--svg", tmp_path / "pictures")
    assert result.exit_code == 0
    assert (tmp_path / "pictures" / "timeline.svg").read_text(encoding="utf-8") == timeline_svg(Plan.load(plan_file))
    assert "no frontier: the plan carries no other plans" in result.stderr
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["timeline.svg"]


def test_pictures_in_pixels_show_their_words(plan_file: Path, tmp_path: Path) -> None:
    resvg_py = pytest.importorskip("resvg_py")
    result = run(plan_file, "-o", tmp_path / "page.html", "--png", tmp_path / "pictures")
    assert result.exit_code == 0
    drawn = (tmp_path / "pictures" / "timeline.png").read_bytes()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["timeline.png"]
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(drawn[16:20], "big") == 2000
    wordless = re.sub(r"<text.*?</text>", "", timeline_svg(Plan.load(plan_file)))
    assert len(bytes(resvg_py.svg_to_bytes(svg_string=wordless, zoom=2))) < 0.9 * len(drawn)


def test_pixels_need_a_package_and_nothing_is_written_without(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    result = run(plan_file, "-o", tmp_path / "page.html", "--png", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'memplan[png]'" in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_plan_without_timeline_has_a_page(tmp_path: Path) -> None:
    a_plan().save(tmp_path / "plan.json")
    result = run(tmp_path / "plan.json", "-o", tmp_path / "page.html", "--svg", tmp_path)
    assert result.exit_code == 0
    assert "no timeline: " in result.stderr
    assert "carries no timeline" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"schema_version": 1}', '{"schema_version": 3}', "\x00"])
def test_a_broken_plan_is_one_line_and_no_page(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content, encoding="utf-8")
    result = run(tmp_path / "plan.json", "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert result.stderr.startswith("memplan: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", [b"{}", b"no", b"\xff"])
def test_a_broken_measurement_says_how_one_is_written(content: bytes, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_bytes(content)
    result = run(plan_file, tmp_path / "measured.json", "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "is no measurement: write fit.measured.model_dump_json() into it" in result.stderr


def test_what_is_not_there_or_cannot_be_written(plan_file: Path, tmp_path: Path) -> None:
    assert "cannot read the plan file" in run(tmp_path / "none.json").stderr
    missing = run(plan_file, tmp_path / "none.json")
    assert (missing.exit_code, "cannot read the measurement" in missing.stderr) == (2, True)
    blocked = run(plan_file, "-o", plan_file / "page.html")
    assert (blocked.exit_code, "cannot write" in blocked.stderr) == (2, True)
    assert run(plan_file, "-o", tmp_path).exit_code == 2


def test_a_measurement_of_another_plan_is_refused_with_both_numbers(
    plan_file: Path, measured_file: Path, tmp_path: Path
) -> None:
    other = measured_file.read_text(encoding="utf-8").replace(f'"predicted_bytes":{20 * GIB}', '"predicted_bytes":1000')
    measured_file.write_text(other, encoding="utf-8")
    result = run(plan_file, measured_file, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    for words in ("predicted a peak of 1,000 bytes", f"predicts {20 * GIB:,}. Measure this plan"):
        assert words in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_full_disk_leaves_the_older_page(plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, pictures = tmp_path / "page.html", tmp_path / "pictures"
    assert run(plan_file, "-o", page, "--svg", pictures).exit_code == 0
    kept = page.read_bytes(), sorted(pictures.iterdir())
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # no file may grow beyond it, as on a full disk
    try:
        result = run(plan_file, "-o", page, "--svg", pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.exit_code, f"cannot write {page}: {os.strerror(errno.EFBIG)}" in result.stderr) == (2, True)
    assert (page.read_bytes(), sorted(pictures.iterdir())) == kept
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def test_parts_of_a_plan_that_contradict_each_other_are_a_damaged_plan(plan_file: Path, tmp_path: Path) -> None:
    text = plan_file.read_text(encoding="utf-8").replace('"option": "keep"', '"option": "magic"')
    plan_file.write_text(text, encoding="utf-8")
    result = run(plan_file, "-o", tmp_path / "page.html")
    assert (result.exit_code, "the plan is damaged" in result.stderr) == (2, True)


def test_the_page_needs_no_torch(plan_file: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from memplan.cli import app
app(["report", {str(plan_file)!r}, "-o", {str(tmp_path / "page.html")!r}], standalone_mode=False)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
