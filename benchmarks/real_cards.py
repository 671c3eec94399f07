"""Predicted against what others measured on real cards: `python benchmarks/real_cards.py --write`. Needs no card.

The figures are NVML peaks of training runs on an RTX 3060 and an RTX 4060, published by the authors of xMem
(data/real_cards.json names the source). Each run is predicted from the public config alone. `--runs FILE` takes other
runs of the same form, `--models TEXT` limits what is done to models whose name contains the text.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import transformers_451
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from memplan.device import resolve_gpu
from memplan.recorder import AFTER_FORWARD, AFTER_STEP, Recipe
from memplan.samples import Sample
from memplan.session import Session

ROOT: Final = Path(__file__).resolve().parents[1]
RUNS: Final = Path(__file__).resolve().parent / "data" / "real_cards.json"
RESIDUALS: Final = ROOT / "src" / "memplan" / "residuals.toml"
MIB: Final = 2**20

TOKENS: Final = 128  # lines of wikitext are cut there, and shorter ones padded to the longest of the batch

# What NVML counts beside the allocator's segments and the context of the first sample: handles and kernels that CUDA
# loads when they are first used, 14 to 18 MiB on such cards. A need is rounded up.
LOADED_BYTES: Final = 18 * MIB

# torch 2.6 gives each cuBLASLt product a workspace of its own of 1 MiB (_parseChosenWorkspaceSize, cuda/CUDABlas.cpp):
# one segment of the allocator's small pool. Later versions, which memplan follows, share cuBLAS's.
CUBLASLT_BYTES: Final = 2 * MIB

FAMILIES: Final[dict[str, tuple[type[Any], Callable[..., PretrainedConfig]]]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config),
    "opt": (OPTForCausalLM, OPTConfig),
    "gpt_neo": (GPTNeoForCausalLM, GPTNeoConfig),
    "t5": (T5ForConditionalGeneration, T5Config),
}

_CEREBRAS = {"n_positions": 2048, "activation_function": "gelu", "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
_NEO = {"vocab_size": 50257, "max_position_embeddings": 2048, "window_size": 256, "attention_dropout": 0}

# The fields of the public configs that are not transformers' defaults, by the last part of the model's name.
MODELS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gpt2": ("gpt2", {}),
    "distilgpt2": ("gpt2", {"n_layer": 6}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "cerebras-gpt-111m": ("gpt2", {**_CEREBRAS, "n_embd": 768, "n_layer": 10, "n_head": 12, "n_inner": 3072}),
    "cerebras-gpt-256m": ("gpt2", {**_CEREBRAS, "n_embd": 1088, "n_layer": 14, "n_head": 17, "n_inner": 4352}),
    "opt-125m": ("opt", {"hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12}),
    "opt-350m": (
        "opt",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "ffn_dim": 4096,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
    ),
    "gpt-neo-125m": (
        "gpt_neo",
        {**_NEO, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]},
    ),
    "t5-small": ("t5", {"decoder_start_token_id": 0}),
    "t5-base": (
        "t5",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was measured. Sizes in bytes."""

    model: str
    optimizer: str  # a class of torch.optim
    batch: int
    gpu: str
    zero_grad: int  # 0: before the forward; 1: between forward and backward; 2: after the step
    measured_bytes: int
    xmem_bytes: int
    gpu_total_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """A run beside its prediction."""

    run: Run
    predicted_bytes: int
    allocated_bytes: int
    seconds: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.run.measured_bytes - 1

    @property
    def xmem_error(self) -> float:
        return self.run.xmem_bytes / self.run.measured_bytes - 1


def build(name: str) -> nn.Module:
    """The model of that name as transformers 4.51 makes it, on meta. SystemExit for one whose config is not here."""
    key = name.rpartition("/")[2].lower()
    if key not in MODELS:
        raise SystemExit(f"no config of {name} is known here; of {', '.join(MODELS)} there is")
    family, fields = MODELS[key]
    kind, config = FAMILIES[family]
    return transformers_451.build(config(**fields), kind)


def sample_of(batch: int) -> dict[str, Tensor]:
    """Ids, mask and labels, each [batch, 128]. All rows but one are padded: lines are not of one length."""
    ids = torch.ones(batch, TOKENS, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1:, TOKENS // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def predict(run: Run) -> Row:
    """The run as a loop writes it: `outputs = model(**batch)` stays until the next forward has returned."""
    begin = time.perf_counter()
    model = build(run.model)
    optimizer = getattr(torch.optim, run.optimizer)(model.parameters(), lr=1e-3)
    drops = AFTER_FORWARD if run.zero_grad == 1 else AFTER_STEP
    recipe = Recipe(optimizer=optimizer, drops=drops, keeps_output=True)
    card, _ = resolve_gpu(run.gpu)
    with transformers_451.caches_as_in_451():
        found = Session(model, Sample.of(sample_of(run.batch)), recipe, card, None).predict()
    assert found.reserved_bytes is not None
    used = found.reserved_bytes + CUBLASLT_BYTES + LOADED_BYTES
    return Row(run, used, found.peak_bytes, time.perf_counter() - begin)


def summary(rows: list[Row]) -> str:
    errors = [row.error for row in rows]
    worst = max(rows, key=lambda row: abs(row.error))
    return (
        f"{len(rows)} runs: median error {median(map(abs, errors)):.2%}, worst {worst.error:+.2%} "
        f"({worst.run.model}, {worst.run.optimizer}, batch {worst.run.batch}), lowest {min(errors):+.2%}; "
        f"xMem: median {median(abs(row.xmem_error) for row in rows):.2%}, "
        f"worst {max((row.xmem_error for row in rows), key=abs):+.2%}, "
        f"lowest {min(row.xmem_error for row in rows):+.2%}"
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| model | optimizer | batch | zero_grad | card | measured, MiB | predicted | error | xMem's error | seconds |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        run = row.run
        lines.append(
            f"| {run.model} | {run.optimizer} | {run.batch} | {run.zero_grad} | {run.gpu.rpartition(' ')[2]} "
            f"| {run.measured_bytes / MIB:,.0f} | {row.predicted_bytes / MIB:,.0f} | {row.error:+.2%} "
            f"| {row.xmem_error:+.2%} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


def residuals(rows: list[Row]) -> str:
    """What `memplan.risk` reads."""
    values = "".join(f"    {row.run.measured_bytes / row.predicted_bytes - 1:.4f},\n" for row in rows)
    return (
        "# Measured / predicted - 1 of device memory, of each run in docs/real_cards.md, in its order. Made by\n"
        f"# `python benchmarks/real_cards.py --write`.\nresiduals = [\n{values}]\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS, help="a file of runs, as benchmarks/data/real_cards.json")
    parser.add_argument("--models", default="", help="only models whose name contains this text")
    parser.add_argument("--write", action="store_true", help="write docs/real_cards.md and memplan's residuals.toml")
    args = parser.parse_args()
    if args.write and (args.models or args.runs != RUNS):
        parser.error("--write is for all runs of the project's own file")
    record = json.loads(args.runs.read_text())
    runs = [Run(**row) for row in (record["runs"] if isinstance(record, dict) else record)]
    rows = []
    for run in runs:
        if args.models.lower() in run.model.lower():
            rows.append(predict(run))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if not rows:
        raise SystemExit(f"no run of a model whose name contains {args.models!r}")
    print(table(rows), "", summary(rows), sep="\n")
    if args.write:
        page = ROOT / "docs" / "real_cards.md"
        said = page.read_text().partition("<!-- table -->")[0]
        page.write_text(f"{said}<!-- table -->\n\n{summary(rows)}\n\n{table(rows)}\n")
        RESIDUALS.write_text(residuals(rows))


if __name__ == "__main__":
    main()
