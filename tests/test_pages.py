"""Pages that commands write say what those commands would write now, but for what was measured or printed."""

import json

import printed
import pytest
import tune
from pages import DOCS


def test_the_page_of_tuning() -> None:
    results = json.loads((DOCS / "tune.json").read_text(encoding="utf-8"))
    assert tune.page(results) == (DOCS / "tune.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", printed.PARTS, ids=lambda part: part.heading)
def test_the_page_of_what_is_printed(part: printed.Part) -> None:
    text = (DOCS / "printed.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {part.heading}\n")[1].split("\n## ")[0]
    assert not part.about or part.about in section
    for command in part.commands:
        assert f"$ memplan {command}\n" in section
