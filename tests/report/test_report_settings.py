import ast
from pathlib import Path
from typing import Any

import pytest
from records_made import layers_of, make_plan

from memplan.errors import UsageError
from memplan.report.settings import settings_text, stride_of

OLDER = "  # gradient_checkpointing... before transformers 5.23"


def arguments_in(text: str, kind: str = "TrainingArguments") -> dict[str, Any]:
    """The arguments that the first statement passes."""
    call = ast.parse(text).body[0]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    assert ast.unparse(call.value.func) == kind
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.value.keywords}


def test_nothing_recomputed_needs_arguments_only() -> None:
    assert settings_text(make_plan(layers_of("kkk"))) == (
        "TrainingArguments(\n"
        "    per_device_train_batch_size=2,\n"
        "    gradient_accumulation_steps=4,\n"
        f"    activation_checkpointing=False,{OLDER}\n"
        "    bf16=True,\n"
        '    optim="adamw_torch",\n'
        ")"
    )


def test_all_recomputed_is_activation_checkpointing() -> None:
    text = settings_text(make_plan(layers_of("rrr")))
    assert f"    activation_checkpointing=True,{OLDER}\n" in text
    assert '    activation_checkpointing_kwargs={"use_reentrant": False},\n' in text
    assert "model." not in text


@pytest.mark.parametrize(("options", "every"), [("rkrkr", 2), ("rkrk", 2), ("rkkrkk", 3), ("rkk", 3), ("r", 1)])
def test_every_kth_recomputed_is_an_argument(options: str, every: int) -> None:
    plan = make_plan(layers_of(options))
    assert stride_of(plan) == every
    layers = [at % every == 0 for at in range(len(options))]  # as transformers counts them
    assert layers == [option == "r" for option in options]
    text = settings_text(plan)
    given = arguments_in(text)["activation_checkpointing_kwargs"]
    assert given == ({"use_reentrant": False} if every == 1 else {"every_n_layers": every, "use_reentrant": False})
    assert ("# model.gradient_checkpointing_enable" in text) == (every > 1)


@pytest.mark.parametrize("options", ["kr", "rrk", "rkkr" + "k" * 5, "rks", "sss"])
def test_all_else_is_no_stride(options: str) -> None:
    assert stride_of(make_plan(layers_of(options))) is None


def test_more_than_recomputation_is_no_stride() -> None:
    assert stride_of(make_plan(layers_of("rr"), stepping="single")) is None
    plan = make_plan(layers_of("rr"))
    headed = plan.model_copy(update={"decisions": {**plan.decisions, "lm_head": "chunked-128"}})
    assert stride_of(headed) is None
    for changed in (headed, make_plan(layers_of("kk"), stepping="single")):
        assert settings_text(changed).endswith('memplan.apply(model, memplan.Plan.load("plan.json"))')


def test_transformers_takes_a_stride_for_what_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=5, num_attention_heads=2
        )
    )
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("before 5.23 there is no every_n_layers")
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [option == "r" for option in "rkrkr"]


def test_some_recomputed_are_flagged_one_by_one() -> None:
    text = settings_text(make_plan(layers_of("rrkkr")))
    assert "    activation_checkpointing=False," in text
    assert text.endswith(
        f'model.activation_checkpointing_enable({{"use_reentrant": False}}){OLDER}\n'
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
        ("krk", "{1}"),
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
    layers = layers_of("kr")
    named = (layers[0].model_copy(update={"path": "stem"}), layers[1])
    assert settings_text(make_plan(named)).endswith('memplan.apply(model, memplan.Plan.load("plan.json"))')


def test_many_stacks_get_the_plan_applied() -> None:
    layers = tuple(layer for stack in range(5) for layer in layers_of("kr", f"stages.{stack}.blocks"))
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


# -- other frameworks -----------------------------------------------------------------------------------------------


def test_trl_is_told_what_its_defaults_would_turn_on() -> None:
    given = arguments_in(make_plan(layers_of("kk"), autocast=None).settings("trl"), "SFTConfig")
    assert given["bf16"] is False
    assert given["activation_checkpointing"] is False


def test_trl_takes_them(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    text = make_plan(layers_of("rk"), autocast=None).settings("trl")
    config = trl.SFTConfig(str(tmp_path), use_cpu=True, **arguments_in(text, "SFTConfig"))
    assert config.gradient_checkpointing
    assert config.gradient_checkpointing_kwargs == {"every_n_layers": 2, "use_reentrant": False}
    off = arguments_in(make_plan(layers_of("kk"), autocast=None).settings("trl"), "SFTConfig")
    assert not trl.SFTConfig(str(tmp_path), use_cpu=True, **off).gradient_checkpointing


def test_accelerate_and_lightning_are_told_precision_and_accumulation() -> None:
    plan = make_plan(layers_of("rr"))
    text = plan.settings("accelerate")
    assert 'Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)' in text
    assert 'model.activation_checkpointing_enable({"use_reentrant": False})' in text
    text = make_plan(layers_of("rs"), autocast=None).settings("lightning", "mine.json")
    assert 'lightning.Trainer(precision="32-true", accumulate_grad_batches=4)' in text
    assert text.endswith('memplan.apply(model, memplan.Plan.load("mine.json"))')
    for text in (plan.settings("accelerate"), plan.settings("lightning")):
        ast.parse(text)
        assert "# micro-batches count alike here" in text
    whole = make_plan(layers_of("rr"), micro_batch=16, accumulation=1, effective_batch=16)
    for framework in ("accelerate", "lightning"):
        assert "count alike" not in whole.settings(framework)


def test_axolotl_is_told_in_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(make_plan(layers_of("rr")).settings("axolotl")) == {
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": True,
        "fp16": False,
        "optimizer": "adamw_torch",
    }
    text = make_plan(layers_of("rk")).settings("axolotl")
    assert yaml.safe_load(text)["gradient_checkpointing"] is True
    assert "# every layer is recomputed here, which is not what was planned" in text
    assert yaml.safe_load(make_plan(layers_of("kk")).settings("axolotl"))["gradient_checkpointing"] is False


def test_another_framework_is_refused_with_the_five_names() -> None:
    with pytest.raises(UsageError, match="'keras': name one of trainer, trl, accelerate, axolotl, lightning"):
        make_plan().settings("keras")
