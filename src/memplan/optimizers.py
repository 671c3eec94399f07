"""Optimizers to plan with: by name, or a copy of a live one that stands on other parameters.

A plan runs optimizer steps that must not train anything. So a live optimizer is never stepped: `build` copies it, with
its groups, flags and state, onto stand-ins for the parameters, and leaves the original as it is. `step_alone` steps one
parameter of an optimizer, as training inside the backward does.
"""

import difflib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from memplan.errors import BadOptimizer

Factory = Callable[[Sequence[Parameter], bool | None], Optimizer]
"""Makes an optimizer of (parameters, foreach); None leaves `foreach` to torch, and a name that says it overrules it."""

_LR: Final = 1e-3  # torch wants one; no plan depends on it
_COUNTERS: Final = ("step", "mu_product")  # of steps, one number for each parameter


class Adam8bit(Optimizer):
    """Allocates what bitsandbytes' AdamW8bit allocates, and trains nothing.

    Two states per parameter: uint8 with one float32 scale per block of 256 elements, or float32 where the parameter has
    fewer than 4096 elements. Two maps of 256 float32 are shared by all. The step is one kernel without temporaries.
    Source: bitsandbytes 0.50.2, ``Optimizer2State.init_state``. Parameters for which bitsandbytes was told to keep 32
    bits (its GlobalOptimManager; transformers' Trainer does so for embeddings) are not known here.
    """

    SMALLEST_8BIT: Final = 4096  # elements
    BLOCK: Final = 256  # elements

    def __init__(self, params: Sequence[Parameter]) -> None:
        self.maps: dict[str, torch.Tensor] = {}
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's own
        loss = closure() if closure is not None else None
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is None:
                continue
            if parameter not in self.state:
                self.state[parameter] = self._new_state(parameter)
            for tensor in (parameter, self.state[parameter]["state1"], self.state[parameter]["state2"]):
                tensor.mul_(1)  # what the kernel reads and writes, in place
        return loss

    def _new_state(self, parameter: Parameter) -> dict[str, Any]:
        if parameter.numel() < self.SMALLEST_8BIT:
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
        if not self.maps:
            self.maps = {name: torch.zeros(256, device=parameter.device) for name in ("qmap1", "qmap2")}
        blocks = -(-parameter.numel() // self.BLOCK)
        return {
            **{name: torch.zeros_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")},
            **{name: torch.zeros(blocks, device=parameter.device) for name in ("absmax1", "absmax2")},
            **self.maps,
        }


class PagedAdam8bit(Adam8bit):
    """As bitsandbytes' PagedAdamW8bit: states of at least 100 000 elements lie in memory that the driver pages.

    They are counted on the host, where they are between steps; scales, maps and smaller states stay on the device. In
    the step the driver moves pages to the device as there is room, and takes them away where there is none.
    Source: bitsandbytes 0.50.2, ``Optimizer8bit.get_state_buffer`` and ``prefetch_state``.
    """

    SMALLEST_PAGED: Final = 100_000  # elements

    def _new_state(self, parameter: Parameter) -> dict[str, Any]:
        state = super()._new_state(parameter)
        if parameter.numel() >= self.SMALLEST_PAGED:
            for name in ("state1", "state2"):
                _set_paged(state[name])
        return state


OPTIMIZERS: Final[Mapping[str, Factory]] = MappingProxyType(
    {
        "adafactor": lambda params, foreach: torch.optim.Adafactor(params, foreach=foreach),
        "adagrad": lambda params, foreach: torch.optim.Adagrad(params, foreach=foreach),
        "adam": lambda params, foreach: torch.optim.Adam(params, foreach=foreach),
        "adam-foreach": lambda params, _: torch.optim.Adam(params, foreach=True),
        "adam-fused": lambda params, _: torch.optim.Adam(params, fused=True),
        "adam8bit": lambda params, _: Adam8bit(params),
        "adamw": lambda params, foreach: torch.optim.AdamW(params, foreach=foreach),
        "adamw-foreach": lambda params, _: torch.optim.AdamW(params, foreach=True),
        "adamw-fused": lambda params, _: torch.optim.AdamW(params, fused=True),
        "adamw-single": lambda params, _: torch.optim.AdamW(params, foreach=False),
        "paged-adamw8bit": lambda params, _: PagedAdam8bit(params),
        "rmsprop": lambda params, foreach: torch.optim.RMSprop(params, foreach=foreach),
        "sgd": lambda params, foreach: torch.optim.SGD(params, lr=_LR, foreach=foreach),
        "sgd-momentum": lambda params, foreach: torch.optim.SGD(params, lr=_LR, momentum=0.9, foreach=foreach),
    }
)


def build(
    optimizer: str | Optimizer,
    params: Sequence[Parameter],
    replacement: Mapping[int, Parameter] = MappingProxyType({}),
    stand_in: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    *,
    foreach: bool | None = None,
) -> Optimizer:
    """An optimizer over `params` for a name; for a live one, a copy of it that can be stepped without consequences.

    The copy has the same class, groups and flags. Each of its parameters is what `replacement` has for the ``id`` of
    the original, and each of its state tensors is what `stand_in` makes of the original. Hooks and patched methods are
    left behind. A wrapper such as accelerate's is seen through. `foreach` decides where the optimizer itself leaves the
    choice to torch, which would look at the device of the stand-ins.

    Raises:
        BadOptimizer: an unknown name, not an optimizer, or one that holds parameters which `replacement` has not.
    """
    if isinstance(optimizer, str):
        return _factory(optimizer)(params, foreach)
    live = unwrapped(optimizer)
    held = [parameter for group in live.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in replacement for parameter in held)
    if foreign:
        raise BadOptimizer(
            f"{foreign} of the {len(held)} parameters of this {type(live).__name__} are not parameters of the model: "
            "build it from model.parameters(), after everything that replaces them (adapters, wrappers, conversions)"
        )
    copy = _copied(live, replacement, stand_in)
    copy.defaults = dict(copy.defaults)
    _disarm(copy.defaults)
    for group in copy.param_groups:
        _disarm(group)
        if foreach is not None and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = foreach
    return copy


def _disarm(group: dict[str, Any]) -> None:
    """Take out what torch allows on some devices or parameters only, and what takes no other memory without it.

    But for the counters of `capturable`; see `on_host`.
    """
    for flag in ("capturable", "differentiable"):
        if group.get(flag):
            group[flag] = False
    if isinstance(group.get("lr"), torch.Tensor):
        group["lr"] = 0.0 if group["lr"].is_meta else float(group["lr"])


def is_paged(tensor: torch.Tensor) -> bool:
    """Whether the state lies on the host between steps. The mark is bitsandbytes' own (``functional.get_paged``)."""
    return bool(getattr(tensor, "is_paged", False))


def _set_paged(tensor: torch.Tensor) -> None:
    tensor.is_paged = True  # type: ignore[attr-defined]  # as bitsandbytes marks it


def on_host(optimizer: str | Optimizer, built: Optimizer) -> set[int]:
    """Ids of the state tensors that lie on the host even if the parameters are on a card: torch's counters of steps.

    They do unless the group is `fused` or `capturable`, to spare the card a kernel for each (``_init_group`` of Adam in
    torch/optim/adam.py, and likewise in all others but ASGD). `built` is what `build` made of `optimizer`; flags that
    it took out are read off the original.
    """
    own = [base for base in type(built).__mro__ if base.__module__.startswith("torch.optim.") and base is not Optimizer]
    if not own or torch.optim.ASGD in own:
        return set()
    groups = built.param_groups if isinstance(optimizer, str) else unwrapped(optimizer).param_groups
    hosted = [
        (parameter, name)
        for group, copied in zip(groups, built.param_groups, strict=True)
        if not (group.get("fused") or group.get("capturable"))
        for parameter in copied["params"]
        for name in _COUNTERS
    ]
    counters = [built.state.get(parameter, {}).get(name) for parameter, name in hosted]
    return {id(counter) for counter in counters if isinstance(counter, torch.Tensor)}


def batches_parameters(optimizer: str | Optimizer, foreach: bool | None = None) -> bool:
    """Whether a step takes many parameters at once by foreach operators, with temporaries for all of them.

    Args:
        foreach: what the device does where the optimizer leaves it open, as in `build`.

    Raises:
        BadOptimizer: an unknown name, or not an optimizer.
    """
    some = _factory(optimizer)([Parameter(torch.empty(1))], foreach) if isinstance(optimizer, str) else None
    groups = (some or unwrapped(optimizer)).param_groups
    return any(
        (foreach if group["foreach"] is None else group["foreach"]) and not group.get("fused")
        for group in groups
        if "foreach" in group
    )


@contextmanager
def narrowed(optimizer: Optimizer, params: Sequence[Parameter]) -> Iterator[None]:
    """The optimizer as if it held these of its parameters alone, in their own groups, while the `with` block lasts."""
    wanted, groups = {id(parameter) for parameter in params}, optimizer.param_groups
    kept = [(group, [p for p in group["params"] if id(p) in wanted]) for group in groups]
    kept = [(group, chosen) for group, chosen in kept if chosen]
    before = [group["params"] for group, _ in kept]
    optimizer.param_groups = [group for group, _ in kept]
    for group, chosen in kept:
        group["params"] = chosen
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for (group, _), params_before in zip(kept, before, strict=True):
            group["params"] = params_before


def step_alone(optimizer: Optimizer, parameter: Parameter) -> None:
    """Step one parameter by its gradient, with the optimizer's own arithmetic, group and state.

    Step hooks, and what learning-rate schedulers put around `step`, are left out: they belong to the whole step.
    """
    step = type(optimizer).step
    if getattr(step, "hooked", False):  # torch wraps each class's step into one that calls the hooks
        step = step.__wrapped__  # type: ignore[attr-defined]
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    # A class of one's own may call the step of its base class, which calls them too.
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        with narrowed(optimizer, [parameter]):
            step(optimizer)
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks


def name_of(optimizer: str | Optimizer) -> str:
    """A name of the table as it is written there, or the class of a live optimizer.

    Raises:
        BadOptimizer: an unknown name, or not an optimizer.
    """
    if isinstance(optimizer, str):
        _factory(optimizer)
        return _spelled(optimizer)
    return type(unwrapped(optimizer)).__name__


def _spelled(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _factory(name: str) -> Factory:
    factory = OPTIMIZERS.get(_spelled(name))
    if factory is None:
        nearest = difflib.get_close_matches(_spelled(name), OPTIMIZERS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise BadOptimizer(
            f"no optimizer is called {name!r}{hint} The names are {', '.join(OPTIMIZERS)}. Any other can be passed live"
        )
    return factory


def unwrapped(optimizer: object) -> Optimizer:
    """The optimizer that does the work: accelerate and others wrap it in one that holds it as `.optimizer`."""
    seen = optimizer
    while isinstance(inner := getattr(seen, "optimizer", None), Optimizer):
        seen = inner
    if not isinstance(seen, Optimizer):
        raise BadOptimizer(
            f"an optimizer is a name such as 'adamw' or a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return seen


def _copied(
    live: Optimizer, replacement: Mapping[int, Parameter], stand_in: Callable[[torch.Tensor], torch.Tensor]
) -> Optimizer:
    """By the way that optimizers are unpickled: the constructor of a class that is not torch's cannot be known."""
    copies: dict[int, torch.Tensor] = dict(replacement)  # a tensor that several states share stays shared

    def copied(value: Any) -> Any:
        match value:
            case torch.Tensor():
                if id(value) not in copies:
                    copies[id(value)] = stand_in(value)
                    if is_paged(value):
                        _set_paged(copies[id(value)])
                return copies[id(value)]
            case defaultdict():
                return defaultdict(value.default_factory, {copied(k): copied(v) for k, v in value.items()})
            case dict():
                return {copied(k): copied(v) for k, v in value.items()}
            case list() | tuple() | set() if type(value) in (list, tuple, set):
                return type(value)(copied(part) for part in value)
        return value

    copy = type(live).__new__(type(live))
    copy.__setstate__({name: copied(value) for name, value in vars(live).items() if not _is_attached(live, name)})
    return copy


def _is_attached(live: Optimizer, name: str) -> bool:
    """Whether users or frameworks put it on the optimizer: hooks, and methods that shadow the class's own."""
    return name.startswith("_optimizer_") or callable(getattr(type(live), name, None))
