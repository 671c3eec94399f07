"""A plan as lines to paste: the arguments of a training framework, and the layers to recompute."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from memplan.errors import UsageError
from memplan.plan_record import Plan
from memplan.report.paths import number_runs, numbers_text

MOST_STACKS: Final = 4
"""More stacks of layers than this are not spelled out: the saved plan says it better."""

_OLDER: Final = "gradient_checkpointing... before transformers 5.23"
_PRECISIONS: Final = {"bfloat16": "bf16", "float16": "fp16"}
_OPTIMIZERS: Final = {  # memplan's names -> transformers'
    "adafactor": "adafactor",
    "adagrad": "adagrad",
    "adam8bit": "adamw_bnb_8bit",
    "adamw": "adamw_torch",
    "adamw-fused": "adamw_torch_fused",
    "paged-adamw8bit": "paged_adamw_8bit",
    "rmsprop": "rmsprop",
    "sgd": "sgd",
}


def settings_text(plan: Plan, plan_file: str = "plan.json", *, native: bool = True, framework: str = "trainer") -> str:
    """Lines that do what the plan says: Python, for axolotl YAML.

    Where every k-th block is recomputed, or none, arguments say it all. Else the layers are flagged one by one. Where
    they are in too many places or are not numbered, where they have no flags of transformers (`native` false), or where
    more is decided than what to recompute, the plan that was saved as `plan_file` is applied.

    Args:
        framework: "trainer" (transformers), "trl", "accelerate", "axolotl" or "lightning".

    Raises:
        UsageError: another framework.
    """
    if framework not in _ARGUMENTS:
        raise UsageError(f"no settings are known for {framework!r}: name one of {', '.join(_ARGUMENTS)}")
    every = stride_of(plan) if native or not plan.changed else None
    arguments = _ARGUMENTS[framework](plan, every)
    return "\n".join([arguments, *_lines(plan, plan_file, every, native, framework)])


def stride_of(plan: Plan) -> int | None:
    """k, if a plan recomputes blocks 0, k, 2k, ... and does nothing else; 0 if it does nothing; else None.

    That is what transformers' `every_n_layers` does (`PreTrainedModel._set_gradient_checkpointing`).
    """
    if plan.stepping != "plain" or plan.changed != plan.recomputed:
        return None
    chosen = [at for at, option in enumerate(plan.decisions.values()) if option == "recompute"]
    if not chosen:
        return 0
    every = chosen[1] if len(chosen) > 1 else len(plan.decisions)
    return every if chosen == list(range(0, len(plan.decisions), every)) else None


def _lines(plan: Plan, plan_file: str, every: int | None, native: bool, framework: str) -> list[str]:
    """What has to be done to the model beside the arguments."""
    in_arguments = framework in ("trainer", "trl")
    if every == 0:
        return []
    if framework == "axolotl":
        other = "# every layer is recomputed here, which is not what was planned: that takes memplan in a plugin"
        return [] if every == 1 else [f"{other}\n# {_apply(plan_file)}"]
    if every is None:
        stacks = _stacks(plan) if native and plan.changed == plan.recomputed and plan.stepping == "plain" else None
        return [_flags(stacks) if stacks is not None and len(stacks) <= MOST_STACKS else _apply(plan_file)]
    if not in_arguments:
        strided = "" if every == 1 else f", every_n_layers={every}"
        return [f'model.activation_checkpointing_enable({{"use_reentrant": False}}{strided})  # {_OLDER}']
    stacks = _stacks(plan)
    if every == 1 or stacks is None or len(stacks) > MOST_STACKS:
        return []
    older = _flags(stacks).replace(f"  # {_OLDER}", "").replace("activation_checkpointing_", "gradient_checkpointing_")
    text = f"before transformers 5.23, which has no every_n_layers: gradient_checkpointing=False, and\n{older}"
    return [f"# {line}" for line in text.splitlines()]


def _of_transformers(kind: str, plan: Plan, every: int | None) -> str:
    arguments: dict[str, object] = {
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "activation_checkpointing": bool(every),
    }
    if every:
        strided = {} if every == 1 else {"every_n_layers": every}
        arguments["activation_checkpointing_kwargs"] = {**strided, "use_reentrant": False}
    if plan.autocast in _PRECISIONS:
        arguments[_PRECISIONS[plan.autocast]] = True
    elif kind == "SFTConfig":
        arguments["bf16"] = False  # TRL's default is True
    if plan.optimizer in _OPTIMIZERS:
        arguments["optim"] = _OPTIMIZERS[plan.optimizer]
    lines = _keywords(arguments)
    lines[2] += f"  # {_OLDER}"
    return "\n".join([f"{kind}(", *lines, ")"])


def _of_accelerate(plan: Plan, _: int | None) -> str:
    precision = _PRECISIONS.get(plan.autocast or "", "no")
    return (
        f'accelerator = Accelerator(mixed_precision="{precision}", gradient_accumulation_steps={plan.accumulation})\n'
        f"loader = DataLoader(data, batch_size={plan.micro_batch}, shuffle=True)\n"
        "# and in the loop: with accelerator.accumulate(model): ..." + _unweighted(plan, "memplan.attach(accelerator)")
    )


def _of_lightning(plan: Plan, _: int | None) -> str:
    precision = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}.get(plan.autocast or "", "32-true")
    return (
        f'trainer = lightning.Trainer(precision="{precision}", accumulate_grad_batches={plan.accumulation})\n'
        f"loader = DataLoader(data, batch_size={plan.micro_batch}, shuffle=True)"
        + _unweighted(plan, "memplan.integrations.lightning.MemplanCallback()")
    )


def _unweighted(plan: Plan, instead: str) -> str:
    """What accumulation does there to a mean over tokens, where the plan accumulates."""
    if plan.accumulation == 1:
        return ""
    return (
        "\n# micro-batches count alike here, also with unequal numbers of label tokens or in a shorter last step,\n"
        f"# which is another run than with the whole batch; {instead} weighs them"
    )


def _of_axolotl(plan: Plan, every: int | None) -> str:
    values: dict[str, object] = {
        "micro_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_checkpointing": every != 0,
    }
    lines = [f"{name}: {str(value).lower()}" for name, value in values.items()]
    if every != 0:
        lines += ["gradient_checkpointing_kwargs:", "  use_reentrant: false"]
    lines += [f"{name}: {str(plan.autocast == dtype).lower()}" for dtype, name in _PRECISIONS.items()]
    if plan.optimizer in _OPTIMIZERS:
        lines.append(f"optimizer: {_OPTIMIZERS[plan.optimizer]}")
    return "\n".join(lines)


_ARGUMENTS: Final[Mapping[str, Callable[[Plan, int | None], str]]] = {
    "trainer": partial(_of_transformers, "TrainingArguments"),
    "trl": partial(_of_transformers, "SFTConfig"),
    "accelerate": _of_accelerate,
    "axolotl": _of_axolotl,
    "lightning": _of_lightning,
}


def _keywords(arguments: Mapping[str, object]) -> list[str]:
    # repr has single quotes, formatted code has not
    return [f"    {name}={value!r},".replace("'", '"') for name, value in arguments.items()]


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
    lines = [f'model.activation_checkpointing_enable({{"use_reentrant": False}})  # {_OLDER}']
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
