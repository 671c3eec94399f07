"""Tables for terminals of any width."""

from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_ANY_WIDTH: Final = 10_000
NARROW: Final = 76  # columns; below, what a table has no room for is told line by line


def ruled(title: str) -> Table:
    """A table of the look that all have; the columns are still to come."""
    return Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


class Rows:
    """A table whose first `text` columns are words and whose others are numbers, which are never broken.

    Where the terminal is too narrow for that, each row is a line with its first cell, and below it the others, each
    after the name of its column.
    """

    def __init__(self, title: str, *columns: str, text: int = 1) -> None:
        self.table, self.title, self.columns = ruled(title), title, columns
        self.rows: list[tuple[tuple[str, ...], str | None]] = []
        for place, column in enumerate(columns):
            is_text = place < text
            self.table.add_column(
                column, justify="left" if is_text or not place else "right", no_wrap=not is_text, overflow="fold"
            )

    def add_row(self, *cells: str, style: str | None = None) -> None:
        self.table.add_row(*cells, style=style)
        self.rows.append((cells, style))

    def add_section(self) -> None:
        self.table.add_section()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needs = Measurement.get(console, options.update_width(_ANY_WIDTH), self.table)
        if needs.maximum <= options.max_width or (options.max_width >= NARROW and needs.minimum <= options.max_width):
            yield self.table
            return
        if self.title:
            yield Text(self.title, style="bold")
        for (first, *others), style in self.rows:
            yield Text(f" {first}", style=style or "")
            named = zip(self.columns[1:], others, strict=True)
            told = ", ".join(f"{_inside(name)} {cell}" for name, cell in named if cell)
            yield Padding(Text(told), (0, 0, 0, 3))
        yield ""


def _inside(name: str) -> str:
    """The name of a column inside a sentence: "Extra time" -> "extra time", and "GB/s" as it is."""
    name = name.replace("\n", " ")
    return name[:1].lower() + name[1:] if name[1:].islower() else name
