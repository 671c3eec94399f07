import errno
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from io import FileIO
from pathlib import Path

import optuna
import pytest
import tuners
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tuners import BUDGET_BYTES, COUNT, MADE_FOR, candidate, measured

from memplan.errors import PlanMismatch, UsageError
from memplan.plan_record import Verdict
from memplan.storages import reached, storage_of
from memplan.trials import NEAR, Candidate, Trials

ALL = 10**6
KINDS = {"memory": lambda folder: None, "journal": lambda folder: folder / "tune.log"}
KINDS["sqlite"] = lambda folder: f"sqlite:///{folder / 'tune.db'}"
in_every_storage = pytest.mark.parametrize("kind", KINDS)


def trials_of(*queue: Candidate, storage: object = None, patience_s: float = 300.0) -> Trials:
    return Trials(storage_of(storage), "shared", MADE_FOR, lambda: queue, patience_s)


def run_all(
    trials: Trials, seconds: Callable[[Candidate], float], most: int = ALL, peak_bytes: int = BUDGET_BYTES
) -> list[int]:
    """Numbers of the trials that ran, in their order. While none keeps the budget, none is let go."""
    ran = []
    while (trial := trials.claim(most)) is not None:
        ran.append(trial.number)
        trials.measured(trial, measured(trial.plan, seconds(trial), peak_bytes))
    return ran


# --- one worker -----------------------------------------------------------------------------------------------------


@in_every_storage
def test_every_plan_is_measured_once_and_the_fastest_is_best(kind: str, tmp_path: Path) -> None:
    trials = trials_of(*(candidate(1 + 0.005 * number) for number in range(5)), storage=KINDS[kind](tmp_path))
    assert run_all(trials, lambda one: 0.99 ** (200 * (one.plan.step_s - 1))) == [0, 1, 2, 3, 4]
    best = trials.best(trials.all)
    assert best is not None
    assert best.number == trials._study.best_trial.number == 4


def test_a_study_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "tune.journal"
    assert run_all(trials_of(*tuners.queue(), storage=file), lambda one: 0.01, 2, BUDGET_BYTES + 1) == [0, 1]

    def never() -> list[Candidate]:
        raise AssertionError("the study has its plans")

    again = Trials(storage_of(str(file)), "shared", MADE_FOR, never, 300.0)
    assert run_all(again, lambda one: 0.01, 5, BUDGET_BYTES + 1) == [2, 3, 4]
    assert [one.state for one in again.all].count("complete") == 5


def test_what_cannot_win_is_let_go() -> None:
    trials = trials_of(*(candidate(seconds) for seconds in (1.0, 1.01, 1.015, 1.05, 1.2, 1.3)))
    assert run_all(trials, lambda one: one.plan.step_s * 1.5) == [0, 1, 2]
    gone = [one for one in trials.all if one.state == "pruned"]
    assert [one.number for one in gone] == [3, 4, 5]
    assert gone[0].why == "1.58 s are to be expected by those that were run, and trial 0 took 1.50 s"


def test_other_micro_batches_get_the_benefit_of_the_doubt() -> None:
    trials = trials_of(candidate(1.0, 1), candidate(1.1, 1), candidate(1.15, 4), candidate(1.16, 4), candidate(1.3, 8))
    assert run_all(trials, lambda one: one.plan.step_s * (1.0 if one.micro_batch == 1 else 0.8)) == [0, 1, 2, 3]


def test_one_run_alone_lets_nothing_go() -> None:
    trials = trials_of(*(candidate(seconds) for seconds in (1.0, 2.0, 3.0)))
    assert run_all(trials, lambda one: one.plan.step_s) == [0, 1]


def test_a_micro_batch_that_turns_out_dear_is_let_go() -> None:
    trials = trials_of(candidate(1.0, 1), candidate(1.05, 4), candidate(1.06, 1), candidate(1.07, 4))
    assert run_all(trials, lambda one: one.plan.step_s * (1.5 if one.micro_batch == 1 else 1.0)) == [0, 1, 3]


def test_a_third_of_the_trials_finds_what_all_would_find() -> None:
    """With predictions off by 1 %, and by up to a fifth for a micro-batch as a whole: 2 % is exceeded once in 80."""
    regrets = []
    for seed in range(20):
        chance = random.Random(seed)
        off = {size: chance.uniform(0.8, 1.2) for size in (1, 2, 4, 8)}
        queue = [candidate(chance.uniform(1.0, 1.4), size) for size in off for _ in range(5)]
        truth = {one.plan.step_s: one.plan.step_s * off[one.micro_batch] * chance.gauss(1, 0.01) for one in queue}
        trials = trials_of(*queue)
        ran = run_all(trials, lambda one, truth=truth: truth[one.plan.step_s], most=len(queue) // 3)
        best = trials.best(trials.all)
        assert best is not None
        assert len(ran) <= len(queue) // 3
        regrets.append(truth[best.plan.step_s] / min(truth.values()) - 1)
    assert sum(regret > 2 * NEAR for regret in regrets) <= 1
    assert sum(regrets) / len(regrets) <= NEAR


def test_what_broke_the_budget_is_not_the_best() -> None:
    trials = trials_of(candidate(1.0), candidate(1.1))
    first, second = trials.claim(ALL), trials.claim(ALL)
    assert first is not None
    assert second is not None
    trials.measured(first, measured(first.plan, 1.0, peak_bytes=BUDGET_BYTES + 1))
    trials.measured(second, measured(second.plan, 1.1))
    best = trials.best(trials.all)
    assert best is not None
    assert best.number == trials._study.best_trial.number == second.number
    assert trials._study.best_value == pytest.approx(8 / 1.1)
    assert [one.why for one in trials.all] == ["its peak is 1 B above the budget", ""]


def test_what_cannot_be_run_is_not_possible() -> None:
    trials = trials_of(*(candidate(1 + 0.001 * number) for number in range(6)))
    claimed = [trials.claim(ALL) for _ in range(5)]
    fits, over, out, bad, running = (one for one in claimed if one is not None)
    trials.measured(fits, measured(fits.plan, 1.0))
    trials.measured(over, measured(over.plan, 0.5, peak_bytes=BUDGET_BYTES + 1))
    trials.ran_out(out, "out of memory")
    trials.failed(bad, "no such thing")
    waiting = trials.all[-1]
    assert [one.number for one in trials.possible(trials.all)] == [fits.number, running.number, waiting.number]


def test_more_are_run_until_one_has_kept_the_budget() -> None:
    queue = [candidate(1 + 0.001 * number) for number in range(6)]
    trials = trials_of(*queue)
    ran = []
    while (trial := trials.claim(2, until_found=True)) is not None:
        ran.append(trial.number)
        over = BUDGET_BYTES + (1 if trial.number < 3 else -1)
        trials.measured(trial, measured(trial.plan, 1.0, peak_bytes=over))
    assert ran == [0, 1, 2, 3]
    strict = trials_of(*queue)
    assert run_all(strict, lambda _: 1.0, 2, BUDGET_BYTES + 1) == [0, 1]


def test_what_may_need_more_than_the_budget_comes_last() -> None:
    unsure = Candidate(4, 1.0, "balanced", "any", tuners.plan_of(0.9, verdict=Verdict.UNCERTAIN))
    trials = trials_of(unsure, candidate(1.0), candidate(0.999))
    assert run_all(trials, lambda one: one.plan.step_s, 2) == [1, 2]


def test_the_budget_is_the_whole_one() -> None:
    budget = tuners.plan_of(1.0).budget.model_copy(update={"margin_bytes": BUDGET_BYTES // 4})
    smaller = Candidate(4, 0.75, "balanced", "any", tuners.plan_of(1.0, budget=budget))
    assert trials_of(smaller).budget_bytes == BUDGET_BYTES


# --- what goes wrong ------------------------------------------------------------------------------------------------


@in_every_storage
def test_what_was_interrupted_waits_again(kind: str, tmp_path: Path) -> None:
    trials = trials_of(candidate(1.0), storage=KINDS[kind](tmp_path))
    for _ in range(3):
        trial = trials.claim(most=1)
        assert trial is not None
        trials.give_back(trial)
    assert [one.state for one in trials.all] == ["waiting"]
    assert run_all(trials, lambda one: 1.0) == [3]


@in_every_storage
def test_a_trial_of_a_worker_that_is_gone_is_run_again_once(kind: str, tmp_path: Path) -> None:
    storage = storage_of(KINDS[kind](tmp_path))
    patient, hasty = (trials_of(candidate(1e-4), storage=storage, patience_s=seconds) for seconds in (300.0, -1.0))
    first = patient.claim(ALL)
    assert first is not None
    second = hasty.claim(ALL)
    assert second is not None
    assert (second.number, [one.number for one in hasty.all]) == (1, [1])
    patient.measured(first, measured(first.plan, 1.0))  # not gone after all, but too late
    assert [one.state for one in patient.all] == ["running"]
    assert hasty.claim(ALL) is None
    assert [one.state for one in hasty.all] == ["fail"]
    assert "nothing was heard of its worker" in hasty.all[0].why


def test_a_worker_s_trial_is_no_other_s_for_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that has claimed it and said nothing yet, only the storage's clock is known."""
    storage = storage_of(None)
    first, second = (trials_of(candidate(1.0), storage=storage) for _ in range(2))
    monkeypatch.setattr(Trials, "alive", lambda *_: None)
    assert first.claim(ALL) is not None
    (trial,) = storage.get_all_trials(0, deepcopy=False)
    trial.datetime_start = trial.datetime_start - timedelta(hours=2)
    second._take_up()
    assert [one.state for one in second.all] == ["running"]


@in_every_storage
def test_a_worker_that_ends_between_copy_and_end_loses_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_of(KINDS[kind](tmp_path))
    trials = trials_of(candidate(1.0), storage=storage)
    trial = trials.claim(ALL)
    assert trial is not None
    with monkeypatch.context() as patched:

        def ended(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(storage, "set_trial_state_values", ended)
        with pytest.raises(KeyboardInterrupt):
            trials.give_back(trial)
    assert [(one.number, one.state) for one in trials.all] == [(1, "waiting")]
    trials.give_back(trial)  # once more, as another worker would: of two copies one counts
    assert run_all(trials_of(storage=storage), lambda _: 1.0) == [1]
    assert [one.number for one in trials.all] == [1]


def test_a_queue_that_was_not_finished_is_no_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, add = tmp_path / "tune.log", optuna.Study.add_trial

    def interrupted(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if len(study.trials) == 1:
            raise KeyboardInterrupt
        add(study, trial)

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "add_trial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trials_of(candidate(1.0), candidate(1.1), storage=file)
    assert len(trials_of(candidate(1.0), candidate(1.1), storage=file).all) == 2


def test_waiting_for_another_process_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.trials._SILENT_S", 0.0)
    storage = storage_of(None)
    first, second = (trials_of(candidate(1.0), storage=storage) for _ in range(2))
    trial = first.claim(ALL)
    assert trial is not None
    monkeypatch.setattr("time.sleep", lambda _: caplog.records and first.measured(trial, measured(trial.plan, 1.0)))
    assert second.claim(ALL) is None
    assert "waiting for trial 0, which another process is running; if it says nothing for 5 min 30 s" in caplog.text


def test_a_study_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tune.log"
    trials_of(candidate(1.0), storage=file)
    with pytest.raises(PlanMismatch, match=r"effective_batch 8, not 16.* another"):
        Trials(storage_of(file), "shared", {**MADE_FOR, "effective_batch": 16}, tuners.queue, 1.0)


def test_a_study_that_is_not_memplans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_of(None)
    optuna.create_study(study_name="shared", storage=storage)
    monkeypatch.setattr("memplan.trials._FILLING_S", 0.0)
    with pytest.raises(UsageError, match="was begun and has no queue"):
        trials_of(candidate(1.0), storage=storage)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("tune.txt", "ends in .log or .journal"),
        ("/proc/memplan.log", "cannot be read or written"),
        ("sqlite:////proc/memplan.db", "cannot be read or written"),
        ("dialect+nothing://x", "cannot be read or written"),
        ("training.log", "is no journal of a study"),
        ("metrics.log", "is no journal of a study"),
        ("note.log", "is no journal of a study"),
    ],
)
def test_where_no_study_can_be_kept_is_said(
    where: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("training.log").write_text("epoch 1\nepoch 2\n", encoding="utf-8")
    Path("metrics.log").write_text('{"loss": 1}\n{"loss": 2}\n', encoding="utf-8")
    Path("note.log").write_text("one line that does not end", encoding="utf-8")
    with pytest.raises(UsageError, match=why):
        storage_of(where)
    assert Path("note.log").read_text(encoding="utf-8") == "one line that does not end"


def test_a_full_disk_is_said_and_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tune.log"
    trials = trials_of(*tuners.queue(), storage=file)
    assert len(run_all(trials, lambda one: 0.01, most=2)) == 2

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="No space left on device"):
            trials.claim(ALL)
    assert sum(one.measured is not None for one in trials_of(storage=file).all) == 2


@pytest.mark.parametrize("half", [b'{"op_code":', b'{"op_c\0\0\0\0', b'{"op_code":5,"worker_id":"' + b"x" * 200_000])
def test_a_study_whose_last_line_was_cut_short_goes_on(
    half: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tune.log"
    assert run_all(trials_of(*tuners.queue(), storage=file), lambda one: 0.01, 2, BUDGET_BYTES + 1) == [0, 1]
    with file.open("ab") as journal:
        journal.write(half)
    assert run_all(trials_of(storage=file), lambda one: 0.01, 4, BUDGET_BYTES + 1) == [2, 3]
    assert caplog.text.count("was cut short") == 1
    assert sum(one.measured is not None for one in trials_of(storage=file).all) == 4


@pytest.mark.parametrize("mends", [True, False])
def test_a_write_that_fails_half_way_leaves_a_study_to_go_on_with(
    mends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(FileIO):
        def write(self, content: bytes) -> int:  # type: ignore[override]  # of all buffers, bytes are what is written
            if os.fstat(self.fileno()).st_size > size:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content[: len(content) // 2])

        def truncate(self, size: int | None = None) -> int:
            if not mends:
                raise OSError(errno.EIO, "Input/output error")
            return super().truncate(size)

    file = tmp_path / "tune.log"
    trials = trials_of(*tuners.queue(), storage=file)
    whole = file.read_bytes()
    size = len(whole)
    with monkeypatch.context() as patch:
        patch.setattr("memplan.storages.FileIO", Full)
        with pytest.raises(UsageError, match="No space left on device"):
            trials.claim(ALL)
    assert (file.read_bytes() == whole) is mends
    assert not (tmp_path / "tune.log.lock").exists()
    assert run_all(trials, lambda one: 0.01, 2, BUDGET_BYTES + 1) == [0, 1]
    assert run_all(trials_of(storage=file), lambda one: 0.01, 3, BUDGET_BYTES + 1) == [2]


def test_a_line_of_a_study_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tune.log"
    trials_of(*tuners.queue(), storage=file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b'{"op_code":', *lines[3:]]))
    with pytest.raises(UsageError, match=r"line 4 of .*tune\.log is no entry .* The 3 lines before it are sound"):
        trials_of(storage=file)
    with pytest.raises(UsageError, match="of the test cannot be read or written"), reached("the file of the test"):
        JournalStorage(JournalFileBackend(str(file)))  # one that a caller made


def test_tables_of_another_optuna_are_refused(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'tune.db'}"
    storage = storage_of(database)
    assert isinstance(storage, optuna.storages.RDBStorage)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    storage.engine.dispose()
    with pytest.raises(UsageError, match=r"another version of Optuna .*storage upgrade.* name another database"):
        storage_of(database)


def test_a_proxy_that_is_gone_is_said() -> None:
    grpc, why = pytest.importorskip("grpc"), r"grpc://host:1 cannot be read or written \(RpcError: gone\)"
    with pytest.raises(UsageError, match=why), reached("grpc://host:1"):
        raise grpc.RpcError("gone")


# --- several workers ------------------------------------------------------------------------------------------------


def worker(storage: str, patience_s: float, *hang: str) -> "subprocess.Popen[str]":
    program = [sys.executable, tuners.__file__, storage, str(patience_s), *hang]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow  # starts three processes
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_processes_share_a_study_without_loss_or_double(kind: str, tmp_path: Path) -> None:
    share(str(KINDS[kind](tmp_path)))


@pytest.mark.slow  # starts four processes
def test_processes_share_a_study_behind_a_proxy(tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", PROXY, str(tmp_path / "tune.log"), str(port)]) as proxy:
        try:
            share(f"grpc://localhost:{port}")
        finally:
            proxy.kill()


PROXY = """
import sys
from optuna.storages import run_grpc_proxy_server
from memplan.storages import storage_of
run_grpc_proxy_server(storage_of(sys.argv[1]), host="localhost", port=int(sys.argv[2]))
"""


@pytest.mark.slow  # starts two processes, which plan and run a model
def test_processes_tune_one_study_together(tmp_path: Path) -> None:
    file = tmp_path / "tune.log"
    workers = [worker(str(file), 300.0, "tune") for _ in range(2)]
    one, other = [json.loads(each.communicate(timeout=600)[0]) for each in workers]
    trials = optuna.load_study(study_name="memplan", storage=storage_of(file)).trials
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert sorted(one["ran"] + other["ran"]) == [trial.number for trial in trials if "heard" in trial.user_attrs]
    assert one["best"] == other["best"]


def share(storage: str) -> None:
    workers = [worker(storage, 300.0) for _ in range(3)]
    printed = [one.communicate(timeout=300)[0].split() for one in workers]
    assert [one.returncode for one in workers] == [0, 0, 0]
    assert sorted(int(number) for numbers in printed for number in numbers) == list(range(COUNT))
    trials = trials_of(storage=storage)
    assert [one.state for one in trials.all] == ["complete"] * COUNT
    assert len(trials._study.get_trials(states=(TrialState.COMPLETE,))) == COUNT


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_the_trial_of_a_killed_process_is_taken_up(kind: str, tmp_path: Path) -> None:
    """At once, since it was one of this machine."""
    storage = str(KINDS[kind](tmp_path))
    with worker(storage, 300.0, "hang") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "0\n"
        first.kill()
    second = worker(storage, 1e6)
    printed, _ = second.communicate(timeout=300)
    assert sorted(map(int, printed.split())) == list(range(1, COUNT + 1))  # the last is the first one's again
    assert [one.state for one in trials_of(storage=storage).all] == ["complete"] * COUNT
