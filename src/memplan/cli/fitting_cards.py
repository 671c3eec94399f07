"""`memplan fit`: which card a way to train a model needs."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.options import (
    Autocast,
    ClipOption,
    ConfigOption,
    DtypeOption,
    LoraRankOption,
    Method,
    ModelArgument,
    OptimizerOption,
    SeqLenOption,
    build,
    one_model,
)
from memplan.cli.terminal import EXIT_DOES_NOT_FIT, JsonOption, errors_as_exit_codes, progress, stderr_console
from memplan.errors import BadBatch, UsageError

if TYPE_CHECKING:
    from memplan.gpus import Gpu
    from memplan.offer import Offer

DEFAULT_SAMPLES = 16  # per optimizer step


def fit(
    model: ModelArgument = None,
    config: ConfigOption = None,
    method: Annotated[
        list[Method] | None, typer.Option(help="full, lora or qlora; may be given again. Default: all three.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="Cards, with commas between them. Default: all that `memplan gpus` lists.")
    ] = None,
    seq_len: SeqLenOption = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens per optimizer step. Default: {DEFAULT_SAMPLES} samples.")
    ] = None,
    lora_rank: LoraRankOption = 16,
    dtype: DtypeOption = None,
    optimizer: OptimizerOption = "adamw",
    autocast: Annotated[
        Autocast | None, typer.Option(help="Forward under torch.autocast. Default: bf16 for qlora, else none.")
    ] = None,
    clip_grad_norm: ClipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which cards a model can be trained on, how, and about how fast."""
    console = stderr_console()
    offers: list[Offer] = []
    left_out: list[str] = []
    with errors_as_exit_codes():
        named, cards = one_model(model, config), _cards(gpus)
        for each in method or list(Method):
            try:
                built = build(console, named, each, lora_rank, dtype)
            except UsageError as error:
                if method or each is Method.FULL:
                    raise
                left_out.append(f"{each} is left out: {error}")
                continue
            with progress(console, f"planning {each} for {len(cards)} cards"):
                from memplan.samples import sample_for
                from memplan.survey import survey

                sample = sample_for(built, 2, seq_len)
                cast = autocast or (Autocast.BF16 if each is Method.QLORA else Autocast.NONE)
                offers += survey(
                    built,
                    cards,
                    _samples(tokens_per_step, sample.tokens),
                    method=each,
                    sample=sample,
                    optimizer=optimizer,
                    autocast=cast.dtype(),
                    clip_grad_norm=clip_grad_norm,
                )
    from memplan.report.offers import offer_tables, ranked

    console.print(offer_tables(offers))
    for line in left_out:
        console.print(line)
    if as_json:
        record = [offer.model_dump(mode="json") for offer in ranked(offers)]
        typer.echo(json.dumps({"schema_version": 1, "offers": record}, indent=1))
    if not any(offer.fits for offer in offers):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _cards(gpus: str | None) -> "list[Gpu]":
    from memplan.gpus import all_gpus, find_gpu

    if gpus is None:
        return list(all_gpus())
    cards = {card.name: card for card in map(find_gpu, gpus.split(","))}
    for card in cards.values():
        if card.kind != "cuda":
            raise UsageError(
                f"--gpus {card.name}: it is no card of the catalogue. memplan plan --gpu {card.name} plans for it"
            )
    return list(cards.values())


def _samples(tokens_per_step: int | None, length: int | None) -> int:
    """Samples per optimizer step."""
    if tokens_per_step is None:
        return DEFAULT_SAMPLES
    if length is None:
        raise UsageError("--tokens-per-step: the samples of this model are no tokens; leave it out")
    samples, rest = divmod(tokens_per_step, length)
    if rest:
        near = " and ".join(f"{count * length:,}" for count in (samples, samples + 1) if count)
        raise BadBatch(
            f"--tokens-per-step {tokens_per_step} is no multiple of the {length} tokens of a sample; nearest: {near}"
        )
    return samples
