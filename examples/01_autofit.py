"""Train a language model on real English text inside a memory budget that its plain training step would break.

Runs on the CPU of any machine in a few minutes: `make demo`, or `python examples/01_autofit.py`.
"""

import pydoc_data.topics
import time
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.units import format_bytes as size

BUDGET, BATCH, LENGTH, STEPS, ROUNDS = "460MiB", 2, 512, 21, 3


def text_batches() -> list[torch.Tensor]:
    """The manual that ships with Python, one token per byte, shuffled, in batches of shape [BATCH, LENGTH]."""
    tokens = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")))
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return list(rows[order].split(BATCH))


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor, plan: memplan.Plan):
    """An ordinary step: the plan says how large a micro-batch is. Returns (loss, seconds)."""
    begin, total = time.perf_counter(), 0.0
    for micro in batch.split(plan.micro_batch):
        loss = model(input_ids=micro, labels=micro).loss / plan.accumulation
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total, time.perf_counter() - begin


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**shape, num_hidden_layers=8, vocab_size=256, max_position_embeddings=LENGTH, use_cache=False)
    model = LlamaForCausalLM(config).train()
    batches = text_batches()
    sample = {"input_ids": batches[0], "labels": batches[0]}
    plain = memplan.predict(model, sample)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {BATCH} x {LENGTH} tokens a step, budget {BUDGET}")
    print(f"Without a plan the step needs {size(plain.peak_bytes)} (predicted): too much.\n")

    fit = memplan.autofit(model, f"cpu:{BUDGET}", sample=sample, effective_batch=BATCH)  # the one line
    print(fit.plan.describe() + "\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(STEPS):
        loss, seconds = train_step(model, optimizer, batches[number], fit.plan)
        if number % 3 == 0:
            print(f"  step {number:2d}   loss {loss:.3f}   {seconds:.2f} s")
    fit.undo()

    full = memplan.plan(model, "cpu", sample=sample, micro_batch=BATCH, strategy="huggingface")
    times: dict[str, list[float]] = {"plan": [], "full": []}
    for batch in batches[STEPS : STEPS + ROUNDS]:  # in turn, so that a busy machine slows both
        for name, plan in (("plan", fit.plan), ("full", full)):
            with memplan.apply(model, plan):
                times[name].append(train_step(model, optimizer, batch, plan)[1])
    mine, theirs = median(times["plan"]), median(times["full"])
    measured = fit.measured
    kept = measured.peak_bytes <= fit.plan.budget_bytes < plain.peak_bytes
    print(
        f"\npeak  measured {size(measured.peak_bytes)}, predicted {size(fit.plan.peak_bytes)}, budget {BUDGET}:",
        end=" ",
    )
    print("within the budget that the plain step breaks" if kept else "THE BUDGET WAS NOT KEPT")
    print(f"time  {mine:.2f} s a step; checkpointing every block {theirs:.2f} s with a peak of {size(full.peak_bytes)}")
    print(
        f"      {1 - mine / theirs:+.0%} time saved" if mine < theirs else "      the plan was no faster here this time"
    )


if __name__ == "__main__":
    main()
