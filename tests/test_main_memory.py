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
    none = tmp_path / "none"
    assert limit_bytes(tmp_path, none) == limit
    assert share_bytes({}, tmp_path, none) == share
    assert share_bytes({"LOCAL_WORLD_SIZE": "8"}, tmp_path, none) == share // 8


GROUPS = {  # lines of a process -> the folder of its group, from the root
    "0::/system.slice/slurmstepd.scope/job_7/step_0\n": "system.slice/slurmstepd.scope/job_7/step_0",
    "5:cpuset:/\n4:cpu,memory:/slurm/uid_0/job_7/step_0\n0::/\n": "memory/slurm/uid_0/job_7/step_0",
    "0::/odd:name/job_7/step_0\n": "odd:name/job_7/step_0",
}


@pytest.mark.parametrize(("lines", "folder"), GROUPS.items())
@pytest.mark.parametrize("limits", [{"step": 3 * 2**30}, {"job": 2**31, "step": 2**33}, {"job": 2**31}, {}])
def test_the_limit_of_a_job(lines: str, folder: str, limits: dict[str, int], tmp_path: Path) -> None:
    """Of the groups one in the other the lowest counts; others, and those that are not there, do not."""
    own, step = tmp_path / "own", tmp_path / folder
    own.write_text(lines)
    step.mkdir(parents=True)
    name = "memory.limit_in_bytes" if folder.startswith("memory") else "memory.max"
    for group, at in {"step": step, "job": step.parent}.items():
        (at / name).write_text(f"{limits.get(group, 'max')}\n")
    other = step.parent / "step_1"
    other.mkdir()
    (other / name).write_text("4096\n")
    assert limit_bytes(tmp_path, own) == (min(limits.values()) if limits else None)
    (tmp_path / "elsewhere").mkdir()
    assert limit_bytes(tmp_path / "elsewhere", own) is None


@pytest.mark.parametrize(("said", "processes"), [("1", 1), ("4", 4), ("0", 1), ("-2", 1), ("many", 1), ("", 1)])
def test_the_processes_of_a_machine_share_it(said: str, processes: int, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert limit_bytes(tmp_path, none) is None
    assert share_bytes({"LOCAL_WORLD_SIZE": said}, tmp_path, none) == TOTAL // processes


@pytest.mark.parametrize(("host_memory", "n_bytes"), [(0.5, 2**30), ("1GiB", 2**30), ("8GiB", 2**31)])
def test_a_plan_copies_no_more_to_the_host_than_its_process_may_have(
    host_memory: "str | float", n_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{2**34}\n")
    monkeypatch.setattr(main_memory, "limit_bytes", lambda *_: limit_bytes(tmp_path, tmp_path / "none"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    model, batch = tiny.plain()
    session = Session(model, Sample.of(batch), Recipe(), *resolve_gpu("cpu:1GiB"))
    session.__dict__["_link_bytes_s"] = 1e9  # as if its device were a card
    strategy = memplan.Strategy("mine", host_memory=host_memory)
    assert session._host_bytes(strategy) == n_bytes * 8 // 9
