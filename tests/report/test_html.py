"""What a notebook shows: the tables of the terminal, with whatever names a model has."""

import re
from html import unescape

from records_made import layers_of, make_plan, make_prediction

from memplan.plan_record import Verdict


def words(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


def test_a_plan_shows_its_tables() -> None:
    html = make_plan()._repr_html_()
    assert html.startswith("<pre style=")
    assert html.endswith("</pre>")
    for text in ("fits: 3 of 5 blocks are recomputed", "21.00 GiB", "2 x 4", "model.layers.0-2", "recompute"):
        assert text in words(html)


def test_a_prediction_shows_its_tables() -> None:
    text = words(make_prediction()._repr_html_())
    assert "peak 3.00 GiB in backward of model.layers.1" in text
    assert "params" in text


def test_verdicts_are_coloured_and_the_page_is_left_as_it_is() -> None:
    html = make_plan(verdict=Verdict.DOES_NOT_FIT)._repr_html_()
    assert "color: #d63e34" in html
    assert "background" not in html


def test_names_are_no_markup() -> None:
    hostile = "</pre><script>alert(1)</script>[red]"
    html = make_plan(layers=layers_of("rk", stack=hostile), reason=hostile)._repr_html_()
    assert "<script" not in html
    assert hostile in words(html)
