"""The models that every benchmark, accuracy table and example of memplan speaks of. Random weights, no downloads.

    model, batch = build("W1")                  # small: real weights, trains on a laptop
    model = build_on_meta("llama-3.1-405b")     # big: shapes only, no memory behind them

The six small ones cover what makes planners wrong: grouped-query attention (W1), dropout and tied weights (W2), a loss
over masked tokens (W3), pixels (W4), convolutions with batch norm (W5), and a frozen base under adapters (W6).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

Batch = dict[str, torch.Tensor]

IMAGE_SIDE = 224
IMAGE_CLASSES = 1000
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Small:
    """A workload that runs for real: the sizes of its batch, and how to make its model."""

    about: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[], Batch]


@dataclass(frozen=True)
class Big:
    """The public configuration of a causal language model that is planned without weights.

    `family` is the prefix of the transformers classes (``LlamaConfig``, ``LlamaForCausalLM``).
    """

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    more: dict[str, int] = field(default_factory=dict)

    def config(self) -> transformers.PreTrainedConfig:
        """As training wants it: no key/value cache."""
        make = getattr(transformers, f"{self.family}Config")
        config: transformers.PreTrainedConfig = make(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            use_cache=False,
            **self.more,
        )
        return config


def token_batch(rows: int, length: int, vocab: int) -> Batch:
    """Random token ids that are their own labels, int64, [rows, length]."""
    ids = torch.randint(vocab, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def image_batch(rows: int) -> Batch:
    """Random images [rows, 3, 224, 224] in float32, with one of 1000 classes each."""
    pixels = torch.randn(rows, 3, IMAGE_SIDE, IMAGE_SIDE)
    return {"pixel_values": pixels, "labels": torch.randint(IMAGE_CLASSES, (rows,))}


def _llama_12() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig())


def _vit() -> nn.Module:
    config = transformers.ViTConfig()
    config.num_labels = IMAGE_CLASSES
    return transformers.ViTForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig()
    config.num_labels = IMAGE_CLASSES
    return transformers.ResNetForImageClassification(config)


def _lora_on_llama_12() -> nn.Module:
    import peft

    adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    model: nn.Module = peft.get_peft_model(_llama_12(), adapters)
    return model


SMALL = {
    "W1": Small("Llama-style causal LM, 12 layers, 4 x 512 tokens", _llama_12, lambda: token_batch(4, 512, 32_000)),
    "W2": Small("GPT-2 small, dropout 0.1, 2 x 512 tokens", _gpt2, lambda: token_batch(2, 512, 50_257)),
    "W3": Small("BERT-base masked LM, 8 x 256 tokens", _bert, lambda: token_batch(8, 256, 30_522)),
    "W4": Small("ViT-B/16, 8 images", _vit, lambda: image_batch(8)),
    "W5": Small("ResNet-50 (batch norm: never split its batch), 8 images", _resnet, lambda: image_batch(8)),
    "W6": Small("LoRA r=16 on all linear layers of W1", _lora_on_llama_12, lambda: token_batch(4, 512, 32_000)),
}

BIG = {
    "mistral-7b": Big("Mistral", 4096, 14_336, layers=32, heads=32, kv_heads=8, vocab=32_000),
    "llama-3-8b": Big("Llama", 4096, 14_336, layers=32, heads=32, kv_heads=8, vocab=128_256),
    "qwen1.5-14b": Big("Qwen2", 5120, 13_696, layers=40, heads=40, kv_heads=40, vocab=152_064),
    "qwen3-14b": Big("Qwen3", 5120, 17_408, layers=40, heads=40, kv_heads=8, vocab=151_936, more={"head_dim": 128}),
    "llama-3-70b": Big("Llama", 8192, 28_672, layers=80, heads=64, kv_heads=8, vocab=128_256),
    "llama-3.1-405b": Big("Llama", 16_384, 53_248, layers=126, heads=128, kv_heads=8, vocab=128_256),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A small workload in training mode and the keyword arguments of its forward, labels included.

    Seeds torch's global generator, so two calls give the same weights and the same batch. KeyError for other names.
    """
    workload = SMALL[name]
    torch.manual_seed(seed)
    model = workload.make_model().train()
    return model, workload.make_batch()


def build_on_meta(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A big model in training mode whose parameters have shapes and `dtype` but no bytes. KeyError for other names."""
    big = BIG[name]
    make: Any = getattr(transformers, f"{big.family}ForCausalLM")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: nn.Module = make(big.config())
    finally:
        torch.set_default_dtype(before)
    return model.train()
