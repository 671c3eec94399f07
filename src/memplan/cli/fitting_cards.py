"""`memplan fit`: which card a way to train a model needs."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
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
    built,
    one_model,
)
from memplan.cli.terminal import EXIT_DOES_NOT_FIT, JsonOption, errors_as_exit_codes, progress, stderr_console
from memplan.errors import BadBatch, MemplanError, UsageError

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
        asked = _Asked(
            named=one_model(model, config),
            cards=_cards(gpus),
            lora_rank=lora_rank,
            dtype=dtype,
            seq_len=seq_len,
            tokens_per_step=tokens_per_step,
            optimizer=optimizer,
            autocast=autocast,
            clip_grad_norm=clip_grad_norm,
        )
        methods = method or list(Method)
        with progress(console, f"planning {' and '.join(methods)} for {len(asked.cards)} cards"):
            for each, found in zip(methods, _found(asked, methods), strict=True):
                if not isinstance(found, UsageError):
                    offers += found
                elif method or each is Method.FULL:
                    raise found
                else:
                    left_out.append(f"{each} is left out: {found}")
    from memplan.report.offers import offer_tables, ranked

    console.print(offer_tables(offers))
    for line in left_out:
        console.print(line)
    if as_json:
        record = [offer.model_dump(mode="json") for offer in ranked(offers)]
        typer.echo(json.dumps({"schema_version": 1, "offers": record}, indent=1))
    if not any(offer.fits for offer in offers):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


@dataclass(frozen=True, slots=True)
class _Asked:
    """For whatever method."""

    named: str
    cards: "list[Gpu]"
    lora_rank: int
    dtype: str | None
    seq_len: int | None
    tokens_per_step: int | None
    optimizer: str
    autocast: Autocast | None
    clip_grad_norm: bool

    def found(self, method: Method) -> "Sequence[Offer] | UsageError":
        """Offers in the order of the cards, or why the model cannot be built for the method."""
        try:
            model = built(self.named, method, self.lora_rank, self.dtype)
        except UsageError as error:
            return error
        from memplan.samples import sample_for
        from memplan.survey import survey

        sample = sample_for(model, 2, self.seq_len)
        cast = self.autocast or (Autocast.BF16 if method is Method.QLORA else Autocast.NONE)
        return survey(
            model,
            self.cards,
            _samples(self.tokens_per_step, sample.tokens),
            method=method,
            sample=sample,
            optimizer=self.optimizer,
            autocast=cast.dtype(),
            clip_grad_norm=self.clip_grad_norm,
        )


def _found(asked: _Asked, methods: Sequence[Method]) -> "Iterator[Sequence[Offer] | UsageError]":
    """What is found for each method; for the last ones meanwhile, on other cores, by processes of their own."""
    elsewhere = min(len(methods), _cores()) - 1
    here, rest = methods[: len(methods) - elsewhere], methods[len(methods) - elsewhere :]
    with _begun(asked, rest) as ends:
        for method in here:
            yield asked.found(method)
        for method, end in zip(rest, ends, strict=True):
            try:
                found, error = end.recv()
            except EOFError:
                raise RuntimeError(
                    f"the process that planned {method} is gone; ask with --method {method} alone"
                ) from None
            if error is not None:
                raise error
            yield found


@contextmanager
def _begun(asked: _Asked, methods: Sequence[Method]) -> Iterator[list[Connection]]:
    """A process for each method, and the ends at which to receive what it found."""
    context, ends, processes = get_context("spawn"), [], []
    try:
        for method in methods:
            end, other = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(asked, method, other), daemon=True)
            process.start()
            other.close()  # so that `end` knows when the process is gone
            ends.append(end)
            processes.append(process)
        yield ends
    finally:
        for process in processes:
            process.terminate()


def _send(asked: _Asked, method: Method, end: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that waits, which ends this one
    try:
        end.send((asked.found(method), None))
    except MemplanError as error:
        end.send((None, error))


def _cores() -> int:
    """On which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
