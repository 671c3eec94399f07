"""What an Accelerator saves of a planned run, and knows of the one whose checkpoint it has loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from memplan.integrations.counting import steps_in
from memplan.integrations.grouping import Group
from memplan.plan_record import Plan

_PLAN_FILE, _STEPS_FILE = "memplan.json", "memplan_steps.txt"  # beside what `save_state` writes


class SavedRun:
    """The plan and the steps taken go into a checkpoint and are read from one, until `let_go`.

    Args:
        plan: in force, if there is one.
        group: the step under way, once the loader is prepared.
    """

    def __init__(
        self, accelerator: Accelerator, plan: Callable[[], Plan | None], group: Callable[[], Group | None]
    ) -> None:
        self._accelerator, self._plan, self._group = accelerator, plan, group
        # Of the run that saved the loaded checkpoint: samples in a batch, and steps that it had taken in its epoch.
        self._counted_rows: int | None = None
        self._taken_steps: int | None = None
        hooked = accelerator.register_save_state_pre_hook, accelerator.register_load_state_pre_hook
        self._hooks = [register(hook) for register, hook in zip(hooked, (self._save, self._load), strict=True)]

    def steps_in(self, batches: int, plan: Plan, own_rows: int) -> int:
        """The optimizer steps in batches that the script leaves out: see `counting.steps_in`, which raises."""
        return steps_in(batches, plan, own_rows, self._counted_rows, self._taken_steps)

    def let_go(self) -> None:
        """Checkpoints are the script's own again."""
        for hook in self._hooks:
            hook.remove()

    def _save(self, _models: Any, _weights: Any, output_dir: str) -> None:
        plan, group = self._plan(), self._group()
        if self._accelerator.is_main_process and plan is not None:
            plan.save(Path(output_dir) / _PLAN_FILE)
            if group is not None:
                (Path(output_dir) / _STEPS_FILE).write_text(f"{group.in_epoch}\n", encoding="utf-8")

    def _load(self, _models: Any, input_dir: str) -> None:
        path, steps, group = Path(input_dir) / _PLAN_FILE, Path(input_dir) / _STEPS_FILE, self._group()
        self._taken_steps = int(steps.read_text(encoding="utf-8")) if steps.is_file() else None
        if path.is_file():
            self._counted_rows = Plan.load(path).micro_batch
        elif group is not None:  # it was trained without a plan
            self._counted_rows = group.split.own_rows
