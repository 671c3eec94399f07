"""The cases of `cuda_accuracy.py`: which models, how they run, and what one process measures of one of them.

The six workloads of `workloads.py`, at the size at which they are trained on a card, and QLoRA. Each is run as it
stands, with transformers' checkpointing, or by a plan; in float32, in bfloat16, or under autocast.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from cuda_card import Card
from cuda_models import Task, build
from cuda_models import tiny as tiny_task
from cuda_step import Answer, checkpointed, failed, is_out_of_memory, sizes_of, step_of, taken
from torch import nn
from workloads import Batch, Big, token_batch

import memplan
from memplan.plan_record import Plan, Verdict
from memplan.strategy import load_strategy

Precision = Literal["fp32", "bf16", "autocast"]
Mode = Literal["plain", "checkpointed", "planned"]

TRANSIENT_SHARE = 0.6  # of what is above weights and optimizer state, the budget of a plan
STEPS = 3  # of a cap test: the optimizer's state comes with the first
HISTORY_STEPS = 2  # the one that makes the optimizer's state, and one that is like all that follow
SMALLEST_TRIES = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `history`: its allocator is recorded if that is asked for."""

    model: str
    precision: Precision
    mode: Mode
    accumulation: int = 1
    history: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}/{self.precision}/{self.mode}/{self.accumulation}"

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "autocast" else None


# The most varied first; the small ones, whose histories are kept, last.
CASES = {
    case.name: case
    for case in (
        Case("W1", "autocast", "plain"),
        Case("W6", "autocast", "plain"),
        Case("W6 nf4", "autocast", "plain"),
        Case("W2", "autocast", "plain"),
        Case("W5", "fp32", "plain"),
        Case("W4", "autocast", "plain"),
        Case("W3", "autocast", "checkpointed", 2),
        Case("W1", "autocast", "planned", 2),
        Case("W6", "autocast", "planned"),
        Case("W6 nf4", "autocast", "planned"),
        Case("W6 int8", "autocast", "plain"),
        Case("W1", "fp32", "plain"),
        Case("W1", "bf16", "checkpointed"),
        Case("W2", "fp32", "planned", 2),
        Case("W3", "autocast", "plain"),
        Case("W4", "fp32", "planned"),
        Case("W1 2 layers", "autocast", "plain", history=True),
        Case("W2 2 layers", "fp32", "plain", history=True),
        Case("W6 2 layers", "autocast", "checkpointed", 2, history=True),
    )
}

Made = tuple[nn.Module, Batch]


@dataclass(frozen=True, slots=True)
class Model:
    about: str
    make: Callable[[torch.device, bool], Made]  # (where, in its tiny form)


def _llama(about: str, layers: int) -> Model:
    def make(device: torch.device, tiny: bool) -> Made:
        if tiny:
            sizes = Big("Llama", 32, 64, layers=2, heads=4, kv_heads=2, vocab=96)
        else:
            sizes = Big("Llama", 2048, 5632, layers=layers, heads=32, kv_heads=8, vocab=32_000)
        config = sizes.config()
        rows, length = (2, 16) if tiny else (4, 1024)
        return _direct(transformers.LlamaForCausalLM, config, token_batch(rows, length, sizes.vocab), device)

    return Model(about, make)


def _gpt2(about: str, layers: int) -> Model:
    def make(device: torch.device, tiny: bool) -> Made:
        large: dict[str, Any] = {"n_embd": 1024, "n_head": 16, "n_layer": layers}
        small: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96}
        config = transformers.GPT2Config(**(small if tiny else large), bos_token_id=0, eos_token_id=0)
        config.use_cache = False
        rows, length = (2, 16) if tiny else (8, 512)
        return _direct(transformers.GPT2LMHeadModel, config, token_batch(rows, length, config.vocab_size), device)

    return Model(about, make)


# BERT-large and ViT-L have the same encoder.
_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _bert(device: torch.device, tiny: bool) -> Made:
    config = transformers.BertConfig(**(_SMALL | {"vocab_size": 96} if tiny else _LARGE))
    rows, length = (2, 16) if tiny else (16, 512)
    return _direct(transformers.BertForMaskedLM, config, token_batch(rows, length, config.vocab_size), device)


def _vit(device: torch.device, tiny: bool) -> Made:
    config = transformers.ViTConfig(**(_SMALL | {"image_size": 32, "patch_size": 8} if tiny else _LARGE))
    config.num_labels = 10 if tiny else 1000
    batch = _images(2 if tiny else 64, config.image_size, config.num_labels)
    return _direct(transformers.ViTForImageClassification, config, batch, device)


def _resnet(device: torch.device, tiny: bool) -> Made:
    large: dict[str, Any] = {"depths": [3, 8, 36, 3]}
    small: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}
    config = transformers.ResNetConfig(**(small if tiny else large))
    config.num_labels = 10 if tiny else 1000
    batch = _images(2 if tiny else 64, 32 if tiny else 224, config.num_labels)
    return _direct(transformers.ResNetForImageClassification, config, batch, device)


def _images(rows: int, side: int, classes: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, side, side), "labels": torch.randint(classes, (rows,))}


def _direct(make: Any, config: Any, batch: Batch, device: torch.device) -> Made:
    """Made where it is trained, by transformers' own initialisation, in float32."""
    with device:
        model: nn.Module = make(config)
    return model.to(device).train(), {name: tensor.to(device) for name, tensor in batch.items()}


def _adapted(about: str, base: Literal["int8", "nf4", "bf16"], layers: int, prepared: bool = False) -> Model:
    sizes = Big("Llama", 3072, 8192, layers=layers, heads=24, kv_heads=8, vocab=128_256)

    def make(device: torch.device, tiny: bool) -> Made:
        task = Task("W6", about, sizes, base, prepared=prepared)
        return build(tiny_task(task) if tiny else task, device)

    return Model(about, make)


MODELS = {
    "W1": _llama("Llama, 22 layers, 1.0 B parameters, 4 x 1024 tokens", 22),
    "W2": _gpt2("GPT-2 medium, dropout 0.1, 8 x 512 tokens", 24),
    "W3": Model("BERT-large masked LM, 16 x 512 tokens", _bert),
    "W4": Model("ViT-L/16, 64 images", _vit),
    "W5": Model("ResNet-152, 64 images", _resnet),
    "W6": _adapted("LoRA r=16 on all linear layers of a 3 B Llama in bfloat16, 4 x 1024 tokens", "bf16", 28),
    "W6 nf4": _adapted("the same on a 4-bit base, prepared by PEFT (QLoRA)", "nf4", 28, prepared=True),
    "W6 int8": _adapted("the same on an 8-bit base", "int8", 28),
    "W1 2 layers": _llama("W1 with 2 layers", 2),
    "W2 2 layers": _gpt2("W2 with 2 layers", 2),
    "W6 2 layers": _adapted("W6 with 2 layers", "bf16", 2),
}


def _made(case: Case, card: Card, tiny: bool) -> tuple[nn.Module, Batch, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, batch = MODELS[case.model].make(card.device.torch_device, tiny)
    if case.precision == "bf16":
        model.to(torch.bfloat16)
    gc.collect()
    return model, batch, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def _asked(case: Case, card: Card) -> dict[str, Any]:
    return {"autocast": case.autocast, "optimizer": "adamw", "gpu": card.gpu}


def case(card: Card, name: str, tiny: bool, plan_file: str, history: bool) -> Iterator[Answer]:
    """Measured peaks of a case, then its predicted sizes. A plan goes to `plan_file`, for the cap tests.

    With `history`, first what the allocator does from the first allocation through two steps: before the cache is given
    back for the measurement, which a history does not tell from memory pressure.
    """
    what = CASES[name]
    if history:
        card.start_history()  # before the first allocation
    model, batch, optimizer = _made(what, card, tiny)
    _moded(what, card, model, batch, plan_file, make=True)
    step = step_of(model, batch, optimizer, what.autocast, what.accumulation)
    if history:
        card.device.seconds_of(step, HISTORY_STEPS)
        yield {"history": card.history()}
    card.set_cap(None)
    yield taken(card, step, laps=1)
    sizes = sizes_of(memplan.predict(model, batch, accumulation=what.accumulation, **_asked(what, card)))
    yield {"predicted": sizes, "smallest_cap": card.smallest_cap(sizes)}


def _moded(what: Case, card: Card, model: nn.Module, batch: Batch, plan_file: str, make: bool) -> None:
    if what.mode == "checkpointed":
        checkpointed(model)
    elif what.mode == "planned":
        if make:
            Path(plan_file).parent.mkdir(parents=True, exist_ok=True)
            _planned(what, card, model, batch).save(plan_file)
        memplan.apply(model, Plan.load(plan_file))


def _planned(what: Case, card: Card, model: nn.Module, batch: Batch) -> Plan:
    """For a share of what the plain step takes beyond weights and optimizer state; or the smallest that is possible."""
    asked = _asked(what, card)
    plain = memplan.predict(model, batch, accumulation=what.accumulation, **asked)
    static = sum(plain.breakdown.get(kind, 0) for kind in ("params", "buffers", "optimizer"))
    budget = static + int((plain.peak_bytes - static) * TRANSIENT_SHARE)
    rows = next(iter(batch.values())).shape[0]
    asked |= {"sample": batch, "micro_batch": rows, "effective_batch": rows * what.accumulation}
    for _ in range(SMALLEST_TRIES):
        gpu, strategy = card.asked(budget, replace(load_strategy("balanced"), name="accuracy"))
        plan = memplan.plan(model, **(asked | {"gpu": gpu, "strategy": strategy}))
        if plan.verdict is not Verdict.DOES_NOT_FIT:
            return plan
        budget = max(plan.smallest_bytes, budget + 1)
    raise SystemExit(f"{what.name}: no plan within {budget:,} bytes")


def capped(card: Card, name: str, tiny: bool, plan_file: str, cap: int) -> Iterator[Answer]:
    """Whether a case runs from its first allocation under a cap: retries by stage, and what it ended with."""
    what, stage = CASES[name], "building"
    answer: Answer = {"cap": cap, "retries": {}, "oom": False}
    card.set_cap(cap)
    seen = card.retries()
    try:
        model, batch, optimizer = _made(what, card, tiny)
        _moded(what, card, model, batch, plan_file, make=False)
        step = step_of(model, batch, optimizer, what.autocast, what.accumulation)
        answer["retries"][stage] = card.retries() - seen
        for turn in range(1, STEPS + 1):
            stage, seen = f"step {turn}", card.retries()
            card.device.seconds_of(step, 1)
            answer["retries"][stage] = card.retries() - seen
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer |= {"oom": True, "ended": stage, "said": failed(error)["error"]}  # it is what was asked, not a fault
    yield answer
