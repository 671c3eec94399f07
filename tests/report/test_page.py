import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from page_plans import full_plan, point
from records_made import GIB, MIB, layers_of, make_plan
from test_charts import measured_at

from memplan.errors import PlanSchema
from memplan.plan_record import Plan, Verdict
from memplan.report.answers import answers
from memplan.report.explain import explain
from memplan.report.page import MOST_ROWS, page_html, parts_of, shown_plans
from memplan.units import format_bytes

HOSTILE = "model.</script><b onclick=alert(1)>.0"


class Reader(HTMLParser):
    """Tags, the text outside of scripts and styles, and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside and data.strip():
            self.words.append(" ".join(data.split()))


def text_of(plan: Plan, **more: Any) -> str:
    return " ".join(Reader(page_html(plan, **more)).words)


def sentence_of(plan: Plan, at: int) -> str:
    answer = answers(plan)[at]
    return " ".join((answer.short, *answer.sentences))


class TestPage:
    def test_its_record_is_the_timeline_of_the_plan(self) -> None:
        plan = full_plan()
        assert plan.timeline is not None
        record, _ = Reader(page_html(plan)).scripts
        assert json.loads(record) == json.loads(plan.timeline.model_dump_json())

    def test_it_asks_for_nothing_from_anywhere(self) -> None:
        html = page_html(full_plan())
        assert not [
            value
            for _, values in Reader(html).tags
            for name in ("src", "href")
            if (value := values.get(name)) and value != "data:,"
        ]
        assert "default-src 'none'" in html
        assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
        assert not [name for _, values in Reader(html).tags for name in values if name.startswith("on")]

    def test_a_hostile_path_stays_text(self) -> None:
        layers = tuple(layer.model_copy(update={"path": HOSTILE}) for layer in full_plan("r").layers)
        plan = full_plan(
            "r", layers=layers, model="<img src=x>", peak_module=HOSTILE, breakdown={f"activations/{HOSTILE}": GIB}
        )
        reader = Reader(page_html(plan))
        assert len(reader.scripts) == 2
        assert not {"b", "img"} & {tag for tag, _ in reader.tags}
        assert any(HOSTILE in words for words in reader.words)

    def test_a_long_model_stays_below_a_megabyte(self) -> None:
        plan = full_plan("rsk" * 42)
        breakdown = {
            f"activations/model.layers.{i}.mlp.experts.{j}.gate_proj": GIB + i for i in range(126) for j in range(40)
        }
        html = page_html(plan.model_copy(update={"breakdown": {"params": 16 * GIB} | breakdown}))
        assert plan.timeline is not None
        assert len(plan.timeline.phase) > 250
        assert len(html.encode()) < 1e6

    def test_without_a_timeline_there_is_a_note(self) -> None:
        html = page_html(make_plan())
        assert "carries no timeline" in html
        assert 'id="moment"' not in html
        assert Reader(html).scripts[0] == "null"
        assert "model.layers.0-2" in html

    def test_a_measured_run_stands_beside_its_prediction(self) -> None:
        run = measured_at(19 * GIB, 1.25)
        assert f"Measured on cpu, 2 steps: {run.describe().removeprefix('measured ')}" in text_of(
            full_plan(), measured=run
        )
        assert "Measured" not in text_of(full_plan())
        assert "All of this is predicted" in text_of(full_plan())
        assert "All of this is predicted" not in text_of(full_plan(), measured=run)

    def test_what_is_trained_stands_above(self) -> None:
        text = text_of(full_plan(assumptions=("weights: 8 billion of bfloat16; samples of 2,048 tokens",)))
        assert text.index("weights: 8 billion") < text.index("What fits?")

    def test_the_peak_is_told_by_category_first(self) -> None:
        text = text_of(full_plan())
        assert "in backward of model.layers.4: params 16.00 GiB, activations 3.00 GiB" in text

    def test_of_many_micro_batches_two_are_drawn(self) -> None:
        assert "Of the 4 micro-batches two are drawn" in text_of(full_plan(accumulation=4))
        assert "two are drawn" not in text_of(full_plan(accumulation=2))

    def test_the_budget_adds_up(self) -> None:
        text = text_of(full_plan(peak_bytes=21 * GIB))
        rows = "total of rtx-4090 24.00 GiB - other processes 1.00 GiB - CUDA context 512.00 MiB - margin 512.00 MiB"
        assert f"{rows} = budget 22.00 GiB - predicted peak 21.00 GiB = spare 1.00 GiB" in text

    def test_on_a_card_what_is_reserved_is_taken_off(self) -> None:
        text = text_of(full_plan(peak_bytes=20 * GIB, fits_bytes=21 * GIB))
        assert "- reserved by the allocator at the peak 21.00 GiB = spare 1.00 GiB" in text
        assert "Cards that are enough With the least memory: " in text
        assert "Cards that are enough" not in text_of(full_plan())

    def test_what_does_not_fit_says_by_how_much_and_what_to_do(self) -> None:
        plan = full_plan(
            verdict=Verdict.DOES_NOT_FIT, peak_bytes=23 * GIB, smallest_bytes=23 * GIB, ways_out=("train with LoRA",)
        )
        text = text_of(plan)
        assert "does not fit LlamaForCausalLM does not fit into 22.00 GiB" in text
        assert "1.00 GiB too much" in text
        assert "Ways out train with LoRA" in text
        assert "With that least, a step would take 1.23 s" in text
        assert "proven" not in text

    def test_what_is_dropped_in_part_is_named(self) -> None:
        text = text_of(full_plan(selections={"select-2": ("norm/mul", "act/silu")}))
        assert "What the chosen plan drops in part select-2 norm/mul, act/silu" in text
        assert "drops in part" not in text_of(full_plan())

    def test_a_plan_without_bytes_is_a_page_too(self) -> None:
        assert "What takes most? nothing" in text_of(make_plan(breakdown={}))

    def test_a_model_without_blocks_says_so(self) -> None:
        assert "no repeated blocks" in text_of(make_plan(()))

    def test_assumptions_are_listed(self) -> None:
        assert "What is assumed flash attention" in text_of(full_plan(assumptions=("flash attention",)))
        assert "What is assumed" not in text_of(full_plan())


class TestAnswers:
    def test_what_fits(self) -> None:
        assert sentence_of(full_plan(peak_bytes=21 * GIB), 0) == (
            "2 x 4 samples 2 at a time, 4 times: 8 in a step. It needs 21.00 GiB; the budget is 22.00 GiB. "
            "1.00 GiB are spare."
        )
        assert sentence_of(full_plan(accumulation=1), 0).startswith("2 samples All samples of a step at once.")

    def test_what_it_costs(self) -> None:
        said = sentence_of(full_plan(unplanned_bytes=30 * GIB), 1)
        assert said == (
            "12.0% slower A step takes 1.23 s (estimate): 6.48 samples/s. Keeping everything would take 1.10 s and "
            "need 30.00 GiB. By these times no plan of the strategy's levers for this batch and budget is more than "
            "0.10% faster; that is proven."
        )
        first = full_plan(levers=("offload", "select"))
        assert "no plan by offload, select for this batch and budget" in sentence_of(first, 1)
        assert sentence_of(full_plan(slowdown=0.0), 1).startswith("no time")
        assert "(from measured blocks)" in sentence_of(full_plan(times="measured"), 1)
        assert "is any faster" in sentence_of(full_plan(gap=0.0), 1)
        assert "2.00 GiB of pinned host memory." in sentence_of(full_plan(host_bytes=2 * GIB), 1)

    def test_what_a_strategy_of_little_memory_leaves(self) -> None:
        """Another plan fits too and is faster: nothing is proven of it, and more memory changes nothing."""
        lean = full_plan(
            strategy="smallest-memory",
            objective="peak",
            frontier=(point("rrrrr", 21 * GIB, 1.234, chosen=True), point("kkkkk", 22 * GIB, 1.0)),
        )
        assert "for this batch and so little memory is more than" in sentence_of(lean, 1)
        said = sentence_of(lean, 3)
        assert said.startswith("nothing The strategy 'smallest-memory' takes as little as it can.")
        assert "19.0 % less time and needs 22.00 GiB" in said
        assert explain(lean).more.more_s == 0.0
        fast = lean.model_copy(update={"objective": "samples-per-second"})  # of a card, by estimate
        assert "takes as little" not in sentence_of(fast, 3)

    def test_what_nothing_done_needs_is_said_in_the_same_measure(self) -> None:
        card = full_plan(
            fits_bytes=22 * GIB,
            peak_bytes=21 * GIB,
            unplanned_bytes=30 * GIB,
            frontier=(point("rrrrr", 22 * GIB, 1.234, chosen=True),),
        )
        assert "and need about 31.00 GiB" in sentence_of(card, 1)
        kept = (point("rrrrr", 22 * GIB, 1.234, chosen=True), point("kkkkk", 33 * GIB, 1.0))
        assert "and need about 33.00 GiB" in sentence_of(card.model_copy(update={"frontier": kept}), 1)

    def test_what_takes_most(self) -> None:
        assert sentence_of(full_plan(), 2) == (
            "params 16.00 GiB, 76.2 % of the peak, which is in backward of model.layers.4. "
            "Next: activations, 3.00 GiB. Of the activations, model.layers.3 has most: 2.00 GiB."
        )

    def test_what_more_memory_would_change(self) -> None:
        assert sentence_of(full_plan(), 3) == (
            "30.0 ms per GiB One GiB more would save 2.4 % of a step. "
            "The fastest for micro-batches of 2 needs 23.00 GiB and saves 10.9 %."
        )
        on_card = sentence_of(full_plan(fits_bytes=20 * GIB), 3)
        assert on_card.startswith("about 30.0 ms per GiB One GiB more would save about 2.4 % of a step, by its tensors")
        steps = (
            point("rrskk", 21 * GIB, 1.234, chosen=True),
            point("rskkk", 23 * GIB, 1.11),
            point("kkkkk", 30 * GIB, 1.0),
        )
        assert "The next of the plans below needs 23.00 GiB, saves 10.0 %. The fastest" in sentence_of(
            full_plan(frontier=steps), 3
        )
        alone = full_plan(shadow_price=0.0, frontier=(point("rrskk", GIB, 1.234, chosen=True),))
        assert sentence_of(alone, 3).startswith("nothing No plan for micro-batches of 2 is faster")
        assert sentence_of(full_plan(shadow_price=0.0), 3).startswith("up to 10.9 % less time The fastest")


class TestPlans:
    def test_each_point_has_its_blocks_as_runs(self) -> None:
        least, chosen, most = shown_plans(full_plan("rrskk"))
        assert [cell.mark for cell in chosen.cells] == ["R", "R", "S2", "K", "K"]
        assert [(run.name, run.option, run.count) for run in chosen.runs] == [
            ("model.layers.0-1", "recompute", 2),
            ("model.layers.2", "select-2", 1),
            ("model.layers.3-4", "keep", 2),
        ]
        (run,) = least.runs
        assert (run.option, run.holds, run.extra) == ("recompute", "16.00 MiB", "12.3 ms")
        assert least.counts == {"recompute": 5}
        assert [shown.chosen for shown in (least, chosen, most)] == [False, True, False]

    def test_blocks_that_read_the_same_are_one_run_whatever_the_last_digit(self) -> None:
        first, second = layers_of("ss")
        (shown,) = shown_plans(make_plan((first, second.model_copy(update={"extra_s": second.extra_s + 1e-9}))))
        assert [(run.name, run.extra) for run in shown.runs] == [("model.layers.0-1", "12.3 ms")]

    def test_the_others_are_told_against_the_chosen_one(self) -> None:
        least, chosen, most = shown_plans(full_plan(peak_bytes=19 * GIB))
        assert least.sentence == "1.00 GiB less than the chosen plan, 166 ms slower; within the budget."
        assert chosen.sentence == "The chosen plan."
        assert most.sentence == "4.00 GiB more than the chosen plan, 134 ms faster; 1.00 GiB above the budget."

    def test_what_is_done_beside_the_blocks_is_named(self) -> None:
        least, *_, most = shown_plans(full_plan())
        assert least.beside == (("loss head", "chunked-512"),)
        assert most.beside == ()

    def test_without_a_frontier_the_plan_itself_is_shown(self) -> None:
        (shown,) = shown_plans(make_plan(layers_of("rk")))
        assert shown.chosen
        assert [run.option for run in shown.runs] == ["recompute", "keep"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"frontier": (point("kkkkk", GIB, 1.0),)}, "none of the plan's frontier is the chosen one"),
            ({"layers": layers_of("rrskk")}, "model.layers.0 has 'recompute' in the frontier, but not what"),
            (
                {"frontier": (point("kkkkk", GIB, 1.0).model_copy(update={"options": ("magic",) * 5}),)},
                "'magic' is no option.*damaged",
            ),
            (
                {"frontier": (point("kkkkk", GIB, 1.0).model_copy(update={"options": ("chunked-1",) * 5}),)},
                "'chunked-1' is nothing that a block can do",
            ),
        ],
    )
    def test_parts_that_do_not_belong_together_are_an_error(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanSchema, match=message):
            shown_plans(full_plan(**changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"frontier": [point("rr", GIB, 1.0).model_dump()]}, "a plan of the frontier has 2 options for 5 blocks"),
            ({"peak_bytes": 0}, "peak_bytes: Input should be greater than 0"),
            ({"step_s": 0.0}, "step_s: Input should be greater than 0"),
            ({"gap": float("nan")}, "gap: Input should be a finite number"),
            ({"peak_bytes": 0, "gap": float("inf")}, "peak_bytes: .*, and 1 more. Plan again."),
        ],
    )
    def test_numbers_that_cannot_be_are_an_error_of_the_file(
        self, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        record = json.loads(full_plan().model_dump_json()) | changes
        (tmp_path / "plan.json").write_text(json.dumps(record))
        with pytest.raises(PlanSchema, match=f"is a damaged plan: .*{message}"):
            Plan.load(tmp_path / "plan.json")


class TestParts:
    def test_the_largest_is_first_and_nothing_is_left_out(self) -> None:
        parts = parts_of({"params": MIB, "grads": 0, "activations/a": GIB, "logits/loss": 5, "activations/": 7})
        assert [(p.category, p.module, p.n_bytes) for p in parts] == [
            ("activations", "a", GIB),
            ("params", "", MIB),
            ("activations", "", 7),
            ("logits/loss", "", 5),
        ]

    def test_what_is_too_small_to_be_named_is_one_row(self) -> None:
        breakdown = {f"activations/m{i}": 1 + i for i in range(MOST_ROWS + 10)}
        parts = parts_of(breakdown)
        assert len(parts) == MOST_ROWS + 1
        assert (parts[-1].module, parts[-1].n_bytes) == ("10 smaller", sum(range(1, 11)))
        assert sum(part.n_bytes for part in parts) == sum(breakdown.values())


def test_sizes_in_the_page_carry_their_bytes() -> None:
    plan = full_plan()
    html = page_html(plan)
    for name, size in plan.breakdown.items():
        if size:
            assert f'<data value="{size}">{format_bytes(size)}</data>' in html, name
