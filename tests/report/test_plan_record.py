"""Plan files: whole or not at all, and nothing in place of what is no file."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from records_made import make_plan

from memplan.errors import PlanSchema
from memplan.plan_record import Plan
from memplan.records import write_whole


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CHOSEN = {
    "peak_bytes": 1,
    "step_s": 1.0,
    "options": ["keep"] * 5,
    "head": "keep",
    "stepping": "plain",
    "chosen": True,
}


def test_a_full_disk_leaves_the_older_plan(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", make_plan()
    plan.save(path)
    with full_disk(), pytest.raises(PlanSchema, match=r"cannot write the plan file .*File too large. Name another"):
        make_plan(micro_batch=4).save(path)
    assert Plan.load(path) == plan
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_plan_is_replaced_and_keeps_who_may_read_it(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", make_plan(micro_batch=4, effective_batch=16)
    make_plan().save(path)
    path.chmod(0o600)
    plan.save(path)
    assert Plan.load(path) == plan
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_goes_on_to_point_to_its_file(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(file)
    write_whole(link, b"new")
    assert (link.is_symlink(), file.read_bytes()) == (True, b"new")


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, b"new")
        assert os.read(reading, 10) == b"new"
    finally:
        os.close(reading)
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"effective_batch": 3}, "2 x 4 samples are not 3 per step"),
        ({"breakdown": {}}, "the parts of the peak are 0 bytes together, and it is 22,548,578,304"),
        ({"micro_batch": 0}, "micro_batch: Input should be greater than 0"),
        ({"frontier": [CHOSEN, CHOSEN]}, "more than one plan of the frontier is the chosen one"),
        ({"budget": {**make_plan().budget.model_dump(), "total_bytes": -5}}, "budget.total_bytes: Input should be"),
        ({"schema_version": "3"}, "schema version '3'; this memplan reads version 3"),
    ],
)
def test_a_file_that_contradicts_itself_is_damaged(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(make_plan().model_dump(mode="json") | changes))
    with pytest.raises(PlanSchema, match=re.escape(words)):
        Plan.load(path)
