"""Whether a process has ended, as others see it."""

import os
import subprocess
import sys

import psutil

from memplan.workers import has_ended, this_worker


def test_this_process_has_not_ended() -> None:
    assert not has_ended(this_worker())


def test_nothing_is_known_of_nobody_and_of_other_machines() -> None:
    host, namespace, booted, *_ = this_worker()
    assert not has_ended(None)
    assert not has_ended(["another host", namespace, booted, 1, 0.0])
    assert not has_ended([host, "pid:[1]", booted, 1, 0.0])
    assert not has_ended([host, namespace, "another time", 1, 0.0])


def test_a_process_that_has_ended_or_waits_to_be_taken_note_of() -> None:
    host, namespace, booted, *_ = this_worker()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        worker = [host, namespace, booted, child.pid, psutil.Process(child.pid).create_time()]
        assert not has_ended(worker)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(worker)
    assert has_ended(worker)


def test_a_number_that_another_process_has_now() -> None:
    *machine, number, began = this_worker()
    assert isinstance(began, float)
    assert has_ended([*machine, number, began - 60])
