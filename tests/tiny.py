"""Models of every kind that memplan plans for, small enough that a step takes milliseconds. Random weights.

Each maker seeds torch and returns a model in training mode with the keyword arguments of one step.
"""

from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]
Made = tuple[nn.Module, Batch]

VOCABULARY = 96


# As a `config.json` has it.
LLAMA_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def tokens(rows: int, length: int) -> Batch:
    """Random token ids that are their own labels, [rows, length]."""
    ids = torch.randint(VOCABULARY, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def pixels(rows: int, side: int, classes: int) -> Batch:
    """Random images [rows, 3, side, side] with one class each."""
    return {"pixel_values": torch.randn(rows, 3, side, side), "labels": torch.randint(classes, (rows,))}


def llama(layers: int = 4, rows: int = 2, length: int = 16, **config: object) -> Made:
    """Grouped-query attention; `use_cache` is left as transformers has it."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": 0.0,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **config}))
    return model.train(), tokens(rows, length)


def gpt2(layers: int = 3, rows: int = 2, length: int = 16, **config: object) -> Made:
    """Dropout of 0.1 everywhere, tied weights; its blocks get the cache as a positional argument."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **special, **config}))
    return model.train(), tokens(rows, length)


def bert(layers: int = 3, rows: int = 2, length: int = 16) -> Made:
    """Dropout of 0.1 everywhere, a loss over every token."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return transformers.BertForMaskedLM(config).train(), tokens(rows, length)


def vit(layers: int = 3, rows: int = 2) -> Made:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.1,
    )
    config.num_labels = 10
    return transformers.ViTForImageClassification(config).train(), pixels(rows, 32, 10)


def resnet(rows: int = 4) -> Made:
    """Batch norms, whose running statistics a second forward must not move; two stages of three bottlenecks."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[3, 3], layer_type="bottleneck", num_labels=10
    )
    return transformers.ResNetForImageClassification(config).train(), pixels(rows, 32, 10)


def lora(layers: int = 4) -> Made:
    """A frozen base under adapters with dropout, so that few parameters have gradients."""
    base, batch = llama(layers)
    adapters = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, adapters).train(), batch


def t5(layers: int = 2, rows: int = 2, length: int = 16, **config: object) -> Made:
    """Encoder and decoder: two chains of blocks, the second of which reads what the first made."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    depths = {"num_layers": layers, "num_decoder_layers": layers, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**sizes, **depths, **config}))
    return model.train(), tokens(rows, length)


class Plain(nn.Module):
    """No transformers: blocks in a ModuleList, with dropout and a batch norm, a loss of its own."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.wide = nn.Linear(width, 4 * width)
            self.norm = nn.BatchNorm1d(4 * width)
            self.narrow = nn.Linear(4 * width, width)
            self.dropout = nn.Dropout(0.2)

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return x + scale * self.dropout(self.narrow(torch.relu(self.norm(self.wide(x)))))

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


def plain(layers: int = 4, rows: int = 8, width: int = 16) -> Made:
    torch.manual_seed(0)
    batch = {"x": torch.randn(rows, width), "labels": torch.randint(10, (rows,))}
    return Plain(layers, width).train(), batch


class Contrastive(nn.Module):
    """Its loss compares the rows of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x
        for block in self.blocks:
            y = block(y)
        return {"loss": nn.functional.cross_entropy(y.mean(1) @ x.mean(1).t(), torch.arange(len(x)))}


def contrastive(rows: int = 8) -> Made:
    torch.manual_seed(0)
    return Contrastive().train(), {"x": torch.randn(rows, 16, 64)}


WORKLOADS: dict[str, Callable[[], Made]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "resnet": resnet,
    "lora": lora,
    "t5": t5,
    "plain": plain,
}
