"""Fit any PyTorch training step into a memory budget: predict it, plan it, apply the plan, measure it.

::

    fit = memplan.autofit(model, "24GiB", sample=batch)    # plan + apply
    ...                                                    # train as before
    fit.undo()

Importing memplan does no work: each name below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from memplan.data import Data
    from memplan.errors import MemplanError
    from memplan.fitting import Fit
    from memplan.gpus import Gpu, find_gpu
    from memplan.guard import Guard
    from memplan.integrations.accelerate import MemplanPlugin, attach, prepare
    from memplan.integrations.fsdp import MemplanFSDPPlugin
    from memplan.pipeline import apply, autofit, plan, predict
    from memplan.plan_record import Measured, Plan, Verdict
    from memplan.prediction import Prediction
    from memplan.rungs import ladder
    from memplan.strategy import Strategy
    from memplan.tuning import tune
    from memplan.world import World

__version__ = "0.1.0"

__all__ = [
    "Data",
    "Fit",
    "Gpu",
    "Guard",
    "Measured",
    "MemplanError",
    "MemplanFSDPPlugin",
    "MemplanPlugin",
    "Plan",
    "Prediction",
    "Strategy",
    "Verdict",
    "World",
    "__version__",
    "apply",
    "attach",
    "autofit",
    "find_gpu",
    "ladder",
    "plan",
    "predict",
    "prepare",
    "tune",
]

_HOMES: Final = {
    "Data": "memplan.data",
    "Fit": "memplan.fitting",
    "Gpu": "memplan.gpus",
    "Guard": "memplan.guard",
    "Measured": "memplan.plan_record",
    "MemplanError": "memplan.errors",
    "MemplanFSDPPlugin": "memplan.integrations.fsdp",
    "MemplanPlugin": "memplan.integrations.accelerate",
    "Plan": "memplan.plan_record",
    "Prediction": "memplan.prediction",
    "Strategy": "memplan.strategy",
    "Verdict": "memplan.plan_record",
    "World": "memplan.world",
    "apply": "memplan.pipeline",
    "attach": "memplan.integrations.accelerate",
    "autofit": "memplan.pipeline",
    "find_gpu": "memplan.gpus",
    "ladder": "memplan.rungs",
    "plan": "memplan.pipeline",
    "predict": "memplan.pipeline",
    "prepare": "memplan.integrations.accelerate",
    "tune": "memplan.tuning",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
