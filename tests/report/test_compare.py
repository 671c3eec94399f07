from records_made import GIB, MIB, layers_of, make_plan

from memplan.plan_record import SampleField
from memplan.report.compare import compare, head_of


def test_a_plan_does_not_differ_from_itself() -> None:
    assert compare(make_plan(), make_plan()).is_empty


def test_only_what_differs_is_named() -> None:
    found = compare(make_plan(), make_plan(micro_batch=4, accumulation=2, step_s=1.0, peak_bytes=20 * GIB))
    assert not found.is_empty
    assert found.facts == {"micro_batch": ("2", "4"), "accumulation": ("4", "2")}
    assert found.sizes == {"needs_bytes": (21 * GIB, 20 * GIB), "peak_bytes": (21 * GIB, 20 * GIB)}
    assert found.times == {"step_s": (1.234, 1.0)}
    assert found.categories == {}


def test_what_only_one_rests_on_is_kept() -> None:
    both = make_plan().assumptions
    found = compare(make_plan(), make_plan(assumptions=(*both, "the machine was busy")))
    assert found.assumed == ((), ("the machine was busy",))
    assert not found.is_empty


def test_budgets_are_compared_by_card_and_size() -> None:
    budget = make_plan().budget.model_copy(update={"gpu": "a100-40gb", "total_bytes": 40 * GIB})
    found = compare(make_plan(), make_plan(budget=budget))
    assert found.facts == {"gpu": ("rtx-4090", "a100-40gb")}
    assert found.sizes == {"budget_bytes": (22 * GIB, 38 * GIB)}


def test_the_peak_is_compared_by_category() -> None:
    parts = {"params": 16 * GIB, "activations/model.layers.3": 3 * GIB}
    assert compare(make_plan(), make_plan(breakdown=parts)).categories == {"optimizer": (2 * GIB, 0)}


def test_alike_blocks_that_differ_are_one_row() -> None:
    (blocks,) = compare(make_plan(layers_of("rrrkk")), make_plan(layers_of("rssss"))).blocks[:1]
    assert (blocks.paths, blocks.count, blocks.options) == ("model.layers.1-2", 2, ("recompute", "select-2"))
    assert blocks.held_bytes == (16 * MIB, 160 * MIB)


def test_blocks_that_read_the_same_are_one_row_whatever_the_last_digit() -> None:
    layers = layers_of("rrrr")
    slower = tuple(layer.model_copy(update={"extra_s": layer.extra_s + i * 1e-9}) for i, layer in enumerate(layers))
    larger = layers[3].model_copy(update={"held_bytes": 17 * MIB})
    (*_, last) = rows = compare(make_plan((*slower[:3], larger)), make_plan(layers_of("kkkk"))).blocks
    assert [(blocks.paths, blocks.count) for blocks in rows] == [("model.layers.0-2", 3), ("model.layers.3", 1)]
    assert last.held_bytes == (17 * MIB, 300 * MIB)


def test_what_is_done_to_the_loss_head_is_a_fact() -> None:
    layers = layers_of("rk")
    decisions = {layer.path: layer.option for layer in layers} | {"lm_head": "chunked-512"}
    chunked = make_plan(layers, decisions=decisions)
    assert head_of(chunked) == "chunked-512"
    found = compare(make_plan(layers), chunked)
    assert (found.facts, found.blocks) == ({"loss_head": ("keep", "chunked-512")}, ())


def test_ranks_and_shapes_of_the_sample_are_facts() -> None:
    tokens = SampleField(name="input_ids", shape=(2048,), dtype="int64")
    found = compare(make_plan(sample=(tokens,)), make_plan(replicas=4, shards=2))
    assert found.facts == {
        "replicas": ("1", "4"),
        "shards": ("1", "2"),
        "sample": ("input_ids[2048] int64", "not in the plan"),
    }


def test_a_selection_of_another_content_differs_though_its_name_does_not() -> None:
    first, second = (make_plan(layers_of("s"), selections={"select-2": names}) for names in (("a",), ("a", "b")))
    assert compare(first, first).blocks == ()
    assert [blocks.paths for blocks in compare(first, second).blocks] == ["model.layers.0"]


def test_different_models_are_said_to_be_and_blocks_are_compared_where_both_have_them() -> None:
    found = compare(make_plan(layers_of("rr")), make_plan(layers_of("rkk"), signature="1", model="Other"))
    assert not found.same_model
    assert found.facts["model"] == ("LlamaForCausalLM", "Other")
    assert [blocks.paths for blocks in found.blocks] == ["model.layers.1"]
    assert found.alone == (0, 1)
