"""Quantised bases under adapters on the CPU, predicted and measured: `python benchmarks/quantised.py --write`.

bitsandbytes has CPU kernels, so a step with 4-bit or 8-bit layers really runs here, and its peak is what torch's
allocator says. Each case is run in a process of its own; the table is put into docs/quantised.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pages import DOCS, written
from torch import nn

HEAD = "lm_head"  # what transformers leaves as it is


def layers_of(bits: int, quant_type: str = "nf4", *, double: bool = True, compute: torch.dtype = torch.bfloat16) -> Any:
    """A `BitsAndBytesConfig`. With 8 bits the rest says nothing."""
    import transformers

    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def quantised(config: Any, layers: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model of a config, its linear layers but the head replaced as `from_pretrained` does.

    On "cpu" the weights are random and packed; on "meta" they have shapes, and are packed when somebody loads them.
    """
    import transformers
    from transformers.integrations import replace_with_bnb_linear

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        weights = {path: module.weight for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        replace_with_bnb_linear(model, modules_to_not_convert=[HEAD], quantization_config=layers)
    finally:
        torch.set_default_dtype(before)
    bits = 4 if layers.load_in_4bit else 8
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        if path != HEAD and device != "meta":
            layer.weight = _packed(layer.weight, weight.detach())
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def _packed(empty: Any, weight: torch.Tensor) -> Any:
    """As transformers' `Bnb4bitQuantize` and `Bnb8bitQuantize` (integrations/bitsandbytes.py)."""
    settings = {name: value for name, value in vars(empty).items() if name != "SCB"}
    return type(empty)(weight, requires_grad=False, **settings).to(weight.device)


@dataclass(frozen=True, slots=True)
class Case:
    layers: str  # "nf4", "nf4 double", "fp4", "int8"
    precision: str  # "fp32": as it comes; "bf16": autocast
    blocks: str  # "plain", "checkpointed" by prepare_model_for_kbit_training, "planned"

    @property
    def name(self) -> str:
        return "/".join(asdict(self).values())


def every_case() -> Iterator[Case]:
    for blocks in ("plain", "checkpointed", "planned"):
        for layers in ("nf4 double", "nf4", "fp4", "int8"):
            for precision in ("fp32", "bf16"):
                if blocks != "planned" or layers in ("nf4 double", "int8"):  # a plan takes long on a busy machine
                    yield Case(layers, precision, blocks)


def model_of(case: Case) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Four layers of 512, adapters of rank 8 on every linear layer of the blocks; 2 x 256 tokens."""
    import peft
    import transformers
    from workloads import token_batch

    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    kind, _, double = case.layers.partition(" ")
    bits = 8 if kind == "int8" else 4
    compute = torch.float32 if case.precision == "fp32" else torch.bfloat16
    model = quantised(config, layers_of(bits, kind, double=bool(double), compute=compute))
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=case.blocks == "checkpointed")
    adapters = peft.LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters).train(), token_batch(2, 256, config.vocab_size)


def run(case: Case) -> dict[str, int]:
    """Measure and predict one case. A plan aims halfway between keeping and recomputing everything."""
    from accuracy import meter
    from steps import make_step

    import memplan

    model, batch = model_of(case)
    autocast = torch.bfloat16 if case.precision == "bf16" else None
    undo = None
    if case.blocks == "planned":
        asked: dict[str, Any] = {"sample": batch, "micro_batch": 2, "autocast": autocast}
        full = memplan.plan(model, "cpu:1TiB", strategy="huggingface", **asked)
        budget = (full.peak_bytes + full.unplanned_bytes) // 2
        plan = memplan.plan(model, f"cpu:{budget}B", strategy="recompute-only", **asked)
        predicted, undo = plan.peak_bytes, memplan.apply(model, plan).undo
    else:
        predicted = memplan.predict(model, batch, autocast=autocast).peak_bytes
    measured = meter()(make_step(model, batch, autocast=autocast))
    if undo is not None:
        undo()
    return {"measured": measured, "predicted": predicted}


def table(results: dict[str, dict[str, int]]) -> str:
    lines = [
        "| layers | precision | blocks | measured | predicted | difference | error |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for name, r in results.items():
        difference = r["predicted"] - r["measured"]
        error = f"{difference / r['measured']:+.4%}"
        cells = [*name.split("/"), f"{r['measured']:,}", f"{r['predicted']:,}", f"{difference:+,}", error]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/quantised.md")
    parser.add_argument("--case", help="one case, here, as JSON: what every process of its own does")
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(run(Case(*asked.case.split("/")))))
        return
    results = {}
    for case in every_case():
        command = [sys.executable, "-W", "ignore", __file__, "--case", case.name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[case.name] = json.loads(out.splitlines()[-1])
        print(case.name, results[case.name], flush=True)
    print(table(results))
    if asked.write:
        written("table", table(results), DOCS / "quantised.md")


if __name__ == "__main__":
    main()
