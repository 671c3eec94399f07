"""Predicted against what others measured on real cards: `python benchmarks/real_cards.py --write`. Needs no card.

The figures are NVML peaks of training runs on an RTX 3060 and an RTX 4060, published by the authors of xMem
(data/real_cards.json names the source). Each run is predicted from the public config alone. `--runs FILE` takes other
runs of the same form, `--models TEXT` limits what is done to models whose name contains the text.

A run has to have `model`, `optimizer`, `batch`, `gpu` and `measured_bytes`, and may have `zero_grad` and `xmem_bytes`;
other fields are passed over. One that cannot be predicted is a row that says why. Exit codes: 0 all were predicted, 1
some were not, 2 the runs cannot be read.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import transformers_451
from pages import DOCS, written
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
from memplan.errors import MemplanError
from memplan.recipe import AFTER_FORWARD, AFTER_STEP, Recipe
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


class NotPredictable(Exception):
    """What is needed to predict a run is not known here; the message says what."""


class BadRuns(Exception):
    """A file that is no file of runs."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was measured. Sizes in bytes."""

    model: str
    optimizer: str  # a class of torch.optim
    batch: int
    gpu: str
    measured_bytes: int
    zero_grad: int = 0  # 0: before the forward; 1: between forward and backward; 2: after the step
    xmem_bytes: int | None = None

    @property
    def xmem_error(self) -> float | None:
        return None if self.xmem_bytes is None else self.xmem_bytes / self.measured_bytes - 1


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


@dataclass(frozen=True, slots=True)
class Gap:
    """A run that cannot be predicted."""

    run: Run
    why: str


def runs_in(path: Path) -> list[Run]:
    """The runs of a file: a list of objects, or an object whose `runs` is one. BadRuns, in one line, if it is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadRuns(f"{path}: {error}") from error
    rows = record.get("runs") if isinstance(record, dict) else record
    if not isinstance(rows, list):
        raise BadRuns(f"{path} has no list of runs: it is a list of objects, or an object with one as 'runs'")
    return [_run_of(row, f"{path}: run {number}") for number, row in enumerate(rows, start=1)]


def _run_of(row: object, where: str) -> Run:
    if not isinstance(row, dict):
        raise BadRuns(f"{where} is {row!r}, not an object")
    known = {field.name: field for field in fields(Run)}
    missing = [name for name, field in known.items() if field.default is MISSING and row.get(name) is None]
    if missing:
        raise BadRuns(f"{where} has no {', '.join(missing)}; it has {', '.join(row) or 'nothing'}")
    given = {name: row[name] for name in known if row.get(name) is not None}
    for name, value in given.items():
        kind, least = (str, "") if known[name].type is str else (int, 0 if name == "zero_grad" else 1)
        if type(value) is not kind or value < least:
            raise BadRuns(f"{where} has {name} = {value!r}; that is {'a text' if kind is str else 'a whole number'}")
    return Run(**given)


def build(name: str) -> nn.Module:
    """The model of that name as transformers 4.51 makes it, on meta. NotPredictable if its config is not here."""
    key = name.rpartition("/")[2].lower()
    if key not in MODELS:
        raise NotPredictable(f"no config of {name} is known here; of {', '.join(MODELS)} there is")
    family, settings = MODELS[key]
    kind, config = FAMILIES[family]
    return transformers_451.build(config(**settings), kind)


def sample_of(batch: int) -> dict[str, Tensor]:
    """Ids, mask and labels, each [batch, 128]. All rows but one are padded: lines are not of one length."""
    ids = torch.ones(batch, TOKENS, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1:, TOKENS // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def predict(run: Run) -> Row:
    """The run as a loop writes it: `outputs = model(**batch)` stays until the next forward has returned.

    NotPredictable, or an error of memplan's, if a part of it is not known.
    """
    begin = time.perf_counter()
    model = build(run.model)
    make = getattr(torch.optim, run.optimizer, None)
    if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
        raise NotPredictable(f"torch.optim has no optimizer {run.optimizer}")
    if run.zero_grad not in (0, 1, 2):
        raise NotPredictable(f"zero_grad is {run.zero_grad}; 0, 1 and 2 are known")
    optimizer = make(model.parameters(), lr=1e-3)  # type: ignore[call-arg]  # of every class but the base
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
    said = (
        f"{len(rows)} runs: median error {median(map(abs, errors)):.2%}, worst {worst.error:+.2%} "
        f"({worst.run.model}, {worst.run.optimizer}, batch {worst.run.batch}), lowest {min(errors):+.2%}"
    )
    theirs = [row.run.xmem_error for row in rows if row.run.xmem_error is not None]
    if not theirs:
        return said
    count = "" if len(theirs) == len(rows) else f" ({len(theirs)} runs)"
    return (
        f"{said}; xMem{count}: median {median(map(abs, theirs)):.2%}, worst {max(theirs, key=abs):+.2%}, "
        f"lowest {min(theirs):+.2%}"
    )


def table(rows: Sequence[Row | Gap]) -> str:
    lines = [
        "| model | optimizer | batch | zero_grad | card | measured, MiB | predicted | error | xMem's error | seconds |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        run = row.run
        xmem = "" if run.xmem_error is None else f"{run.xmem_error:+.2%}"
        known = isinstance(row, Row)
        predicted = f"{row.predicted_bytes / MIB:,.0f} | {row.error:+.2%}" if known else f"not predictable: {row.why} |"
        lines.append(
            f"| {run.model} | {run.optimizer} | {run.batch} | {run.zero_grad} | {run.gpu.rpartition(' ')[2]} "
            f"| {run.measured_bytes / MIB:,.0f} | {predicted} | {xmem} | {f'{row.seconds:.1f}' if known else ''} |"
        )
    return "\n".join(lines)


def residuals(rows: list[Row]) -> str:
    """What `memplan.risk` reads."""
    values = "".join(f"    {row.run.measured_bytes / row.predicted_bytes - 1:.4f},\n" for row in rows)
    return (
        "# Measured / predicted - 1 of device memory, of each run in docs/real_cards.md, in its order. Made by\n"
        f"# `python benchmarks/real_cards.py --write`.\nresiduals = [\n{values}]\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS, help="a file of runs, as benchmarks/data/real_cards.json")
    parser.add_argument("--models", default="", help="only models whose name contains this text")
    parser.add_argument("--write", action="store_true", help="write docs/real_cards.md and memplan's residuals.toml")
    args = parser.parse_args(argv)
    if args.write and (args.models or args.runs != RUNS):
        parser.error("--write is for all runs of the project's own file")
    try:
        runs = [run for run in runs_in(args.runs) if args.models.lower() in run.model.lower()]
    except BadRuns as error:
        parser.exit(2, f"{error}\n")
    if not runs:
        parser.exit(2, f"no run of a model whose name contains {args.models!r}\n")
    rows: list[Row | Gap] = []
    for run in runs:
        try:
            rows.append(predict(run))
        except (NotPredictable, MemplanError) as error:
            rows.append(Gap(run, " ".join(str(error).split())))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    predicted = [row for row in rows if isinstance(row, Row)]
    print(table(rows), *(["", summary(predicted)] if predicted else []), sep="\n")
    if len(predicted) < len(rows):
        raise SystemExit(f"{len(rows) - len(predicted)} of {len(rows)} runs cannot be predicted; their rows say why")
    if args.write:
        written("table", f"{summary(predicted)}\n\n{table(predicted)}", DOCS / "real_cards.md")
        RESIDUALS.write_text(residuals(predicted))


if __name__ == "__main__":
    main()
