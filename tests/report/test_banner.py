"""What a run says when it begins, and where."""

import logging

import pytest
from records_made import make_plan

from memplan.report.banner import announce, banner


def test_what_was_chosen_why_and_how_to_turn_it_off() -> None:
    text = banner(make_plan(), (8, 1), "undo()", beside=" (checked)", said=("rows are equal",), alone="print it")
    assert text.splitlines() == [
        "memplan   LlamaForCausalLM on rtx-4090, balanced: fits",
        "  needs   21.00 GiB of 22.00 GiB, with nothing recomputed 30.00 GiB",
        "  batch   2 x 4 accumulated = 8 per step (was 8 x 1); same steps, same learning rates",
        "  blocks  3 of 5 recomputed; 3 of 5 blocks are recomputed (checked)",
        "  time    12.0% slower than keeping everything (estimate)",
        "  assumed rows are equal",
        "  off     undo(); MEMPLAN_BANNER=off leaves out these lines",
        "  alone   print it",
    ]


def test_as_before_and_nothing_more_to_say() -> None:
    text = banner(make_plan(layers=(), decisions={}), (2, 4), "undo()")
    assert "(as before)" in text
    assert "  blocks  3 of 5 blocks are recomputed\n" in text
    assert "assumed" not in text
    assert "alone" not in text


def test_it_goes_to_stderr_unless_the_log_shows_it(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    announce("first 100%")
    assert capsys.readouterr().err == "first 100%\n"
    with caplog.at_level(logging.INFO, "memplan"):
        announce("second 100%")
    assert capsys.readouterr().err == ""
    assert [(record.name, record.message) for record in caplog.records] == [("memplan", "second 100%")]


def test_switched_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_BANNER", "off")
    announce("nothing")
    assert capsys.readouterr() == ("", "")
