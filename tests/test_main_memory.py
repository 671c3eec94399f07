"""How much main memory a process may count on."""

from pathlib import Path

import psutil
import pytest
import tiny

import memplan
from memplan import main_memory
from memplan.device import resolve_gpu
from memplan.main_memory import limit_bytes, share_bytes
from memplan.recipe import Recipe
from memplan.samples import Sample
from memplan.session import Session

TOTAL = 64 * 2**30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(total=TOTAL)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("written", "limit", "share"),
    [
        ("17179869184\n", 2**34, 2**34),
        ("max\n", None, TOTAL),
        ("9223372036854771712\n", 9223372036854771712, TOTAL),  # version 1's way to write no limit
    ],
)
def test_the_limit_of_a_container(name: str, written: str, limit: int | None, share: int, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(written)
    assert limit_bytes(tmp_path) == limit
    assert share_bytes({}, tmp_path) == share
    assert share_bytes({"LOCAL_WORLD_SIZE": "8"}, tmp_path) == share // 8


@pytest.mark.parametrize(("said", "processes"), [("1", 1), ("4", 4), ("0", 1), ("-2", 1), ("many", 1), ("", 1)])
def test_the_processes_of_a_machine_share_it(said: str, processes: int, tmp_path: Path) -> None:
    assert limit_bytes(tmp_path) is None
    assert share_bytes({"LOCAL_WORLD_SIZE": said}, tmp_path) == TOTAL // processes


@pytest.mark.parametrize(("host_memory", "n_bytes"), [(0.5, 2**30), ("1GiB", 2**30), ("8GiB", 2**31)])
def test_a_plan_copies_no_more_to_the_host_than_its_process_may_have(
    host_memory: "str | float", n_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{2**34}\n")
    monkeypatch.setattr(main_memory, "limit_bytes", lambda *_: limit_bytes(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    model, batch = tiny.plain()
    session = Session(model, Sample.of(batch), Recipe(), *resolve_gpu("cpu:1GiB"))
    session.__dict__["_link_bytes_s"] = 1e9  # as if its device were a card
    strategy = memplan.Strategy("mine", host_memory=host_memory)
    assert session._host_bytes(strategy) == n_bytes * 8 // 9
