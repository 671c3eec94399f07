import pytest
from records_made import layers_of, make_plan

from memplan.report.settings import settings_text


def test_nothing_recomputed_needs_arguments_only() -> None:
    assert settings_text(make_plan(layers_of("kkk"))) == (
        "TrainingArguments(\n"
        "    per_device_train_batch_size=2,\n"
        "    gradient_accumulation_steps=4,\n"
        "    gradient_checkpointing=False,\n"
        "    bf16=True,\n"
        '    optim="adamw_torch",\n'
        ")"
    )


def test_all_recomputed_is_gradient_checkpointing() -> None:
    text = settings_text(make_plan(layers_of("rrr")))
    assert "    gradient_checkpointing=True,\n" in text
    assert '    gradient_checkpointing_kwargs={"use_reentrant": False},\n' in text
    assert "model." not in text


def test_some_recomputed_are_flagged_one_by_one() -> None:
    text = settings_text(make_plan(layers_of("rrkkr")))
    assert "    gradient_checkpointing=False,\n" in text
    assert text.endswith(
        'model.gradient_checkpointing_enable({"use_reentrant": False})\n'
        'for i, layer in enumerate(model.get_submodule("model.layers")):\n'
        "    layer.gradient_checkpointing = i in {0, 1, 4}  # 0-1,4"
    )


def test_a_run_is_a_range_and_none_is_nothing() -> None:
    layers = (*layers_of("rrrkk", "encoder.block"), *layers_of("kk", "decoder.block"))
    text = settings_text(make_plan(layers))
    assert "i in range(0, 3)  # 0-2" in text
    assert "i in ()  # none" in text


@pytest.mark.parametrize(
    ("options", "members"),
    [
        ("rkk", "{0}"),
        ("rrk", "{0, 1}"),
        ("krrr", "range(1, 4)"),
        ("rrrrkkrkrrr", "{*range(0, 4), 6, *range(8, 11)}"),
    ],
)
def test_layers_are_named_by_the_shortest_set(options: str, members: str) -> None:
    text = settings_text(make_plan(layers_of(options)))
    assert f"i in {members}  #" in text
    assert {i for i in range(len(options)) if i in eval(members)} == {i for i, o in enumerate(options) if o == "r"}


@pytest.mark.parametrize("options", ["rk", "rr", "kk"])
@pytest.mark.parametrize("native", [True, False])
def test_the_text_is_python(options: str, native: bool) -> None:
    compile(settings_text(make_plan(layers_of(options)), native=native), "settings", "exec")


def test_layers_without_flags_get_the_plan_applied() -> None:
    text = settings_text(make_plan(layers_of("rk")), "mine.json", native=False)
    assert text.endswith('memplan.apply(model, memplan.Plan.load("mine.json"))')
    assert "memplan.apply" in settings_text(make_plan(layers_of("rr")), native=False)
    assert "memplan.apply" not in settings_text(make_plan(layers_of("kk")), native=False)


def test_layers_without_numbers_get_the_plan_applied() -> None:
    layers = layers_of("rk")
    named = (layers[0].model_copy(update={"path": "stem"}), layers[1])
    assert settings_text(make_plan(named)).endswith('memplan.apply(model, memplan.Plan.load("plan.json"))')


def test_many_stacks_get_the_plan_applied() -> None:
    layers = tuple(layer for stack in range(5) for layer in layers_of("rk", f"stages.{stack}.blocks"))
    assert settings_text(make_plan(layers)).endswith('memplan.apply(model, memplan.Plan.load("plan.json"))')


@pytest.mark.parametrize(
    ("autocast", "line"),
    [("bfloat16", "bf16=True"), ("float16", "fp16=True")],
)
def test_autocast_is_the_trainer_s_precision(autocast: str, line: str) -> None:
    assert f"    {line},\n" in settings_text(make_plan(autocast=autocast))


def test_without_autocast_no_precision_is_set() -> None:
    text = settings_text(make_plan(autocast=None))
    assert "bf16" not in text
    assert "fp16" not in text


@pytest.mark.parametrize(("optimizer", "optim"), [("adam8bit", "adamw_bnb_8bit"), ("adafactor", "adafactor")])
def test_the_optimizer_is_named_as_the_trainer_names_it(optimizer: str, optim: str) -> None:
    assert f'    optim="{optim}",\n' in settings_text(make_plan(optimizer=optimizer))


def test_an_optimizer_that_the_trainer_does_not_know_is_left_out() -> None:
    assert "optim=" not in settings_text(make_plan(optimizer="Lion"))
