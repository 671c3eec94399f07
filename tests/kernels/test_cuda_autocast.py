"""CUDA's autocast on the CPU: the type of each result, and what is kept for backward."""

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from card import BF16, FP32, FP64, fake, kept, on_card
from torch import Tensor, nn

from memplan.kernels import cuda_autocast

H, W, V, V32 = fake(8, 8), fake(8, 8, dtype=FP32), fake(8), fake(8, dtype=FP32)
IMAGE, LABELS = fake(2, 4, 8, 8), torch.zeros(8, dtype=torch.int64)
ON_THE_CARDS_LIST = cuda_autocast._on_list("AutocastCUDA")

RESULTS: Mapping[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "F.softmax": (lambda: F.softmax(H, -1), FP32),
    "torch.softmax": (lambda: torch.softmax(H, -1), FP32),
    "Tensor.softmax": (lambda: H.softmax(-1), FP32),
    "nn.Softmax": (lambda: nn.Softmax(-1)(H), FP32),
    "softmax into a type": (lambda: F.softmax(H, -1, dtype=BF16), BF16),
    "softmin": (lambda: F.softmin(H, -1), FP32),
    "log_softmax": (lambda: F.log_softmax(H, -1), FP32),
    "special.softmax": (lambda: torch.special.softmax(H, -1), FP32),
    "layer_norm": (lambda: F.layer_norm(H, (8,)), FP32),
    "group_norm": (lambda: F.group_norm(IMAGE, 2), FP32),
    "rms_norm": (lambda: F.rms_norm(H, (8,), V), FP32 if "rms_norm" in ON_THE_CARDS_LIST else BF16),
    "Tensor.norm": (lambda: H.norm(), FP32),
    "linalg.norm": (lambda: torch.linalg.norm(H), FP32),
    "linalg.vector_norm": (lambda: torch.linalg.vector_norm(H), FP32),
    "normalize": (lambda: F.normalize(H), FP32),
    "exp": (lambda: H.exp(), FP32),
    "exp in place": (lambda: H.detach().clone().exp_(), BF16),
    "log": (lambda: torch.log(H), FP32),
    "rsqrt": (lambda: H.rsqrt(), FP32),
    "division of a number": (lambda: 1 / H, FP32),
    "power": (lambda: H**2, FP32),
    "power of a number": (lambda: 2**H, FP32),
    "square": (lambda: H.square(), FP32),
    "softplus": (lambda: F.softplus(H), FP32),
    "cosine_similarity": (lambda: F.cosine_similarity(H, H), FP32),
    "cdist": (lambda: torch.cdist(H, H), FP32),
    "sum": (lambda: H.sum(), FP32),
    "sum of rows": (lambda: torch.sum(H, dim=1), FP32),
    "prod": (lambda: H.prod(), FP32),
    "cumsum": (lambda: H.cumsum(0), FP32),
    "logsumexp": (lambda: H.logsumexp(0), FP32),
    "mean": (lambda: H.mean(), BF16),
    "mse_loss": (lambda: F.mse_loss(H, H), FP32),
    "cross_entropy": (lambda: F.cross_entropy(H, LABELS), FP32),
    "cross_entropy, smoothed": (lambda: F.cross_entropy(H, LABELS, label_smoothing=0.1), FP32),
    "nll_loss": (lambda: F.nll_loss(H, LABELS), FP32),
    "interpolate": (lambda: F.interpolate(IMAGE, scale_factor=2), FP32),
    "addcmul": (lambda: torch.addcmul(H, H, W), FP32),
    "addcmul of one type": (lambda: torch.addcmul(H, H, H), BF16),
    "dot": (lambda: V.dot(V32), FP32),
    "scatter_add": (lambda: torch.zeros(8, dtype=FP32).scatter_add(0, LABELS, V), FP32),
    "grid_sample": (lambda: F.grid_sample(IMAGE, fake(2, 8, 8, 2), align_corners=False), BF16),
    "linear": (lambda: F.linear(W, W), BF16),
    "matmul": (lambda: W @ W, BF16),
    "mv": (lambda: W @ V32, BF16),
    "einsum": (lambda: torch.einsum("ij,j->i", W, V32), BF16),
    "lstm_cell": (lambda: nn.LSTMCell(8, 8, bias=False)(W)[0], BF16),
    "attention": (lambda: F.scaled_dot_product_attention(*(fake(1, 2, 8, 8, dtype=FP32) for _ in range(3))), BF16),
    "gelu": (lambda: F.gelu(H), BF16),
    "batch_norm": (lambda: F.batch_norm(IMAGE, None, None, training=True), BF16),
    "reflection padding": (lambda: F.pad(IMAGE, (1, 1, 1, 1), mode="reflect"), BF16),
    "avg_pool3d": (lambda: F.avg_pool3d(IMAGE, 2), BF16),
    "trace": (lambda: H.trace(), BF16),
    "float64 is left alone": (lambda: fake(8, dtype=FP64).exp(), FP64),
    "integers are left alone": (lambda: LABELS.sum(), torch.int64),
}


@pytest.mark.parametrize("case", RESULTS)
def test_autocast_by_the_cards_lists(case: str) -> None:
    run, expected = RESULTS[case]
    with on_card(), torch.autocast("cpu", BF16):
        assert run().dtype == expected
        with torch.autocast("cpu", enabled=False):
            assert F.softmax(H, -1).dtype == BF16
    with on_card():
        assert F.softmax(H, -1).dtype == BF16


def test_the_lists_are_those_of_the_installed_torch() -> None:
    cuda, cpu = cuda_autocast._on_list("AutocastCUDA"), cuda_autocast._on_list("AutocastCPU")
    listed = cuda_autocast.FLOAT32 | cuda_autocast.FLOAT32_RESULT | cuda_autocast.WIDEST | cuda_autocast.LOWER
    inner = {
        *("_scaled_dot_product_flash_attention", "cudnn_convolution", "cudnn_convolution_transpose"),
        *("_thnn_fused_gru_cell", "_thnn_fused_lstm_cell"),  # reached from functions only
        "_cudnn_rnn",  # as those, and there only in a torch that was built with CUDA
    }
    assert listed <= cuda | {"rms_norm"}  # came after torch 2.11
    assert cuda - cpu - inner <= listed


def test_a_weight_is_cast_once_and_kept() -> None:
    with on_card() as operators, torch.autocast("cpu", BF16):
        for _ in range(2):
            F.layer_norm(F.linear(H, W), (8,))
    assert operators.names.count("_to_copy") == 1 + 2


def test_what_is_widened_is_kept_so() -> None:
    with on_card(), torch.autocast("cpu", BF16):
        assert {t.dtype for t in kept(lambda: F.layer_norm(H, (8,)))} == {FP32}
        logits = fake(8, 100)
        saved = kept(lambda: F.cross_entropy(logits, LABELS))
    assert [t.dtype for t in saved if t.numel() == 800] == [BF16, FP32]  # log_softmax as it comes, nll_loss widened
