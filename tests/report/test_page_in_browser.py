"""The page as a reader has it: in Chromium. Skipped where there is none, unless NEED_BROWSER is set."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_plans import full_plan
from records_made import GIB, MIB, make_plan
from test_charts import measured_at

from memplan.plan_record import Measured, Plan
from memplan.prediction import Timeline
from memplan.report.page import page_html
from memplan.units import format_bytes, format_seconds

pytestmark = pytest.mark.slow

Open = Callable[..., Any]  # plan, measured, what the browser's context takes -> a playwright page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if found is None:
        message = "no Chromium, or no playwright: apt-get install chromium; pip install playwright"
        if os.environ.get("NEED_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as driver, driver.chromium.launch(executable_path=found) as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens plans from disk; in the end no page may have complained or asked for another file."""
    complaints: list[str] = []
    asked: list[str] = []

    def open_(plan: Plan, measured: Measured | None = None, width: int = 1100, **context: Any) -> Any:
        path = tmp_path / "report.html"
        path.write_text(page_html(plan, measured), encoding="utf-8")
        page = browser.new_context(viewport={"width": width, "height": 800}, **context).new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    assert complaints == []
    assert {url for url in asked if not url.startswith("data:")} == {(tmp_path / "report.html").as_uri()}


def told(page: Any) -> dict[str, tuple[int, str]]:
    """Under the timeline: category -> bytes and their text."""
    rows = "all => all.map(d => [d.dataset.category ?? 'total', Number(d.value), d.textContent])"
    return {name: (n_bytes, text.strip()) for name, n_bytes, text in page.eval_on_selector_all("#moment data", rows)}


def recorded(timeline: Timeline, moment: int) -> dict[str, tuple[int, str]]:
    sizes = {name: column[moment] for name, column in timeline.bytes.items() if any(column)}
    sizes["total"] = timeline.total[moment]
    return {name: (size, format_bytes(size)) for name, size in sizes.items()}


def shown_rows(page: Any, table: str) -> list[list[str]]:
    rows = "all => all.filter(r => r.checkVisibility()).map(r => [...r.cells].map(c => c.textContent.trim()))"
    return page.eval_on_selector_all(f"{table} tbody tr", rows)


def test_it_draws_and_begins_at_the_peak(open_page: Open) -> None:
    plan = full_plan()
    assert plan.timeline is not None
    page = open_page(plan, measured_at(19 * GIB, 1.25))
    assert page.locator("h1").inner_text().split("\n")[-1] == "LlamaForCausalLM fits into 22.00 GiB"
    assert page.locator("svg.timeline:visible").count() == page.locator("svg.frontier:visible").count() == 1
    assert page.locator("svg.timeline:visible").bounding_box()["height"] > 250
    assert told(page) == recorded(plan.timeline, plan.timeline.total.index(max(plan.timeline.total)))


def test_pointing_at_a_moment_tells_its_bytes(open_page: Open) -> None:
    timeline = full_plan().timeline
    assert timeline is not None
    page = open_page(full_plan())
    picture = page.locator("svg.timeline:visible")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    left, right = (float(picture.get_attribute(f"data-{side}")) for side in ("left", "right"))
    last = len(timeline.phase) - 1
    for moment in range(last + 1):
        x = (left + moment / last * (right - left)) * box["width"] / 1000
        page.mouse.move(box["x"] + x, box["y"] + 100)
        assert told(page) == recorded(timeline, moment)
        assert page.locator("#moment .phase").inner_text() == timeline.phase[moment]


def test_the_keys_walk_through_the_step_and_write_sizes_as_python_does(open_page: Open) -> None:
    sizes = (
        0,
        1,
        1023,
        1024,
        1025,
        MIB - 1,
        MIB,
        MIB + 1,
        10 * MIB + 51,
        GIB - 1,
        GIB,
        1023 * GIB,
        2**40 - 1,
        2**46 + 1,
    )
    timeline = Timeline(phase=("forward",) * len(sizes), bytes={"params": sizes, "grads": (0,) * len(sizes)})
    page = open_page(full_plan(timeline=timeline, unplanned_timeline=timeline))
    picture = page.locator("svg.timeline:visible")
    picture.focus()
    page.keyboard.press("Home")
    for moment in range(len(sizes)):
        assert told(page) == recorded(timeline, moment)
        assert picture.get_attribute("aria-valuenow") == str(moment + 1)
        assert picture.get_attribute("aria-valuetext").endswith(format_bytes(sizes[moment]))
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert told(page) == recorded(timeline, len(sizes) - 2)


def test_the_slider_and_the_points_show_other_plans(open_page: Open) -> None:
    plan = full_plan("rrskk")
    page = open_page(plan)

    def shows(at: int) -> None:
        point = plan.frontier[at]
        assert [run[1] for run in shown_rows(page, ".plan") for _ in range(int(run[2]))] == list(point.options)
        figures = page.locator(".plan:visible .figures data")
        assert figures.all_inner_texts() == [format_bytes(point.peak_bytes), format_seconds(point.step_s)]
        assert page.locator("#slider").input_value() == str(at)
        assert page.locator("svg.frontier:visible .point.on").get_attribute("data-plan") == str(at)

    shows(1)
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    shows(0)
    assert shown_rows(page, ".plan") == [["model.layers.0-4", "recompute", "5", "300.00 MiB", "16.00 MiB", "12.3 ms"]]
    page.keyboard.press("End")
    shows(2)
    page.locator('svg.frontier:visible [data-plan="1"] .touch').click()
    shows(1)
    page.locator('svg.frontier:visible [data-plan="1"]').focus()
    page.keyboard.press("ArrowLeft")
    shows(0)


def test_search_and_order_of_the_breakdown(open_page: Open) -> None:
    modules = {f"activations/model.layers.{i}.{kind}": (20 - i) * MIB for i in range(20) for kind in ("mlp", "attn")}
    page = open_page(full_plan(breakdown={"params": GIB, **modules}))
    assert len(shown_rows(page, "#breakdown")) == 12
    page.locator("#search").fill("LAYERS.1.")
    assert sorted(row[1] for row in shown_rows(page, "#breakdown")) == ["model.layers.1.attn", "model.layers.1.mlp"]
    assert page.locator(".search output").inner_text() == "2 of 41 rows, 38.00 MiB"
    page.locator("#search").fill("")
    page.locator("#more").click()
    assert len(shown_rows(page, "#breakdown")) == 41
    page.get_by_role("button", name="Size").click()
    assert shown_rows(page, "#breakdown")[0][2] == "1.00 MiB"
    page.get_by_role("button", name="Module").click()
    modules_shown = [row[1] for row in shown_rows(page, "#breakdown")]
    assert modules_shown[1:4] == ["model.layers.0.attn", "model.layers.0.mlp", "model.layers.1.attn"]
    assert page.locator("#breakdown th[aria-sort]").inner_text().strip() == "Module"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_colours(open_page: Open, scheme: str) -> None:
    page = open_page(full_plan("rrskk" * 25), measured_at(19 * GIB, 1.25), width=360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("svg.timeline:visible").bounding_box()["width"] <= 360
    paper = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 29)"}
    assert page.evaluate(paper) == colours.pop(scheme)
    page.locator("#theme").click()
    assert page.evaluate(paper) == colours.popitem()[1]


def test_on_paper_it_is_light_and_without_controls(open_page: Open) -> None:
    page = open_page(full_plan(), color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert page.locator("button:visible, input:visible").count() == 0
    assert len(shown_rows(page, ".plan")) == 3


def test_everything_that_acts_is_reached_by_tab(open_page: Open) -> None:
    page = open_page(full_plan())
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('class')"))
    assert {"theme", "timeline", "point", "point on", "slider", "search"} <= set(reached)


def test_a_plan_without_timeline_or_other_plans_is_a_page_too(open_page: Open) -> None:
    page = open_page(make_plan())
    assert page.locator("svg").count() == 0
    assert page.locator(".note").inner_text().startswith("This plan carries no timeline")
    assert len(shown_rows(page, ".plan")) == 2
