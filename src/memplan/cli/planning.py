"""`memplan predict`, `memplan plan`, `memplan gpus`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.options import (
    Autocast,
    AutocastOption,
    ClipOption,
    ConfigOption,
    DtypeOption,
    LoraRankOption,
    Method,
    MethodOption,
    ModelArgument,
    OptimizerOption,
    ParamDtypeOption,
    ReduceDtypeOption,
    SaveOption,
    SeqLenOption,
    StrategyOption,
    build,
    one_model,
    world_of,
)
from memplan.cli.terminal import (
    EXIT_DOES_NOT_FIT,
    JsonOption,
    check_writable,
    errors_as_exit_codes,
    hand_out,
    progress,
    stderr_console,
)
from memplan.gpus import check_named
from memplan.settings import Settings
from memplan.strategy import load_strategy

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from memplan.plan_record import Plan


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
    """Predict the peak memory of one training step, and what it is made of. `memplan plan` says whether it fits."""
    console = stderr_console()
    with errors_as_exit_codes():
        check_named(gpu)
        built = build(console, one_model(model, config), method, lora_rank, dtype)
        with progress(console, "predicting"):
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


def plan(
    model: ModelArgument = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="A card (rtx-4090), a size (24GiB), cuda, cuda:1, cpu:2GiB. Default: auto, the device here."),
    ] = None,
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
    strategy: StrategyOption = None,
    risk: Annotated[
        float | None,
        typer.Option(
            help="On a card, how likely a plan that fits may run out of memory. Default: the strategy's, 0.01."
        ),
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="Cards that share the weights, by FSDP2.")] = 1,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas of the model, each with samples of its own.")] = 1,
    param_dtype: ParamDtypeOption = None,
    reduce_dtype: ReduceDtypeOption = None,
    save: SaveOption = None,
    as_json: JsonOption = False,
) -> None:
    """Plan recomputation and micro-batch so that a training step fits a card.

    What no option says is read from MEMPLAN_GPU, MEMPLAN_STRATEGY and so on, then from memplan.toml.
    """
    console = stderr_console()
    with errors_as_exit_codes():
        settings = Settings.found({"gpu": gpu, "strategy": strategy, "micro_batch": micro_batch, "risk": risk})
        check_writable(save)  # before the seconds that a model takes
        check_named(settings.gpu)
        load_strategy(settings.strategy)
        world = world_of(replicas, shards, param_dtype, reduce_dtype)
        built = build(console, one_model(model, config), method, lora_rank, dtype)
        with progress(console, f"planning for {settings.gpu}"):
            from memplan.pipeline import plan as make_plan
            from memplan.plan_record import Verdict

            made = make_plan(
                built,
                settings.gpu,
                sample=None,
                optimizer=optimizer,
                autocast=autocast.dtype(),
                clip_grad_norm=clip_grad_norm,
                effective_batch=effective_batch,
                micro_batch=settings.micro_batch,
                strategy=settings.strategy,
                seq_len=seq_len,
                risk=settings.risk,
                world=world,
            )
    _show(console, made, built, plan_file=str(save or "plan.json"))
    hand_out(made, save, as_json=as_json)
    if made.verdict is Verdict.DOES_NOT_FIT:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def gpus(as_json: JsonOption = False) -> None:
    """List the cards that memplan knows. Any other is given by its memory, such as 24GiB."""
    from memplan.gpus import Gpu, all_gpus
    from memplan.report.tables import gpu_table

    stderr_console().print(gpu_table(all_gpus()))
    if as_json:
        from pydantic import TypeAdapter

        cards = TypeAdapter(tuple[Gpu, ...]).dump_python(all_gpus(), mode="json")
        typer.echo(json.dumps({"schema_version": 1, "gpus": cards}, indent=1))


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
