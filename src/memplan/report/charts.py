"""A plan as two pictures: memory over the step, and memory against time. Plain SVG text from plain records.

Colours are attributes, for whoever shows the file as it is. Everything has a class too, so that the page
(`memplan.report.page`) can give it the colours of a dark room. One unit of a picture is one CSS pixel at its own width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, log2, log10
from typing import Final

from memplan.errors import PlanSchema, UsageError
from memplan.plan_record import FrontierPoint, Measured, Plan
from memplan.prediction import Timeline
from memplan.units import format_budget, format_bytes, format_seconds

# On light paper, on dark paper. Each stands out from its paper by 3:1 at least (WCAG 2.2, 1.4.11). Neighbours in the
# stack differ by 21 in CIELAB and any two of the six large ones by 10, also with each kind of colour blindness
# (matrices of Machado, Oliveira and Fernandes, 2009).
COLOURS: Final = {
    "params": ("#24356f", "#5270c6"),
    "buffers": ("#8c6d31", "#b89a5e"),
    "inputs": ("#59636d", "#8d97a2"),
    "optimizer": ("#4196cc", "#7fbbe6"),
    "libraries": ("#633a86", "#8f62bf"),
    "grads": ("#1b8a6f", "#35b291"),
    "activations": ("#dc6730", "#f0874a"),
    "logits/loss": ("#661340", "#b9559f"),
    "temporaries": ("#6e6212", "#f0dc6e"),
    "allocator": ("#747c84", "#7d868f"),
}
INK: Final = {  # of lines and words; words stand out by 4.5:1 at least
    "paper": ("#ffffff", "#15181d"),
    "ink": ("#1b1f24", "#e7e5e0"),
    "quiet": ("#59616b", "#a2a9b3"),
    "rule": ("#dde0e4", "#2f353d"),
    "edge": ("#8b939c", "#5f6873"),
    "shade": ("#f1f2f4", "#20252c"),
    "budget": ("#b3261e", "#ff8a80"),
    "measured": ("#0a5bb5", "#7db7f5"),
    "reserved": ("#8a5a00", "#e9b44c"),
}
_LETTER: Final = 6.4  # the width of a letter of 12 px, on average, for the layout of words
_LINE: Final = 16
# The last ones by name: what makes pixels of a picture looks for no other font of a system than those that are named.
_FONTS: Final = "system-ui, Arial, Helvetica, Liberation Sans, DejaVu Sans, Noto Sans, sans-serif"


def timeline_svg(plan: Plan, measured: Measured | None = None, *, width: int = 1000, key: bool = True) -> str:
    """Bytes by category over the step, stacked; behind it the step without a plan; budget and measured peak as lines.

    Moments are operators in the order in which they run, not seconds. Each phase of the step without a plan is
    stretched to the same phase of the plan. `key` names the colours under the picture.

    Raises:
        UsageError: the plan has no timeline.
        PlanSchema: its timeline has categories that memplan does not know.
    """
    if plan.timeline is None:
        raise UsageError("the plan carries no timeline, so memory over the step cannot be drawn: make the plan again")
    plain = plan.unplanned_timeline if plan.unplanned_bytes > plan.peak_bytes else None
    lines = _levels(plan, measured)
    tops = [max(plan.timeline.total), *([max(plain.total)] if plain else [])]
    tops += [size for size, _, name, _ in lines if name != "budget"]
    names = [name for name, sizes in plan.timeline.bytes.items() if any(sizes)]
    legend = _legend(names, width) if key else []
    spans = (0, max(1, len(plan.timeline.phase) - 1)), (0, _top(tops, plan.budget_bytes))
    frame = _Frame(width, 300 if width < 500 else 380, *spans, left=66, right=8, bottom=28 + _LINE * len(legend))

    drawn = [*_grid(frame, _size_ticks(*frame.span_y))]
    if plain is not None:
        drawn.append(_curve(frame, _aligned(plain.phase, plan.timeline.phase), plain.total, "plain", "shade", "edge"))
    drawn += _stack(frame, plan.timeline, names)
    drawn += _phases(frame, plan.timeline.phase)
    drawn += _rules(frame, lines)
    if plain is not None:
        drawn.append(_plain_label(frame, plain, plan))
    for row, entries in enumerate(legend):
        drawn += _key_row(entries, frame.height - _LINE * (len(legend) - row) + 4)
    peak = f"peak {plan.beside_budget(plan.peak_bytes)} in {plan.peak_phase}, budget {format_budget(plan.budget_bytes)}"
    return _svg(frame, "timeline", f"Memory over one training step: {peak}", drawn)


def frontier_svg(plan: Plan, measured: Measured | None = None, *, width: int = 1000) -> str:
    """Memory needed against time per step of the plans found at this micro-batch, the chosen one filled.

    Raises:
        UsageError: the plan has no frontier.
    """
    points = plan.frontier
    if not points:
        raise UsageError("the plan carries no other plans, so there is no frontier to draw: make the plan again")
    sizes, times = [point.peak_bytes for point in points], [point.step_s for point in points]
    limit = plan.budget_bytes if _near(plan.budget_bytes, sizes) else None
    run = measured if measured and _near(measured.needs_bytes, sizes) and _near(measured.step_s, times) else None
    span_x = _padded([*sizes, *([] if limit is None else [limit]), *([run.needs_bytes] if run else [])])
    span_y = _padded([*times, *([run.step_s] if run else [])])
    rows = _time_ticks(*span_y)
    left = 16 + int(_LETTER * max(len(words) for _, words in rows))
    frame = _Frame(width, 280 if width < 500 else 340, span_x, span_y, left=left, right=24, bottom=44)

    drawn = [*_grid(frame, rows, _size_ticks(*span_x))]
    drawn.append(_text(frame.right_x, frame.height - 6, "memory needed", "quiet", "end"))
    drawn.append(_text(4, 12, "time per step", "quiet"))
    if limit is not None:
        drawn += _upright(frame, limit, f"budget {format_budget(limit)}")
    way = " ".join(f"{frame.x(point.peak_bytes):.1f},{frame.y(point.step_s):.1f}" for point in points)
    drawn.append(f'<polyline points="{way}" fill="none" {_stroke("edge")}/>')
    drawn += [_point(frame, at, point, limit) for at, point in enumerate(points)]
    if run is not None:
        x, y = frame.x(run.needs_bytes), frame.y(run.step_s)
        drawn.append(f'<path d="M{x - 7:.1f} {y:.1f}l7 -7 7 7 -7 7z" fill="none" {_stroke("measured", 2)}/>')
        drawn.append(_text(x, y + 22, "measured", "measured", "middle", halo=True))
    elif measured is not None:
        size, seconds = format_bytes(measured.needs_bytes), format_seconds(measured.step_s)
        words = f"measured {size}, {seconds}: outside this picture"
        drawn.append(_text(frame.right_x, 12, words, "measured", "end"))
    return _svg(frame, "frontier", f"Memory against time per step of {len(points)} plans", drawn)


def class_of(category: str) -> str:
    """The class of a category's colour in the page: "logits/loss" -> "c-logits-loss"."""
    return "c-" + "".join(letter if letter.isalnum() else "-" for letter in category)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where numbers lie in the picture: x from `left` to `right_x`, y from `base` up to `head`."""

    width: int
    height: int
    span_x: tuple[float, float]
    span_y: tuple[float, float]
    left: int
    right: int
    bottom: int
    head: int = 22

    @property
    def right_x(self) -> int:
        return self.width - self.right

    @property
    def base(self) -> int:
        return self.height - self.bottom

    def x(self, value: float) -> float:
        low, high = self.span_x
        return self.left + (value - low) / (high - low) * (self.right_x - self.left)

    def y(self, value: float) -> float:
        low, high = self.span_y
        return self.base - (value - low) / (high - low) * (self.base - self.head)


_Level = tuple[int, str, str, str]  # bytes, words, name in INK, dashes


def _levels(plan: Plan, measured: Measured | None) -> list[_Level]:
    """Lines across the timeline, the highest first."""
    lines = [(plan.budget_bytes, f"budget {format_budget(plan.budget_bytes)}", "budget", "")]
    if plan.fits_bytes is not None:
        words = f"reserved by the allocator {format_bytes(plan.fits_bytes)}"
        lines.append((plan.fits_bytes, words, "reserved", "2 3"))
    if measured is not None:
        words = f"measured peak {format_bytes(measured.peak_bytes)}"
        lines.append((measured.peak_bytes, words, "measured", "7 4"))
    return sorted(lines, reverse=True)


def _top(tops: Sequence[int], budget_bytes: int) -> float:
    """The top of the picture; a budget far above all else would leave no picture, so it is not in it."""
    needed = max(tops)
    return 1.06 * (budget_bytes if needed <= budget_bytes <= 3 * needed else needed)


def _rules(frame: _Frame, lines: Sequence[_Level]) -> Iterable[str]:
    """The lines, their words above them, or below those of a higher line that is close."""
    below = 0.0
    for size, words, name, dashes in lines:
        at = frame.y(size)
        if at < frame.head - 8 or at > frame.base:
            words, at = f"{words}, outside this picture", frame.head if size > 0 else frame.base
        else:
            dash = f' stroke-dasharray="{dashes}"' if dashes else ""
            yield f'<path d="M{frame.left} {at:.1f}H{frame.right_x}" {_stroke(name, 1.5)}{dash}/>'
        below = at - 5 if at - 5 >= below + 15 else max(at + 12, below + 15)
        yield _text(frame.left + 6, below, words, name, halo=True)


def _plain_label(frame: _Frame, plain: Timeline, plan: Plan) -> str:
    assert plan.timeline is not None
    peak = max(range(len(plain.total)), key=plain.total.__getitem__)
    words = f"without a plan {format_bytes(plan.unplanned_bytes)}"
    half = len(words) * _LETTER / 2
    x = frame.x(_aligned(plain.phase, plan.timeline.phase)[peak])
    x = min(max(x, frame.left + half), frame.right_x - half)
    return _text(x, frame.y(plain.total[peak]) - 6, words, "quiet", "middle", halo=True)


def _aligned(phases: Sequence[str], onto: Sequence[str]) -> list[float]:
    """The place of each moment among other moments: phase by phase where they have the same ones, else all at once."""
    mine, others = _phase_runs(phases), _phase_runs(onto)
    if [phase for phase, *_ in mine] != [phase for phase, *_ in others]:
        mine, others = [("", 0, len(phases))], [("", 0, len(onto))]
    places: list[float] = []
    for (_, start, stop), (_, low, high) in zip(mine, others, strict=True):
        steps = max(1, stop - start - 1)
        places += [low + k * (high - low - 1) / steps for k in range(stop - start)]
    return places


def _phase_runs(phases: Sequence[str]) -> list[tuple[str, int, int]]:
    """Phase, first moment, and the one after the last."""
    runs, start = [], 0
    for phase, moments in groupby(phases):
        stop = start + len(list(moments))
        runs.append((phase, start, stop))
        start = stop
    return runs


def _stack(frame: _Frame, timeline: Timeline, names: Sequence[str]) -> Iterable[str]:
    """From the back to the front: each area reaches down to zero, and the next hides all but its own part."""
    totals = list(timeline.total)
    for name in reversed(names):
        yield _curve(frame, range(len(totals)), totals, class_of(name), _colour(name), "paper")
        totals = [total - size for total, size in zip(totals, timeline.bytes[name], strict=True)]


def _curve(frame: _Frame, moments: Sequence[float], sizes: Sequence[int], kind: str, fill: str, outline: str) -> str:
    """The area under steps: what is alive stays so until the next moment."""
    heights = [f"{frame.y(size):.1f}" for size in sizes]
    steps = "".join(
        f"H{frame.x((moments[k - 1] + moments[k]) / 2):.1f}V{heights[k]}"
        for k in range(1, len(heights))
        if heights[k] != heights[k - 1]
    )
    area = f"M{frame.left} {frame.base}V{heights[0]}{steps}H{frame.right_x}V{frame.base}z"
    colour = INK[fill][0] if fill in INK else fill
    stroke = f'stroke="{INK[outline][0]}" stroke-width="{0.4 if outline == "paper" else 1}"'
    return f'<path class="{kind} s-{outline}" d="{area}" fill="{colour}" {stroke}/>'


def _phases(frame: _Frame, phases: Sequence[str]) -> Iterable[str]:
    """Names under the axis, where there is room for them, and hairlines where one ends and the next begins."""
    for phase, start, stop in _phase_runs(phases):
        left = frame.x(max(0, start - 0.5))
        right = frame.x(stop - 0.5) if stop < len(phases) else frame.right_x
        if start:
            yield f'<path d="M{left:.1f} {frame.head}V{frame.base + 8}" {_stroke("edge")} stroke-dasharray="1 3"/>'
        if right - left > len(phase) * _LETTER:
            yield _text((left + right) / 2, frame.base + 18, phase, "quiet", "middle")


def _legend(names: Sequence[str], width: int) -> list[list[tuple[float, str]]]:
    """Names with their places, in as many rows as they take."""
    rows: list[list[tuple[float, str]]] = [[]]
    x = 8.0
    for name in names:
        wide = 30 + len(name) * _LETTER
        if x + wide > width and rows[-1]:
            rows.append([])
            x = 8.0
        rows[-1].append((x, name))
        x += wide
    return rows


def _key_row(entries: Iterable[tuple[float, str]], y: float) -> Iterable[str]:
    for x, name in entries:
        place = f'x="{x:.1f}" y="{y - 9:.1f}" width="11" height="11"'
        yield f'<rect class="{class_of(name)}" {place} fill="{_colour(name)}"/>'
        yield _text(x + 16, y, name, "ink")


def _grid(frame: _Frame, rows: Iterable[tuple[float, str]], columns: Iterable[tuple[float, str]] = ()) -> Iterable[str]:
    for value, words in rows:
        y = frame.y(value)
        yield f'<path d="M{frame.left} {y:.1f}H{frame.right_x}" {_stroke("rule")}/>'
        yield _text(frame.left - 8, y + 4, words, "quiet", "end")
    right = -1.0
    for value, words in columns:
        x, half = frame.x(value), len(words) * _LETTER / 2
        yield f'<path d="M{x:.1f} {frame.head}V{frame.base}" {_stroke("rule")}/>'
        if x - half > right + 8:
            yield _text(x, frame.base + 18, words, "quiet", "middle")
            right = x + half


def _time_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Three to seven round times with their words."""
    power = 10 ** floor(log10((high - low) / 3))
    step = next(power * n for n in (5, 2, 1) if power * n <= (high - low) / 3)
    times = [k * step for k in range(ceil(low / step), floor(high / step) + 1)]
    return [(time, _round_text(format_seconds(time))) for time in times]


def _size_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to eight multiples of a power of two bytes, so that their words are round."""
    step = 2.0 ** max(0, ceil(log2((high - low) / 8)))
    sizes = [k * step for k in range(ceil(low / step), floor(high / step) + 1)]
    return [(size, _round_text(format_bytes(int(size)))) for size in sizes]


def _upright(frame: _Frame, size: int, words: str) -> Iterable[str]:
    x = frame.x(size)
    yield f'<path d="M{x:.1f} {frame.head}V{frame.base}" {_stroke("budget", 1.5)}/>'
    anchor, gap = ("end", -6) if x > (frame.left + frame.right_x) / 2 else ("start", 6)
    yield _text(x + gap, frame.head + 12, words, "budget", anchor, halo=True)


def _point(frame: _Frame, at: int, point: FrontierPoint, limit: int | None) -> str:
    x, y = frame.x(point.peak_bytes), frame.y(point.step_s)
    fill = "ink" if point.chosen else "paper"
    words = f"{format_bytes(point.peak_bytes)}, {format_seconds(point.step_s)} per step"
    crowded = x > frame.right_x - 60 or (limit is not None and 0 <= frame.x(limit) - x < 60)
    beside = x - 10, y + 18, "chosen", "ink", "end"  # the curve falls to the right, so above or below it is free
    if not crowded or x < frame.left + 60:
        beside = x + 10, y - 8, "chosen", "ink", "start"
    shown = _text(*beside, halo=True)
    return (
        f'<g class="point" data-plan="{at}" aria-label="{escape(words + ", chosen" * point.chosen)}">'
        f'<circle class="touch" cx="{x:.1f}" cy="{y:.1f}" r="14" fill="none" pointer-events="all"/>'
        f'<circle class="dot f-{fill} s-ink" cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{INK[fill][0]}"'
        f' stroke="{INK["ink"][0]}" stroke-width="1.5"/>{shown if point.chosen else ""}</g>'
    )


def _near(value: float, values: Sequence[float]) -> bool:
    """Whether a picture that shows it too still shows the others."""
    spread = max(max(values) - min(values), 0.05 * max(values))
    return min(values) - spread <= value <= max(values) + spread


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """A span with all of them in it, not so narrow that three digits could not tell its ticks apart."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (0.05 * high - (high - low)) / 2, 1e-9)
    return low - room, high + room


def _round_text(text: str) -> str:
    """Without zeros at its end: "512.00 MiB" -> "512 MiB"."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _colour(name: str) -> str:
    if name not in COLOURS:
        raise PlanSchema(f"the plan has bytes of {name!r}, which is none of memplan's categories: {', '.join(COLOURS)}")
    return COLOURS[name][0]


def _stroke(name: str, width: float = 1) -> str:
    return f'class="s-{name}" stroke="{INK[name][0]}" stroke-width="{width:g}"'


def _text(x: float, y: float, words: str, name: str, anchor: str = "start", *, halo: bool = False) -> str:
    classes, behind = f"f-{name}", ""
    if halo:
        classes += " s-paper"
        behind = f' stroke="{INK["paper"][0]}" stroke-width="3" stroke-linejoin="round" paint-order="stroke"'
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{classes}" {place} fill="{INK[name][0]}"{behind}>{escape(words)}</text>'


def _svg(frame: _Frame, kind: str, label: str, drawn: Iterable[str]) -> str:
    """The whole picture; the `data-` attributes are for a page that follows a finger over it."""
    plot = f'data-left="{frame.left}" data-right="{frame.right_x}" data-head="{frame.head}" data-base="{frame.base}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" viewBox="0 0 {frame.width} {frame.height}" '
        f'{plot} role="img" aria-label="{escape(label)}" font-family="{_FONTS}" font-size="12">'
        f'<rect class="sheet" width="100%" height="100%" fill="{INK["paper"][0]}"/>{"".join(drawn)}</svg>\n'
    )
