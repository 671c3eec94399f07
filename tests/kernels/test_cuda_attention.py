"""Which attention kernel a card runs, and what it keeps for backward."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from card import ADA, AMPERE, BF16, BLACKWELL, FP16, FP32, FP64, HOPPER, TURING, backward, fake, kept, on_card
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memplan.kernels.cuda import CudaKernels
from memplan.kernels.cuda_attention import Attention, attend, attention_kernel

FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
CUDNN, MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH


def call(
    dtype: torch.dtype = BF16,
    head: int = 64,
    *,
    value_head: int | None = None,
    heads: int = 4,
    queries: int = 128,
    keys: int = 128,
    mask: Tensor | None = None,
    train: bool = True,
    **options: Any,
) -> Attention:
    query = fake(2, 4, queries, head, dtype=dtype, grad=train)
    key = fake(2, heads, keys, head, dtype=dtype, grad=train)
    value = fake(2, heads, keys, value_head or head, dtype=dtype, grad=train)
    return Attention(query, key, value, mask, grouped=heads != 4, **options)


def square(dtype: torch.dtype = torch.bool, grad: bool = False, keys: int = 128) -> Tensor:
    return fake(2, 1, 128, keys, dtype=dtype, grad=grad)


CHOICES: Mapping[str, tuple[Callable[[], Attention], tuple[int, int], SDPBackend]] = {
    "half precision": (call, AMPERE, FLASH),
    "float16, causal": (partial(call, FP16, causal=True), AMPERE, FLASH),
    "float32": (partial(call, FP32), AMPERE, EFFICIENT),
    "float64": (partial(call, FP64), AMPERE, MATH),
    "dropout": (partial(call, dropout=0.1), AMPERE, FLASH),
    "float32 with dropout": (partial(call, FP32, dropout=0.1), AMPERE, EFFICIENT),
    "consumer cards": (call, ADA, FLASH),
    "consumer Blackwell": (call, BLACKWELL, FLASH),
    "Hopper": (call, HOPPER, CUDNN),
    "data-centre Blackwell": (call, (10, 0), CUDNN),
    "Hopper, float32": (partial(call, FP32), HOPPER, EFFICIENT),
    "Hopper, dropout in sixteenths": (partial(call, dropout=0.125), HOPPER, CUDNN),
    "Hopper, other dropout": (partial(call, dropout=0.1), HOPPER, FLASH),
    "Hopper, one key": (partial(call, keys=1), HOPPER, FLASH),
    "Hopper, large heads": (partial(call, head=256), HOPPER, FLASH),
    "Hopper, latent heads": (partial(call, head=192, value_head=128), HOPPER, CUDNN),
    "Turing has no flash": (partial(call, FP16), TURING, EFFICIENT),
    "Turing has no bfloat16": (call, TURING, MATH),
    "mask": (lambda: call(mask=square()), AMPERE, EFFICIENT),
    "Hopper, mask": (lambda: call(mask=square()), HOPPER, CUDNN),
    "Hopper, mask and dropout": (lambda: call(mask=square(), dropout=0.1), HOPPER, EFFICIENT),
    "Hopper, bias with gradient": (lambda: call(mask=square(BF16, grad=True)), HOPPER, EFFICIENT),
    "mask without rows in memory": (lambda: call(mask=fake(2, 1, 128, 1).expand(-1, -1, -1, 128)), AMPERE, MATH),
    "grouped heads": (partial(call, heads=2), AMPERE, FLASH),
    "grouped heads in float32": (partial(call, FP32, heads=2), AMPERE, MATH),
    "grouped heads and mask": (lambda: call(heads=2, mask=square()), AMPERE, MATH),
    "Hopper, grouped heads and mask": (lambda: call(heads=2, mask=square()), HOPPER, CUDNN),
    "odd heads are padded": (partial(call, head=100), AMPERE, FLASH),
    "odd heads with a mask": (lambda: call(head=100, mask=square()), AMPERE, MATH),
    "odd heads in float32": (partial(call, FP32, head=100), AMPERE, EFFICIENT),
    "very large heads": (partial(call, head=512), AMPERE, EFFICIENT),
    "large heads cannot be trained here": (partial(call, head=224), ADA, EFFICIENT),
    "large heads can be used here": (partial(call, head=224, train=False), ADA, FLASH),
    "larger heads can be trained here": (partial(call, head=256), ADA, FLASH),
    "but not with dropout": (partial(call, head=256, dropout=0.1), ADA, EFFICIENT),
    "two head sizes": (partial(call, value_head=32), AMPERE, EFFICIENT),
    "causal, not square": (partial(call, causal=True, keys=64), AMPERE, EFFICIENT),
    "three dimensions": (lambda: Attention(*(fake(4, 128, 64) for _ in range(3))), AMPERE, MATH),
}


@pytest.mark.parametrize("case", CHOICES)
def test_attention_runs_by_the_kernel_that_the_card_would_pick(case: str) -> None:
    make, capability, expected = CHOICES[case]
    made = make()
    assert attention_kernel(made, capability) is expected
    operator = {MATH: "_safe_softmax"}.get(expected) or f"_scaled_dot_product_{expected.name.lower()}"
    with on_card(capability) as operators:
        out = attend(made, capability)
        assert out.shape == (*made.query.shape[:-1], made.value.shape[-1])
        assert out.dtype == made.query.dtype
        if out.requires_grad:
            backward(out)
            assert made.key.grad is not None
            assert made.key.grad.shape == made.key.shape
    assert operator in operators.names


def test_kernels_switched_off_by_the_user_are_passed_over() -> None:
    with sdpa_kernel([EFFICIENT, MATH]):
        assert attention_kernel(call(), HOPPER) is EFFICIENT
    with sdpa_kernel(FLASH), pytest.raises(RuntimeError, match="No available kernel"):
        attention_kernel(call(mask=square()), HOPPER)


def test_attention_keeps_no_probabilities() -> None:
    """BERT's attention: 4 heads of 64, dropout; the CPU keeps scores of [2, 4, 128, 128] more than once."""
    for made, capability, statistics in (
        (call(dropout=0.1), AMPERE, 2 * 4 * 128 * 4 + 16 + 8),
        (call(FP16, dropout=0.125), HOPPER, 2 * 4 * 128 * 4 + 8 + 8),
        (call(FP32, dropout=0.1), AMPERE, 2 * 4 * 128 * 4 + 8 + 8),
    ):
        with on_card(capability):
            saved = kept(lambda made=made, capability=capability: attend(made, capability))
        assert sum(t.nbytes for t in saved) == 4 * made.query.nbytes + statistics


def test_sizes_of_what_the_kernels_keep() -> None:
    heads = [fake(2, 100, 4, 64).transpose(1, 2) for _ in range(3)]
    for capability, options, name, statistics in (
        (AMPERE, {}, "flash", (2, 4, 100)),
        (HOPPER, {}, "cudnn", (2, 4, 100, 1)),
        (AMPERE, {"attn_mask": fake(100, 100, grad=False)}, "efficient", (2, 4, 128)),
    ):
        with on_card(capability) as operators:
            out = F.scaled_dot_product_attention(*heads, **options)
            backward(out)
        forward = operators.outputs[f"_scaled_dot_product_{name}_attention"]
        gradients = operators.outputs[f"_scaled_dot_product_{name}_attention_backward"]
        assert forward[1].shape == statistics
        assert forward[1].dtype == FP32
        assert out.stride() == heads[0].stride()  # so that merging the heads copies nothing
        assert [g.stride() for g in gradients] == [h.stride() for h in heads]
    with on_card() as operators, torch.no_grad():
        F.scaled_dot_product_attention(*heads, attn_mask=fake(100, 100, grad=False))
    assert operators.outputs["_scaled_dot_product_efficient_attention"][1].numel() == 0


def test_a_mask_becomes_a_bias_padded_to_multiples_of_eight() -> None:
    with on_card() as operators:
        F.scaled_dot_product_attention(*(fake(2, 4, 100, 64) for _ in range(3)), attn_mask=fake(2, 1, 100, 100) > 0)
    padded = operators.outputs["constant_pad_nd"][0]
    assert (padded.shape, padded.dtype) == ((2, 1, 100, 104), BF16)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"enable_gqa": True, "scale": -0.2}, {"attn_mask": "bias"}])
@pytest.mark.parametrize("dtype", [FP64, BF16])
def test_the_plain_kernel_is_torchs_own(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grouped = 2 if "enable_gqa" in options else 1
    query, key, value = (torch.randn(2, 4 // g, 8, 16, dtype=dtype) for g in (1, grouped, grouped))
    if "attn_mask" in options:
        options = {"attn_mask": torch.rand(8, 8) > 0.3}
    with sdpa_kernel(MATH):
        expected = F.scaled_dot_product_attention(query, key, value, **options)
        with CudaKernels(AMPERE):
            found = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)
