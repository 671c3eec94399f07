"""Published times of fine-tuning on a card against the roofline: `python benchmarks/published_times.py --write`.

What memplan says of the speed of a card that is elsewhere is an estimate. How far such estimates are off is taken from
runs that others have timed: Qwen's own table of LoRA fine-tuning on one A100 (QwenLM/Qwen, README.md, "Profiling of
Memory and Speed": micro-batch 1 x 8, seconds per step, FlashAttention 2; finetune_lora_single_gpu.sh: rank 64 on every
linear layer, bf16, gradient checkpointing). The table is put into docs/fit.md; `roofline.BAND` begins with its least.
"""

import argparse
from collections.abc import Iterator

import peft
import torch
import transformers
from pages import DOCS, written

from memplan.gpus import find_gpu
from memplan.kernels import backend_for
from memplan.problem import KEEP
from memplan.profile import Level
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.roofline import Rates, estimated
from memplan.samples import sample_for

CARD = "a100-sxm-80gb"
ACCUMULATION = 8
LENGTHS = (1024, 2048, 4096, 8192)  # of shorter ones the times hardly differ: the host is the limit, not the card

# hidden, layers, heads, intermediate; seconds per step at each length
RUNS = {
    "Qwen-1.8B": ((2048, 24, 16, 5504), (1.1, 1.7, 3.3, 6.8)),
    "Qwen-7B": ((4096, 32, 32, 11008), (2.8, 5.2, 10.1, 21.3)),
    "Qwen-14B": ((5120, 40, 40, 13696), (4.4, 8.4, 17.0, 36.0)),
}


def adapted(hidden: int, heads: int, intermediate: int) -> torch.nn.Module:
    """Two layers of Qwen's sizes (which has biases besides) on meta, in bfloat16, with LoRA."""
    config = transformers.LlamaConfig(
        vocab_size=151_936,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=max(LENGTHS),
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        model.gradient_checkpointing_enable()
        model = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules="all-linear"))
    torch.set_default_dtype(torch.float32)
    return model.train()


def estimates(sizes: tuple[int, int, int, int]) -> Iterator[float]:
    """Seconds per step at each length, by the roofline; layers are alike, so one stands for all."""
    hidden, layers, heads, intermediate = sizes
    model, card = adapted(hidden, heads, intermediate), find_gpu(CARD)
    recorder = Recorder(model, Recipe(autocast=torch.bfloat16), backend_for(card))
    for length in LENGTHS:
        trace = recorder.record(sample_for(model, 1, length))
        times = estimated({1: {KEEP: [Level({}, trace)]}}, Rates.of(card))
        layer_s = times.block_s(trace.steps[0].blocks[-1].path, KEEP, 1)
        yield ACCUMULATION * (times.rest_s(1, KEEP) + layers * layer_s) + times.optimizer_s * layers / 2


def table() -> str:
    lines = ["| model | tokens | published, s | estimate, s | published / estimate |", "|---|--:|--:|--:|--:|"]
    shares = []
    for name, (sizes, published) in RUNS.items():
        for length, seconds, estimate in zip(LENGTHS, published, estimates(sizes), strict=True):
            share = seconds / estimate
            shares.append(share)
            lines.append(f"| {name} | {ACCUMULATION} x {length:,} | {seconds} | {estimate:.2f} | {share:.2f} |")
            print(lines[-1], flush=True)
    return "\n".join([*lines, "", f"From {min(shares):.2f} to {max(shares):.2f} times the estimate."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/fit.md")
    asked = parser.parse_args()
    made = table()
    print(made)
    if asked.write:
        written("published", made, DOCS / "fit.md")


if __name__ == "__main__":
    main()
