"""A plan as lines to paste: the arguments of transformers' Trainer, and the layers to recompute."""

import json
from collections.abc import Mapping
from typing import Final

from memplan.plan_record import Plan
from memplan.report.paths import number_runs, numbers_text

MOST_STACKS: Final = 4
"""More stacks of layers than this are not spelled out: the saved plan says it better."""

_PRECISIONS: Final = {"bfloat16": "bf16", "float16": "fp16"}
_OPTIMIZERS: Final = {  # memplan's names -> transformers'
    "adafactor": "adafactor",
    "adagrad": "adagrad",
    "adam8bit": "adamw_bnb_8bit",
    "adamw": "adamw_torch",
    "adamw-fused": "adamw_torch_fused",
    "rmsprop": "rmsprop",
    "sgd": "sgd",
}


def settings_text(plan: Plan, plan_file: str = "plan.json", *, native: bool = True) -> str:
    """Python that does what the plan says.

    Where all blocks or none are recomputed, TrainingArguments say it all. Else the layers are flagged one by one. Where
    they are in too many places or are not numbered, where they have no flags of transformers (`native` false), or where
    more is decided than what to recompute, the plan that was saved as `plan_file` is applied.
    """
    if not plan.changed:
        return _arguments(plan, checkpointing=False)
    if native and len(plan.recomputed) == len(plan.decisions):
        return _arguments(plan, checkpointing=True)
    stacks = _stacks(plan) if native and plan.changed == plan.recomputed else None
    lines = _flags(stacks) if stacks is not None and len(stacks) <= MOST_STACKS else _apply(plan_file)
    return f"{_arguments(plan, checkpointing=False)}\n{lines}"


def _arguments(plan: Plan, *, checkpointing: bool) -> str:
    # gradient_checkpointing is what every transformers before 6 understands; 5.23 made activation_checkpointing of it
    arguments: dict[str, object] = {
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_checkpointing": checkpointing,
    }
    if checkpointing:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if plan.autocast in _PRECISIONS:
        arguments[_PRECISIONS[plan.autocast]] = True
    if plan.optimizer in _OPTIMIZERS:
        arguments["optim"] = _OPTIMIZERS[plan.optimizer]
    # repr has single quotes, formatted code has not
    values = {name: repr(value).replace("'", '"') for name, value in arguments.items()}
    return "\n".join(["TrainingArguments(", *(f"    {name}={value}," for name, value in values.items()), ")"])


def _stacks(plan: Plan) -> dict[str, list[int]] | None:
    """Which members of which list are recomputed; None where a block is not a numbered member of a list."""
    stacks: dict[str, list[int]] = {}
    for path, option in plan.decisions.items():
        parent, _, number = path.rpartition(".")
        if not parent or not number.isdecimal():
            return None
        chosen = stacks.setdefault(parent, [])
        if option == "recompute":
            chosen.append(int(number))
    return stacks


def _flags(stacks: Mapping[str, list[int]]) -> str:
    lines = ['model.gradient_checkpointing_enable({"use_reentrant": False})']
    for parent, chosen in stacks.items():
        lines.append(f'for i, layer in enumerate(model.get_submodule("{parent}")):')
        lines.append(f"    layer.gradient_checkpointing = i in {_set_text(chosen)}  # {numbers_text(chosen) or 'none'}")
    return "\n".join(lines)


def _set_text(numbers: list[int]) -> str:
    """An expression that contains these numbers: range(0, 8), or {*range(0, 8), 9, 11}."""
    runs = number_runs(numbers)
    if not runs:
        return "()"
    texts = [f"range({run.start}, {run.stop})" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    if len(runs) == 1 and len(runs[0]) > 2:
        return texts[0]
    return f"{{{', '.join(f'*{text}' if text.startswith('range') else text for text in texts)}}}"


def _apply(plan_file: str) -> str:
    return f"memplan.apply(model, memplan.Plan.load({json.dumps(plan_file)}))"
