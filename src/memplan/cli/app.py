"""`memplan predict`, `memplan plan`, `memplan gpus`.

Tables go to stderr and the record's JSON to stdout, so that a pipe carries nothing else. Exit codes: 0 it fits, or a
prediction was made; 2 what was asked for cannot be used; 3 no plan fits.

Torch, transformers and the tables are imported by the commands that need them, never for `--help`.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from memplan import __version__
from memplan.errors import DoesNotFit, MemplanError, UsageError
from memplan.strategy import shipped_strategies

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from memplan.plan_record import Plan

EXIT_USAGE: Final = 2
EXIT_DOES_NOT_FIT: Final = 3
PLAIN_WIDTH: Final = 120  # columns, where nobody's terminal says how many there are

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fit any PyTorch training step into a memory budget.",
    epilog="Exit codes: 0 fits, 2 bad usage, 3 does not fit.",
)


class Method(StrEnum):
    """What is trained."""

    FULL = "full"
    LORA = "lora"


class Autocast(StrEnum):
    """The dtype of torch.autocast; its value is what the user types."""

    NONE = "none"
    BF16 = "bf16"
    FP16 = "fp16"

    def dtype(self) -> "torch.dtype | None":
        import torch

        return {Autocast.NONE: None, Autocast.BF16: torch.bfloat16, Autocast.FP16: torch.float16}[self]


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A folder with a config.json, the file itself, or a hub id. Needs no weights."
    ),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="The same as MODEL, for a local file or folder.")]
MethodOption = Annotated[Method, typer.Option(help="Train all weights, or LoRA adapters on every linear layer.")]
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
StrategyOption = Annotated[
    str, typer.Option(help=f"One of {', '.join(shipped_strategies())}, or the path of a TOML file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Also write the record as JSON to stdout.")]


def main() -> None:
    """The `memplan` command."""
    app(prog_name="memplan")


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _print_version(asked), help="Show it.")
    ] = False,
) -> None:
    pass


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"memplan {__version__}")
        raise typer.Exit


@app.command()
def predict(
    model: ModelArgument = None,
    config: ConfigOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one micro-batch.")] = 1,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches per optimizer step.")] = 1,
    gpu: Annotated[str, typer.Option(help="Where the step would run: a card's name, cuda, or cpu.")] = "cpu",
    method: MethodOption = Method.FULL,
    lora_rank: LoraRankOption = 16,
    dtype: DtypeOption = None,
    seq_len: SeqLenOption = None,
    optimizer: OptimizerOption = "adamw",
    autocast: AutocastOption = Autocast.NONE,
    clip_grad_norm: ClipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict the peak memory of one training step, and what it is made of."""
    console = _console()
    with _errors_as_exit_codes():
        built = _build(console, _one_model(model, config), method, lora_rank, dtype)
        with _progress(console, "predicting"):
            from memplan.pipeline import predict as predict_step
            from memplan.samples import sample_for

            prediction = predict_step(
                built,
                sample_for(built, batch, seq_len).content,
                optimizer=optimizer,
                autocast=autocast.dtype(),
                accumulation=accumulation,
                clip_grad_norm=clip_grad_norm,
                gpu=gpu,
            )
    from memplan.report.tables import prediction_tables

    console.print(prediction_tables(prediction))
    if as_json:
        typer.echo(prediction.model_dump_json(indent=1))


@app.command()
def plan(
    gpu: Annotated[str, typer.Option(help="A card (rtx-4090), a size (24GiB), cuda, cuda:1, cpu:2GiB, or auto.")],
    model: ModelArgument = None,
    config: ConfigOption = None,
    method: MethodOption = Method.FULL,
    lora_rank: LoraRankOption = 16,
    dtype: DtypeOption = None,
    seq_len: SeqLenOption = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Fix the samples in one micro-batch.")] = None,
    effective_batch: Annotated[int | None, typer.Option(min=1, help="Fix the samples per optimizer step.")] = None,
    optimizer: OptimizerOption = "adamw",
    autocast: AutocastOption = Autocast.NONE,
    clip_grad_norm: ClipOption = False,
    strategy: StrategyOption = "balanced",
    shards: Annotated[int, typer.Option(min=1, help="Cards that share the weights, by FSDP2.")] = 1,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas of the model, each with samples of its own.")] = 1,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this file, for memplan.Plan.load.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan recomputation and micro-batch so that a training step fits a card."""
    console = _console()
    with _errors_as_exit_codes():
        built = _build(console, _one_model(model, config), method, lora_rank, dtype)
        with _progress(console, f"planning for {gpu}"):
            from memplan.pipeline import plan as make_plan
            from memplan.plan_record import Verdict
            from memplan.world import World

            made = make_plan(
                built,
                gpu,
                sample=None,
                optimizer=optimizer,
                autocast=autocast.dtype(),
                clip_grad_norm=clip_grad_norm,
                effective_batch=effective_batch,
                micro_batch=micro_batch,
                strategy=strategy,
                seq_len=seq_len,
                world=World(replicas, shards),
            )
    _show(console, made, built, plan_file=str(save or "plan.json"))
    if as_json:
        typer.echo(made.model_dump_json(indent=1))
    if save is not None:
        with _errors_as_exit_codes():
            made.save(save)
    if made.verdict is Verdict.DOES_NOT_FIT:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


@app.command()
def gpus(as_json: JsonOption = False) -> None:
    """List the cards that memplan knows. Any other is given by its memory, such as 24GiB."""
    from memplan.gpus import Gpu, all_gpus
    from memplan.report.tables import gpu_table

    _console().print(gpu_table(all_gpus()))
    if as_json:
        from pydantic import TypeAdapter

        cards = TypeAdapter(tuple[Gpu, ...]).dump_python(all_gpus(), mode="json")
        typer.echo(json.dumps({"schema_version": 1, "gpus": cards}, indent=1))


def _build(console: "Console", named: str, method: Method, lora_rank: int, dtype: str | None) -> "nn.Module":
    with _progress(console, f"building {named}"):
        from memplan.cli.models import build_model

        return build_model(named, dtype=dtype, lora_rank=lora_rank if method is Method.LORA else None)


def _show(console: "Console", plan: "Plan", model: "nn.Module", plan_file: str) -> None:
    from memplan._compat import is_checkpointing_layer
    from memplan.plan_record import Verdict
    from memplan.report.settings import settings_text
    from memplan.report.tables import plan_tables

    console.print(plan_tables(plan))
    if plan.verdict is not Verdict.DOES_NOT_FIT:
        native = all(is_checkpointing_layer(model.get_submodule(path)) for path in plan.decisions)
        console.print("Settings to paste", style="bold")
        console.print(settings_text(plan, plan_file, native=native), soft_wrap=True)


def _one_model(model: str | None, config: Path | None) -> str:
    if (model is None) == (config is None):
        raise UsageError("name one model, as MODEL or by --config: a folder with a config.json, the file, or a hub id")
    if model is not None:
        return model
    if config is not None and not config.exists():
        raise UsageError(f"--config {config}: there is no such file or folder")
    return str(config)


@contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    """One line on stderr for what memplan raises on purpose; anything else is a bug and keeps its traceback."""
    try:
        yield
    except MemplanError as error:
        typer.echo(f"memplan: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT if isinstance(error, DoesNotFit) else EXIT_USAGE) from error


def _console() -> "Console":
    """Stderr, for people: plain text where it is not a terminal or NO_COLOR is set."""
    from rich.console import Console

    return Console(
        stderr=True,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if sys.stderr.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
    )


def _progress(console: "Console", doing: str) -> AbstractContextManager[object]:
    return console.status(f"{doing} ...") if console.is_terminal else nullcontext()
