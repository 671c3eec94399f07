"""The two CUDA benchmarks, dry: all that needs no card, on tiny models, with a fake device that has a cap and fails."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cuda
import cuda_accuracy
import cuda_card
import cuda_measure
import cuda_models
import cuda_report
import cuda_runs
import pytest
import torch
from cuda_report import AT_FULL, CAPPED, FULL, FULL_CAPPED, LAPS, NONE, named
from cuda_runs import Answer, Here, Job, Store, Workers, run_all
from histories import check_repeated
from pages import DOCS, written

from memplan.allocator import Events
from memplan.gpus import find_gpu
from memplan.strategy import Strategy, load_strategy

TASK = "mistral-7b bf16"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of dry runs go nowhere else, and plans have one lever, so that a plan takes a second."""
    for module in (cuda, cuda_accuracy):
        monkeypatch.setattr(module, "DRY", tmp_path)
    whole = Strategy("whole blocks", levers=("recompute",))
    for module in (cuda_measure, cuda_measure.cuda_cases):
        monkeypatch.setattr(module, "load_strategy", lambda name: whole)
    monkeypatch.setattr(cuda, "ROUNDS", 2)
    monkeypatch.setattr(cuda_measure, "LEVERS", ("recompute", "optimizer", "step-in-backward"))
    return tmp_path


def results_in(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text())["results"]
    return read


@pytest.mark.slow
def test_the_trainings_dry(folder: Path) -> None:
    text = cuda.main(["--dry-run", "--tasks", f"mistral-7b int8,{TASK}"], Here("fake"))
    results = results_in(folder / "cuda.json")
    full, none, ours = (results[named(TASK, setting)] for setting in (FULL, NONE, AT_FULL))
    assert full["allocated"] < none["allocated"]
    assert ours["plan"]["budget_bytes"] == pytest.approx(full["allocated"], rel=0.05)  # the CPU's workspaces are unseen
    assert ours["allocated"] <= full["allocated"] * 1.05
    assert none["predicted"]["peak"] == pytest.approx(none["allocated"], rel=0.02)
    assert [len(done) for done in results[named(TASK, LAPS)]["rounds"]] == [3] * cuda.ROUNDS
    for setting in (CAPPED, FULL_CAPPED):
        assert results[named(TASK, setting)]["allocated"] <= cuda_card.DRY_CAP_BYTES
    assert "fails" in cuda_report._options(results[named(TASK, FULL_CAPPED)])
    rows = [line for line in text.splitlines() if line.startswith("| mistral-7b")]
    rows = [row for row in rows if row.split(" | ")[1] in cuda.SETTINGS["mistral-7b int8"]]
    assert len(rows) == 5 + 5 + 2
    assert {row.count("|") for row in rows} == {cuda_report.COLUMNS + 1}
    if not results[named("mistral-7b int8", NONE)].get("allocated"):
        assert "not yet measured: bitsandbytes is not installed there" in text


@pytest.mark.slow
def test_a_full_fine_tune_dry(folder: Path) -> None:
    text = cuda.main(["--dry-run", "--tasks", cuda.FULL_TUNE], Here("fake"))
    ours, theirs = (results_in(folder / "cuda.json")[named(cuda.FULL_TUNE, setting)] for setting in cuda.UNDER_CAP)
    assert ours["micro_batch"] > 1
    assert ours["predicted"]["peak"] <= cuda_card.DRY_CAP_BYTES
    assert f"allocation {cuda.DRY_FAILS_AT} was told to fail" in str(theirs["tries"])
    assert f"| {cuda.FULL_TUNE} | {CAPPED} | {ours['micro_batch']} x 1 |" in text


def test_an_allocation_that_fails_is_an_answer_and_a_row() -> None:
    request = {"do": "run", "task": TASK, "setting": NONE, "fails_at": 40}
    failed, _ = cuda_measure.answers(request, "fake")
    assert failed["oom"]
    assert "allocation 40 was told to fail" in failed["error"]
    (row,) = [row for row in cuda_report.table({named(TASK, NONE): failed}, {TASK: (NONE,)}) if TASK in row]
    assert row.startswith(f"| {TASK} | {NONE} | out of memory |")


def test_what_is_measured_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.at(folder / "cuda.json")
    store.results[named(TASK, NONE)] = {"allocated": 1, "reserved": 1}
    jobs = [
        Job(named(TASK, NONE), NONE, 1.0, pytest.fail),
        Job("late", FULL, 9.0, pytest.fail),
        Job("lost", FULL_CAPPED, 1.0, lambda: None),
    ]
    run_all(jobs, Here("fake"), store, limit_s=5.0, begin=__import__("time").monotonic())
    assert list(store.results) == [named(TASK, NONE)]


@pytest.mark.parametrize("case", ["W1 2 layers/autocast/plain/1", "W3/autocast/checkpointed/2", "W4/fp32/planned/1"])
def test_the_accuracy_dry(folder: Path, case: str) -> None:
    text = cuda_accuracy.main(["--dry-run", "--histories", "--cases", case], Here("fake"))
    results = results_in(folder / "accuracy" / "cuda_accuracy.json")
    line = cuda_accuracy.line_of(results, case)
    assert line.error == pytest.approx(0, abs=0.02)
    assert (line.holds, line.is_tight) == (True, True)
    below = results[f"{case} {cuda_accuracy.UNDER}"]
    assert below["oom"]
    assert below["ended"].startswith("step")
    assert f"| {case} |" in text
    kept = list((folder / "accuracy").glob("history*.json"))
    assert len(kept) == cuda_accuracy.CASES[case].history
    for path in kept:
        check_repeated(path)
        history = json.loads(path.read_text())
        assert len(Events.from_history(history["device_traces"][0]).sizes) > 100
        assert history["origin"].startswith(case)
        assert str(Path.home()) not in path.read_text()


def test_a_history_is_over_before_a_cap_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To set one gives the cache back, which no history tells from memory pressure."""
    done: list[str] = []
    for name in ("start_history", "history", "set_cap"):
        whole = getattr(cuda_card.FakeCard, name)
        noted = lambda *args, name=name, whole=whole: (done.append(name), whole(*args))[1]  # noqa: E731
        monkeypatch.setattr(cuda_card.FakeCard, name, noted)
    case = "W2 2 layers/fp32/plain/1"
    first, *_ = cuda_measure.answers(
        {"do": "case", "name": case, "tiny": True, "plan_file": str(folder / "plan.json"), "history": True}, "fake"
    )
    assert list(first) == ["history"]
    assert done == ["start_history", "history", "set_cap"]


def test_what_is_asked_for_first_fits_the_limit_by_the_guesses(folder: Path) -> None:
    jobs = cuda.Table(Store.at(folder / "cuda.json"), folder, dry=True).jobs([*cuda.KNOWN, cuda.FULL_TUNE])
    before, laps = jobs[: -len(cuda.KNOWN)], jobs[-len(cuda.KNOWN) :]
    assert {job.kind for job in laps} == {cuda_report.LAPS_CAPPED}
    assert sum(job.guess_s for job in before) <= cuda.LIMIT_S < 8 * 60
    assert [job.kind for job in before[:4]] == [NONE, FULL, AT_FULL, LAPS]


def test_seconds_are_expected_as_the_like_took(folder: Path) -> None:
    store = Store.at(folder / "cuda.json")
    jobs = [Job(str(at), kind, 5.0, lambda: None) for at, kind in enumerate("aaabc")]
    store.results.update({"0": {"took_s": 8.0}, "1": {"took_s": 9.0}, "3": {"took_s": 1.0, "error": "failed"}})
    assert [cuda_runs.expected_s(job, jobs, store) for job in jobs] == [9.0, 9.0, 9.0, 5.0, 5.0]


def test_enough_cases_of_every_kind() -> None:
    cases = list(cuda_accuracy.CASES.values())
    assert len(cases) >= 12
    assert {case.model.split()[0] for case in cases} == {"W1", "W2", "W3", "W4", "W5", "W6"}
    assert {case.mode for case in cases} == {"plain", "checkpointed", "planned"}
    assert {case.accumulation for case in cases} == {1, 2}


class TestPage:
    def test_without_measurements_it_says_so_and_nothing_else(self, folder: Path) -> None:
        text = cuda.document(Store.at(folder / "none.json")) + cuda_accuracy.document(Store.at(folder / "none.json"))
        rows = [line for line in text.splitlines() if line.startswith("| ") and "not yet measured" in line]
        assert len(rows) == 3 * 5 + 2 + 3 * 3 + len(cuda_accuracy.CASES) + 4
        assert "pass" not in text
        assert "fail" not in text.replace("retries or fails", "")

    def test_both_parts_are_written_between_their_marks(self, folder: Path) -> None:
        page = folder / "page.md"
        page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
        written("x", "new", page)
        assert page.read_text() == "a\n<!-- x: begin -->\n\nnew\n<!-- x: end -->\nb\n"
        with pytest.raises(SystemExit, match="no marks"):
            written("y", "new", page)
        text = (DOCS / "cuda.md").read_text()
        assert all(f"<!-- {part}: begin -->" in text for part in ("trainings", "accuracy"))

    def test_a_dry_run_is_never_written(self) -> None:
        for command in (cuda, cuda_accuracy):
            with pytest.raises(SystemExit):
                command.main(["--dry-run", "--write"])

    def test_verdicts(self) -> None:
        task = "mistral-7b int8"
        measured: dict[str, Mapping[str, Any]] = {
            named(task, setting): {"allocated": gib * 2**30, "seconds": [s], "micro_batch": n, "accumulation": 1}
            for setting, gib, s, n in (
                (NONE, 50, 1.0, 4),
                (FULL, 20, 1.3, 4),
                (AT_FULL, 20, 1.05, 4),
                (CAPPED, 23, 3.0, 16),
                (FULL_CAPPED, 23, 4.0, 16),
            )
        }
        assert [verdict.passed for verdict in cuda_report.verdicts(measured, task)] == [True, True, True]
        measured[named(task, LAPS)] = {"rounds": [[(NONE, 1.0), (AT_FULL, 1.1)], [(NONE, 1.0), (AT_FULL, 1.1)]]}
        assert [verdict.passed for verdict in cuda_report.verdicts(measured, task)] == [True, False, True]
        assert [verdict.passed for verdict in cuda_report.verdicts({}, task)] == [None, None, None]
        assert cuda_report.verdicts(measured, TASK) == []  # another model with more bytes


class TestStore:
    def test_results_of_two_machines_do_not_mix(self, folder: Path) -> None:
        store = Store.at(folder / "cuda.json")
        store.on({"card": "A", "torch": "2.13"})
        store.results["x"] = {"allocated": 1}
        store.save()
        again = Store.at(folder / "cuda.json")
        again.on({"card": "A", "torch": "2.13"})
        with pytest.raises(SystemExit, match="card 'A', now 'B'"):
            again.on({"card": "B", "torch": "2.13"})

    def test_what_failed_for_another_reason_than_memory_is_forgotten_when_asked(self, folder: Path) -> None:
        store = Store.at(folder / "cuda.json")
        oom, died = {"error": "OutOfMemoryError", "oom": True}, {"error": "ended with -9", "oom": False}
        store.results.update({"a": {"allocated": 1}, "b": oom, "c": died, "d": {"allocated": 1, "fault": died}})
        cuda_runs.forget_failures(store)
        assert list(store.results) == ["a", "b"]


class TestCard:
    def test_a_plan_gets_the_budget_that_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A live card takes it as a share; a catalogued one stands for it here."""
        card = cuda_card.CudaCard.__new__(cuda_card.CudaCard)
        card.gpu, wanted = "rtx-4090", 10 * 2**30 + 12_345
        gpu, strategy = card.asked(wanted, load_strategy("balanced"))
        assert gpu == "rtx-4090"
        usable = cuda_card.budget_of("rtx-4090")
        assert abs(int(usable * strategy.budget_share) - wanted) <= 1
        monkeypatch.setattr(cuda_card, "budget_of", lambda gpu: 2**30)
        card.device = cuda_card.FakeCard().device
        with pytest.raises(SystemExit, match="more than"):
            card.asked(wanted, strategy)

    @pytest.mark.parametrize("total", [84_974_239_744, 150_023_733_248])
    def test_the_cap_is_what_was_asked_for_to_the_byte(self, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The allocator multiplies the fraction by the card's total and drops what is below a byte."""
        calls: list[object] = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (total, total))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.append)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: {"num_alloc_retries": 3})
        card = cuda_card.CudaCard()
        assert (card.gpu, card.retries()) == ("cuda:0", 3)
        assert card.smallest_cap({"peak": 1, "fits": 2}) == 2
        for cap in (card.cap_bytes, int(card.cap_bytes * 0.97), 12_345_678_901, total):
            calls.clear()
            card.set_cap(cap)
            assert calls[0] == "empty"
            assert int(float(str(calls[1])) * total) == cap
        card.set_cap(None)
        assert calls[-1] == 1.0
        with pytest.raises(SystemExit, match="take a larger card"):
            card.set_cap(total + 1)

    def test_the_acted_card_is_in_the_catalogue(self) -> None:
        total = find_gpu(cuda_card.ACTED_CARD).total_bytes
        assert total is not None
        assert cuda_card.budget_of(cuda_card.ACTED_CARD) < total

    def test_without_a_card_it_says_what_to_do(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a card")
        with pytest.raises(SystemExit, match="--dry-run"):
            cuda_card.card_of("cuda")

    def test_a_history_has_no_frames_and_no_addresses(self) -> None:
        base = 0x7F0000000000
        events = [
            ("segment_alloc", 0, 2 * 2**20),
            ("alloc", 0, 600),
            ("alloc", 1024, 100),
            ("free_requested", 0, 600),
            ("free_completed", 0, 600),
            ("free_requested", 1024, 100),
        ]
        trace = [
            {"action": a, "addr": base + at, "size": size, "stream": 77, "frames": ["/home/x.py"], "time_us": 5}
            for a, at, size in events
        ]
        oom = {"action": "oom", "device_free": 5, "size": 9, "stream": 77, "frames": []}
        block = {"address": base, "size": 512, "state": "inactive", "requested_size": 0, "frames": ["/home/x.py"]}
        segment = {"device": 0, "address": base, "total_size": 2 * 2**20, "stream": 77, "segment_type": "small"}
        snapshot = {
            "device_traces": [[*trace, oom]],
            "segments": [{**segment, "blocks": [block]}],
            "allocator_settings": {"expandable_segments": False},
        }
        made = cuda_card.anonymous(snapshot)
        assert "/home" not in json.dumps(made)
        assert [(e["action"], e["addr"]) for e in made["device_traces"][0]] == [
            ("segment_alloc", 0),
            ("alloc", 0),
            ("alloc", 1024),
            ("free_completed", 0),
            ("free_requested", 1024),
        ]
        assert len(Events.from_history(made["device_traces"][0]).sizes) == 4


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "is_memory"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
            (RuntimeError("CUDA error: out of memory"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
            (ValueError("shapes do not match"), False),
        ],
    )
    def test_out_of_memory_is_told_from_other_errors(self, error: Exception, is_memory: bool) -> None:
        assert cuda_measure.is_out_of_memory(error) is is_memory
        wrapped = RuntimeError("the step failed")
        wrapped.__cause__ = error
        assert cuda_measure.failed(wrapped)["oom"] is is_memory

    def test_a_request_that_fails_is_answered(self) -> None:
        request = {"do": "run", "task": TASK, "setting": CAPPED, "budget": 1000, "plan": "unused"}
        *_, failed, done = cuda_measure.answers(request, "fake")
        assert failed["kind"] == "DoesNotFit"
        assert not failed["oom"]
        assert done == {"done": True}

    def test_memory_of_a_try_that_failed_is_given_back(self) -> None:
        bench = cuda_measure.Bench(cuda_card.FakeCard(), cuda_models.tiny(cuda_models.TASKS[TASK]))
        cuda_measure.checkpointed(bench.model)
        memory = bench.card.memory  # type: ignore[attr-defined]  # of a FakeCard
        assert "error" not in cuda_measure._tried(bench, 4, 2**22)
        held = memory.held_bytes
        assert "error" in cuda_measure._tried(bench, 400, 2**22)
        assert memory.held_bytes == held


@pytest.mark.slow
def test_a_measuring_process_answers_and_is_replaced_when_it_dies() -> None:
    def words(answers: Iterator[Answer]) -> list[Answer]:
        return list(answers)

    with Workers("fake") as workers:
        (first,) = words(workers.ask({"do": "facts"}, 300))
        assert first["facts"]["card"] == "dry run"
        workers._spare.kill()
        (died,) = words(workers.ask({"do": "facts"}, 300))
        assert died["kind"] == "Died"
        (again,) = words(workers.ask({"do": "run", "task": "nothing"}, 300))
        assert again["error"].startswith("KeyError")
        (late,) = words(workers.ask({"do": "run", "task": TASK, "setting": NONE}, 0.001))
        assert "was ended after" in late["error"]
