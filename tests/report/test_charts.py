import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from page_plans import full_plan, point
from records_made import GIB, MIB, make_plan

from memplan.errors import PlanSchema, UsageError
from memplan.plan_record import Measured, Plan
from memplan.prediction import Timeline
from memplan.report.charts import COLOURS, INK, class_of, frontier_svg, timeline_svg
from memplan.trace import CATEGORIES
from memplan.units import format_budget, format_bytes

SVG = "{http://www.w3.org/2000/svg}"


def measured_at(peak_bytes: int, step_s: float) -> Measured:
    return Measured(
        peak_bytes=peak_bytes,
        predicted_bytes=19 * GIB,
        step_s=step_s,
        predicted_s=1.234,
        budget_bytes=22 * GIB,
        device="cpu",
        steps=2,
    )


def words_of(svg: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text")]


def path_of(svg: str, kind: str) -> str:
    (path,) = [p.get("d", "") for p in ET.fromstring(svg).iter(f"{SVG}path") if kind in p.get("class", "").split()]
    return path


def bytes_along(svg: str, kind: str, moments: int, top_bytes: int) -> list[float]:
    """What an area says at each moment, read off the picture by the height of the highest one in it."""
    plot = ET.fromstring(svg).attrib
    left, right, base = (float(plot[f"data-{name}"]) for name in ("left", "right", "base"))
    start, *steps = re.findall(
        r"(?:M[\d.]+ [\d.]+|H([\d.]+))V([\d.]+)", path_of(svg, kind).removesuffix(f"H{right:g}V{base:g}z")
    )
    places = [left, *(float(x) for x, _ in steps)]
    heights = [base - float(y) for _, y in (start, *steps)]
    highest, found = max(heights), []
    for moment in range(moments):
        x = left + moment / (moments - 1) * (right - left)
        found.append(heights[max(k for k, place in enumerate(places) if place <= x + 0.01)] / highest * top_bytes)
    return found


def limit_y(svg: str, name: str) -> float:
    (line,) = re.findall(rf'<path d="M\d+ ([\d.]+)H\d+" class="s-{name}"', svg)
    return float(line)


class TestTimeline:
    def test_each_area_reaches_the_sum_of_its_category_and_those_below(self) -> None:
        plan = full_plan()
        svg = timeline_svg(plan)
        assert plan.timeline is not None
        sums = [0] * len(plan.timeline.phase)
        for name, sizes in plan.timeline.bytes.items():
            if not any(sizes):
                assert f'class="{class_of(name)} ' not in svg
                continue
            sums = [below + size for below, size in zip(sums, sizes, strict=True)]
            shown = bytes_along(svg, class_of(name), len(sums), max(sums))
            assert shown == pytest.approx(sums, abs=max(sums) / 1000)

    def test_the_plain_step_is_behind_the_stack_and_named(self) -> None:
        plan = full_plan()
        svg = timeline_svg(plan)
        assert svg.index('class="plain') < svg.index(f'class="{class_of("params")} ')
        assert f"without a plan {format_bytes(plan.unplanned_bytes)}" in words_of(svg)
        assert plan.unplanned_timeline is not None
        totals = plan.unplanned_timeline.total
        assert bytes_along(svg, "plain", len(totals), max(totals)) == pytest.approx(totals, rel=0.002)

    def test_a_plan_that_saves_nothing_has_no_step_behind_it(self) -> None:
        plan = full_plan("kkk", unplanned_bytes=1)
        assert "without a plan" not in timeline_svg(plan)

    def test_phases_of_the_plain_step_lie_on_those_of_the_plan(self) -> None:
        # The planned backward has twice the moments; the plain one is stretched over the same room.
        planned = Timeline(phase=("forward",) * 4 + ("backward",) * 8, bytes={"params": (MIB,) * 12})
        plain = Timeline(phase=("forward",) * 4 + ("backward",) * 4, bytes={"params": (MIB,) * 4 + (2 * MIB,) * 4})
        svg = timeline_svg(
            full_plan(timeline=planned, unplanned_timeline=plain, peak_bytes=MIB, unplanned_bytes=2 * MIB)
        )
        (step,) = re.findall(r"H([\d.]+)V[\d.]+H", path_of(svg, "plain"))
        plot = ET.fromstring(svg).attrib
        left, right = float(plot["data-left"]), float(plot["data-right"])
        assert float(step) == pytest.approx(left + 3.5 / 11 * (right - left), abs=0.1)

    def test_lines_for_budget_reservation_and_measurement(self) -> None:
        plan = full_plan(fits_bytes=20 * GIB)
        svg = timeline_svg(plan, measured_at(21 * GIB, 1.0))
        for words in (
            f"budget {format_budget(plan.budget_bytes)}",
            f"reserved by the allocator {format_bytes(20 * GIB)}",
            f"measured peak {format_bytes(21 * GIB)}",
        ):
            assert words in words_of(svg)
        assert limit_y(svg, "budget") < limit_y(svg, "measured") < limit_y(svg, "reserved")

    def test_words_of_lines_that_are_close_do_not_lie_on_each_other(self) -> None:
        plan = full_plan()
        svg = timeline_svg(plan, measured_at(plan.budget_bytes - MIB, 1.0))
        heights = [
            float(text.get("y", "0"))
            for text in ET.fromstring(svg).iter(f"{SVG}text")
            if (text.text or "").startswith(("budget", "measured"))
        ]
        assert abs(heights[0] - heights[1]) >= 12

    def test_a_budget_far_above_is_told_and_not_drawn(self) -> None:
        far = make_plan().budget.model_copy(update={"total_bytes": 1000 * GIB})
        svg = timeline_svg(full_plan(budget=far))
        assert f"budget {format_budget(far.usable_bytes)}, outside this picture" in words_of(svg)
        assert not re.findall(r'H\d+" class="s-budget"', svg)

    @pytest.mark.parametrize("measured_bytes", [None, GIB])
    def test_a_peak_that_takes_the_whole_budget_is_in_the_picture(self, measured_bytes: int | None) -> None:
        peak = full_plan("kkk").peak_bytes
        tight = make_plan().budget.model_copy(
            update={"total_bytes": peak, "others_bytes": 0, "context_bytes": 0, "margin_bytes": 0}
        )
        plan = full_plan("kkk", budget=tight)
        run = None if measured_bytes is None else measured_at(measured_bytes, 1.0)
        svg = timeline_svg(plan, run)
        assert f"budget {format_budget(peak)}" in words_of(svg)
        assert limit_y(svg, "budget") > float(ET.fromstring(svg).attrib["data-head"])

    @pytest.mark.parametrize("width", [360, 640, 1000])
    def test_the_key_names_what_is_there_and_stays_inside(self, width: int) -> None:
        svg = timeline_svg(full_plan(), width=width)
        names = {"params", "optimizer", "grads", "activations", "logits/loss"}
        assert names <= set(words_of(svg))
        assert "buffers" not in words_of(svg)
        assert "params" not in words_of(timeline_svg(full_plan(), width=width, key=False))
        height = float(ET.fromstring(svg).get("viewBox", "").split()[3])
        assert all(float(text.get("y", "0")) <= height for text in ET.fromstring(svg).iter(f"{SVG}text"))

    def test_one_moment_is_a_timeline_too(self) -> None:
        once = Timeline(phase=("backward",), bytes={"params": (GIB,)})
        svg = timeline_svg(full_plan(timeline=once, unplanned_timeline=once))
        assert "backward" in words_of(svg)

    def test_without_a_timeline_there_is_no_picture(self) -> None:
        with pytest.raises(UsageError, match="no timeline"):
            timeline_svg(make_plan())

    @pytest.mark.parametrize("sizes", [{}, {"params": (1,)}, {"params": (1, 2), "grads": (1, 2, 3)}])
    def test_a_timeline_with_holes_is_a_damaged_plan(self, sizes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
        """Known when it is read, so that nobody else has to look."""
        for name in ("timeline", "unplanned_timeline"):
            record = json.loads(full_plan().model_dump_json())
            record[name] = {"phase": ["forward", "backward"], "bytes": sizes}
            (tmp_path / "plan.json").write_text(json.dumps(record))
            with pytest.raises(PlanSchema, match=f"damaged plan: {name}: .*a phase and all bytes"):
                Plan.load(tmp_path / "plan.json")

    def test_bytes_of_no_category_are_a_damaged_plan(self) -> None:
        odd = Timeline(phase=("forward",), bytes={"gold": (1,)})
        with pytest.raises(PlanSchema, match="'gold', which is none of"):
            timeline_svg(full_plan(timeline=odd))


def points_of(svg: str) -> list[tuple[float, float, str]]:
    """x, y and fill of the points, in their order."""
    dots = [dot for dot in ET.fromstring(svg).iter(f"{SVG}circle") if "dot" in dot.get("class", "")]
    return [(float(dot.get("cx", "")), float(dot.get("cy", "")), dot.get("fill", "")) for dot in dots]


class TestFrontier:
    def test_every_plan_is_a_point_to_scale_and_the_chosen_one_is_filled(self) -> None:
        plan = full_plan()
        shown = points_of(frontier_svg(plan))
        assert [fill for *_, fill in shown] == [INK["paper"][0], INK["ink"][0], INK["paper"][0]]
        (x0, y0, _), (x1, y1, _), (x2, y2, _) = shown
        sizes, times = [p.peak_bytes for p in plan.frontier], [p.step_s for p in plan.frontier]
        assert (x1 - x0) / (x2 - x0) == pytest.approx((sizes[1] - sizes[0]) / (sizes[2] - sizes[0]), abs=0.001)
        assert (y1 - y0) / (y2 - y0) == pytest.approx((times[1] - times[0]) / (times[2] - times[0]), abs=0.001)
        assert x0 < x1 < x2
        assert y0 < y1 < y2  # downwards is faster

    def test_points_say_what_they_are(self) -> None:
        labels = re.findall(r'data-plan="\d" aria-label="([^"]+)"', frontier_svg(full_plan()))
        assert labels[:2] == ["18.00 GiB, 1.40 s per step", "19.00 GiB, 1.23 s per step, chosen"]

    def test_a_budget_far_from_all_plans_is_left_out(self) -> None:
        assert f"budget {format_budget(22 * GIB)}" in words_of(frontier_svg(full_plan()))
        far = make_plan().budget.model_copy(update={"total_bytes": 1000 * GIB})
        assert not [words for words in words_of(frontier_svg(full_plan(budget=far))) if words.startswith("budget")]

    def test_a_measured_run_is_drawn_where_it_fits_and_told_where_not(self) -> None:
        assert "measured" in words_of(frontier_svg(full_plan(), measured_at(19 * GIB, 1.25)))
        assert "measured 19.00 GiB, 59.9 s: outside this picture" in words_of(
            frontier_svg(full_plan(), measured_at(19 * GIB, 59.9))
        )

    @pytest.mark.parametrize("step_s", [1e-6, 0.3, 1.0, 9.99, 63.0, 9000.0])
    def test_ticks_of_a_narrow_span_read_differently(self, step_s: float) -> None:
        near = (point("rrskk", 1000 * MIB, step_s), point("rrskk", 1001 * MIB, step_s * 0.999, chosen=True))
        svg = frontier_svg(full_plan(frontier=near))
        ticks = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text") if text.get("class") == "f-quiet"]
        assert len(ticks) == len(set(ticks))
        assert len(ticks) >= 5

    def test_one_plan_alone_is_drawn(self) -> None:
        assert len(points_of(frontier_svg(full_plan(frontier=(point("rrskk", GIB, 1.0, chosen=True),))))) == 1

    def test_without_plans_there_is_no_picture(self) -> None:
        with pytest.raises(UsageError, match="no frontier"):
            frontier_svg(make_plan())


def linear(channel: int) -> float:
    """sRGB to light, IEC 61966-2-1."""
    share = channel / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def light_of(colour: str) -> list[float]:
    return [linear(int(colour[at : at + 2], 16)) for at in (1, 3, 5)]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05)."""
    a, b = (
        sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), light_of(c), strict=True)) + 0.05
        for c in (one, other)
    )
    return max(a, b) / min(a, b)


# Machado, Oliveira and Fernandes (2009), severity 1: protanopia, deuteranopia, tritanopia; and full sight.
EYES = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
)


def lab(colour: str, eye: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    """CIELAB under D65, as an eye sees it."""
    lights = light_of(colour)
    r, g, b = (min(1.0, max(0.0, sum(m * part for m, part in zip(row, lights, strict=True)))) for row in eye)
    x, y, z = (
        v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116
        for v in (
            (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
            0.2126 * r + 0.7152 * g + 0.0722 * b,
            (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
        )
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def difference(one: str, other: str) -> float:
    return min(sum((a - b) ** 2 for a, b in zip(lab(one, eye), lab(other, eye), strict=True)) ** 0.5 for eye in EYES)


@pytest.mark.parametrize("room", [0, 1], ids=["light", "dark"])
class TestColours:
    def test_they_stand_out_from_the_paper(self, room: int) -> None:
        paper = INK["paper"][room]
        assert min(contrast(pair[room], paper) for pair in COLOURS.values()) >= 3
        assert (
            min(contrast(INK[name][room], paper) for name in ("ink", "quiet", "budget", "measured", "reserved")) >= 4.5
        )
        assert contrast(INK["edge"][room], paper) >= 3
        assert contrast(INK["ink"][room], INK["shade"][room]) >= 4.5

    def test_any_eye_tells_neighbours_and_the_large_ones_apart(self, room: int) -> None:
        names = list(COLOURS)
        neighbours = itertools.pairwise(names)
        large = ("params", "optimizer", "grads", "activations", "logits/loss", "temporaries")
        assert min(difference(COLOURS[a][room], COLOURS[b][room]) for a, b in neighbours) >= 21
        assert min(difference(COLOURS[a][room], COLOURS[b][room]) for a, b in itertools.combinations(large, 2)) >= 10


def test_every_category_has_a_colour_in_the_order_of_the_stack() -> None:
    assert tuple(COLOURS) == (*CATEGORIES, "allocator")


def test_a_hostile_name_stays_text() -> None:
    plan = full_plan(peak_phase='"><script>alert(1)</script>')
    svg = timeline_svg(plan)
    assert not list(ET.fromstring(svg).iter(f"{SVG}script"))
