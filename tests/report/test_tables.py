import datetime

import pytest
from records_made import GIB, MIB, layers_of, make_plan, make_prediction
from rich.console import Console, RenderableType

from memplan.gpus import Gpu, all_gpus
from memplan.plan_record import Budget, Verdict
from memplan.report.tables import gpu_table, plan_tables, prediction_tables


def text_of(renderable: RenderableType, width: int = 120) -> str:
    console = Console(width=width, color_system=None, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def rows_of(renderable: RenderableType, width: int = 120) -> list[list[str]]:
    """The cells of each line: what two spaces or more hold apart."""
    lines = (line.strip() for line in text_of(renderable, width).splitlines())
    return [[cell for cell in line.split("  ") if cell] for line in lines if line]


def cells_of(renderable: RenderableType, first: str) -> list[str]:
    """The row that begins with `first`."""
    (row,) = [[cell.strip() for cell in row] for row in rows_of(renderable) if row[0] == first]
    return row[1:]


class TestPlan:
    def test_it_begins_with_the_verdict(self) -> None:
        assert text_of(plan_tables(make_plan())).startswith("fits: 3 of 5 blocks are recomputed\n")

    def test_the_budget_is_made_up_of_its_parts(self) -> None:
        shown = plan_tables(make_plan())
        assert cells_of(shown, "total") == ["24.00 GiB"]
        assert cells_of(shown, "- other processes") == ["1.00 GiB"]
        assert cells_of(shown, "- CUDA context") == ["512.00 MiB"]
        assert cells_of(shown, "- margin") == ["512.00 MiB"]
        assert cells_of(shown, "= budget") == ["22.00 GiB"]
        assert cells_of(shown, "predicted peak") == ["21.00 GiB in backward, 1.00 GiB spare"]
        assert cells_of(shown, "without a plan") == ["30.00 GiB at the same micro-batch"]
        assert cells_of(shown, "least that fits") == ["20.00 GiB with the strategy 'balanced'"]

    def test_the_step_has_its_batch_time_and_bounds(self) -> None:
        shown = plan_tables(make_plan())
        assert cells_of(shown, "batch") == ["2 x 4 (micro-batch x accumulation) = 8"]
        assert cells_of(shown, "blocks") == ["3 of 5 recomputed"]
        assert cells_of(shown, "time") == ["1.23 s (estimate), 6.48 samples/s"]
        assert cells_of(shown, "slowdown") == ["12.0 % against keeping everything"]
        assert cells_of(shown, "gap") == ["0.1 % at most to the fastest plan of its levers"]
        assert cells_of(shown, "one GiB more") == ["would save 30.0 ms"]

    def test_memory_that_would_save_nothing_is_not_offered(self) -> None:
        assert "one GiB more" not in text_of(plan_tables(make_plan(shadow_price=0.0)))

    def test_neighbours_that_read_the_same_are_one_row(self) -> None:
        shown = plan_tables(make_plan())
        assert cells_of(shown, "model.layers.0-2") == ["recompute", "3", "300.00 MiB", "16.00 MiB", "12.3 ms"]
        assert cells_of(shown, "model.layers.3-4") == ["keep", "2", "300.00 MiB", "300.00 MiB", "0.00 us"]

    def test_runs_end_where_the_option_or_the_stack_changes(self) -> None:
        layers = (*layers_of("rkr", "encoder.block"), *layers_of("rr", "decoder.block"))
        names = [row[0] for row in rows_of(plan_tables(make_plan(layers))) if ".block" in row[0]]
        assert names == ["encoder.block.0", "encoder.block.1", "encoder.block.2", "decoder.block.0-1"]

    def test_blocks_that_drop_a_part_are_counted_and_named(self) -> None:
        shown = plan_tables(make_plan(layers_of("rssk"), selections={"select-2": ("norm/mul",)}))
        assert cells_of(shown, "blocks") == ["1 of 4 recomputed, 2 of 4 in part"]
        assert cells_of(shown, "model.layers.1-2") == ["select-2", "2", "300.00 MiB", "160.00 MiB", "12.3 ms"]

    def test_a_model_without_blocks_has_no_table_of_them(self) -> None:
        assert "Blocks" not in text_of(plan_tables(make_plan(())))

    def test_the_peak_is_summed_by_category_and_sorted(self) -> None:
        shown = plan_tables(make_plan())
        names = [row[0] for row in rows_of(shown) if row[-1].endswith("%")]
        assert names == ["params", "activations", "optimizer"]
        assert cells_of(shown, "activations") == ["3.00 GiB", "14.3 %"]
        assert cells_of(shown, "sum") == ["21.00 GiB"]

    def test_on_a_card_what_the_allocator_reserves_is_held_against_the_budget(self) -> None:
        shown = plan_tables(make_plan(peak_bytes=20 * GIB, fits_bytes=21 * GIB))
        assert cells_of(shown, "predicted peak") == ["20.00 GiB in backward"]
        assert cells_of(shown, "reserved") == ["21.00 GiB by the allocator, 1.00 GiB spare"]

    def test_what_does_not_fit_says_by_how_much_and_what_to_do(self) -> None:
        plan = make_plan(
            verdict=Verdict.DOES_NOT_FIT,
            reason="the least peak is 1 GiB above the budget",
            peak_bytes=23 * GIB,
            ways_out=("train with LoRA", "use adam8bit [states of 8 bits]"),
        )
        text = text_of(plan_tables(plan))
        assert text.startswith("does not fit: the least peak is 1 GiB above the budget\n")
        assert cells_of(plan_tables(plan), "predicted peak") == ["23.00 GiB in backward, 1.00 GiB too much"]
        assert "Ways out\n  - train with LoRA" in "\n".join(line.rstrip() for line in text.splitlines())
        assert "use adam8bit [states of 8 bits]" in text

    def test_assumptions_are_listed(self) -> None:
        text = text_of(plan_tables(make_plan(assumptions=("attention is flash attention",))))
        assert "Assumed" in text
        assert "- attention is flash attention" in text
        assert "Assumed" not in text_of(plan_tables(make_plan()))

    def test_a_budget_below_nothing_is_still_shown(self) -> None:
        budget = Budget(gpu="1MiB", total_bytes=MIB, others_bytes=0, context_bytes=512 * MIB, margin_bytes=0)
        assert cells_of(plan_tables(make_plan(budget=budget)), "= budget") == ["-511.00 MiB"]


class TestPrediction:
    def test_it_begins_with_the_peak_and_its_circumstances(self) -> None:
        first, second, *_ = text_of(prediction_tables(make_prediction())).splitlines()
        assert first == "peak 3.00 GiB in backward of model.layers.1"
        assert second == "micro-batch 2 x 4 accumulated, adamw, no autocast, fake run"
        assert "autocast to bfloat16" in text_of(prediction_tables(make_prediction(autocast="bfloat16")))

    def test_modules_are_collapsed_with_their_kinds_below(self) -> None:
        shown = prediction_tables(make_prediction())
        assert cells_of(shown, "model.layers.0-1") == ["2", "400.00 MiB", "200.00 MiB", "1.00 GiB"]
        assert cells_of(shown, "mlp") == ["2", "200.00 MiB", "100.00 MiB", "1.00 GiB"]
        assert cells_of(shown, "attn") == ["2", "200.00 MiB", "100.00 MiB", "0 B"]
        assert cells_of(shown, "lm_head") == ["1.00 MiB", "0 B"]

    def test_both_sums_are_there(self) -> None:
        sums = [row[1:] for row in rows_of(prediction_tables(make_prediction())) if row[0] == "sum"]
        assert [[cell.strip() for cell in row] for row in sums] == [["3.00 GiB"], ["401.00 MiB", "1.00 GiB"]]

    def test_only_the_largest_kinds_are_named(self) -> None:
        saved = {f"layers.{i}.part{j}": 10 - j for i in range(2) for j in range(6)}
        shown = prediction_tables(make_prediction(saved=saved, breakdown={"params": GIB}), top=4)
        names = [row[0] for row in rows_of(shown)]
        assert [name for name in names if name.startswith("part")] == ["part0", "part1", "part2", "part3"]
        assert cells_of(shown, "2 smaller") == ["22 B", "0 B"]

    def test_modules_of_unlike_size_say_up_to(self) -> None:
        shown = prediction_tables(make_prediction(saved={"layers.0": MIB, "layers.1": 2 * MIB}))
        assert cells_of(shown, "layers.0-1")[:3] == ["2", "3.00 MiB", "up to 2.00 MiB"]

    def test_what_belongs_to_the_model_itself_has_a_name(self) -> None:
        assert cells_of(prediction_tables(make_prediction(saved={"": MIB})), "(itself)") == ["1.00 MiB", "0 B"]


class TestGpus:
    def test_every_card_has_a_row_that_fits_a_terminal(self) -> None:
        rows = rows_of(gpu_table(all_gpus()), width=80)
        names = {row[0] for row in rows}
        assert {gpu.name for gpu in all_gpus()} <= names

    def test_what_is_not_known_is_empty(self) -> None:
        gpu = Gpu(name="card", kind="cuda", total_bytes=GIB, date=datetime.date(2026, 1, 2))
        assert cells_of(gpu_table([gpu]), "card") == ["1.00 GiB", "2026-01-02"]

    def test_rates_are_in_the_units_of_the_head(self) -> None:
        gpu = Gpu(
            name="card",
            kind="cuda",
            total_bytes=GIB,
            bandwidth_bytes_s=1.008e12,
            flops={"bfloat16": 165.2e12, "float32": 82.6e12},
            compute_capability=(8, 9),
        )
        assert cells_of(gpu_table([gpu]), "card") == ["1.00 GiB", "1,008", "165", "83", "8.9"]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_every_width_has_it_all(width: int) -> None:
    for shown in (plan_tables(make_plan()), prediction_tables(make_prediction()), gpu_table(all_gpus())):
        text, whole = text_of(shown, width), text_of(shown, 400)
        assert max(map(len, text.splitlines())) <= width
        numbers = {word for word in whole.split() if word.replace(".", "").replace(",", "").isdecimal()}
        assert numbers <= {word.rstrip(",") for word in text.split()}
    for layer in make_plan().layers:
        assert layer.path.rpartition(".")[0] in "".join(text_of(plan_tables(make_plan()), width).split())
    assert all(gpu.name in text_of(gpu_table(all_gpus()), width) for gpu in all_gpus())
