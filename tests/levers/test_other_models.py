"""Every lever on architectures that no other test has: attention, experts and norms of other makes, with dropout."""

import gc
from collections.abc import Callable, Mapping

import pytest
import tiny
import torch
import transformers
from imprint import Imprint
from test_recompute import differences, run
from torch import Tensor, nn
from torch.nn import functional

import memplan
from memplan import levers
from memplan.blocks import find_blocks
from memplan.levers import RECOMPUTE, loss_head
from memplan.levers.host_pool import HostPool
from memplan.levers.offload import BOUNDARY, SAVED
from memplan.problem import KEEP

Decisions = Callable[[nn.Module], Mapping[str, str]]

_SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "use_cache": False,
    "attention_dropout": 0.1,
}


def phi3() -> tiny.Made:
    """Projections fused, dropout on every residual."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(**_SIZES, intermediate_size=64, num_key_value_heads=2, resid_pdrop=0.1)
    return transformers.Phi3ForCausalLM(config).train(), tiny.tokens(2, 16)


def gpt_neox() -> tiny.Made:
    """Attention and MLP side by side."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**_SIZES, intermediate_size=64, hidden_dropout=0.1)
    return transformers.GPTNeoXForCausalLM(config).train(), tiny.tokens(2, 16)


def opt() -> tiny.Made:
    """Tied weights, biases everywhere."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32)
    return transformers.OPTForCausalLM(config).train(), tiny.tokens(2, 16)


def mixtral() -> tiny.Made:
    """Experts that a noisy router chooses, and a loss on that choice, which reads what the blocks leave aside."""
    torch.manual_seed(0)
    settings = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_jitter_noise": 0.1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings, **experts))
    return model.train(), tiny.tokens(2, 16)


def gemma3n() -> tiny.Made:
    """Later blocks attend to keys and values that earlier ones leave in a dict."""
    torch.manual_seed(0)
    settings = {**_SIZES, "num_hidden_layers": 5, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    settings |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCABULARY, "laurel_rank": 4}
    settings |= {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 5, "num_kv_shared_layers": 2}
    settings |= {"layer_types": [*["sliding_attention", "full_attention"] * 2, "full_attention"], "sliding_window": 8}
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**settings)).train(), tiny.tokens(2, 16)


class Encoder(nn.Module):
    """Torch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, tiny.VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(self.embed(input_ids)))
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def encoder() -> tiny.Made:
    torch.manual_seed(0)
    return Encoder().train(), tiny.tokens(2, 16)


MODELS: dict[str, Callable[[], tiny.Made]] = {
    "phi3": phi3,
    "gpt_neox": gpt_neox,
    "opt": opt,
    "mixtral": mixtral,
    "gemma3n": gemma3n,
    "encoder": encoder,
}


def used(name: str) -> tiny.Made:
    """After a first forward, in which transformers itself sets attributes to capture outputs by."""
    model, batch = MODELS[name]()
    model(**batch)
    return model, batch


for_every_model = pytest.mark.parametrize("name", MODELS)


@for_every_model
@pytest.mark.parametrize("option", [RECOMPUTE, SAVED, BOUNDARY])
def test_what_runs_blocks_changes_no_bit_and_leaves_no_trace(name: str, option: str) -> None:
    wanted = run(*MODELS[name]())
    model, batch = used(name)
    before = Imprint(model)
    pool = HostPool(2**24, least_bytes=1)
    with levers.decided(model, dict.fromkeys(find_blocks(model), option), {}, pool):
        for _ in range(2):  # a first step, and a steady one
            model.zero_grad()
            assert differences(run(model, batch), wanted) == []
    assert (sum(pool.copied.values()) > 0) == (option != RECOMPUTE)
    model.zero_grad()
    torch.set_rng_state(torch.from_numpy(before.random[0]))
    assert before.differences() == []


def in_graphs() -> int:
    """Tensors that an operator has made for a backward."""
    gc.collect()
    return sum(type(thing) is Tensor and thing.grad_fn is not None for thing in gc.get_objects())


@pytest.mark.slow
def test_blocks_that_share_keys_and_values_are_planned() -> None:
    """Neither a proof without their work nor a block that is timed by itself has what the others leave."""
    wanted = run(*gemma3n())
    model, batch = gemma3n()
    asked = {"sample": batch, "effective_batch": 2, "micro_batch": 2, "strategy": "recompute-only"}
    before = in_graphs()
    roomy = memplan.plan(model, "cpu:1GiB", **asked)
    assert in_graphs() == before  # a graph that holds what it was made from is never let go of
    tight = memplan.plan(model, f"cpu:{(roomy.smallest_bytes + roomy.peak_bytes) // 2}B", **asked)
    planned = {block for block, option in tight.decisions.items() if option != KEEP}
    assert planned
    with memplan.apply(model, tight):
        assert differences(run(model, batch), wanted) == []


@for_every_model
def test_a_loss_in_chunks_changes_rounding_only_and_leaves_no_trace(name: str) -> None:
    wanted = run(*MODELS[name]())
    model, batch = used(name)
    before = Imprint(model)
    path = loss_head.find_head(model)
    assert path is not None
    with levers.decided(model, {path: "chunked-7", **dict.fromkeys(find_blocks(model), RECOMPUTE)}):
        found = run(model, batch)
        assert loss_head.uses(model.get_submodule(path)) == loss_head.Uses(losses=1, reads=0)
    torch.testing.assert_close(
        {key: value for key, value in found.items() if value is not None},
        {key: value for key, value in wanted.items() if value is not None},
    )
    model.zero_grad()
    torch.set_rng_state(torch.from_numpy(before.random[0]))
    assert before.differences() == []
