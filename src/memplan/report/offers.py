"""Offers of many cards as tables: which fit, how each would be used, and the smallest that does."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from memplan.offer import Offer
from memplan.plan_record import Verdict
from memplan.report.rows import NARROW, ruled
from memplan.units import format_budget, format_bytes

_CHECKED: Final = (
    "Whether a card fits is checked by a trace of the leanest plan, on its allocator, with what `memplan plan` keeps "
    "free of it. How it would be used is read off the profile: `memplan plan --gpu CARD` checks that too, and has more "
    "levers, so it finds the same or better."
)
_UNCERTAIN: Final = (
    "uncertain: by prediction the leanest plan needs a part of the margin, which is kept for the error of predictions, "
    "or more than the card has, by no more than predictions have been too high. It may run out of memory."
)
_ESTIMATED: Final = (
    "samples/s are estimates from datasheets, not measurements. The band is from tensor cores at 50 % of their rate, "
    "where the estimate takes 70 %, to the fastest of published runs against it (docs/fit.md)."
)


def offer_tables(offers: Sequence[Offer]) -> RenderableType:
    """For each method the cards that fit, by memory and then by speed, and those that do not; then the smallest."""
    methods = [list(group) for _, group in groupby(offers, key=lambda offer: offer.method)]
    rows: list[RenderableType] = []
    for found in methods:
        rows += [_Fitting([offer for offer in found if offer.fits]), *_others(found)]
        rows += [f" for {assumed}" for assumed in dict.fromkeys(offer.assumed for offer in found if offer.assumed)]
        rows.append("")
    rows += [*_smallest(methods), ""]
    if any(offer.samples_per_s is not None for offer in offers):
        rows.append(_ESTIMATED)
    unknown = list(dict.fromkeys(o.gpu for o in offers if o.fits and o.samples_per_s is None))
    if unknown:
        rows.append(f"{', '.join(unknown)}: only the memory is known, so there is no time.")
    if any(offer.verdict is Verdict.UNCERTAIN for offer in offers):
        rows.append(_UNCERTAIN)
    if any(offer.fits for offer in offers):
        rows.append(_CHECKED)
    return Group(*rows)


def ranked(offers: Iterable[Offer]) -> list[Offer]:
    """By memory, then the fastest first."""
    return sorted(offers, key=lambda offer: (offer.total_bytes, -(offer.samples_per_s or 0.0), offer.gpu))


class _Fitting:
    """One method's cards that fit; in a narrow terminal each has a line for itself and one for how it is used."""

    def __init__(self, offers: Sequence[Offer]) -> None:
        self.offers = ranked(offers)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        if not self.offers:
            return
        first = self.offers[0]
        title = f"{first.method}, {first.samples} samples per step"
        if options.max_width < NARROW:
            yield Text(title, style="bold")
            for offer in self.offers:
                yield Text.assemble((offer.gpu, "bold"), f" {format_budget(offer.total_bytes)}")
                yield Text.assemble(f"  {_batch(offer)}, ", _how(offer))
                if offer.samples_per_s is not None:
                    yield Text(f"  {_rate(offer)} samples/s ({_band(offer)})")
            return
        table = ruled(title)
        table.add_column("Card", no_wrap=True)
        for name in ("Memory", "Batch"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("Plan", overflow="fold")
        for name in ("samples/s", "band"):
            table.add_column(name, justify="right", no_wrap=True)
        for offer in self.offers:
            cells = format_budget(offer.total_bytes), _batch(offer), _how(offer), _rate(offer), _band(offer)
            table.add_row(offer.gpu, *cells)
        yield table


def _others(offers: Sequence[Offer]) -> list[RenderableType]:
    """The cards of one method that do not fit, and what it takes."""
    out = ranked(offer for offer in offers if not offer.fits)
    if not out:
        return []
    checked = {offer.least_bytes for offer in out if not offer.is_bound}  # libraries keep more on some cards
    if checked:
        takes = f"the leanest plan takes {' to '.join(dict.fromkeys(map(format_bytes, (min(checked), max(checked)))))}"
    else:
        takes = f"weights and optimizer state alone are {format_bytes(max(offer.least_bytes for offer in out))}"
    names = ", ".join(offer.gpu for offer in out)
    said = f" {names}: {takes}, beside CUDA's context and a margin"
    return [Text.assemble((f"{out[0].method} does not fit", "red"), said)]


def _smallest(methods: Sequence[Sequence[Offer]]) -> list[RenderableType]:
    rows: list[RenderableType] = [Text("Smallest card", style="bold")]
    for offers in methods:
        found = next(iter(ranked(offer for offer in offers if offer.verdict is Verdict.FITS)), None)
        name = "none of these" if found is None else f"{found.gpu}, {format_budget(found.total_bytes)}"
        rows.append(Text(f"  {offers[0].method}: {name}"))
    return rows


def _batch(offer: Offer) -> str:
    assert offer.micro_batch is not None
    return f"{offer.micro_batch} x {offer.samples // offer.micro_batch}"


def _how(offer: Offer) -> Text:
    parts = [f"{offer.recomputed} of {offer.blocks} recomputed"] if offer.recomputed else []
    parts += ["chunked loss"] if offer.chunked else []
    unsure = "" if offer.verdict is Verdict.FITS else f"{offer.verdict}: "
    return Text.assemble((unsure, "yellow"), ", ".join(parts) or "everything kept")


def _rate(offer: Offer) -> str:
    return "" if offer.samples_per_s is None else _short(offer.samples_per_s)


def _band(offer: Offer) -> str:
    return "" if offer.band is None else f"{_short(offer.band[0])} to {_short(offer.band[1])}"


def _short(rate: float) -> str:
    """To two digits: more would pretend."""
    return f"{rate:.2g}" if rate < 100 else f"{rate:,.0f}"
