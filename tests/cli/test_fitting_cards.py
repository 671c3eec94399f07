"""`memplan fit`: what is asked of the survey, what is printed where, and how it ends."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from torch import nn
from typer.testing import CliRunner, Result

from memplan.cli import app, fitting_cards
from memplan.gpus import Gpu, all_gpus
from memplan.offer import Offer
from memplan.plan_record import Verdict


class Survey(SimpleNamespace):
    """Stands in for `memplan.survey`: notes what was asked; the cards from `smallest` bytes on fit."""

    smallest = 20 * 2**30
    asked: list[tuple[nn.Module, int, dict[str, Any]]]

    def survey(self, model: nn.Module, cards: Sequence[Gpu], samples: int, **options: Any) -> tuple[Offer, ...]:
        self.asked.append((model, samples, options))
        return tuple(self._offer(card, samples, str(options["method"])) for card in cards)

    def _offer(self, card: Gpu, samples: int, method: str) -> Offer:
        assert card.total_bytes is not None
        fits = card.total_bytes >= self.smallest
        how = {
            "micro_batch": 1,
            "blocks": 2,
            "recomputed": 1,
            "chunked": False,
            "samples_per_s": 1.0,
            "band": (0.5, 2.0),
        }
        return Offer(
            method=method,
            gpu=card.name,
            total_bytes=card.total_bytes,
            verdict=Verdict.FITS if fits else Verdict.DOES_NOT_FIT,
            least_bytes=2**30,
            is_bound=False,
            samples=samples,
            **(how if fits else {}),
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Survey:
    survey = Survey(asked=[])
    monkeypatch.setitem(sys.modules, "memplan.survey", survey)
    monkeypatch.setattr(fitting_cards, "_cores", lambda: 1)  # nothing stands in for it in another process
    return survey


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, ["fit", *map(str, arguments)], env=environment)


def test_every_method_and_card_is_asked_for_by_default(config: Path, stand_in: Survey) -> None:
    result = run(config, "--json")
    assert result.exit_code == 0
    assert [options["method"] for _, _, options in stand_in.asked] == ["full", "lora", "qlora"]
    assert [options["autocast"] is not None for _, _, options in stand_in.asked] == [False, False, True]
    assert {samples for _, samples, _ in stand_in.asked} == {16}
    offers = json.loads(result.stdout)["offers"]
    assert len(offers) == 3 * len(all_gpus())
    assert offers == sorted(offers, key=lambda offer: offer["total_bytes"])
    assert "Smallest card" in result.stderr
    assert "rtx-a5000" in result.stderr


def test_methods_and_cards_can_be_chosen(config: Path, stand_in: Survey) -> None:
    result = run(config, "--method", "lora", "--method", "full", "--gpus", "rtx-4090,NVIDIA L4,rtx4090", "--json")
    assert [options["method"] for _, _, options in stand_in.asked] == ["lora", "full"]
    assert sorted(offer["gpu"] for offer in json.loads(result.stdout)["offers"]) == ["l4", "l4", "rtx-4090", "rtx-4090"]


def test_tokens_per_step_are_samples_of_the_length(config: Path, stand_in: Survey) -> None:
    run(config, "--method", "full", "--seq-len", 16, "--tokens-per-step", 128, "--autocast", "fp16")
    ((_, samples, options),) = stand_in.asked
    assert (samples, options["sample"].tokens, str(options["autocast"])) == (8, 16, "torch.float16")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seq-len", 16, "--tokens-per-step", 100), "no multiple of the 16 tokens of a sample; nearest: 96 and 112"),
        (("--seq-len", 16, "--tokens-per-step", 5), "nearest: 16"),
        (("--gpus", "rtx-4091"), "the nearest names are rtx-4090"),
        (("--gpus", "24GiB"), "memplan plan --gpu 24GiB plans for it"),
        (("--gpus", "rtx-4090,"), "no card is called ''"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    config: Path, stand_in: Survey, arguments: tuple[object, ...], says: str
) -> None:
    result = run(config, "--method", "full", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_method_whose_package_is_missing_is_left_out_unless_it_was_asked_for(
    config: Path, stand_in: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = run(config)
    assert result.exit_code == 0
    assert [options["method"] for _, _, options in stand_in.asked] == ["full", "lora"]
    assert "qlora is left out: --method qlora needs bitsandbytes and peft" in " ".join(result.stderr.split())
    asked = run(config, "--method", "qlora")
    assert asked.exit_code == 2
    assert "pip install 'memplan[quantised]'" in asked.stderr


def test_no_card_that_fits_is_an_exit_code_of_its_own(config: Path, stand_in: Survey) -> None:
    stand_in.smallest = 2**50
    result = run(config, "--method", "full")
    assert result.exit_code == 3
    assert "full: none of these" in result.stderr


def test_forty_columns_without_colour_are_enough(config: Path, stand_in: Survey) -> None:
    result = run(config, "--method", "full", COLUMNS="40", NO_COLOR="1")
    assert max(map(len, result.stderr.splitlines())) <= 40
    assert "\x1b" not in result.stderr


def test_samples_that_are_no_tokens_cannot_be_counted_in_tokens(tmp_path: Path, stand_in: Survey) -> None:
    path = tmp_path / "config.json"
    vit = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 1}
    path.write_text(json.dumps({**vit, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}))
    result = run(path, "--method", "full", "--tokens-per-step", 128)
    assert result.exit_code == 2
    assert "are no tokens; leave it out" in result.stderr


def test_a_survey_of_adapters_on_four_bits_needs_no_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**tiny.LLAMA_CONFIG, "hidden_size": 64, "intermediate_size": 128, "torch_dtype": "bfloat16"})
    )
    asked = ("--method", "qlora", "--gpus", "rtx-4090,mi300x", "--seq-len", 16, "--tokens-per-step", 64, "--json")
    result = run(path, *asked)
    assert result.exit_code == 0
    card, unknown = json.loads(result.stdout)["offers"]
    assert (card["gpu"], card["verdict"], card["samples"], card["micro_batch"]) == ("rtx-4090", "fits", 4, 4)
    assert card["band"][0] < card["samples_per_s"] < card["band"][1]
    assert (unknown["gpu"], unknown["samples_per_s"]) == ("mi300x", None)
    assert "mi300x: only the memory is known" in result.stderr


@pytest.mark.slow
def test_methods_are_planned_side_by_side_where_there_are_cores(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--method", "full", "--method", "lora", "--gpus", "rtx-4090", "--seq-len", 16, "--tokens-per-step", 64)
    begun: list[Sequence[str]] = []
    begin = fitting_cards._begun
    monkeypatch.setattr(fitting_cards, "_begun", lambda asked, methods: begun.append(methods) or begin(asked, methods))
    said = []
    for cores in (1, 2):
        monkeypatch.setattr(fitting_cards, "_cores", lambda cores=cores: cores)
        result = run(config, *asked, "--json")
        assert result.exit_code == 0
        said.append((result.stdout, result.stderr))
    assert begun == [[], ["lora"]]
    assert said[0] == said[1]


@pytest.mark.slow
def test_what_another_process_cannot_use_is_refused_as_here(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes from the other one alone: this one has nothing to do."""
    monkeypatch.setattr(fitting_cards, "_cores", lambda: 2)
    monkeypatch.setattr(fitting_cards._Asked, "found", lambda _self, _method: ())
    result = run(config, "--method", "full", "--method", "lora", "--seq-len", 16, "--tokens-per-step", 100)
    assert result.exit_code == 2
    assert "nearest: 96 and 112" in result.stderr


def test_a_process_that_is_gone_is_said(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def gone(_asked: object, _methods: Sequence[str]) -> Iterator[list[Connection]]:
        end, other = Pipe(duplex=False)
        other.close()
        yield [end]

    monkeypatch.setattr(fitting_cards, "_cores", lambda: 2)
    monkeypatch.setattr(fitting_cards, "_begun", gone)
    monkeypatch.setattr(fitting_cards._Asked, "found", lambda _self, _method: ())
    result = run(config, "--method", "full", "--method", "lora")
    assert isinstance(result.exception, RuntimeError)
    assert "the process that planned lora is gone; ask with --method lora alone" in str(result.exception)
