"""Fine-tune adapters with TRL's SFTTrainer, packed, inside a memory budget: the plain script and one line more.

Runs on the CPU of any machine, with `pip install trl peft`: `python examples/04_sft_lora.py`. The text is the manual
that ships with Python, the tokenizer is made on the spot, and the model is a small one with random weights.
"""

import pydoc_data.topics
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import memplan

BUDGET, STEPS = "cpu:64MiB", 6


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    torch.manual_seed(0)
    text = "\n\n".join(pydoc_data.topics.topics.values())
    paragraphs = [part[:200] for part in text.split("\n\n") if len(part) > 20]
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=258))
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=16,
        packing=True,
        max_length=64,
        max_steps=STEPS,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"text": paragraphs[:200]}),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    memplan.autofit(trainer, BUDGET)  # the one line
    trainer.train()


if __name__ == "__main__":
    main()
