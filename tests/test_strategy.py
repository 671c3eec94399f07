import dataclasses
import math
from pathlib import Path

import pytest

from memplan.errors import BadStrategy
from memplan.strategy import LEVERS, SAFE_LEVERS, Strategy, load_strategy, shipped_strategies

GIB = 2**30


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "objective", "tolerance", "levers", "host_memory"),
    [
        ("balanced", "samples-per-second", 0.01, SAFE_LEVERS, 0.25),
        ("throughput", "samples-per-second", 0.0, SAFE_LEVERS, 0.25),
        ("largest-batch", "micro-batch", 0.01, SAFE_LEVERS, 0.25),
        ("smallest-memory", "peak", 0.01, SAFE_LEVERS, 0.5),
        ("recompute-only", "samples-per-second", 0.01, ("recompute", "select"), 0.0),
        ("offload-first", "samples-per-second", 0.01, SAFE_LEVERS, 0.5),
        ("huggingface", "samples-per-second", 0.01, ("recompute",), 0.0),
    ],
)
def test_the_shipped_strategies(
    name: str, objective: str, tolerance: float, levers: tuple[str, ...], host_memory: float
) -> None:
    strategy = load_strategy(name)
    assert strategy.name == name
    assert (strategy.objective, strategy.tolerance) == (objective, tolerance)
    assert (strategy.levers, strategy.host_memory) == (levers, host_memory)
    assert (strategy.budget_share, strategy.max_slowdown) == (1.0, None)
    assert strategy.levers_first == (("offload",) if name == "offload-first" else ())
    assert strategy.every_block == ("recompute" if name == "huggingface" else None)
    assert strategy.summary.endswith(".")
    assert strategy.when_to_use.endswith(".")
    assert name in shipped_strategies()


def test_seven_strategies_are_shipped() -> None:
    assert len(shipped_strategies()) == 7


@pytest.mark.parametrize(
    ("host_memory", "total_bytes", "limit"),
    [(0.25, 64 * GIB, 16 * GIB), (0.25, None, 0), ("8GiB", None, 8 * GIB), ("8GiB", 4 * GIB, 4 * GIB), (0, 64, 0)],
)
def test_host_memory_is_never_unbounded(host_memory: str | float, total_bytes: int | None, limit: int) -> None:
    assert Strategy(name="mine", host_memory=host_memory).host_bytes(total_bytes) == limit


def test_levers_are_kept_in_one_order(tmp_path: Path) -> None:
    strategy = load_strategy(write(tmp_path, 'levers = ["offload", "recompute", "offload"]'))
    assert strategy.levers == ("recompute", "offload")


def test_the_readme_lists_each_shipped_strategy_and_each_key() -> None:
    readme = (Path(__file__).parents[1] / "strategies" / "README.md").read_text(encoding="utf-8")
    for word in (*LEVERS, *shipped_strategies(), *(field.name for field in dataclasses.fields(Strategy))):
        assert f"`{word}`" in readme or f'`"{word}"`' in readme


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
        ('levers = ["ofload"]', r"levers entry 'ofload' .* did you mean 'offload'\?"),
        ('levers = "offload"', r"levers = 'offload' has to be a list of recompute, select"),
        ('levers = ["select"]\nlevers_first = ["offload"]', r"levers_first = \['offload'\] has more than"),
        ('every_block = "select"', "keep, recompute"),
        ("host_memory = 1.5", r"host_memory = 1.5 .* from 0 to 1, or a size such as '32GiB'"),
        ('host_memory = "32"', "host_memory: '32' has no unit"),
        ("host_memory = inf", "host_memory = inf"),
        ('recompute = "all"', "key 'recompute' is not one of name, summary"),
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
