"""The rules for CPU operators against the allocator: each is run, and what it took and gave back is what the rule says.

Numbers in Python become 0-dim tensors inside operators, 4 to 16 bytes each, which no rule counts.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter, tree_map_only

from memplan.kernels.cpu import RULES, workspace_bytes
from memplan.kernels.fakes import on_fakes
from memplan.meter import workspaces_of

A = torch.ops.aten
BF16 = torch.bfloat16
WRAPPED_NUMBERS = 32

Call = tuple[Any, tuple[Any, ...]]  # an operator and its arguments


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def low(*shape: int) -> Tensor:
    return ones(*shape, dtype=BF16)


def turned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of this shape, with the last two dimensions swapped in memory."""
    return ones(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)


def channels_last(*shape: int) -> Tensor:
    return ones(*shape).contiguous(memory_format=torch.channels_last)


def index(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def heads(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return ones(2, length, 4, 16, dtype=dtype).transpose(1, 2)


def flash_backward(length: int, *, dense: bool = True) -> Call:
    q = heads(length)
    out, normalisers = A._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    grad = torch.ones_like(out) if dense else ones(2, 4, length, 16)
    operands = (grad, q, q, q, out, normalisers, 0.0, False)
    return A._scaled_dot_product_flash_attention_for_cpu_backward.default, operands


def layer_norm_backward(grad: Tensor, source: Tensor, mask: list[bool]) -> Call:
    width = source.shape[-1]
    statistic, weight = ones(*source.shape[:-1], 1), ones(width)
    operands = (grad, source, [width], statistic, statistic, weight, weight, mask)
    return A.native_layer_norm_backward.default, operands


def batch_norm(source: Tensor) -> Call:
    channel = ones(source.shape[1])
    return A.native_batch_norm.default, (source, *[channel] * 4, True, 0.1, 1e-5)


def batch_norm_backward(grad: Tensor, source: Tensor) -> Call:
    channel = ones(source.shape[1])
    return A.native_batch_norm_backward.default, (grad, source, *[channel] * 5, True, 1e-5, [True] * 3)


def group_norm_backward() -> Call:
    source, statistic = ones(4, 8, 6, 6), ones(4, 2)
    return A.native_group_norm_backward.default, (
        source,
        source,
        statistic,
        statistic,
        ones(8),
        4,
        8,
        36,
        2,
        [True] * 3,
    )


def bags(mode: int) -> Call:
    operands = (ones(100, 16), torch.arange(96) % 100, torch.arange(0, 96, 8), False, mode, False, None)
    return A._embedding_bag.default, operands


def bags_backward(mode: int) -> Call:
    func, (weight, indices, offsets, *rest) = bags(mode)
    out, *kept = func(weight, indices, offsets, *rest)
    return A._embedding_bag_backward.default, (torch.ones_like(out), indices, offsets, *kept, 100, *rest)


CALLS: dict[str, Callable[[], Call]] = {
    "flash": lambda: (A._scaled_dot_product_flash_attention_for_cpu.default, (heads(300),) * 3),
    "flash, short": lambda: (A._scaled_dot_product_flash_attention_for_cpu.default, (heads(20),) * 3),
    "flash, long": lambda: (A._scaled_dot_product_flash_attention_for_cpu.default, (heads(900),) * 3),
    "flash, low": lambda: (A._scaled_dot_product_flash_attention_for_cpu.default, (heads(64, BF16),) * 3),
    "flash, low, long": lambda: (A._scaled_dot_product_flash_attention_for_cpu.default, (heads(700, BF16),) * 3),
    "flash backward": lambda: flash_backward(300),
    "flash backward, another layout": lambda: flash_backward(64, dense=False),
    "safe softmax": lambda: (A._safe_softmax.default, (ones(8, 32, 64), -1)),
    "softmax": lambda: (A._softmax.default, (ones(8, 32, 64), -1, False)),
    "softmax, turned": lambda: (A._softmax.default, (turned(8, 32, 64), -1, False)),
    "softmax backward, turned": lambda: (
        A._softmax_backward_data.default,
        (turned(8, 32, 64), ones(8, 32, 64), -1, torch.float32),
    ),
    "log softmax, channels last": lambda: (A._log_softmax.default, (channels_last(2, 8, 16, 16), 1, False)),
    "layer norm": lambda: (A.native_layer_norm.default, (ones(8, 32, 64), [64], ones(64), ones(64), 1e-5)),
    "layer norm, turned": lambda: (A.native_layer_norm.default, (turned(8, 32, 64), [64], ones(64), ones(64), 1e-5)),
    "layer norm backward": lambda: layer_norm_backward(ones(8, 32, 64), ones(8, 32, 64), [True] * 3),
    "layer norm backward, turned": lambda: layer_norm_backward(ones(8, 32, 64), turned(8, 32, 64), [True] * 3),
    "layer norm backward, frozen": lambda: layer_norm_backward(ones(8, 32, 64), ones(8, 32, 64), [True, False, False]),
    "layer norm backward, mixed": lambda: layer_norm_backward(low(8, 32, 64), low(8, 32, 64), [True] * 3),
    "batch norm": lambda: batch_norm(ones(4, 64, 6, 6)),
    "batch norm, channels last": lambda: batch_norm(channels_last(4, 64, 6, 6)),
    "batch norm of rows": lambda: batch_norm(ones(16, 64)),
    "batch norm, mixed": lambda: batch_norm(low(4, 64, 6, 6)),
    "batch norm backward": lambda: batch_norm_backward(ones(4, 64, 6, 6), ones(4, 64, 6, 6)),
    "batch norm backward, channels last": lambda: batch_norm_backward(*[channels_last(4, 64, 6, 6)] * 2),
    "group norm backward": group_norm_backward,
    "embedding": lambda: (A.embedding.default, (ones(32, 16), index(8, 8))),
    "embedding, one row for all": lambda: (A.embedding.default, (ones(32, 16), index(1, 8).expand(8, 8))),
    "embedding backward": lambda: (A.embedding_dense_backward.default, (ones(8, 8, 16), index(8, 8), 32, -1, False)),
    "embedding backward, turned": lambda: (
        A.embedding_dense_backward.default,
        (turned(8, 8, 16), index(8, 8), 32, -1, False),
    ),
    "sum": lambda: (A.sum.default, (ones(8, 64),)),
    "sum of booleans": lambda: (A.sum.dim_IntList, (ones(8, 64) > 0, [1])),
    "sum, low": lambda: (A.sum.dim_IntList, (low(8, 64, 32), [0, 1])),
    "sum over what does not merge, low": lambda: (A.sum.dim_IntList, (low(8, 64, 32), [0, 2])),
    "cumulative sum of booleans": lambda: (A.cumsum.default, (ones(8, 64) > 0, -1)),
    "mean": lambda: (A.mean.dim, (ones(8, 64), [1])),
    "mean, low": lambda: (A.mean.dim, (low(8, 64, 32), [1])),
    "gather, low": lambda: (A.gather.default, (low(8, 64), 1, index(8, 4))),
    "scatter add, low": lambda: (A.scatter_add.default, (low(8, 64), 1, index(8, 4), low(8, 4))),
    "scatter": lambda: (A.scatter.src, (ones(8, 64), 1, index(8, 4), ones(8, 4))),
    "mean squares": lambda: (A.mse_loss.default, (ones(8, 64), ones(8, 64))),
    "squares": lambda: (A.mse_loss.default, (ones(8, 64), ones(8, 64), 0)),
    "Huber": lambda: (A.huber_loss.default, (ones(8, 64), ones(8, 64))),
    "smooth L1": lambda: (A.smooth_l1_loss.default, (ones(8, 64), ones(8, 64))),
    "cross entropy of logits": lambda: (A.binary_cross_entropy_with_logits.default, (ones(8, 64), ones(8, 64))),
    "cross entropy of logits, none": lambda: (
        A.binary_cross_entropy_with_logits.default,
        (ones(8, 64), ones(8, 64), None, None, 0),
    ),
    "mean squares, low": lambda: (A.mse_loss.default, (low(8, 64), low(8, 64))),
    "sum of squares, low": lambda: (A.mse_loss.default, (low(8, 64), low(8, 64), 2)),
    "cross entropy of chances": lambda: (A.binary_cross_entropy.default, (ones(8, 64), ones(8, 64), None, 1)),
    "cross entropy of chances, low": lambda: (A.binary_cross_entropy.default, (low(8, 64), low(8, 64), None, 1)),
    "soft margin": lambda: (A.soft_margin_loss.default, (ones(8, 64), ones(8, 64))),
    "soft margin backward": lambda: (
        A.soft_margin_loss_backward.default,
        (torch.ones(()), ones(8, 64), ones(8, 64), 1),
    ),
    "bags": lambda: bags(0),
    "mean of bags": lambda: bags(1),
    "greatest of bags": lambda: bags(2),
    "bags backward": lambda: bags_backward(0),
    "mean of bags backward": lambda: bags_backward(1),
    "greatest of bags backward": lambda: bags_backward(2),
    "log sum exp": lambda: (A.logsumexp.default, (ones(8, 64), [1])),
    "roll": lambda: (A.roll.default, (ones(8, 64), [1], [1])),
    "roll twice": lambda: (A.roll.default, (ones(8, 64), [1, 1], [0, 1])),
    "gelu backward": lambda: (A.gelu_backward.default, (ones(8, 32, 64), ones(8, 32, 64))),
    "gelu backward, turned": lambda: (A.gelu_backward.default, (turned(8, 32, 64), ones(8, 32, 64))),
    "gelu backward of a slice": lambda: (A.gelu_backward.default, (ones(8, 64), ones(8, 128)[:, :64])),
    "product": lambda: (A.mm.default, (ones(32, 64), turned(64, 16))),
    "product of every other column": lambda: (A.mm.default, (ones(32, 128)[:, ::2], ones(64, 16))),
    "batched product of expanded rows": lambda: (A.bmm.default, (ones(4, 1, 64).expand(4, 32, 64), ones(4, 64, 16))),
    "add": lambda: (A.add.Tensor, (ones(64, 64), ones(64, 64))),
    "add two types": lambda: (A.add.Tensor, (ones(64, 64), low(64))),
    "add in place to a lower type": lambda: (A.add_.Tensor, (low(64, 64), ones(64, 64))),
    "mask by product": lambda: (A.mul.Tensor, (ones(64, 64), ones(64, 64) > 0)),
    "a boolean times a number": lambda: (A.mul.Tensor, (ones(64, 64) > 0, 2.0)),
    "exp of integers": lambda: (A.exp.default, (index(64, 64),)),
    "compare two types": lambda: (A.eq.Tensor, (index(64, 64), index(64, 64).int())),
    "choose": lambda: (A.where.self, (ones(64, 64) > 0, ones(64, 64), ones(64, 64))),
    "choose of two types": lambda: (A.where.self, (ones(64, 64) > 0, ones(64, 64), low(64, 64))),
    "fill by a mask": lambda: (A.masked_fill.Scalar, (ones(64, 64), ones(64, 64) > 0, 0.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_workspace_is_what_the_rule_says(name: str) -> None:
    func, args = CALLS[name]()
    with torch.no_grad():
        out = func(*args)
        (measured,) = workspaces_of([lambda: lambda: func(*args)])
    outputs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    assert abs(workspace_bytes(func, list(tree_iter(args)), outputs) - measured) <= WRAPPED_NUMBERS


def test_every_rule_is_of_an_operator() -> None:
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    assert not set(RULES) - names


def mixed_group_norm() -> Call:
    return A.native_group_norm.default, (low(4, 8, 6, 6), ones(8), ones(8), 4, 8, 36, 2, 1e-5)


def mixed_group_norm_backward() -> Call:
    source, statistic = low(4, 8, 6, 6), ones(4, 2)
    return A.native_group_norm_backward.default, (
        source,
        source,
        statistic,
        statistic,
        ones(8),
        4,
        8,
        36,
        2,
        [True] * 3,
    )


def connectionist_loss() -> Call:
    scores, targets = ones(20, 2, 5).log_softmax(-1), torch.ones(2, 7, dtype=torch.long)
    return A._ctc_loss.Tensor, (scores, targets, torch.tensor([20, 20]), torch.tensor([7, 3]))


SHAPES: dict[str, Callable[[], Call]] = {
    "layer norm, mixed": lambda: (A.native_layer_norm.default, (low(8, 64), [64], ones(64), ones(64), 1e-5)),
    "layer norm, low": lambda: (A.native_layer_norm.default, (low(8, 64), [64], low(64), low(64), 1e-5)),
    "layer norm, bare": lambda: (A.native_layer_norm.default, (low(8, 64), [64], None, None, 1e-5)),
    "batch norm, mixed": lambda: batch_norm(low(4, 8, 6, 6)),
    "group norm, mixed": mixed_group_norm,
    "group norm backward, mixed": mixed_group_norm_backward,
    "layer norm backward, turned": lambda: layer_norm_backward(turned(8, 32, 64), ones(8, 32, 64), [True] * 3),
    "softmax backward, turned": lambda: (
        A._softmax_backward_data.default,
        (turned(8, 32, 64), ones(8, 32, 64), -1, torch.float32),
    ),
    "grouped product": lambda: (
        A._grouped_mm.default,
        (ones(64, 32), ones(4, 32, 16), torch.tensor([16, 32, 48, 64], dtype=torch.int32)),
    ),
    "connectionist loss": connectionist_loss,
    "mean squares": lambda: (A.mse_loss.default, (ones(8, 64), ones(8, 64))),
    "squares": lambda: (A.mse_loss.default, (ones(8, 64), ones(8, 64), 0)),
    "smooth L1, low": lambda: (A.smooth_l1_loss.default, (low(8, 64), low(8, 64), 2)),
    "Huber": lambda: (A.huber_loss.default, (ones(8, 64), ones(8, 64))),
    "soft margin": lambda: (A.soft_margin_loss.default, (ones(8, 64), ones(8, 64))),
    "cross entropy of chances": lambda: (A.binary_cross_entropy.default, (ones(8, 64), ones(8, 64), None, 1)),
    "recurrent": lambda: recurrent(8),
    "recurrent, long": lambda: recurrent(300),
}


def recurrent(steps: int) -> Call:
    weights = (ones(80, 12), ones(80, 20), ones(80), ones(80))
    states = (ones(1, 3, 20), ones(1, 3, 20))
    operands = (ones(steps, 3, 12), *weights, *states, False, [], 2, 20, 1, True, False, False, True)
    return A.mkldnn_rnn_layer.default, operands


def bytes_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("name", SHAPES)
def test_abstract_results_have_the_layout_of_real_ones(name: str) -> None:
    func, args = SHAPES[name]()
    real = [(t.shape, t.dtype, t.stride(), bytes_of(t)) for t in tree_iter(func(*args)) if isinstance(t, Tensor)]
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def imitate(tensor: Tensor) -> Tensor:
        return fake.from_tensor(tensor) if tensor.is_floating_point() else tensor

    fakes = tree_map_only(Tensor, imitate, args)
    with fake:
        out = on_fakes(func, fakes, {})
    assert [(t.shape, t.dtype, t.stride(), bytes_of(t)) for t in tree_iter(out) if isinstance(t, Tensor)] == real
