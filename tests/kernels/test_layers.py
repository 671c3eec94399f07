"""Predicted against measured steps of torch's own layers and losses, on the CPU: none needs more than was said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from real import peak_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as everybody calls it

import memplan
from memplan.errors import CannotTrace
from memplan.losses import Loss
from memplan.recipe import Recipe
from memplan.samples import Sample

WRAPPED_NUMBERS = 256

IMAGE, ROWS, VECTORS = (4, 16, 16, 16), (4, 24, 32), (32, 32)


def squares(model: nn.Module, batch: Any) -> Tensor:
    out = model(*batch) if isinstance(batch, tuple) else model(batch)
    return (out[0] if isinstance(out, tuple) else out).square().mean()


def short_by(model: nn.Module, batch: Any, loss: Loss) -> int:
    """Bytes that were measured and not predicted."""
    predicted = memplan.predict(model, batch, loss=loss, optimizer="sgd").peak_bytes
    return peak_of(model, Sample.of(batch), Recipe(loss, "sgd")) - predicted


IMAGE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "Hardswish": nn.Hardswish,
    "Sigmoid": nn.Sigmoid,
    "LogSigmoid": nn.LogSigmoid,
    "Tanh": nn.Tanh,
    "Softplus": nn.Softplus,
    "PReLU": nn.PReLU,
    "RReLU": nn.RReLU,
    "Dropout": nn.Dropout,
    "AlphaDropout": nn.AlphaDropout,
    "Dropout2d": nn.Dropout2d,
    "GLU": lambda: nn.GLU(1),
    "Softmax": lambda: nn.Softmax(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(4),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(16),
    "GroupNorm": lambda: nn.GroupNorm(4, 16),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(16, affine=True),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d(1),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "Unfold": lambda: nn.Unfold(3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(16, 8, 3, 2, 1),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, groups=16),
}


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_layers_of_images(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), IMAGE_LAYERS[name]())
    assert abs(short_by(model, torch.randn(IMAGE), squares)) <= WRAPPED_NUMBERS


ROW_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)),
    "RMSNorm": lambda: nn.Sequential(nn.Linear(32, 32), nn.RMSNorm(32)),
    "Conv1d": lambda: nn.Conv1d(24, 16, 3),
    "LSTM": lambda: nn.LSTM(32, 48, batch_first=True),
    "LSTM of two directions and layers": lambda: nn.LSTM(32, 48, 2, dropout=0.1, bidirectional=True),
    "LSTM without bias": lambda: nn.LSTM(32, 40, bias=False),
    "LSTM, projected": lambda: nn.LSTM(32, 48, proj_size=16),
    "GRU": lambda: nn.GRU(32, 48, batch_first=True),
    "RNN": lambda: nn.RNN(32, 48),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
}


@pytest.mark.parametrize("name", ROW_LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_layers_of_rows(name: str) -> None:
    torch.manual_seed(0)
    assert abs(short_by(ROW_LAYERS[name](), torch.randn(ROWS), squares)) <= WRAPPED_NUMBERS


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str) -> None:
    assert abs(short_by(nn.EmbeddingBag(100, 64, mode=mode), torch.randint(100, (16, 8)), squares)) <= WRAPPED_NUMBERS


def test_lstm_under_autocast() -> None:
    model, batch = nn.LSTM(32, 48, batch_first=True), torch.randn(ROWS)
    predicted = memplan.predict(model, batch, loss=squares, optimizer="sgd", autocast=torch.bfloat16).peak_bytes
    assert abs(peak_of(model, Sample.of(batch), Recipe(squares, "sgd", torch.bfloat16)) - predicted) <= WRAPPED_NUMBERS


IMAGE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "mse, sum": lambda out, x: F.mse_loss(out, x, reduction="sum"),
    "l1": F.l1_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "binary cross entropy": lambda out, x: F.binary_cross_entropy(out.sigmoid(), x.sigmoid()),
    "binary cross entropy with logits": lambda out, x: F.binary_cross_entropy_with_logits(out, x.sigmoid()),
    "kl": lambda out, x: F.kl_div(out.log_softmax(1), x.softmax(1), reduction="batchmean"),
    "nll": lambda out, x: F.nll_loss(out.log_softmax(1), x.argmax(1)),
    "cross entropy": lambda out, x: F.cross_entropy(out, x.softmax(1)),
    "soft margin": lambda out, x: F.soft_margin_loss(out, x.sign()),
    "poisson": lambda out, x: F.poisson_nll_loss(out, x.abs()),
}


@pytest.mark.parametrize("name", IMAGE_LOSSES)
def test_losses_of_images(name: str) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return IMAGE_LOSSES[name](model(batch), batch)

    assert abs(short_by(nn.Conv2d(16, 16, 3, padding=1), torch.randn(IMAGE), loss)) <= WRAPPED_NUMBERS


VECTOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda out, x: F.cosine_embedding_loss(out, x, torch.ones(len(x))),
    "triplet": lambda out, x: F.triplet_margin_loss(out, x, x.flip(0)),
    "margin": lambda out, x: F.multi_margin_loss(out, torch.zeros(len(x), dtype=torch.long)),
    "distance": lambda out, x: torch.cdist(out, x).mean(),
}


@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_losses_of_vectors(name: str) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return VECTOR_LOSSES[name](model(batch), batch)

    assert abs(short_by(nn.Linear(32, 32), torch.randn(VECTORS), loss)) <= WRAPPED_NUMBERS


@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [
        (lambda: nn.Bilinear(32, 32, 16), (torch.randn(ROWS), torch.randn(ROWS)), squares),
        (lambda: nn.Linear(32, 32), torch.randn(VECTORS), lambda model, x: model(x).prod(-1).sum()),
        (lambda: nn.Linear(32, 32), torch.randn(VECTORS), lambda model, x: model(x).cumprod(-1).sum()),
    ],
    ids=["bilinear", "prod", "cumprod"],
)
def test_what_is_overstated_is_never_understated(model: Callable[[], nn.Module], batch: Any, loss: Loss) -> None:
    """`prod` takes a shorter way where no factor is zero."""
    assert short_by(model(), batch, loss) <= WRAPPED_NUMBERS


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(100, 16, sparse=True)
    with pytest.raises(CannotTrace, match=r"layout sparse_coo.*sparse=False"):
        memplan.predict(model, torch.randint(100, (4, 8)), loss=squares, optimizer="sgd")
