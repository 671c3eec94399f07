"""Records in a notebook: the tables of the terminal, as HTML that looks well on light and on dark pages."""

from io import StringIO
from typing import Final

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme

from memplan.plan_record import Plan
from memplan.prediction import Prediction
from memplan.report.tables import plan_tables, prediction_tables

_COLUMNS: Final = 110
_PAGE: Final = '<pre style="white-space:pre;overflow-x:auto;line-height:1.3;font-family:monospace">{code}</pre>'
_THEME: Final = TerminalTheme(  # contrast of about 4 or more against white and against black
    (255, 255, 255),
    (0, 0, 0),
    [
        (0, 0, 0),
        (214, 62, 52),
        (26, 140, 62),
        (166, 112, 0),
        (60, 110, 220),
        (170, 70, 170),
        (0, 130, 140),
        (128, 128, 128),
    ],
)


def plan_html(plan: Plan) -> str:
    """The tables of a plan."""
    return _html(plan_tables(plan))


def prediction_html(prediction: Prediction) -> str:
    """The tables of a prediction."""
    return _html(prediction_tables(prediction))


def _html(tables: RenderableType) -> str:
    console = Console(
        record=True, file=StringIO(), width=_COLUMNS, force_jupyter=False, markup=False, highlight=False, emoji=False
    )
    console.print(tables)
    return console.export_html(theme=_THEME, inline_styles=True, code_format=_PAGE)
