import dataclasses
import math
from pathlib import Path

import pytest

from memplan.errors import BadStrategy
from memplan.strategy import Strategy, load_strategy, shipped_strategies


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "objective", "recompute", "tolerance"),
    [
        ("balanced", "samples-per-second", "planned", 0.01),
        ("throughput", "samples-per-second", "planned", 0.0),
        ("largest-batch", "micro-batch", "planned", 0.01),
        ("smallest-memory", "peak", "planned", 0.01),
        ("huggingface", "samples-per-second", "all", 0.01),
    ],
)
def test_the_shipped_strategies(name: str, objective: str, recompute: str, tolerance: float) -> None:
    strategy = load_strategy(name)
    assert strategy.name == name
    assert (strategy.objective, strategy.recompute, strategy.tolerance) == (objective, recompute, tolerance)
    assert (strategy.budget_share, strategy.max_slowdown) == (1.0, None)
    assert strategy.summary.endswith(".")
    assert strategy.when_to_use.endswith(".")
    assert name in shipped_strategies()


def test_the_readme_lists_each_shipped_strategy_and_each_key() -> None:
    readme = (Path(__file__).parents[1] / "strategies" / "README.md").read_text(encoding="utf-8")
    for word in (*shipped_strategies(), *(field.name for field in dataclasses.fields(Strategy))):
        assert f"`{word}`" in readme


def test_a_file_says_only_what_it_wants_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, "budget_share = 0.9\nmax_slowdown = 0")
    strategy = load_strategy(path)
    assert strategy == Strategy(name="mine", budget_share=0.9, max_slowdown=0)
    assert load_strategy(str(path)) == strategy
    assert load_strategy(strategy) is strategy
    assert load_strategy(write(tmp_path, 'name = "polite"')).name == "polite"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("budget_share = nan", r"budget_share = nan .* above 0 and at most 1"),
        ("budget_share = inf", "budget_share = inf"),
        ("budget_share = 0", "budget_share = 0 "),
        ("budget_share = 1.01", "budget_share = 1.01"),
        ("budget_share = true", "budget_share = True"),
        ('budget_share = "0.5"', "budget_share = '0.5'"),
        ("tolerance = -0.1", r"tolerance = -0.1 .* at least 0 and below 1"),
        ("tolerance = nan", "tolerance = nan"),
        ("tolerance = 1", "tolerance = 1 "),
        ("max_slowdown = -1", r"max_slowdown = -1 .* at least 0 and finite"),
        ("max_slowdown = inf", "max_slowdown = inf"),
        ("max_slowdown = nan", "max_slowdown = nan"),
        ('objective = "microbatch"', r"did you mean 'micro-batch'\?"),
        ('objective = "joy"', "samples-per-second, micro-batch, peak"),
        ("objective = 3", "objective 3 is not one of"),
        ('recompute = "plan"', "planned, all, none"),
        ("summary = 1", "summary = 1 has to be a text"),
        ("budget_shar = 0.5", r"key 'budget_shar' .* did you mean 'budget_share'\?"),
        ("xyzzy = 1", "key 'xyzzy' is not one of name, summary"),
        ("tolerance = ", "not a TOML file"),
    ],
)
def test_an_impossible_file_is_refused_with_the_value_and_the_range(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BadStrategy, match=complaint) as caught:
        load_strategy(path)
    assert str(path) in str(caught.value)


def test_a_record_made_by_hand_is_checked_as_well() -> None:
    with pytest.raises(BadStrategy, match="budget_share = nan"):
        Strategy(name="mine", budget_share=math.nan)


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BadStrategy, match=r"'fastest'.* balanced, .*huggingface, .*'mine.toml'"):
        load_strategy("fastest")
    with pytest.raises(BadStrategy, match=r"cannot read .*none\.toml: No such file"):
        load_strategy(tmp_path / "none.toml")
    with pytest.raises(BadStrategy, match="cannot read"):
        load_strategy(tmp_path)
    bad = tmp_path / "bytes.toml"
    bad.write_bytes(b"summary = '\xff'")
    with pytest.raises(BadStrategy, match="not a TOML file"):
        load_strategy(bad)
