"""What both CUDA benchmarks share: the command, measuring processes, the file of results, the time limit."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, Protocol, Self

from pages import DOCS, written

MEASURE = Path(__file__).with_name("cuda_measure.py")
ROOT = Path(__file__).resolve().parents[1]
DRY = ROOT / "build" / "cuda-dry"

Answer = dict[str, Any]
SAME = ("card", "driver", "total_bytes", "torch", "transformers")  # facts that results of one file must share


class Asks(Protocol):
    """Answers requests; the last answer, which says that it is done, is left out."""

    def ask(self, request: Answer, limit_s: float) -> Iterator[Answer]: ...


class Workers:
    """Measuring processes. On a card each request gets a fresh one; the next starts up while one measures.

    Args:
        kind: "cuda"; or "fake", where one process serves all requests.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._spare = self._started()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._spare)

    def ask(self, request: Answer, limit_s: float) -> Iterator[Answer]:
        """The answers of one process; an `error` if it dies or does not end within `limit_s` seconds."""
        worker = self._spare
        if self.kind == "cuda":
            self._spare = self._started()
        assert worker.stdin is not None
        assert worker.stdout is not None
        overdue, whole = Timer(limit_s, worker.kill), False
        overdue.start()
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            for line in worker.stdout:
                answer = json.loads(line) if line.startswith("{") else {}
                if answer.get("done"):
                    whole = True
                    return
                if answer and "ready" not in answer:
                    yield answer
        except BrokenPipeError:  # it died before it read
            pass
        finally:
            late = not overdue.is_alive()
            overdue.cancel()
            if self.kind == "cuda" or not whole:  # what it still has to say would be taken for the next one's answer
                _end(worker)
                if worker is self._spare:
                    self._spare = self._started()
        why = f"was ended after {limit_s:.0f} s" if late else f"ended with {worker.returncode}; its words are above"
        yield {"error": f"the measuring process {why}", "kind": "Late" if late else "Died", "oom": False}

    def _started(self) -> "subprocess.Popen[str]":
        environment = os.environ | {"KINETO_LOG_LEVEL": "6", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", str(MEASURE), "--card", self.kind]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _end(worker: "subprocess.Popen[str]") -> None:
    """Close its input, at which it ends by itself; if it does not, end it."""
    if worker.stdin is not None:
        with suppress(BrokenPipeError):
            worker.stdin.close()
    try:
        worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    if worker.stdout is not None:
        worker.stdout.close()


class Here:
    """Answers in this process, for tests."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def ask(self, request: Answer, limit_s: float) -> Iterator[Answer]:  # noqa: ARG002  # nobody would end it
        from cuda_measure import answers  # imports torch, which the command itself does without

        for answer in answers(json.loads(json.dumps(request)), self.kind):
            if not answer.get("done"):
                yield json.loads(json.dumps(answer))


@dataclass(frozen=True, slots=True)
class Store:
    """The JSON file of results: `machine`, and a table of answers by name. Saved whole after each answer."""

    path: Path
    data: Answer = field(default_factory=lambda: {"machine": {}, "results": {}})

    @classmethod
    def at(cls, path: Path) -> "Store":
        return cls(path, json.loads(path.read_text())) if path.exists() else cls(path)

    @property
    def results(self) -> Answer:
        results: Answer = self.data["results"]
        return results

    def on(self, machine: Answer) -> None:
        """Note the machine. SystemExit if the file has results of another one: they would not compare."""
        before = self.data["machine"]
        other = [
            f"{key} {before.get(key)!r}, now {machine.get(key)!r}"
            for key in SAME
            if before and before.get(key) != machine.get(key)
        ]
        if other and self.results:
            raise SystemExit(f"{self.path} was measured with {'; '.join(other)}: pass another --cache")
        self.data["machine"] = machine
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in self.results.items())
        machine = json.dumps(self.data["machine"], indent=2).replace("\n", "\n ")
        text = f'{{\n "machine": {machine},\n "results": {{\n{rows}\n }}\n}}\n'
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.path)  # at once: a run that is killed leaves the old file or the new one


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to measure: the name of its result, the kind of work, a guess of its seconds, what is asked.

    `request` is called when its turn comes, for it may need earlier results; None: they are missing, so it is left out.
    """

    name: str
    kind: str
    guess_s: float
    request: Callable[[], Answer | None]


def expected_s(job: Job, jobs: Sequence[Job], store: Store) -> float:
    """The longest that a job of its kind took here, once one is measured; until then the guess."""
    alike = [store.results.get(other.name, {}) for other in jobs if other.kind == job.kind]
    took = [float(result["took_s"]) for result in alike if "took_s" in result and "error" not in result]
    return max(took, default=job.guess_s)


def run_all(jobs: list[Job], asks: Asks, store: Store, limit_s: float, begin: float) -> None:
    """Every job that has no result yet, in order, as long as there is time. Prints a line for each."""
    for job in jobs:
        if job.name in store.results:
            continue
        left, expected = limit_s - (time.monotonic() - begin), expected_s(job, jobs, store)
        if expected > left:
            print(f"{job.name:60} left for the next run: about {expected:.0f} s, and {left:.0f} s are left", flush=True)
            continue
        request = job.request()
        if request is None:
            print(f"{job.name:60} left out: it needs a result that is not there", flush=True)
            continue
        started, result = time.monotonic(), Answer()
        for answer in asks.ask(request, left):
            if "round" in answer:
                result.setdefault("rounds", []).append(answer["round"])
            elif "error" in answer and ("allocated" in result or "rounds" in result):
                result["fault"] = answer  # after what was measured, which stays
            else:
                result |= answer
        if result.get("kind") == "Late":
            print(f"{job.name:60} left for the next run: {result['error']}", flush=True)
            continue
        result["took_s"] = round(time.monotonic() - started, 1)
        store.results[job.name] = result
        store.save()
        said = result.get("error") or result.get("fault", {}).get("error", "measured")
        print(f"{job.name:60} {result['took_s']:6.1f} s  {said}", flush=True)


def time_plan(jobs: list[Job], store: Store, limit_s: float) -> None:
    """What will be done, in its order, with the seconds that the like of it took before or else a guess."""
    at = 0.0
    print(f"time plan (limit {limit_s:.0f} s; guesses, until it has run):")
    for job in jobs:
        done, expected = job.name in store.results, expected_s(job, jobs, store)
        at += 0 if done else expected
        when = "done" if done else f"{expected:4.0f} s, until {at:4.0f} s"
        print(f"  {job.name:60} {when}{'' if at <= limit_s else '  (next run)'}")


def forget_failures(store: Store) -> None:
    """Measure anew what ended in anything but a lack of memory."""
    for name, result in list(store.results.items()):
        if "fault" in result or ("error" in result and not result.get("oom")):
            del store.results[name]


def machine_text(machine: Answer) -> str:
    """One line: card, driver, versions."""
    if not machine:
        return "Not yet measured: no card was at hand."
    if "cuda" not in machine:
        return "A dry run with tiny models on the CPU: nothing here is a measurement, and no verdict means anything."
    names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
    tools = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    return f"{machine['card']}, driver {machine.get('driver') or 'unknown'}, CUDA {machine.get('cuda')}, {tools}."


NOT_YET = "not yet measured"


def gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.3f}"


def facts(asks: Asks, limit_s: float) -> Answer:
    """What is asked first, of the machine. SystemExit if it cannot measure."""
    (first,) = asks.ask({"do": "facts"}, limit_s)
    if "error" in first:
        raise SystemExit(first["error"])
    return first


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    asks: Asks | None,
    *,
    limit_s: float,
    dry: Path,
    name: str,
    part: str,
    measure: Callable[[Asks, Store, argparse.Namespace, float], None],
    document: Callable[[Store], str],
) -> str:
    """Parse, measure, print, and return the text.

    Args:
        parser: with the options that only this command has.
        asks: who measures; None: processes, on a card or, in a dry run, a fake one.
        dry: where a dry run keeps everything.
        name: of the file of results.
        part: of the page.
        measure: with the time at which the command began.
    """
    parser.add_argument("--limit-s", type=float, default=limit_s, help=f"start nothing beyond; default {limit_s}")
    parser.add_argument("--again", action="store_true", help="measure anew what failed for another reason than memory")
    parser.add_argument("--write", action="store_true", help="write it into docs/cuda.md")
    parser.add_argument("--render", action="store_true", help="measure nothing, only render what is measured")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU with a fake device")
    parser.add_argument("--cache", type=Path, default=ROOT / "docs" / name, help="where results are kept")
    args = parser.parse_args(argv)
    if args.dry_run:
        if args.write:
            parser.error("what a dry run says is no measurement: it is never written into the page")
        shutil.rmtree(dry, ignore_errors=True)
        args.cache = dry / name
    store = Store.at(args.cache)
    if args.again:
        forget_failures(store)
    if not args.render:
        begin = time.monotonic()
        if asks is not None:
            measure(asks, store, args, begin)
        else:
            with Workers("fake" if args.dry_run else "cuda") as workers:
                measure(workers, store, args, begin)
    text = document(store)
    print(text)
    if args.write:
        written(part, text, DOCS / "cuda.md")
    return text
