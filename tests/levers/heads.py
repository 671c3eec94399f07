"""Models and logits for the tests of the chunked loss head, and how close to float64 a step is."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import tiny
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from memplan.abstract import preserved
from memplan.device import CpuDevice
from memplan.fitting import training_step
from memplan.levers.loss_head import find_head, install
from memplan.recipe import Recipe
from memplan.samples import Sample

Results = dict[str, Tensor]

_SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def gemma2() -> tiny.Made:
    """A soft cap on the logits, low enough to matter; tied weights."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager")
    return transformers.Gemma2ForCausalLM(config).train(), tiny.tokens(2, 16)


def cohere() -> tiny.Made:
    """Logits are multiplied by a number."""
    torch.manual_seed(0)
    return transformers.CohereForCausalLM(transformers.CohereConfig(**_SIZES, logit_scale=0.3)).train(), tiny.tokens(
        2, 16
    )


def granite() -> tiny.Made:
    """Logits are divided by a number."""
    torch.manual_seed(0)
    config = transformers.GraniteConfig(**_SIZES, logits_scaling=3.0)
    return transformers.GraniteForCausalLM(config).train(), tiny.tokens(2, 16)


class Own(nn.Module):
    """No transformers: a classifier over many classes, with label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.2), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(16, tiny.VOCABULARY)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": self.loss(logits, labels), "logits": logits}


def own() -> tiny.Made:
    torch.manual_seed(0)
    return Own().train(), {"x": torch.randn(32, 16), "labels": torch.randint(tiny.VOCABULARY, (32,))}


MODELS: dict[str, Callable[[], tiny.Made]] = {
    "llama": partial(tiny.llama, layers=1),
    "gpt2": partial(tiny.gpt2, layers=1),
    "bert": partial(tiny.bert, layers=1),
    "t5": partial(tiny.t5, layers=1),
    "lora": partial(tiny.lora, layers=1),
    "gemma2": gemma2,
    "cohere": cohere,
    "granite": granite,
    "own": own,
}


def head_of(model: nn.Module) -> nn.Module:
    path = find_head(model)
    assert path is not None
    return model.get_submodule(path)


@contextmanager
def installed(head: nn.Module, option: str) -> Iterator[None]:
    undo = install(head, option)
    try:
        yield
    finally:
        undo()


def run(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    autocast: torch.dtype | None = None,
    micro_steps: int = 1,
    more: Mapping[str, object] | None = None,
    double: bool = False,
) -> Results:
    """One step without an optimizer: the losses, the gradients, and the random state it leaves behind."""
    if double:
        doubled = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
        with mock.patch.object(Tensor, "float", Tensor.double):  # which losses use to widen their logits
            return run(model.double(), doubled, micro_steps=micro_steps, more=more)
    torch.manual_seed(7)
    found: Results = {}
    for number in range(micro_steps):
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            loss = model(**batch, **(more or {}))["loss"]
        (loss / micro_steps).backward()
        found[f"loss {number}"] = loss.detach()
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"random state": torch.get_rng_state()}


def worse(found: Results, plain: Results, exact: Results) -> list[str]:
    """Names of the results that are more than twice as far from the exact ones as the plain ones are.

    Where the plain one happens to be exact, a unit in the last place of the whole is granted in its stead.
    """
    assert found.keys() == plain.keys()
    assert torch.equal(found.pop("random state"), plain["random state"])
    names = []
    for name, value in found.items():
        assert value.dtype == plain[name].dtype, name
        off, plain_off = (float((t.double() - exact[name].double()).norm()) for t in (value, plain[name]))
        unit = torch.finfo(value.dtype).eps * float(exact[name].norm())
        if not off <= 2 * max(plain_off, unit):
            names.append(f"{name}: {off:.2g} instead of {plain_off:.2g}")
    return names


def loose(bias: bool = False, shape: tuple[int, ...] = (21,)) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head of 40 classes, hidden states [*shape, 8] and class numbers [rows]."""
    torch.manual_seed(0)
    hidden = torch.randn(*shape, 8, requires_grad=True)
    return nn.Linear(8, 40, bias=bias), hidden, torch.randint(40, shape)


def gradients(head: nn.Module, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """A loss of the logits, and its gradients by the hidden states and the head's parameters."""
    value = loss(head(hidden))
    return value.detach(), *torch.autograd.grad(value, (hidden, *head.parameters()))


def _entropy(target: Tensor, logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits.view(-1, logits.size(-1)), target.reshape(-1))


_MASK = torch.arange(21).reshape(3, 7) % 4 != 1
_BY_CLASS = torch.linspace(0.5, 1.5, 40)

WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view": _entropy,
    "reshape": lambda y, z: functional.cross_entropy(z.reshape((21, -1)), y.flatten()),
    "flatten": lambda y, z: functional.cross_entropy(z.flatten(0, 1), y.flatten()),
    "flatten by name": lambda y, z: functional.cross_entropy(torch.flatten(z, end_dim=-2), y.flatten()),
    "by name": lambda y, z: functional.cross_entropy(input=z.flatten(0, 1), target=y.flatten()),
    "shift": lambda y, z: _entropy(y[:, 1:], z[..., :-1, :].contiguous()),
    "slice": lambda y, z: _entropy(y[:, 1:], z[:, :-1].contiguous()),
    "one of the batch": lambda y, z: functional.cross_entropy(z[1], y[1]),
    "mask": lambda y, z: functional.cross_entropy(z[_MASK], y[_MASK]),
    "rows": lambda y, z: functional.cross_entropy(z[torch.tensor([0, 2]), 3], y[[0, 2], 3]),
    "new dimension": lambda y, z: _entropy(y, z[:, None]),
    "casts": lambda y, z: _entropy(y, z.double().float()),
    "to": lambda y, z: _entropy(y, z.to(torch.float64).to("cpu").to(device="cpu", dtype=torch.float32)),
    "soft cap": lambda y, z: _entropy(y, torch.tanh(z / 0.7) * 0.7),
    "scale": lambda y, z: _entropy(y, 2 * z.mul(0.3).div(0.5)),
    "scale by name": lambda y, z: _entropy(y, torch.mul(input=torch.div(input=z, other=0.5), other=0.3)),
    "sum by name": lambda y, z: _entropy(y, torch.add(input=z.tanh(), other=_BY_CLASS)),
    "flatten all by name": lambda y, z: functional.cross_entropy(torch.flatten(input=z, end_dim=1), y.flatten()),
    "constant per class": lambda y, z: _entropy(y, (z + _BY_CLASS[None]) * _BY_CLASS),
    "constant tensor": lambda y, z: _entropy(y, z * torch.tensor(0.3, dtype=torch.float64)),
}


class _Squared(torch.autograd.Function):
    """What goes past `__torch_function__`."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x.square().sum()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * grad


def _written(target: Tensor, logits: Tensor) -> Tensor:
    flat = logits.view(-1, 40)
    flat[3] = 0.0
    return _entropy(target, logits)


def _regularized(target: Tensor, logits: Tensor) -> Tensor:
    return _entropy(target, logits) + torch.logsumexp(logits, -1).square().mean()


def _weights(target: Tensor, logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits.view(-1, 40), target.flatten(), weight=_BY_CLASS)


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "class weights": _weights,
    "each row": lambda y, z: functional.cross_entropy(z.view(-1, 40), y.flatten(), reduction="none").square().sum(),
    "probabilities": lambda y, z: functional.cross_entropy(z.view(-1, 40), _BY_CLASS.softmax(0).expand(21, 40)),
    "classes second": lambda y, z: functional.cross_entropy(z.transpose(1, 2), y),
    "log_softmax": lambda y, z: functional.nll_loss(z.view(-1, 40).log_softmax(-1), y.flatten()),
    "added": _regularized,
    "part of the classes": lambda y, z: functional.cross_entropy(z[..., :39].reshape(-1, 39), y.flatten() % 39),
    "other view": lambda y, z: z.view(-1, 20).square().sum() + z.flatten().sum(),
    "by a learning tensor": lambda y, z: _entropy(y, z * z.new_ones((), requires_grad=True)),
    "detached": lambda y, z: _entropy(y, z) * z.detach().square().mean(),
    "without autograd": lambda y, z: _entropy(y, z) * _unrecorded(z),
    "written": _written,
    "by name": lambda y, z: torch.where(input=z, condition=z > 0, other=torch.mul(input=z, other=_BY_CLASS)).sum(),
    "scaled in place": lambda y, z: _entropy(y, z.mul_(0.5)),
    "own function": lambda y, z: _Squared.apply(z),
    "own function of a part": lambda y, z: _Squared.apply(torch.tanh(z[:, 1:] * 0.5)),
    "concatenated": lambda y, z: _entropy(torch.cat([y, y]), torch.cat([z, z])),
}


def _unrecorded(logits: Tensor) -> Tensor:
    with torch.no_grad():
        return (logits * 2).mean()


def real_peak(model: nn.Module, sample: Sample, recipe: Recipe) -> int:
    """Bytes of one step by the CPU allocator's own record; of tensors that are not the step's, none."""
    device = CpuDevice()
    with preserved(model):
        model.train()
        tensors = (*model.parameters(), *model.buffers())
        own = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        gc.collect()
        others = device.peak_of(lambda: None) - sum(own.values())
        micro = sample.map(torch.clone)
        with training_step(model, micro, recipe, device) as step:
            return device.peak_of(step) - others
