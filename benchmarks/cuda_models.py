"""The models that are trained on a card, made there from their public configurations with random weights.

    task = TASKS["mistral-7b int8"]
    model, batch = build(task, device)      # needs no network; 7e9 weights are there in a second or two

A quantised base has bitsandbytes' own layers, each quantised on the device from random weights, one at a time, so that
the whole model in 16 bits is never there. `BitsandbytesMissing` where that package is not installed.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import nn
from workloads import BIG, LORA_TARGETS, Batch, Big, token_batch

Base = Literal["int8", "nf4", "bf16"]

STD = 0.02  # of random weights, as transformers initialises these models
RANK = 16
OUTLIERS = 6.0  # transformers' default of llm_int8_threshold


class BitsandbytesMissing(Exception):
    """A quantised base was asked for, and bitsandbytes is not installed."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, on what: one line of the table.

    `rows` x `length` tokens are the micro-batch of all settings that are compared at the same batch.
    """

    name: str
    about: str
    sizes: Big
    base: Base
    method: Literal["lora", "full"] = "lora"
    optimizer: str = "adamw"
    rows: int = 4
    length: int = 1024
    prepared: bool = False  # by PEFT's prepare_model_for_kbit_training, without its checkpointing

    @property
    def autocast(self) -> torch.dtype | None:
        """LoRA as Trainer does with bf16=True: adapters in float32 under autocast. A full fine-tune is in bfloat16."""
        return torch.bfloat16 if self.method == "lora" else None

    @property
    def has_bitsandbytes(self) -> bool:
        return self.base != "bf16"


_MISTRAL, _LLAMA, _QWEN = BIG["mistral-7b"], BIG["llama-3-8b"], BIG["qwen1.5-14b"]

TASKS = {
    task.name: task
    for task in (
        Task("mistral-7b int8", "Mistral-7B SFT, LoRA on an 8-bit base", _MISTRAL, "int8"),
        Task("llama-3-8b nf4", "Llama-3-8B QLoRA, 4-bit base", _LLAMA, "nf4"),
        Task("qwen-14b int8", "Qwen1.5-14B LoRA on an 8-bit base", _QWEN, "int8", rows=2),
        Task("mistral-7b full", "Mistral-7B full fine-tune in bfloat16", _MISTRAL, "bf16", "full", "adafactor", rows=1),
        # Only where bitsandbytes is missing, and never in the place of the rows above: another model with more bytes.
        Task("mistral-7b bf16", "Mistral-7B LoRA on a bfloat16 base", _MISTRAL, "bf16"),
        Task("llama-3-8b bf16", "Llama-3-8B LoRA on a bfloat16 base", _LLAMA, "bf16"),
        Task("qwen-14b bf16", "Qwen1.5-14B LoRA on a bfloat16 base", _QWEN, "bf16", rows=2),
    )
}


def tiny(task: Task) -> Task:
    """The same task with a model that trains on a CPU in milliseconds, for dry runs."""
    more = task.sizes.more and {"head_dim": 8}
    sizes = replace(task.sizes, hidden=32, ffn=64, layers=2, heads=4, kv_heads=2, vocab=96, more=more)
    return replace(task, sizes=sizes, rows=2, length=16)


def build(task: Task, device: torch.device, seed: int = 0) -> tuple[nn.Module, Batch]:
    """The model in training mode on the device and one micro-batch of random tokens there.

    Raises:
        BitsandbytesMissing: the base is quantised and the package is not there.
    """
    if task.has_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        raise BitsandbytesMissing(f"bitsandbytes is not installed here, and {task.name!r} has an {task.base} base")
    torch.manual_seed(seed)
    model = materialised(_on_meta(task.sizes), device, LAYERS[task.base])
    if task.method == "lora":
        model = with_adapters(model, task)
    batch = token_batch(task.rows, task.length, task.sizes.vocab)
    return model.train(), {name: tensor.to(device) for name, tensor in batch.items()}


def with_adapters(model: nn.Module, task: Task) -> nn.Module:
    """Frozen under LoRA adapters on all its linear layers."""
    import peft

    setattr(model, "is_loaded_in_8bit", task.base == "int8")  # noqa: B010  # what PEFT chooses its layers by
    setattr(model, "is_loaded_in_4bit", task.base == "nf4")  # noqa: B010
    if task.prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = list(LORA_TARGETS)
    adapters = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    adapted: nn.Module = peft.get_peft_model(model, adapters)
    return adapted


# --- from shapes to weights -----------------------------------------------------------------------------------------


def _on_meta(sizes: Big) -> nn.Module:
    make: Any = getattr(transformers, f"{sizes.family}ForCausalLM")
    with torch.device("meta"):
        model: nn.Module = make(sizes.config())
    return model.to(torch.bfloat16)


Layer = Callable[[nn.Linear, torch.device], nn.Module]


def materialised(model: nn.Module, device: torch.device, layer: Layer) -> nn.Module:
    """The model on a device: `layer` makes each linear layer but the head, everything else is random bfloat16.

    Norms are ones, biases zeros. Rotary embeddings compute their own buffers, so they are made anew.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # transformers'
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and module is not head:
            setattr(model.get_submodule(parent), name, layer(module, device))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            make: Any = type(module)
            setattr(model.get_submodule(parent), name, make(config=model.config).to(device))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, _random(parameter, key, device))
    return model


def _random(parameter: nn.Parameter, key: str, device: torch.device) -> nn.Parameter:
    values = torch.empty_like(parameter, device=device)
    if parameter.dim() > 1:
        values.normal_(std=STD)
    else:
        values.fill_(0.0 if key == "bias" else 1.0)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _plain(linear: nn.Linear, device: torch.device) -> nn.Module:
    for key, parameter in linear.named_parameters(recurse=False):
        setattr(linear, key, _random(parameter, key, device))
    return linear


def _quantised(linear: nn.Linear, device: torch.device, base: Base) -> nn.Module:
    """bitsandbytes' layer of that shape, in the state that loading a quantised model leaves it in."""
    import bitsandbytes as bnb

    wide, narrow = linear.out_features, linear.in_features
    weight = torch.empty(wide, narrow, dtype=torch.bfloat16, device=device).normal_(std=STD)
    made: Any
    if base == "nf4":
        made = bnb.nn.Linear4bit(
            narrow, wide, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device=torch.device("meta")
        )
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, quant_type="nf4", module=made, bnb_quantized=True
        )
        made.quant_state = state
    else:
        made = bnb.nn.Linear8bitLt(
            narrow, wide, bias=False, has_fp16_weights=False, threshold=OUTLIERS, device=torch.device("meta")
        )
        packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        made.weight = bnb.nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
    if linear.bias is not None:
        made.bias = _random(linear.bias, "bias", device)
    return made


LAYERS: dict[Base, Layer] = {
    "bf16": _plain,
    "int8": partial(_quantised, base="int8"),
    "nf4": partial(_quantised, base="nf4"),
}
