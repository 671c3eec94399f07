"""The benchmark of cards measured by others: its models, its command, and the figures it has to hold."""

import json
from pathlib import Path

import pytest
import real_cards
import torch
import transformers_451
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

RUNS = real_cards.runs_in(real_cards.RUNS)


@pytest.mark.parametrize(("model", "optimizer", "batch"), [("distilgpt2", "AdamW", 10), ("T5-small", "SGD", 36)])
def test_a_run_is_predicted_from_its_config_alone(model: str, optimizer: str, batch: int) -> None:
    (run,) = (r for r in RUNS if r.model.endswith(model) and (r.optimizer, r.batch) == (optimizer, batch))
    row = real_cards.predict(run)
    assert abs(row.error) < 0.01
    assert row.allocated_bytes < row.predicted_bytes
    assert all(parameter.is_meta for parameter in real_cards.build(run.model).parameters())


def test_a_model_that_is_not_known() -> None:
    with pytest.raises(real_cards.NotPredictable, match="no config of who/knows is known here; of gpt2, "):
        real_cards.build("who/knows")
    with pytest.raises(ValueError, match="does otherwise for llama is not known"):
        transformers_451.build(LlamaConfig(), LlamaForCausalLM)


PLAIN = {
    "model": "distilgpt2",
    "optimizer": "SGD",
    "batch": 2,
    "gpu": "NVIDIA GeForce RTX 3060",
    "measured_bytes": 2**30,
}


def test_a_run_that_cannot_be_predicted_is_a_row_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = (
        {"model": "who/knows"},
        {"optimizer": "Muons"},
        {"optimizer": "lr_scheduler"},
        {"gpu": "RTX 9"},
        {"zero_grad": 7},
    )
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps([*(PLAIN | change for change in odd), {**PLAIN, "driver": "570", "xmem_bytes": None}]))
    with pytest.raises(SystemExit, match="5 of 6 runs cannot be predicted"):
        real_cards.main(["--runs", str(runs)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert {row.count("|") for row in rows} == {11}
    why = ("no config of who/knows", "no optimizer Muons", "no optimizer lr_scheduler", "RTX 9", "zero_grad is 7")
    for row, reason in zip(rows, why, strict=False):
        assert "not predictable: " in row
        assert reason in row
    assert "not predictable" not in rows[-1]
    assert "| SGD | 2 | 0 | 3060 | 1,024 | " in rows[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            json.dumps([PLAIN, {"model": "gpt2", "batch": 2, "gpu": "x"}]),
            "run 2 has no optimizer, measured_bytes; it has",
        ),
        (json.dumps({"runs": [PLAIN | {"batch": "8"}]}), "run 1 has batch = '8'; that is a whole number"),
        (json.dumps([PLAIN | {"measured_bytes": 0}]), "run 1 has measured_bytes = 0"),
        (json.dumps(["gpt2"]), "run 1 is 'gpt2', not an object"),
        (json.dumps({"rows": []}), "has no list of runs"),
        ("{", "Expecting property name"),
    ],
)
def test_a_file_that_is_no_file_of_runs(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs.json"
    runs.write_text(text)
    with pytest.raises(SystemExit) as ended:
        real_cards.main(["--runs", str(runs)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_all_models_of_the_table_can_be_built() -> None:
    assert {run.model.rpartition("/")[2].lower() for run in RUNS} <= set(real_cards.MODELS)
    weights = {name: sum(p.numel() for p in real_cards.build(name).parameters()) for name in real_cards.MODELS}
    # As the model cards have them.
    assert weights["gpt2"] == 124_439_808
    assert weights["distilgpt2"] == 81_912_576
    assert weights["gpt2-medium"] == 354_823_168
    assert weights["opt-125m"] == 125_239_296
    assert weights["opt-350m"] == 331_196_416
    assert weights["gpt-neo-125m"] == 125_198_592
    assert weights["t5-small"] == 60_506_624
    assert weights["t5-base"] == 222_903_552


def test_a_cache_keeps_what_it_is_given_first_and_only_inside_the_context() -> None:
    before = DynamicLayer.update
    states = torch.ones(1, 2, 3, 4)
    with transformers_451.caches_as_in_451():
        cache = DynamicCache()
        assert cache.update(states, states, 0)[0] is states
        assert cache.update(states, states, 0)[0].shape == (1, 2, 6, 4)
    assert DynamicLayer.update is before


def test_the_page_has_the_table_of_all_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "real_cards.md").read_text()
    assert f"{len(RUNS)} runs: median error" in page
    for run in RUNS:
        assert f"| {run.model} | {run.optimizer} | {run.batch} | {run.zero_grad} |" in page
