"""The training script that the equivalence tests run with and without memplan: what people write with Accelerate."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BatchEncoding

import memplan
from memplan import Strategy

KEEP_ALL = Strategy(name="keep-all", summary="", when_to_use="", levers=())
EPOCHS = 2
BATCH = 8
LONGEST = 16  # tokens in a row


class Texts(Dataset[dict[str, list[int]]]):
    """Rows of unequal length, from 3 to `LONGEST` tokens."""

    def __init__(self, rows: int) -> None:
        draw = torch.Generator().manual_seed(1)
        lengths = torch.randint(3, LONGEST + 1, (rows,), generator=draw).tolist()
        self.rows = [torch.randint(1, tiny.VOCABULARY, (n,), generator=draw).tolist() for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[at]}


def padded(rows: list[dict[str, list[int]]]) -> BatchEncoding:
    """Right-padded to the longest, padding left out of the labels. What transformers' collators return, no dict."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's singletons as in a new process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        yield
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@dataclass
class Ran:
    """What a run leaves."""

    weights: list[Tensor]
    rates: list[float] = field(default_factory=list)  # the learning rate of each optimizer step
    losses: list[float] = field(default_factory=list)  # of each optimizer step
    accelerator: Any = None

    def differs_by(self, other: "Ran") -> float:
        """max |dW|"""
        return max(float((a - b).abs().max()) for a, b in zip(self.weights, other.weights, strict=True))


@cache
def plan_file(
    model: str, micro_batch: int, effective_batch: int, strategy: str | Strategy = KEEP_ALL, replicas: int = 1
) -> str:
    """A plan made without weights, so that no block is timed: the tests of the loop need one, not the planner."""
    bare = make_model(model).to("meta")
    if isinstance(bare, transformers.PreTrainedModel):
        bare.tie_weights()  # which `to` has parted
    sample = tiny.vit()[1] if model == "vit" else padded([{"input_ids": [1] * LONGEST}] * 4)
    sizes = {"micro_batch": micro_batch, "effective_batch": effective_batch}
    path = Path(tempfile.mkdtemp()) / "plan.json"
    world = memplan.World(replicas)
    memplan.plan(bare, "cpu:1GiB", sample=sample, strategy=strategy, world=world, **sizes).save(path)
    return str(path)


def make_model(name: str) -> nn.Module:
    """Those whose batches are split are without dropout."""
    makers = {"llama": tiny.llama, "gpt2": tiny.gpt2, "lora": tiny.lora, "bert": tiny.bert, "vit": tiny.vit}
    model: nn.Module = makers[name]()[0]
    if name in ("bert", "vit"):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
    return model


def norm_of_one(accelerator: Accelerator, parameters: Any) -> None:
    accelerator.clip_grad_norm_(parameters, 1.0)


def train(
    attach: Callable[[Accelerator], object] | None,
    *,
    rows: int = 40,
    model: str = "llama",
    own_accumulation: int = 1,
    accumulate: bool = False,
    zero_first: bool = False,
    clip: Callable[[Accelerator, Any], object] = norm_of_one,
    kind: Callable[..., Accelerator] = Accelerator,
    loader: dict[str, Any] | None = None,
    accelerator: dict[str, Any] | None = None,
    dataset: Any = None,
    steps_to_skip: int = 0,
    rate: float = 1e-3,
    apart: bool = False,
) -> Ran:
    """Two epochs of AdamW under a cosine schedule. `attach` is the one line that differs.

    Optimizer and schedule are prepared with the model and its loader, or `apart`.
    """
    with fresh_accelerate():
        set_seed(0)
        own = kind(cpu=True, gradient_accumulation_steps=own_accumulation, **(accelerator or {}))
        if attach is not None:
            attach(own)
        net = make_model(model)
        data = Texts(rows) if dataset is None else dataset
        shuffled = {} if isinstance(data, torch.utils.data.IterableDataset) else {"shuffle": True}
        options = {"batch_size": BATCH, "collate_fn": padded, **shuffled, **(loader or {})}
        texts = DataLoader(data, generator=torch.Generator().manual_seed(2), **options)
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
        steps = EPOCHS * -(-rows // (BATCH * own_accumulation))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if apart:
            (net, texts), (optimizer, schedule) = own.prepare(net, texts), own.prepare(optimizer, schedule)
        else:
            net, optimizer, texts, schedule = own.prepare(net, optimizer, texts, schedule)
        set_seed(3)
        ran = Ran([], accelerator=own)
        for _ in range(EPOCHS):
            step_loss = 0.0
            for batch in texts:
                with own.accumulate(net) if accumulate else nullcontext():
                    if zero_first:
                        optimizer.zero_grad()
                    loss = net(**batch).loss
                    own.backward(loss)
                    step_loss += float(loss.detach()) / own_accumulation
                    clip(own, net.parameters())
                    rate = schedule.get_last_lr()[0]
                    optimizer.step()
                    schedule.step()
                    if not zero_first:
                        optimizer.zero_grad()
                    if own.sync_gradients:
                        ran.rates.append(rate)
                        ran.losses.append(float(own.memplan.loss) if hasattr(own, "memplan") else step_loss)
                        step_loss = 0.0
        ran.weights = [p.detach().clone() for p in net.parameters()]
        return ran
