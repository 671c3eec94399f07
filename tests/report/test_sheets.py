import pytest
from records_made import GIB, layers_of, make_plan
from rich.console import Console, RenderableType
from test_explain import FRONTIER, a_plan, card, point

from memplan.gpus import all_gpus
from memplan.report.answers import answers
from memplan.report.compare import compare
from memplan.report.explain import Again, explain
from memplan.report.sheets import Frontier, comparison_sheet, explanation_sheet


def lines_of(renderable: RenderableType, width: int = 120) -> list[str]:
    console = Console(width=width, color_system=None, markup=False, highlight=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return [line.rstrip() for line in capture.get().splitlines()]


def explained(width: int = 120, **changes: object) -> list[str]:
    plan = a_plan(**changes)
    return lines_of(explanation_sheet(plan, explain(plan, [card("middle", 32)])), width)


class TestExplanation:
    def test_the_questions_come_in_the_order_of_a_reader(self) -> None:
        lines = explained()
        asked = [f"{answer.question} {answer.short}" for answer in answers(a_plan())]
        places = [
            lines.index(title)
            for title in (
                *asked,
                "Where the memory goes",
                "Which moment binds?",
                "Why not another plan?",
                "With another budget, in the same batch",
                "Which card is enough?",
                "Memory against time",
            )
        ]
        assert places == sorted(places)

    def test_what_is_beside_the_peak_is_told_up_to_the_card(self) -> None:
        rows = [line.split() for line in explained()]
        assert ["=", "peak", "21.00", "GiB"] in rows
        assert ["+", "spare", "1.00", "GiB"] in rows
        assert ["=", "all", "there", "is", "24.00", "GiB"] in rows

    def test_the_neighbours_are_sentences(self) -> None:
        text = "\n".join(explained(200))
        assert (
            "The next smaller needs 1.00 GiB less and takes 300 ms (25.0 %) more a step: "
            "model.layers.3-4: recompute instead of keep; the loss head: chunked-512 instead of whole." in text
        )
        assert (
            "The next faster saves 50.0 ms (4.2 %) a step and needs 1.50 GiB more, 512.00 MiB over the budget: "
            "model.layers.2: keep instead of recompute." in text
        )

    def test_what_is_read_off_the_frontier_is_said_to_be(self) -> None:
        text = "\n".join(explained(200))
        assert (
            "2.00 GiB less: about 1.50 s a step, 300 ms (25.0 %) more (read off the frontier, not solved again)."
            in text
        )
        assert "What others need of the card is an estimate" in text
        on_cpu = "\n".join(lines_of(explanation_sheet(a_plan(fits_bytes=None), explain(a_plan(fits_bytes=None)))))
        assert "2.00 GiB less: at most 1.50 s a step" in on_cpu
        assert "is an estimate" not in on_cpu
        plan = a_plan()
        again = explain(plan, again=Again(None, plan, a_plan(step_s=1.0), a_plan(step_s=1.1)))
        text = "\n".join(lines_of(explanation_sheet(plan, again)))
        assert "2.00 GiB less: nothing fits." in text
        assert "2.00 GiB more: 1.00 s a step, 200 ms (16.7 %) less." in text
        told = "One GiB more, solved again, saves 100 ms (8.3 %) of a step; the plan says 60.0 ms (5.0 %)"
        assert f"{told}, by its tensors alone." in text
        on_cpu = a_plan(fits_bytes=None)
        same = explain(on_cpu, again=Again(on_cpu, on_cpu, on_cpu, on_cpu))
        free = a_plan(fits_bytes=None, shadow_price=0.0)
        agreed = explain(free, again=Again(free, free, free, free))
        assert "saves nothing of a step, as the plan says." in "\n".join(lines_of(explanation_sheet(free, agreed)))
        told = "One GiB more, solved again, saves nothing of a step; the plan says 60.0 ms (5.0 %)."
        assert told in "\n".join(lines_of(explanation_sheet(on_cpu, same)))

    def test_the_least_that_fits_is_named_below_it(self) -> None:
        assert "  2.00 GiB less: nothing fits below 21.00 GiB." in explained(
            smallest_bytes=21 * GIB, frontier=FRONTIER[1:]
        )

    def test_cards(self) -> None:
        text = "\n".join(explained())
        assert "With the least memory: middle." in text
        assert "For this plan: middle." in text
        assert "This plan is for a CPU." in "\n".join(explained(fits_bytes=None))
        huge = a_plan(fits_bytes=10**6 * GIB)
        assert "For this plan: none of the catalogue." in "\n".join(
            lines_of(explanation_sheet(huge, explain(huge, all_gpus())))
        )

    def test_a_plan_without_frontier_and_timeline(self) -> None:
        lines = explained(frontier=(), shadow_price=0.0)
        assert "  The plan does not say: it has no frontier." in lines
        assert "Memory against time" not in lines

    @pytest.mark.parametrize("width", [40, 25])
    def test_a_narrow_terminal_loses_no_number(self, width: int) -> None:
        lines = explained(width)
        assert max(map(len, lines)) <= width
        text = " ".join(" ".join(lines).split())
        assert "16.00 GiB" in text
        assert "1.50 s" in text


class TestFrontier:
    def test_each_plan_is_a_row_and_the_budget_lies_between(self) -> None:
        assert lines_of(Frontier(a_plan()), 50) == [
            "    20.00 GiB     1.50 s  ####################",
            ">   21.00 GiB     1.20 s  ########",
            "    22.00 GiB - budget",
            "    22.50 GiB     1.15 s  ######",
            "    30.00 GiB     1.00 s",
        ]

    def test_below_the_budget_all(self) -> None:
        plan = a_plan(frontier=FRONTIER[:2])
        assert lines_of(Frontier(plan))[-1] == "    22.00 GiB - budget"

    def test_one_plan_has_no_bar(self) -> None:
        assert "#" not in "".join(lines_of(Frontier(a_plan(frontier=(point(20, 1.0, chosen=True),)))))


class TestComparison:
    def test_a_row_for_each_thing_that_differs(self) -> None:
        first = make_plan(layers_of("rrrkk"))
        second = make_plan(layers_of("rrkkk"), micro_batch=4, slowdown=0.05, signature="1")
        shown = lines_of(comparison_sheet(compare(first, second), ("old", "new")))
        assert shown[0] == "The plans are of different models: their modules or the shapes of their weights differ."
        rows = [[cell for cell in line.split("  ") if cell] for line in shown[1:]]
        assert [row[0].strip() for row in rows] == ["old", "micro batch", "slowdown", "model.layers.2"]
        assert [cell.strip() for cell in rows[2][1:]] == ["12.0 %", "5.0 %"]
        assert "recompute, holds 16.00 MiB, 12.3 ms extra" in shown[-1]

    def test_what_only_one_rests_on_is_told(self) -> None:
        first = make_plan(assumptions=("the machine was busy", "of both"))
        shown = lines_of(comparison_sheet(compare(first, make_plan(assumptions=("of both",))), ("old", "new")))
        assert [line.strip() for line in shown[-2:]] == ["Assumed only in old", "the machine was busy"]

    def test_nothing_differs(self) -> None:
        assert lines_of(comparison_sheet(compare(make_plan(), make_plan()), ("a", "b"))) == ["The plans do not differ."]

    def test_forty_columns(self) -> None:
        second = make_plan(layers_of("kkkkk"), micro_batch=4, slowdown=0.05)
        assert max(map(len, lines_of(comparison_sheet(compare(make_plan(), second), ("a", "b")), 40))) <= 40
