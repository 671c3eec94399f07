"""The pages of the strategies are what `benchmarks/effects.py --render` makes of the numbers in docs/effects.json."""

import json

import effects
import pytest
from pages import DOCS

from memplan.strategy import shipped_strategies


@pytest.mark.parametrize("name", shipped_strategies())
def test_the_page_of_a_strategy(name: str) -> None:
    page = effects.strategy_page(name, json.loads((DOCS / "effects.json").read_text(encoding="utf-8")))
    assert page == (DOCS / "strategies" / f"{name}.md").read_text(encoding="utf-8")
    assert ("On a CPU nothing is offloaded" in page) == (name == "offload-first")
