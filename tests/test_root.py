import subprocess
import sys

import pytest

import memplan

HEAVY = ("accelerate", "numpy", "optuna", "pydantic", "pynvml", "rich", "torch", "transformers", "typer")


def python(code: str) -> str:
    """What a fresh interpreter prints; this one has long imported everything."""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.strip()


@pytest.mark.parametrize("name", memplan.__all__)
def test_every_exported_name_exists(name: str) -> None:
    assert getattr(memplan, name) is not None
    assert name in dir(memplan)


def test_the_exports_are_sorted_and_few() -> None:
    assert memplan.__all__ == sorted(memplan.__all__)
    assert len(memplan.__all__) <= 23
    assert {"predict", "plan", "apply", "autofit"} <= set(memplan.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        memplan.plam  # noqa: B018  # looking it up is the test


def test_importing_memplan_imports_nothing_heavy() -> None:
    loaded = python(f"import sys, memplan; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_reading_the_catalogue_and_the_strategies_needs_no_torch() -> None:
    loaded = python(
        "import sys, memplan; memplan.find_gpu('rtx-4090'); memplan.Strategy(name='x');"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_importing_memplan_takes_at_most_150_ms() -> None:
    code = "import time; start = time.perf_counter(); import memplan; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) <= 0.150
