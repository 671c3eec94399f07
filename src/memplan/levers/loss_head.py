"""The lever `loss head`: the projection to the vocabulary and the cross-entropy after it, a chunk of rows at a time.

The head gets a `forward` of its own that returns lazy logits (`lazy_logits.py`), which the model's own code takes to
its own loss: the label shift, ignored labels, the number of items in the batch, label smoothing, scales and soft caps
are the model's, not ours. Only `cross_entropy` is computed in chunks (`chunked_loss.py`). Whoever reads the logits gets
them; then nothing is saved, and `uses` says so.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memplan._compat import is_unit
from memplan.blocks import find_blocks
from memplan.errors import PlanMismatch, PlanNotFollowed
from memplan.levers.lazy_logits import Call, lazy
from memplan.levers.undo import StandIn, Undo, plain_forward, set_attributes
from memplan.levers.uses import Uses
from memplan.problem import KEEP

_PREFIX = "chunked-"

# Forward and backward of a head of 512 columns in float32: CPU seconds, medians of 4 or 5 interleaved rounds with one
# thread on a busy two-core machine, and the peak in MiB, gradients included. With fewer than 128 rows it is slower,
# since each chunk reads the weight and its gradient again; with more it takes memory and is no faster.
#
# vocabulary, rows    whole     32         64         128        256        512        1024
# 32,000, 2,048     2.89 750     -       3.18  82   2.66  98   2.63 129   2.65 192   2.67 317
# 128,256, 512      3.13 752  4.15 283   3.29 314   3.00 377   3.13 502      -          -
#
# A card does hundreds of operations in the time of reading a byte (295 on an H100 in bfloat16: 989 TFLOP/s over 3.35
# TB/s), and a product of n rows does n per byte of the weight: 1024 rows keep it busy. Not measured on one yet.
_CHUNK_BYTES, _LEAST_ROWS = 16 * 2**20, 128
_CHUNK_BYTES_CARD, _LEAST_ROWS_CARD = 256 * 2**20, 1024


def rows_for(vocabulary: int, kind: str = "cpu") -> int:
    """Rows of a chunk: the greatest power of two whose float32 logits are within 16 MiB, and 128 at least.

    For another `kind` of device than "cpu", within 256 MiB, and 1024 at least.
    """
    size, least = (_CHUNK_BYTES, _LEAST_ROWS) if kind == "cpu" else (_CHUNK_BYTES_CARD, _LEAST_ROWS_CARD)
    return max(least, 1 << max(0, (size // (4 * vocabulary)).bit_length() - 1))


def options(vocabulary: int, kind: str = "cpu") -> tuple[str, ...]:
    """What the head can be run by, as it is first."""
    return (KEEP, f"{_PREFIX}{rows_for(vocabulary, kind)}")


def rows_of(option: str) -> int | None:
    """Rows per chunk of an option; None for what is no option of this lever's but "keep"."""
    digits = option.removeprefix(_PREFIX)
    return int(digits) if digits != option and digits.isascii() and digits.isdigit() and int(digits) else None


def is_option(name: str) -> bool:
    """Whether a name is one of "keep" and "chunked-<rows>"."""
    return name == KEEP or rows_of(name) is not None


def find_head(model: nn.Module) -> str | None:
    """Path of the linear layer that makes a model's logits, or None.

    transformers' models name it; in others it is the widest linear layer outside the blocks. A layer that makes no more
    numbers than it gets is left alone, as its logits never decide the memory; so is one whose forward is not
    `nn.Linear`'s own. That the layer ends in a cross-entropy is told by a run (`uses`).
    """
    head = _named(model)
    if head is not None:
        return next((path for path, module in model.named_modules() if module is head and _is_head(module)), None)
    return max(_outside_blocks(model), key=lambda found: found[1].out_features, default=(None, None))[0]


def _named(model: nn.Module) -> nn.Module | None:
    """The head by the word of a model of transformers, which has another name for it in each."""
    named = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = named() if named is not None else None
    return head


def refusal_of(model: nn.Module) -> str | None:
    """Why the head that a model names, and `find_head` does not give, is left alone; None where it would save nothing.

    Adapters put a layer of their own in the place of a head that is to learn, and quantization another kind of layer.
    """
    head = _named(model)
    if head is None or _is_head(head) or not _is_wide(head):
        return None
    if type(head) is nn.Linear:
        return "the head is a Linear whose forward or weight is not nn.Linear's own"
    return f"the head is a {type(head).__name__}, not a plain linear layer"


def misuse_of(model: nn.Module, path: str, used: Uses) -> str | None:
    """What in a traced step stands against chunks: the loss reads the logits; None where there are none to be saved.

    A layer that nobody names as the head may be another one, which everything reads. It is taken for the head where a
    cross-entropy comes behind it, or no other linear layer.
    """
    if not used.reads:
        return None  # another kernel does without the logits already
    linear = [module for _, module in model.named_modules() if isinstance(module, nn.Linear)]
    surely = used.losses or _named(model) is not None or model.get_submodule(path) is linear[-1]
    return "the loss reads the logits as a whole" if surely else None


def _outside_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    inside = tuple(f"{path}." for path in find_blocks(model))
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and _is_head(module) and not f"{path}.".startswith(inside):
            yield path, module


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and _is_wide(module) and _is_plain(module)


def _is_wide(module: nn.Module) -> bool:
    """Whether it makes more numbers than it gets, as far as it says so."""
    made, given = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return made is None or given is None or bool(made > given)


def _is_plain(head: nn.Module) -> bool:
    """Whether a module does what `nn.Linear` does, with parameters of its own: not quantized, not re-parametrized."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    own = "forward" not in head.__dict__ or isinstance(head.forward, _Chunked)
    weight = head._parameters.get("weight")
    return own and weight is not None and weight.is_floating_point() and weight.layout == torch.strided


def install(head: nn.Module, option: str) -> Undo:
    """Run a head by an option. What is returned restores the very same attributes.

    Raises:
        PlanMismatch: no such option, or a module that is no plain linear layer.
    """
    rows = rows_of(option)
    if not is_option(option):
        raise PlanMismatch(f"the loss head is to {option!r}, but its options are {KEEP}, {_PREFIX}<rows>: plan again.")
    if rows is None:
        return set_attributes(head, {"forward": plain_forward(head)} if isinstance(head.forward, _Chunked) else {})
    if not _is_plain(head):
        raise PlanMismatch(
            f"the loss head is a {type(head).__name__} whose forward is not nn.Linear's own, so {option!r} could "
            "change what it computes: plan again on the model as it is now."
        )
    return set_attributes(head, {"forward": _Chunked(head, rows)})


def uses(head: nn.Module) -> Uses:
    """How a head's logits were used since it was installed: losses in chunks, and logits read as a whole.

    Where `reads` is not 0 after a step the lever saves nothing; where `losses` is 0 it was never reached.
    """
    return head.forward.uses if isinstance(head.forward, _Chunked) else Uses()


@contextmanager
def unheard(installed: AbstractContextManager[object]) -> Iterator[None]:
    """A lever that is only tried, with no word on what the step does with it: `uses` tells who asks."""
    with warnings.catch_warnings(), installed:
        warnings.simplefilter("ignore", PlanNotFollowed)
        yield


class _Chunked(StandIn):
    """A forward that returns lazy logits, where there is something to learn."""

    def __init__(self, head: nn.Module, rows: int) -> None:
        super().__init__(head, f"{_PREFIX}{rows}")
        self.rows, self.uses = rows, Uses()

    def __call__(self, input: Tensor) -> Any:  # noqa: A002  # torch's own name
        weight, bias = self.block.weight, self.block.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        tensors = [input, weight] if bias is None else [input, weight, bias]
        learns = self.block.training and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if not learns or not _agree(tensors) or self._is_unit():
            return self.__wrapped__(input)
        return lazy(Call(self.__wrapped__, input, weight, bias, self.rows, self.uses))

    def _is_unit(self) -> bool:
        """Whether FSDP2 takes the weight away when the head has returned, before the loss could come for it."""
        if is_unit(self.block):
            warnings.warn(
                "the loss head is sharded by FSDP2 as a unit of its own, so its weight is gone before the loss is "
                "computed: the logits are made at once, and the step takes more memory than planned. Shard the head "
                "with the model (fully_shard(model), not fully_shard(model.lm_head)), or plan without 'loss-head'.",
                PlanNotFollowed,
                stacklevel=3,
            )
            return True
        return False


def _agree(tensors: list[Tensor]) -> bool:
    """Whether `linear` takes them. Where not, its own error is the one to see."""
    hidden, weight = tensors[:2]
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[-1]:
        return False
    if torch.is_autocast_enabled(hidden.device.type):
        return all(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
    return all(t.dtype == weight.dtype and t.device == weight.device for t in tensors)
