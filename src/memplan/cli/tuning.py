"""`memplan tune`: the fastest plan by measurement, on this machine, of a model with random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    ModelArgument,
    OptimizerOption,
    SaveOption,
    SeqLenOption,
    build,
    one_model,
)
from memplan.cli.terminal import (
    EXIT_INTERRUPTED,
    JsonOption,
    check_writable,
    errors_as_exit_codes,
    hand_out,
    progress,
    stderr_console,
)
from memplan.errors import UsageError

if TYPE_CHECKING:
    from memplan.plan_record import Measured


def tune(
    gpu: Annotated[str, typer.Option(help="A device of this machine: cuda, cuda:1, cpu, cpu:2GiB, or auto.")],
    effective_batch: Annotated[int, typer.Option(min=1, help="Samples per optimizer step.")],
    model: ModelArgument = None,
    config: ConfigOption = None,
    method: Annotated[Method, typer.Option(help="full or lora; a base of qlora has to be loaded.")] = Method.FULL,
    lora_rank: LoraRankOption = 16,
    dtype: DtypeOption = None,
    seq_len: SeqLenOption = None,
    optimizer: OptimizerOption = "adamw",
    autocast: AutocastOption = Autocast.NONE,
    clip_grad_norm: ClipOption = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Plans that are run at most. Default: a third of those that fit.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Where the study is kept, to be gone on with or shared: tune.log, sqlite:///tune.db, ..."),
    ] = None,
    study: Annotated[str, typer.Option(help="Its name there.")] = "memplan",
    save: SaveOption = None,
    measured: Annotated[
        Path | None, typer.Option(help="Write what the plan took to this file, for memplan report.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the most promising plans for a few steps each, and take the fastest."""
    console = stderr_console()
    with errors_as_exit_codes():
        from memplan.device import resolve_gpu

        check_writable(save, measured)
        if method is Method.QLORA:
            raise UsageError("--method qlora: a quantised base has to be loaded; do that, and call memplan.tune on it")
        _, device = resolve_gpu(gpu)
        place = "meta" if device is None else str(device.torch_device)  # a card that is elsewhere is refused below
        built = build(console, one_model(model, config), method, lora_rank, dtype, place)
        with _interruptible(storage), progress(console, f"measuring on {gpu}"):
            from memplan.tuning import tune as run_trials

            found = run_trials(
                built,
                gpu,
                effective_batch=effective_batch,
                optimizer=optimizer,
                autocast=autocast.dtype(),
                clip_grad_norm=clip_grad_norm,
                seq_len=seq_len,
                n_trials=trials,
                storage=storage,
                study=study,
            )
    console.print(found.describe(), soft_wrap=True)
    hand_out(found.plan, save, as_json=as_json)
    if measured is not None:
        with errors_as_exit_codes():
            _write(measured, found.measured)


@contextmanager
def _interruptible(storage: str | None) -> Iterator[None]:
    """Ctrl-C ends with the exit code that shells have for it, and a word on what is left."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "what was measured is lost, as without --storage it is kept nowhere"
        if storage is not None:
            kept = f"started again with --storage {storage} it goes on from what was measured"
        typer.echo(f"memplan: interrupted; {kept}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _write(path: Path, measured: "Measured") -> None:
    from memplan.records import write_whole

    try:
        write_whole(path, f"{measured.model_dump_json(indent=1)}\n".encode())
    except OSError as error:
        raise UsageError(f"cannot write the measurement {path}: {error.strerror}. Name another file.") from error
