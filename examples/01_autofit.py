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

BUDGET, BATCH, LENGTH, STEPS = "460MiB", 2, 512, 24


def text_batches() -> list[torch.Tensor]:
    """The manual that ships with Python, one token per byte, cut into batches of shape [BATCH, LENGTH]."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    tokens = torch.tensor(list(text), dtype=torch.long)
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return list(rows[order[: STEPS * BATCH]].split(BATCH))


def train(model: torch.nn.Module, plan: memplan.Plan) -> list[float]:
    """An ordinary loop: the plan says how large a micro-batch is and how many make a step. Returns seconds per step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seconds = []
    for number, batch in enumerate(text_batches()):
        begin, total = time.perf_counter(), 0.0
        for micro in batch.split(plan.micro_batch):
            loss = model(input_ids=micro, labels=micro).loss / plan.accumulation
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        if number % 4 == 0 or number == STEPS - 1:
            print(f"  step {number:2d}   loss {total:.3f}   {seconds[-1]:.2f} s")
    return seconds


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=256, max_position_embeddings=LENGTH, use_cache=False)  # fmt: skip
    model = LlamaForCausalLM(config).train()
    sample = {"input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long)}
    sample["labels"] = sample["input_ids"]

    plain = memplan.predict(model, sample)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {BATCH} x {LENGTH} tokens a step, budget {BUDGET}")
    print(f"without a plan the step needs {size(plain.peak_bytes)} (predicted): too much\n")

    fit = memplan.autofit(model, f"cpu:{BUDGET}", sample=sample, effective_batch=BATCH)
    print(fit.plan.describe(), "\n", sep="\n")
    seconds = train(model, fit.plan)
    measured = fit.measure(steps=3)
    fit.undo()

    full = memplan.plan(model, f"cpu:{BUDGET}", sample=sample, effective_batch=BATCH, micro_batch=BATCH, strategy="huggingface")
    with memplan.apply(model, full) as everything:
        baseline = everything.measure(steps=3)

    kept = measured.peak_bytes <= fit.plan.budget_bytes < plain.peak_bytes
    print(f"\npeak      measured {size(measured.peak_bytes)}, predicted {size(measured.predicted_bytes)}, budget {BUDGET}")
    print(f"          {'within the budget that the plain step breaks' if kept else 'THE BUDGET WAS NOT KEPT'}")
    print(f"time      {measured.step_s:.2f} s a step (in training: {median(seconds):.2f} s); checkpointing everything,")
    print(f"          {baseline.step_s:.2f} s a step and {size(baseline.peak_bytes)}: the plan takes {measured.step_s / baseline.step_s:.0%} of that")


if __name__ == "__main__":
    main()
