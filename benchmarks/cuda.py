"""Three known fine-tunings and a full one on a card, with memplan and without: `python benchmarks/cuda.py --write`.

Each training without checkpointing, with transformers' full checkpointing, and with memplan at the peak of that; then,
with the allocator capped to what a 24 GB card leaves it, memplan with its best batch and full checkpointing with its
own best batch. Random weights, synthetic tokens, no network. Every setting has a process of its own; times are the
medians of laps that run in turn in one process.

Results go to docs/cuda.json as soon as they are there, and what is in there is not measured again: start it again after
an interruption, or to go on after the time limit. `--dry-run` does all of it with tiny models on the CPU, where a fake
device counts, has a cap and fails once in the middle of a step; its results stay in build/cuda-dry.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cuda_report import AT_FULL, CAPPED, FULL, FULL_CAPPED, LAPS, LAPS_CAPPED, NONE, is_measured, named, table, verdicts
from cuda_runs import (
    DRY,
    ROOT,
    Answer,
    Asks,
    Job,
    Store,
    facts,
    machine_text,
    run_all,
    run_command,
    time_plan,
)

KNOWN = ("mistral-7b int8", "llama-3-8b nf4", "qwen-14b int8")
STAND_INS = (
    "mistral-7b bf16",
    "llama-3-8b bf16",
    "qwen-14b bf16",
)  # where bitsandbytes is missing, under their own names
FULL_TUNE = "mistral-7b full"

SAME_BATCH = (NONE, FULL, AT_FULL)
UNDER_CAP = (CAPPED, FULL_CAPPED)
SETTINGS = dict.fromkeys(KNOWN, (*SAME_BATCH, *UNDER_CAP)) | {FULL_TUNE: UNDER_CAP}

# Seconds on an H200-class card, guessed from the sizes of models and batches: no card has run this yet. Together they
# are more than the limit: the laps under the cap, which time again what each setting has timed alone, come last and are
# for a second run, if the first takes as long as guessed.
GUESS_S = {NONE: 11, FULL: 11, AT_FULL: 28, LAPS: 14, CAPPED: 32, FULL_CAPPED: 34, LAPS_CAPPED: 20}
LIMIT_S = 470
ROUNDS = 3
DRY_FAILS_AT = 400  # which allocation fails in the dry run, of the setting below
DRY_FAILS = (FULL_TUNE, FULL_CAPPED)


class Table:
    """The jobs of one table, most important first."""

    def __init__(self, store: Store, plans: Path, *, dry: bool) -> None:
        self.store, self.plans, self.dry = store, plans, dry

    def jobs(self, tasks: Sequence[str]) -> list[Job]:
        """Savings at the same batch of all known trainings, then what a small card can do with each."""
        known = [task for task in tasks if task != FULL_TUNE]
        jobs = [job for task in known for job in (*self._alone(task, SAME_BATCH), self._together(task, SAME_BATCH))]
        capped = [list(self._alone(task, UNDER_CAP)) for task in known]
        if FULL_TUNE in tasks:
            capped.insert(2, list(self._alone(FULL_TUNE, UNDER_CAP)))  # before the last of the known ones
        jobs += [job for group in capped for job in group]
        # Plans that change the optimizer's step need the live one: the full fine-tune stays with its own process.
        return jobs + [self._together(task, UNDER_CAP) for task in known]

    def _alone(self, task: str, settings: tuple[str, ...]) -> Iterator[Job]:
        for setting in settings:
            yield Job(named(task, setting), setting, GUESS_S[setting], self._run(task, setting))

    def _together(self, task: str, settings: tuple[str, ...]) -> Job:
        laps = LAPS_CAPPED if settings == UNDER_CAP else LAPS
        return Job(named(task, laps), laps, GUESS_S[laps], self._laps(task, settings))

    def _run(self, task: str, setting: str) -> Callable[[], Answer | None]:
        def request() -> Answer | None:
            asked: Answer = {"do": "run", "task": task, "setting": setting, "plan": self._plan_file(task, setting)}
            if setting == AT_FULL:
                full = self.store.results.get(named(task, FULL), {})
                if not is_measured(full):
                    return None
                # A plan's budget is held against the cap that it needs, so it is the cap that full checkpointing needs.
                asked["budget"] = full.get("predicted", {}).get("fits") or full["allocated"]
            if self.dry and (task, setting) == DRY_FAILS:
                asked["fails_at"] = DRY_FAILS_AT
            return asked

        return request

    def _laps(self, task: str, settings: tuple[str, ...]) -> Callable[[], Answer | None]:
        def request() -> Answer | None:
            ran: dict[str, Answer] = {}
            for setting in settings:
                result = self.store.results.get(named(task, setting), {})
                if not is_measured(result):
                    continue
                ran[setting] = {name: result[name] for name in ("micro_batch", "accumulation")}
                if "plan" in result:
                    ran[setting]["plan_file"] = self._plan_file(task, setting)
                    if not Path(self._plan_file(task, setting)).exists():
                        return None
            capped = settings == UNDER_CAP
            return {"do": "laps", "task": task, "settings": ran, "rounds": ROUNDS, "capped": capped} if ran else None

        return request

    def _plan_file(self, task: str, setting: str) -> str:
        return str(self.plans / f"{task} {setting}.json".replace(" ", "-").replace("'", ""))


def document(store: Store) -> str:
    """The part of docs/cuda.md that this command writes."""
    asked = dict(SETTINGS)
    measured = {name.partition(" / ")[0] for name in store.results}
    asked |= {task: (*SAME_BATCH, *UNDER_CAP) for task in STAND_INS if task in measured}
    judged = [verdict for task in asked for verdict in verdicts(store.results, task)]
    lines = [machine_text(store.data["machine"]), ""]
    lines += ["| training | target | | |", "|---|---|---|---|"]
    lines += [f"| {v.task} | {v.what} | {v.word} | {v.numbers} |" for v in judged]
    return "\n".join([*lines, "", *table(store.results, asked), ""])


def main(argv: Sequence[str] | None = None, asks: Asks | None = None) -> str:
    """Measure, print, and return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="", help="only these, by commas; for example 'mistral-7b int8'")
    return run_command(
        parser,
        argv,
        asks,
        limit_s=LIMIT_S,
        dry=DRY,
        name="cuda.json",
        part="trainings",
        measure=_measure,
        document=document,
    )


def _measure(asks: Asks, store: Store, args: argparse.Namespace, begin: float) -> None:
    first = facts(asks, args.limit_s)
    store.on(first["facts"] | {"cap_bytes": first["cap_bytes"]})
    known = KNOWN if first["facts"]["bitsandbytes"] else (*KNOWN, *STAND_INS)
    tasks = args.tasks.split(",") if args.tasks else [*known, FULL_TUNE]
    unknown = set(tasks) - {*KNOWN, *STAND_INS, FULL_TUNE}
    if unknown:
        raise SystemExit(
            f"no such tasks: {', '.join(sorted(unknown))}; there are {', '.join((*KNOWN, *STAND_INS, FULL_TUNE))}"
        )
    plans = (DRY if args.dry_run else ROOT / "build") / "plans"
    jobs = Table(store, plans, dry=args.dry_run).jobs(tasks)
    time_plan(jobs, store, args.limit_s)
    run_all(jobs, asks, store, args.limit_s, begin)


if __name__ == "__main__":
    main()
