"""`Sample`: the inputs of one training step, at any batch size.

A sample only shows shapes and plausible values. The batch size that it comes with binds nothing: `Sample.resized` gives
the same content at any other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from memplan.errors import BadBatch, BadSample
from memplan.plan_record import SampleField
from memplan.sample_rules import EXAMPLE, inputs_for


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What is passed to the model's forward, as the user gave it: a dict of keyword arguments, a tuple, or one tensor.

    Every tensor of at least one dimension has the batch as its first; 0-dim tensors and all other values stay as they
    are. Made by `Sample.of`.
    """

    content: Any  # dict[str, Any], tuple[Any, ...] or Tensor; dicts and tuples may nest
    batch_size: int

    @classmethod
    def of(cls, sample: object) -> "Sample":
        """A sample from a mapping of keyword arguments, a tuple or list of positional ones, or one tensor.

        Raises:
            BadSample: it is none of these, it has no tensor, or its tensors disagree in their first dimension.
        """
        if isinstance(sample, Sample):
            return sample
        content = _normalised(sample)
        rows = {name: leaf.shape for name, leaf in _named_tensors(content) if leaf.dim() > 0}
        if not rows:
            raise BadSample(f"the sample has no tensor with a batch dimension. Pass one, for example\n{EXAMPLE}")
        sizes = {shape[0] for shape in rows.values()}
        if len(sizes) > 1 or 0 in sizes:
            shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in rows.items())
            raise BadSample(
                f"the first dimension of every tensor is the batch, at least 1 and the same in all; here: {shapes}. "
                "Repeat what is shared along that dimension, or give it to the model in another way than as an input"
            )
        _refuse_indexes_without_values(content)
        return cls(content, batch_size=sizes.pop())

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments; empty for a dict."""
        if isinstance(self.content, dict):
            return ()
        return self.content if isinstance(self.content, tuple) else (self.content,)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments; empty for a tuple or a tensor."""
        return self.content if isinstance(self.content, dict) else {}

    def call(self, model: Callable[..., Any]) -> Any:
        """The model's output for this sample."""
        return model(*self.args, **self.kwargs)

    def resized(self, batch_size: int) -> "Sample":
        """The same content with `batch_size` rows, repeated in order where there are fewer. Shares no memory with this.

        Raises:
            BadBatch: fewer than one row.
        """
        if batch_size < 1:
            raise BadBatch(f"a sample has at least one row, got a batch size of {batch_size}")

        def resize(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 0:
                return tensor.detach()
            rows = torch.arange(batch_size, device=tensor.device) % self.batch_size
            return tensor.detach().index_select(0, rows)

        return Sample(_map_tensors(resize, self.content), batch_size)

    @property
    def tokens(self) -> int | None:
        """Of a row: the second dimension of the first integer tensor that has two; None where there is no such."""
        found = (t.shape[1] for t in self.tensors() if t.dim() == 2 and not t.is_floating_point())
        return next(found, None)

    @property
    def row_bytes(self) -> int:
        """Of one row, in all tensors that have rows."""
        return sum(tensor.nbytes for tensor in self.tensors() if tensor.dim()) // self.batch_size

    def lengthened(self, tokens: int) -> "Sample":
        """The same rows with so many tokens each, repeated in order where there are fewer.

        That is in all tensors whose second dimension is `tokens`.

        Raises:
            BadSample: no tensor holds tokens.
        """
        length = self.tokens
        if not length:
            raise BadSample("the sample has no tensor of tokens, integers [rows, tokens], that could be made longer")

        def resize(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() < 2 or tensor.shape[1] != length:
                return tensor.detach()
            return tensor.detach().index_select(1, torch.arange(tokens, device=tensor.device) % length)

        return Sample(_map_tensors(resize, self.content), self.batch_size)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Sample":
        """The same structure with every tensor replaced by `change(tensor)`, which keeps its rows."""
        return Sample(_map_tensors(change, self.content), self.batch_size)

    def tensors(self) -> list[torch.Tensor]:
        """All its tensors, nested ones too."""
        return [tensor for _, tensor in _named_tensors(self.content)]

    def to(self, device: torch.device | str) -> "Sample":
        """The same sample on another device. What comes from "meta" has no values and arrives as zeros."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_meta:
                return torch.zeros_like(tensor, device=device)
            return tensor.to(device)

        return Sample(_map_tensors(move, self.content), self.batch_size)

    def fields(self) -> tuple[SampleField, ...]:
        """The specification of each tensor with a batch dimension, for a plan file. Other values are not in it."""
        return tuple(
            SampleField(
                name=name,
                shape=tuple(tensor.shape[1:]),
                dtype=str(tensor.dtype).removeprefix("torch."),
                below=None if tensor.is_floating_point() or tensor.is_complex() else _bound_of(tensor),
            )
            for name, tensor in _named_tensors(self.content)
            if tensor.dim() > 0
        )

    @classmethod
    def from_fields(cls, fields: Sequence[SampleField], batch_size: int, seed: int = 0) -> "Sample":
        """Random values to a specification, on the CPU. Names that are numbers are positional arguments.

        Raises:
            BadSample: no field, or one inside a nested structure, which a specification cannot give back.
        """
        for field in fields:
            if not (field.name.isidentifier() or field.name.isdecimal()):
                raise BadSample(
                    f"the input {field.name!r} lies inside a structure that a plan file does not keep: pass sample="
                )
        generator = torch.Generator().manual_seed(seed)
        values = {field.name: _random_field(field, batch_size, generator) for field in fields}
        return cls.of(tuple(values.values()) if all(name.isdecimal() for name in values) else values)


def sample_for(model: nn.Module, batch_size: int, seq_len: int | None = None) -> Sample:
    """Inputs and labels for a transformers model, also one wrapped by PEFT, made from its config without a download.

    Values are random (always the same ones), on the CPU, floating ones in the model's dtype. `seq_len` counts tokens,
    those of the labels where speech is turned into text; for other audio it counts samples (waveforms) or frames
    (features). By default it is the model's positions, at most 2048, and 10 s of audio at 16 kHz. Images have the
    config's size, or 224 x 224 where it has none.

    Raises:
        BadSample: not a transformers model, a head that memplan has no rule for, or a `seq_len` that does not go.
    """
    get_base_model = getattr(model, "get_base_model", None)  # PEFT's
    base = get_base_model() if callable(get_base_model) else model
    return Sample.of(inputs_for(base, batch_size, seq_len))


def _normalised(sample: object) -> Any:
    match sample:
        case torch.Tensor():
            return sample
        case Mapping():  # also transformers' BatchEncoding
            if unnamed := [key for key in sample if not isinstance(key, str)]:
                raise BadSample(f"the keys of a sample are the names of the model's inputs, got {unnamed[0]!r}")
            return dict(sample)
        case tuple() | list():
            return tuple(sample)
    kind = type(sample).__name__
    raise BadSample(f"a sample is a dict, a tuple or a tensor, got {kind}. Pass one, for example\n{EXAMPLE}")


def _named_tensors(content: Any) -> list[tuple[str, torch.Tensor]]:
    """Every tensor with its path: "labels", or "0" for positional arguments; inner levels follow a dot."""
    if isinstance(content, torch.Tensor):
        return [("0", content)]
    leaves, _ = pytree.tree_flatten_with_path(content)
    return [
        (".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf)
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor)
    ]


def _map_tensors(change: Callable[[torch.Tensor], torch.Tensor], content: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, change, content)


def _refuse_indexes_without_values(content: Any) -> None:
    for name, tensor in _named_tensors(content):
        if tensor.is_meta and not tensor.is_floating_point():
            raise BadSample(
                f"{name} is an integer tensor on the meta device: it has no values, so which indexes are valid "
                "cannot be known. Make it on the CPU (floating-point inputs may stay on meta)"
            )


def _bound_of(tensor: torch.Tensor) -> int:
    return max(int(tensor.max()) + 1, 1) if tensor.numel() else 1


def _random_field(field: SampleField, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    shape = (batch_size, *field.shape)
    dtype: torch.dtype = getattr(torch, field.dtype)
    if field.below is not None:
        return torch.randint(field.below, shape, generator=generator).to(dtype)
    plain = dtype if dtype.is_complex else torch.float32  # not every dtype has random numbers of its own
    return torch.randn(shape, generator=generator, dtype=plain).to(dtype)
