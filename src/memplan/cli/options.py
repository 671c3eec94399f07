"""Options that several commands have: the model, and how it is trained."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.terminal import progress
from memplan.errors import UsageError
from memplan.strategy import shipped_strategies

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from memplan.world import World


class Method(StrEnum):
    """What is trained."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class Autocast(StrEnum):
    """The dtype of torch.autocast; its value is what the user types."""

    NONE = "none"
    BF16 = "bf16"
    FP16 = "fp16"

    def dtype(self) -> "torch.dtype | None":
        return None if self is Autocast.NONE else _dtype(self)


class Casting(StrEnum):
    """A dtype of FSDP2's mixed precision; its value is what the user types."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    def dtype(self) -> "torch.dtype":
        return _dtype(self)


def _dtype(word: str) -> "torch.dtype":
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[word]


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A folder with a config.json, the file itself, or a hub id. Needs no weights."
    ),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="The same as MODEL, for a local file or folder.")]
MethodOption = Annotated[
    Method, typer.Option(help="Train all weights, or LoRA adapters on every linear layer; qlora: on a base of 4 bits.")
]
LoraRankOption = Annotated[int, typer.Option(min=1, help="The rank of the LoRA adapters.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Of the weights: float32, bfloat16, float16. Default: the config's, else float32."),
]
SeqLenOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens per sample. Default: the model's positions, at most 2048.")
]
OptimizerOption = Annotated[str, typer.Option(help="adamw, adamw-fused, sgd, sgd-momentum, adafactor, adam8bit, ...")]
AutocastOption = Annotated[Autocast, typer.Option(help="Forward under torch.autocast.")]
ClipOption = Annotated[
    bool, typer.Option("--clip-grad-norm", help="Gradients are clipped by their norm before the optimizer's step.")
]
ParamDtypeOption = Annotated[
    Casting | None,
    typer.Option(help="With --shards: the dtype in which FSDP2 gathers weights and computes. Default: --dtype."),
]
ReduceDtypeOption = Annotated[
    Casting | None, typer.Option(help="With --shards: the dtype in which gradients are reduced. Default: as computed.")
]
SaveOption = Annotated[Path | None, typer.Option(help="Write the plan to this file, for memplan.Plan.load.")]
StrategyOption = Annotated[
    str | None,
    typer.Option(help=f"One of {', '.join(shipped_strategies())}, or the path of a TOML file. Default: balanced."),
]


def world_of(replicas: int, shards: int, param_dtype: Casting | None, reduce_dtype: Casting | None) -> "World":
    from memplan.world import World

    if param_dtype is None and reduce_dtype is None:
        return World(replicas, shards)
    if shards == 1:
        raise UsageError("--param-dtype and --reduce-dtype are FSDP2's, of weights that cards share: give --shards too")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    param, reduce = (None if dtype is None else dtype.dtype() for dtype in (param_dtype, reduce_dtype))
    return World(replicas, shards, MixedPrecisionPolicy(param, reduce))


def one_model(model: str | None, config: Path | None) -> str:
    if (model is None) == (config is None):
        raise UsageError("name one model, as MODEL or by --config: a folder with a config.json, the file, or a hub id")
    if model is not None:
        return model
    if config is not None and not config.exists():
        raise UsageError(f"--config {config}: there is no such file or folder")
    return str(config)


def built(named: str, method: Method, lora_rank: int, dtype: str | None, device: str = "meta") -> "nn.Module":
    from memplan.cli.models import build_model

    rank = None if method is Method.FULL else lora_rank
    return build_model(named, dtype=dtype, lora_rank=rank, quantised=method is Method.QLORA, device=device)


def build(
    console: "Console", named: str, method: Method, lora_rank: int, dtype: str | None, device: str = "meta"
) -> "nn.Module":
    with progress(console, f"building {named}"):
        return built(named, method, lora_rank, dtype, device)
