"""The card's operators in a step: inside functions written in Python, in a recomputed block, on the tape."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from card import ADA, AMPERE, BF16, BLACKWELL, FAKE, FP32, HOPPER, TURING, Operators, backward, fake, kept, on_card
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from memplan.abstract import AbstractModel
from memplan.gpus import find_gpu
from memplan.kernels import Backend, backend_for
from memplan.kernels.cpu import CpuBackend
from memplan.kernels.cuda import CudaBackend
from memplan.tape import Tape

# -- functions and kernels ----------------------------------------------------------------------------------------


def test_functions_written_in_python_are_followed_inside() -> None:
    attention = nn.MultiheadAttention(64, 4, dropout=0.1)
    with AbstractModel(attention, FAKE), on_card() as operators:
        x = fake(10, 2, 64, dtype=FP32)
        attention(x, x, x, need_weights=False)
        x.split(5)  # asks its own base class, which comes by under the same name
        torch.einsum("abc->cab", x)
    assert "_scaled_dot_product_efficient_attention" in operators.names
    with AbstractModel(attention, FAKE), on_card() as operators:
        attention(x, x, x)
    assert operators.names.count("native_dropout") == 1


def test_dropout_keeps_one_byte_an_element() -> None:
    x = fake(100, 10, dtype=FP32)
    with on_card():
        for run in (partial(F.dropout, x, 0.1), partial(torch.dropout, x, p=0.1, train=True), partial(nn.Dropout(), x)):
            assert [(t.dtype, t.numel()) for t in kept(run)] == [(torch.bool, 1000)]
        assert kept(lambda: F.dropout(x, 0.0) * 1.5) == []


def test_rms_norm_keeps_its_input_and_a_number_a_row() -> None:
    x, weight = fake(2, 10, 64), fake(64)
    with on_card() as operators:
        saved = kept(lambda: F.rms_norm(x, (64,), weight))
        assert sorted(t.nbytes for t in saved) == sorted([x.nbytes, weight.nbytes, 20 * 4])
        backward(F.rms_norm(x, (64,), weight))
    assert "pow" not in operators.names
    assert weight.grad is not None
    with on_card() as operators, warnings.catch_warnings(action="ignore"):
        F.rms_norm(x, (64,), fake(64, dtype=FP32))  # of two types: not in one kernel, as torch warns once
    assert "rsqrt" in operators.names


# -- recomputation -------------------------------------------------------------------------------------------------


CHECKPOINTS_OWN = ("detach", "empty")  # `empty` up to torch 2.11: what makes its node in the graph


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("directly", [False, True])
def test_a_checkpointed_block_is_recomputed_by_the_same_operators(reentrant: bool, directly: bool) -> None:
    x, weight = fake(8, 8), fake(8, 8, dtype=FP32)

    def block(x: Tensor) -> Tensor:
        heads = F.linear(x, weight).view(2, 4, 2, 4).float()
        return F.dropout(F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1).softmax(-1), 0.1)

    with on_card(HOPPER) as operators:
        with torch.autocast("cpu", BF16):
            out = checkpoint(block, x, use_reentrant=reentrant)
        first = [name for name in operators.names if name not in CHECKPOINTS_OWN]
        operators.names.clear()
        if directly:
            torch.autograd.backward(out, torch.empty_like(out))
        else:
            backward(out)
    again = [name for name in operators.names if name not in CHECKPOINTS_OWN]
    start = again.index(first[0])
    assert again[start : start + len(first)] == first
    assert "native_dropout" in first
    assert "_scaled_dot_product_flash_attention" in first


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("capability", "name"), [(AMPERE, "flash"), (HOPPER, "cudnn")])
def test_a_llama_on_the_tape(capability: tuple[int, int], name: str, checkpointed: bool) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            )
        )  # fmt: skip
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids = torch.ones(2, 16, dtype=torch.int64)
    tape = Tape(model, FAKE)
    with AbstractModel(model, FAKE):
        model.train()
        with tape, CudaBackend(capability).kernels():
            with torch.autocast("cpu", BF16):
                loss = model(input_ids=ids, labels=ids).loss
            tape.backward = True
            loss.backward()
            tape.backward = False
        tape.forget()
    names = [list(tape.notes.op_names)[row[0]] for row in tape.notes.op_columns]
    assert names.count(f"aten::_scaled_dot_product_{name}_attention") == (4 if checkpointed else 2)
    assert names.count(f"aten::_scaled_dot_product_{name}_attention_backward") == 2


# -- behind the operators ------------------------------------------------------------------------------------------


def attended(**options: Any) -> None:
    """Forward and backward of 2 samples, 4 heads, 100 rows; keys and values have `heads`, of size `head`."""
    head, heads, dtype = options.pop("head", 64), options.pop("heads", 4), options.pop("dtype", BF16)
    query, key, value = (fake(2, 100, n, head, dtype=dtype).transpose(1, 2) for n in (4, heads, heads))
    backward(F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != 4, **options))


def normalized(rows: int) -> None:
    backward(F.layer_norm(fake(rows, 64, dtype=FP32), (64,), fake(64, dtype=FP32), fake(64, dtype=FP32)))


def embedded(count: int) -> None:
    backward(F.embedding(torch.zeros(count, dtype=torch.int64), fake(1000, 16, dtype=FP32)))


def clipped(*sizes: int, dtype: torch.dtype) -> None:
    parameters = [fake(size, dtype=dtype) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    clip_grad_norm_(parameters, 1.0, foreach=True)


SCORES = 2 * 4 * 100
WORKSPACES: Mapping[str, tuple[Callable[[], object], str, int]] = {
    "flash: float32 dq of 128 rows, a number a row": (
        attended,
        "_scaled_dot_product_flash_attention_backward",
        2 * 4 * 128 * (64 + 1) * 4,
    ),
    "flash, grouped: dk and dv of every head": (
        partial(attended, heads=2),
        "_scaled_dot_product_flash_attention_backward",
        2 * 4 * 128 * (64 + 1) * 4 + 2 * SCORES * 64 * 2,
    ),
    "flash, large heads: dq in multiples of 64": (
        partial(attended, head=136),
        "_scaled_dot_product_flash_attention_backward",
        2 * 4 * 128 * (192 + 1) * 4,
    ),
    "efficient: tiles of 64 rows, and delta": (
        partial(attended, dtype=FP32),
        "_scaled_dot_product_efficient_attention_backward",
        2 * 4 * 2 * (64 * 64 + 4) * 4 + SCORES * 4,
    ),
    "efficient, half precision, beyond registers: also dk and dv": (
        partial(attended, head=256, attn_mask=fake(100, 104, grad=False)[:, :100]),
        "_scaled_dot_product_efficient_attention_backward",
        2 * 4 * (1 * 4 * (128 * 64 + 4) + 128 * 256 * 2) * 4 + SCORES * 4,
    ),
    "efficient, large heads: a float32 output": (
        partial(attended, head=256, attn_mask=fake(100, 104, grad=False)[:, :100]),
        "_scaled_dot_product_efficient_attention",
        SCORES * 256 * 4,
    ),
    "plain attention: a bool for each score and row": (
        partial(attended, head=60, attn_mask=fake(100, 100, grad=False)),
        "_safe_softmax",
        SCORES * (100 + 1),
    ),
    "few indices are not sorted": (partial(embedded, 3072), "embedding_dense_backward", 0),
    "many are, and summed by tens": (
        partial(embedded, 4096),
        "embedding_dense_backward",
        (3 * 4096 + 2 * 1000 + 1409) * 8 + 1409 * 16 * 4,
    ),
    "layer norm": (partial(normalized, 1000), "native_layer_norm_backward", 0),
    "layer norm of very many rows": (partial(normalized, 70_000), "native_layer_norm_backward", 2 * 2188 * 64 * 4),
    "log_softmax of a slice is copied": (
        lambda: F.log_softmax(fake(2, 10, 100)[:, :-1], -1),
        "_log_softmax",
        2 * 9 * 100 * 2,
    ),
    "gradient of an index is sorted": (
        lambda: backward(fake(50, 4)[torch.zeros(30, dtype=torch.int64)]),
        "index_put",
        4 * 30 * 8,
    ),
    "clipping: a float32 sum per chunk of the largest, for each": (
        partial(clipped, 10, 65536, 3 * 65536 + 1, dtype=BF16),
        "_foreach_norm",
        3 * 4 * 4,
    ),
    "a product has none of its own": (lambda: fake(8, 8) @ fake(8, 8), "mm", 0),
}


@pytest.mark.parametrize("case", WORKSPACES)
def test_workspaces(case: str) -> None:
    run, name, expected = WORKSPACES[case]
    with on_card() as operators:
        run()
    assert operators.workspaces[name] == expected


def test_what_cudnns_frontend_asks_for() -> None:
    with on_card(HOPPER) as operators:
        attended()
    assert operators.workspaces["_scaled_dot_product_cudnn_attention_backward"] == SCORES * (64 + 1) * 4


@pytest.mark.parametrize(
    ("gpu", "backend"),
    [
        ("cpu", CpuBackend()),
        ("cpu:2GiB", CpuBackend()),
        ("24GiB", CudaBackend((8, 0))),
        ("rtx-4090", CudaBackend((8, 9))),
        ("NVIDIA H100 80GB HBM3", CudaBackend((9, 0))),
    ],
)
def test_the_backend_of_a_gpu(gpu: str, backend: Backend) -> None:
    assert backend_for(find_gpu(gpu)) == backend


@pytest.mark.parametrize(
    ("capability", "version", "size"),
    [
        (TURING, "2.13.0", 8_519_680),
        (ADA, "2.13.0", 8_519_680),
        (HOPPER, "2.11.0", 32 * 2**20),
        ((10, 0), "2.11.0", 8_519_680),
        ((10, 0), "2.12.0", 32 * 2**20),
        (BLACKWELL, "2.11.0+cu130", 8_519_680),
        (BLACKWELL, "2.13.0+cu130", 32 * 2**20),
    ],
)
def test_workspaces_of_cublas_forward_and_backward(
    capability: tuple[int, int], version: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert CudaBackend(capability).fixed_bytes() == (size, size)


def test_what_a_backend_adds() -> None:
    cpu, card = CpuBackend(), CudaBackend(AMPERE)
    assert [cpu.rounded(size) for size in (0, 1, 512, 513)] == [0, 1, 512, 513]
    assert [card.rounded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert (cpu.fixed_bytes(), card.fixed_bytes()) == ((), (8_519_680,) * 2)
    assert (cpu.name, cpu.foreach, card.name, card.foreach) == ("cpu", None, "cuda", True)
    softmax = torch.ops.aten._safe_softmax.default
    assert cpu.workspace_bytes(softmax, [fake(4, 8)], [fake(4, 8)]) == 4 * 8 + 4
    convolution = torch.ops.aten.convolution.default
    assert cpu.wants_probe(convolution, [fake(1, 1, 1)])
    assert not card.wants_probe(convolution, [fake(1, 1, 1)])
    with Operators() as operators, cpu.kernels():
        F.dropout(fake(8, 8), 0.1)
    assert "bernoulli_" in operators.names
