"""Models for the command line: built from a config, with shapes and dtypes but without weights."""

import logging
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn

from memplan.errors import UsageError

_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


def build_model(
    named: str,
    *,
    dtype: str | None = None,
    lora_rank: int | None = None,
    quantised: bool = False,
    device: str = "meta",
) -> nn.Module:
    """The model of a local folder, a config.json or a hub id, in training mode; on a device with random weights.

    Its class is the one that the config names, or a causal language model if it names none. `dtype` is that of the
    weights, by default the config's own, else float32. With a `lora_rank`, LoRA adapters are put on every linear layer
    but the head, and all else is frozen. If `quantised`, the linear layers but the head are of 4 bits by then.

    Raises:
        UsageError: no config there, a class that this transformers does not have, an unknown dtype, no peft or no
            bitsandbytes.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels for a CPU, where nothing is run
    config = _read_config(named)
    for part in {id(config): config, id(text := config.get_text_config()): text}.values():
        if getattr(part, "use_cache", None):
            part.use_cache = False  # training keeps no key/value cache
    before = torch.get_default_dtype()
    torch.set_default_dtype(_take_dtype(config, dtype))
    try:
        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other packages' deprecations are not the reader's to mend
            model = _instance(config)
            if quantised:
                model = _in_four_bits(model)
            return (model if lora_rank is None else _with_lora(model, lora_rank)).train()
    finally:
        torch.set_default_dtype(before)


def _read_config(named: str) -> Any:
    path = Path(named)
    here = path.exists()
    if not here and (
        path.is_absolute() or path.suffix == ".json" or named.startswith(".")
    ):  # no hub id looks like that
        raise UsageError(f"{named}: there is no such file or folder")
    try:
        return transformers.AutoConfig.from_pretrained(named, trust_remote_code=False)
    except Exception as error:  # anything: it is another package's reader, on a file that the user wrote
        where = "holds no config that transformers reads" if here else "is not here, and the hub does not give it out"
        raise UsageError(
            f"{named} {where}: {_first_line(error)}. Give a folder with a config.json, the file itself, or a hub id"
        ) from error


def _take_dtype(config: Any, wanted: str | None) -> torch.dtype:
    """The dtype of the weights, which is also written into the config."""
    field = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # the latter before transformers 4.56
    name = str(wanted or getattr(config, field, None) or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f"weights cannot be trained in {name!r}: pass one of --dtype {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    setattr(config, field, dtype)
    return dtype


def _instance(config: Any) -> nn.Module:
    name = next(iter(config.architectures or ()), None)
    kind: Any = transformers.AutoModelForCausalLM.from_config if name is None else getattr(transformers, name, None)
    if kind is None:
        raise UsageError(
            f"the config names the class {name}, which transformers {transformers.__version__} does not have: update "
            "transformers, or build the model yourself and call memplan.plan(model, ...)"
        )
    try:
        model: nn.Module = kind(config)
    except Exception as error:  # anything: it is another package's constructor, run on numbers that the user wrote
        made = name or "a causal language model"
        raise UsageError(
            f"{made} cannot be built from this config: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return model


def _in_four_bits(model: Any) -> nn.Module:
    """As `from_pretrained` makes it for QLoRA, and peft prepares it: NF4 with double quantisation, norms in float32.

    Layers compute in the type of the checkpoint where that is a half, else in bfloat16.
    """
    try:
        import_module("bitsandbytes")
        import peft
    except ImportError as error:
        raise UsageError("--method qlora needs bitsandbytes and peft: pip install 'memplan[quantised]'") from error
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    own = next(model.parameters()).dtype
    layers = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=own if own in (torch.bfloat16, torch.float16) else torch.bfloat16,
    )
    *_, (last, _) = model.named_parameters()
    heads = [path for path, module in model.named_modules() if module is model.get_output_embeddings()]
    replace_with_bnb_linear(model, modules_to_not_convert=[*heads, last.rpartition(".")[0]], quantization_config=layers)
    model.is_loaded_in_4bit = True  # peft asks
    prepare: Any = peft.prepare_model_for_kbit_training
    prepared: nn.Module = prepare(model, use_gradient_checkpointing=False)
    return prepared


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise UsageError("--method lora needs peft: pip install 'memplan[peft]'") from error
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    try:
        wrapped: nn.Module = peft.get_peft_model(model, adapters)
    except ValueError as error:
        raise UsageError(f"LoRA does not go on {type(model).__name__}: {_first_line(error)}") from error
    return wrapped


def _first_line(error: Exception) -> str:
    """Of its text, without the full stop; the type's name where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
