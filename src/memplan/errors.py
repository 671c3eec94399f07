"""Everything memplan raises on purpose, in one tree.

::

    MemplanError
    ├── UsageError (ValueError)      what the caller wrote cannot be used
    │   ├── UnknownGpu               no such card; names the nearest
    │   ├── BadBudget                a memory size that is zero, negative, NaN or not a size
    │   ├── BadStrategy              a strategy file with an unknown key or an impossible value
    │   ├── BadSample                the sample is missing, or its first dimensions disagree
    │   ├── BadLoss                  no scalar, differentiable loss could be found
    │   ├── BadOptimizer             unknown name, or not built from this model's parameters
    │   ├── NoStepInBackward         parameters cannot be stepped one by one, as their gradients come
    │   ├── BadAllocatorSetting      an allocator setting that is unknown, not modelled, or out of its range
    │   ├── BadHistory               an allocation history with holes, or none at all
    │   └── BadBatch                 micro-batch and effective batch cannot be reconciled
    ├── ModelError (RuntimeError)    the model itself stands in the way
    │   ├── NothingToTrain           no parameter requires a gradient
    │   ├── ModelFailed              the model raised inside its own step; the cause is chained
    │   └── CannotTrace              the step reads values that an abstract run does not have
    ├── PlanError (RuntimeError)     a plan and a model do not belong together
    │   ├── PlanSchema               the file is not a plan, or one of another schema version
    │   ├── PlanMismatch             the plan's modules or shapes are not this model's
    │   └── AlreadyApplied           this model carries a plan already
    ├── DoesNotFit (RuntimeError)    no plan meets the budget
    │   └── MemoryTaken              it did when it was made; other processes have taken memory since
    ├── NoRoom (RuntimeError)        no host memory for what is to be offloaded; in `levers.host_memory`
    └── NoDevice (RuntimeError)      the device asked for is not on this machine

`PlanNotFollowed` is a warning: a block could not drop what the plan says, so more memory is needed than promised.

A message says what happened, the numbers, and the way out.
"""


class MemplanError(Exception):
    """Base of all errors that memplan raises on purpose."""


class UsageError(MemplanError, ValueError):
    """What the caller wrote cannot be used."""


class UnknownGpu(UsageError):
    """No card of that name; the message names the nearest."""


class BadBudget(UsageError):
    """A memory size that is zero, negative, not finite or not a size."""


class BadStrategy(UsageError):
    """A strategy file with an unknown key or an impossible value."""


class BadSample(UsageError):
    """The sample is missing, or its first dimensions disagree."""


class BadLoss(UsageError):
    """No scalar, differentiable loss could be found."""


class BadOptimizer(UsageError):
    """An unknown optimizer, or one that was not built from this model's parameters."""


class BadAllocatorSetting(UsageError):
    """A setting of the caching allocator that is unknown, not modelled, or out of its range."""


class BadHistory(UsageError):
    """An allocation history that has lost its beginning or has holes, or that is not one."""


class BadBatch(UsageError):
    """Micro-batch and effective batch cannot be reconciled."""


class ModelError(MemplanError, RuntimeError):
    """The model itself stands in the way."""


class NothingToTrain(ModelError):
    """No parameter requires a gradient."""


class ModelFailed(ModelError):
    """The model raised inside its own step; the original error is the `__cause__`."""


class CannotTrace(ModelError):
    """The step reads values that an abstract run does not have, and no device can run it for real."""


class PlanError(MemplanError, RuntimeError):
    """A plan and a model do not belong together."""


class PlanSchema(PlanError):
    """The file is not a plan, or it is one of another schema version."""


class PlanMismatch(PlanError):
    """The plan names modules or shapes that this model does not have."""


class PlanNotFollowed(UserWarning):
    """A block runs otherwise than it was planned: still right, but with more memory. A warning, no error."""


class AlreadyApplied(PlanError):
    """This model carries a plan already; undo that one first."""


class DoesNotFit(MemplanError, RuntimeError):
    """No plan meets the budget. `smallest_bytes` is the least budget that would."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """To be raised in another process too."""
        return type(self), (str(self), self.smallest_bytes)


class MemoryTaken(DoesNotFit):
    """The plan was made for more memory than is left now: other processes have taken some since."""


class NoDevice(MemplanError, RuntimeError):
    """The device asked for is not on this machine."""


class NoStepInBackward(UsageError):
    """Parameters cannot be stepped one by one inside the backward; the message says why, and what can be done."""
