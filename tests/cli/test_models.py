import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from memplan.cli.models import build_model
from memplan.errors import UsageError
from memplan.packed import bits_of

LLAMA: dict[str, Any] = {k: v for k, v in tiny.LLAMA_CONFIG.items() if k != "architectures"}


def written(folder: Path, **values: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA | values), encoding="utf-8")
    return str(path)


def test_a_model_has_shapes_but_no_weights(tmp_path: Path) -> None:
    model = build_model(written(tmp_path, architectures=["LlamaForCausalLM"]))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())
    assert model.training
    assert model.config.use_cache is False


def test_a_folder_and_any_file_name_do(tmp_path: Path) -> None:
    path = Path(written(tmp_path))
    assert type(build_model(str(tmp_path))).__name__ == "LlamaForCausalLM"
    other = path.rename(tmp_path / "tiny.json")
    assert type(build_model(str(other))).__name__ == "LlamaForCausalLM"


def test_the_config_names_the_class(tmp_path: Path) -> None:
    model = build_model(written(tmp_path, architectures=["LlamaForSequenceClassification"]))
    assert type(model).__name__ == "LlamaForSequenceClassification"


@pytest.mark.parametrize(("key", "value"), [("torch_dtype", "bfloat16"), ("dtype", "bfloat16")])
def test_the_config_s_dtype_is_the_default(tmp_path: Path, key: str, value: str) -> None:
    path = written(tmp_path, **{key: value})
    assert {parameter.dtype for parameter in build_model(path).parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in build_model(path, dtype="float16").parameters()} == {torch.float16}
    assert torch.get_default_dtype() == torch.float32


def test_lora_trains_adapters_on_every_linear_layer(tmp_path: Path) -> None:
    model = build_model(written(tmp_path, torch_dtype="bfloat16"), lora_rank=4)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2  # layers x linear layers x (A, B)
    assert all("lora_" in name and parameter.is_meta for name, parameter in trained.items())
    assert {min(parameter.shape) for parameter in trained.values()} == {4}
    assert model.training


def test_lora_says_how_to_install_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'memplan\[peft\]'"):
        build_model(written(tmp_path), lora_rank=4)


def test_qlora_trains_adapters_on_layers_of_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = build_model(written(tmp_path, torch_dtype="bfloat16"), lora_rank=4, quantised=True)
    packed = [parameter for parameter in model.parameters() if bits_of(parameter) == 4]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(packed) == 2 * 7
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name for name in trained)
    assert all(parameter.is_meta for parameter in model.parameters())
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    assert layer.compute_dtype == torch.bfloat16
    assert bits_of(model.get_output_embeddings().weight) is None
    assert torch.get_default_dtype() == torch.float32


def test_qlora_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"needs bitsandbytes and peft: pip install 'memplan\[quantised\]'"):
        build_model(written(tmp_path), lora_rank=4, quantised=True)


def test_lora_needs_linear_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "architectures": ["ResNetModel"]}))
    with pytest.raises(UsageError, match="LoRA does not go on ResNetModel"):
        build_model(str(tmp_path), lora_rank=4)


@pytest.mark.parametrize("dtype", ["int8", "float31"])
def test_an_unknown_dtype_names_the_known(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match=f"in '{dtype}': pass one of --dtype float32, bfloat16"):
        build_model(written(tmp_path), dtype=dtype)


def test_an_unknown_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"names the class LlamaForDreams, which transformers .* does not have"):
        build_model(written(tmp_path, architectures=["LlamaForDreams"]))


def test_a_config_that_builds_nothing_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM cannot be built from this config: KeyError: 'dreamy'"):
        build_model(written(tmp_path, architectures=["LlamaForCausalLM"], hidden_act="dreamy"))


def test_a_kind_without_a_causal_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Unrecognized configuration class.\nModel type should be one of ...")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", refuse)
    with pytest.raises(UsageError, match="a causal language model cannot be built from this config: ValueError: Unrec"):
        build_model(written(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "dreams"}', "{}"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="holds no config that transformers reads"):
        build_model(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no config"):
        build_model(str(tmp_path))


@pytest.mark.parametrize("named", ["./nowhere", "nowhere.json"])
def test_a_path_to_nothing_is_refused(named: str) -> None:
    with pytest.raises(UsageError, match="there is no such file or folder"):
        build_model(named)


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    with pytest.raises(UsageError, match=r"org/name is not here.*: We couldn't connect to the hub\. Give a folder"):
        build_model("org/name")
