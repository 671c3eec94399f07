"""Packed weights: bitsandbytes' layers of 4 and 8 bits, told apart and imitated without importing the package.

A packed weight is more than a parameter. Beside the bytes of the matrix lie the scales of its blocks: of 4 bits in a
`QuantState` on the parameter, which may be quantised once more; of 8 bits in the layer's `state`. They are neither
parameters nor buffers, so nothing in torch lists them; here they are, by the path on which the layer itself finds them.

A layer that was only built, and not yet moved to its device, holds a matrix of 16 or 32 bits: bitsandbytes packs when
it is moved. It is taken as it will be then. Sizes are those of bitsandbytes 0.50.2 (``functional.quantize_4bit``,
``functional.quantize_blockwise``, ``nn.Int8Params``).
"""

import copy
import sys
from collections.abc import Iterator
from functools import reduce
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.errors import ModelError
from memplan.kernels import forms

_BLOCK: Final = 64  # weights that share a scale, unless the parameter says otherwise
_NESTED_BLOCK: Final = 256  # scales that share a scale, with double quantisation
_CODES: Final = 16  # values that 4 bits stand for
_NESTED_CODES: Final = 256

_FOUR, _EIGHT = "Params4bit", "Int8Params"
_TOLD: Final = MappingProxyType(
    {
        "QuantState": ("shape", "dtype", "blocksize", "quant_type", "nested"),
        "MatmulLtState": ("threshold", "has_fp16_weights", "use_pool", "force_no_igemmlt"),
    }
)
_STATE_OF_FOUR: Final = ("absmax", "code", "offset", "state2.absmax", "state2.code")


def bits_of(parameter: Tensor) -> int | None:
    """4 or 8 for a weight of bitsandbytes', else None. A stand-in is told by what hangs on it."""
    if _is_bitsandbytes(parameter, _FOUR) or hasattr(parameter, "quant_state"):
        return 4
    if _is_bitsandbytes(parameter, _EIGHT) or hasattr(parameter, "SCB"):
        return 8
    return None


def _is_bitsandbytes(value: object, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("bitsandbytes.") for kind in type(value).__mro__)


def form_of(parameter: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a parameter, of one that is yet to be packed as it will be."""
    bits = bits_of(parameter)
    if bits == 4 and _state_of_four(None, parameter) is None:
        storage: torch.dtype = getattr(parameter, "quant_storage", torch.uint8)
        return ((parameter.numel() + 1) // (2 * storage.itemsize), 1), storage
    if bits == 8:
        return tuple(parameter.shape), torch.int8
    return tuple(parameter.shape), parameter.dtype


# -- what lies beside a weight -----------------------------------------------------------------------------------------


def scales_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors beside a layer's packed weight, by their attribute paths below the module (`at` reads one)."""
    weight = module._parameters.get("weight")
    bits = None if weight is None else bits_of(weight)
    if bits == 4:
        state = _state_of_four(module, weight)
        if state is None:
            return {}
        found = {f"weight.quant_state.{path}": _get(state, path) for path in _STATE_OF_FOUR}
        return {path: tensor for path, tensor in found.items() if isinstance(tensor, Tensor)}
    if bits == 8:
        state = getattr(module, "state", None)  # an embedding has none
        scales = getattr(state, "SCB", None)  # before the first forward they are still on the weight
        scales = getattr(weight, "SCB", None) if scales is None else scales
        outliers = getattr(state, "idx", None)  # which columns had some in the last forward
        found = {"weight.SCB" if state is None else "state.SCB": scales, "state.idx": outliers}
        return {path: tensor for path, tensor in found.items() if tensor is not None}
    return {}


def named_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`scales_of` every module of a model, under dotted paths from the model."""
    for path, module in model.named_modules():
        for name, tensor in scales_of(module).items():
            yield f"{path}.{name}" if path else name, tensor


def at(model: nn.Module, path: str) -> Tensor:
    """The parameter, buffer or scale that lies at a dotted path."""
    tensor: Tensor = _get(model, path)
    return tensor


def _get(owner: object, path: str) -> Any:
    return reduce(lambda value, name: getattr(value, name, None), path.split("."), owner)


def _state_of_four(module: nn.Module | None, weight: object) -> Any:
    """Where a conversion has lost it from the parameter, the layer has it still."""
    state = getattr(weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def told(value: object) -> tuple[object, ...] | None:
    """What a layer's `quant_state` or `state` says beyond its tensors, in comparable form; None for anything else."""
    names = next((names for kind, names in _TOLD.items() if _is_bitsandbytes(value, kind)), None)
    return None if names is None else tuple(str(getattr(value, name, None)) for name in names)


def kept_bytes(model: nn.Module) -> int:
    """At most so much bitsandbytes keeps for itself on a CPU, for as long as the process lives, if it packs a model.

    Two tables of codes (``backends/utils.py``); for weights of 4 bits also, of NF4 and of FP4, the codes again with
    their bounds in float32 and their order in int64 (``backends/default/ops.py``), and with double quantisation the
    codes of 8 bits (``functional.py``, ``name2qmap``).
    """
    found = {bits_of(p) for module in model.modules() for p in module._parameters.values() if p is not None}
    tables = 2 * 4 * _CODES if found & {4, 8} else 0
    return tables + (2 * (4 * _CODES + 4 * (_CODES - 1) + 8 * _CODES) + 4 * _NESTED_CODES if 4 in found else 0)


# -- without data ------------------------------------------------------------------------------------------------------


class Imitation:
    """Packed layers on tensors without data, as long as somebody else puts the modules' attributes back."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # by id: tensors that layers share stay shared

    def of(self, module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter | None:
        """A parameter to stand in for a layer's packed weight, on which the layer finds its scales; else None.

        Raises:
            ModelError: a weight that is to be trained.
        """
        bits = bits_of(weight)
        if bits is None:
            return None
        if weight.requires_grad:
            raise ModelError(
                f"the {name} of {type(module).__name__} is of {bits} bits and requires a gradient, but packed weights "
                "cannot be trained. Freeze it (requires_grad_(False)) and train adapters (peft's LoraConfig), or load "
                "the model without quantisation for a full fine-tune."
            )
        return self._four(module, weight) if bits == 4 else self._eight(module, weight)

    def _four(self, module: nn.Module, weight: nn.Parameter) -> nn.Parameter:
        state = _state_of_four(module, weight)
        shape, dtype = (tuple(weight.shape), weight.dtype) if state is not None else form_of(weight)
        stand_in = nn.Parameter(self._empty(shape, dtype), requires_grad=False)
        own = {name: value for name, value in vars(weight).items() if name not in ("data", "module", "quant_state")}
        compute: torch.dtype | None = getattr(module, "compute_dtype", None)
        state = self._state_for(weight, compute) if state is None else self._copy_of(state)
        vars(stand_in).update({**own, "module": module, "bnb_quantized": True, "quant_state": state})
        bias = module._parameters.get("bias")
        if bias is not None and compute is not None:  # the first forward leaves it in this type
            module._parameters["bias"] = nn.Parameter(self._empty(bias.shape, compute), bias.requires_grad)
        return stand_in

    def _state_for(self, weight: Any, compute: torch.dtype | None) -> Any:
        """The `QuantState` that packing gives. Integers are a checkpoint's: the type it was packed from is not known
        before it is loaded, and taken for the one that the layer computes in."""
        block, count = weight.blocksize or _BLOCK, weight.numel()
        blocks = -(-count // block)
        origin = weight.dtype if weight.is_floating_point() else compute or torch.float16
        kind: Any = sys.modules["bitsandbytes.functional"].QuantState
        nested = None
        if weight.compress_statistics:
            nested = kind(
                absmax=self._empty((-(-blocks // _NESTED_BLOCK),), torch.float32),
                code=self._empty((_NESTED_CODES,), torch.float32),
                blocksize=_NESTED_BLOCK,
                dtype=torch.float32,
            )
        return kind(
            absmax=self._empty((blocks,), torch.float32 if nested is None else torch.uint8),
            shape=weight.shape,
            dtype=origin,
            blocksize=block,
            code=self._empty((_CODES,), torch.float32),
            quant_type=weight.quant_type,
            offset=None if nested is None else self._empty((), torch.float32),
            state2=nested,
        )

    def _copy_of(self, state: Any) -> Any:
        twin = copy.copy(state)
        for name, value in vars(state).items():
            if isinstance(value, Tensor):
                setattr(twin, name, self._twin(value))
        if state.state2 is not None:
            twin.state2 = self._copy_of(state.state2)
        return twin

    def _eight(self, module: nn.Module, weight: Any) -> nn.Parameter:
        state: Any = getattr(module, "state", None)
        if weight.has_fp16_weights:
            raise ModelError(
                f"{type(module).__name__} has has_fp16_weights=True: its weights stay in 16 bits and are quantised in "
                "every forward, which memplan does not follow. Build it with has_fp16_weights=False."
            )
        stand_in = nn.Parameter(self._empty(tuple(weight.shape), torch.int8), requires_grad=False)
        scales = self._empty((weight.shape[0],), torch.float32)
        vars(stand_in).update(CB=None, SCB=scales if state is None else None, has_fp16_weights=False)
        if state is not None:
            twin = copy.copy(state)
            twin.CB, twin.SCB, twin.idx = stand_in.detach(), scales, None
            module.state = twin
        return stand_in

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._twins:
            self._twins[id(tensor)] = tensor, self._empty(tuple(tensor.shape), tensor.dtype)
        return self._twins[id(tensor)][1]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return forms.empty(self.fake, shape, dtype)


def statements(model: nn.Module) -> tuple[str, ...]:
    """What a prediction of a model with packed weights assumes, in words; nothing for any other model."""
    count: dict[int, int] = {}
    unpacked = reentrant = False
    for module in model.modules():
        for parameter in module._parameters.values():
            bits = None if parameter is None else bits_of(parameter)
            if bits is not None and parameter is not None:
                count[bits] = count.get(bits, 0) + 1
                unpacked |= form_of(parameter) != (tuple(parameter.shape), parameter.dtype)
        run = getattr(module, "_gradient_checkpointing_func", None)
        on = getattr(module, "gradient_checkpointing", False)
        reentrant |= bool(on) and dict(getattr(run, "keywords", {"use_reentrant": False})).get("use_reentrant", True)
    if not count:
        return ()
    lines = [f"{n} weights are packed in {bits} bits and not trained" for bits, n in sorted(count.items())]
    if unpacked:
        lines.append("weights that are not packed yet are counted as bitsandbytes packs them on the device")
    if reentrant:
        lines.append(_REENTRANT)
    if 8 in count:
        lines.append(_OUTLIERS)
    return tuple(lines)


_REENTRANT: Final = (
    "reentrant checkpointing, the default of prepare_model_for_kbit_training, is replaced in a plan by the "
    "non-reentrant one, block by block"
)
_OUTLIERS: Final = "8-bit products meet one column of outliers (LLM.int8); further ones take a number a token each"
