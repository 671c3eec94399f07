"""What transformers 4.51 does otherwise than later versions, as far as memory goes, for models that later ones make.

Runs that others made with 4.51 are predicted here with the version that is installed. `build` makes a model whose step
asks for what 4.51's own step asks for; each difference below names the function of 4.51.3 that it follows. They were
found by tracing all models of `real_cards.json` with both versions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

_SDPA, _OPT, _T5 = "sdpa-4.51", "opt-4.51", "t5-4.51"

# GPT-Neo and T5 had one attention only (`_supports_sdpa` is False); OPT and GPT-2 chose sdpa by themselves.
_ATTENTION = {"gpt2": _SDPA, "opt": _OPT, "gpt_neo": "eager", "t5": _T5}


def build(config: PretrainedConfig, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A model on the meta device, in training mode. Raises ValueError for a family that was not looked at."""
    if config.model_type not in _ATTENTION:
        known = ", ".join(sorted(_ATTENTION))
        raise ValueError(f"what 4.51 does otherwise for {config.model_type} is not known; it is for {known}")
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config, attn_implementation=_ATTENTION[config.model_type])
        for module in model.modules():
            if isinstance(module, GPT2Attention):
                _add_masks(module, config.max_position_embeddings)
    return model.train()


@contextmanager
def caches_as_in_451() -> Iterator[None]:
    """`DynamicCache.update` (cache_utils.py) keeps the first keys and values that it is given; later it copies them."""
    later = DynamicLayer.update

    def update(
        self: DynamicLayer, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            return later(self, key_states, value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    DynamicLayer.update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        DynamicLayer.update = later  # type: ignore[method-assign]


def _add_masks(attention: nn.Module, positions: int) -> None:
    """GPT2Attention.__init__ (models/gpt2/modeling_gpt2.py): a causal mask of each layer, also where sdpa runs."""
    attention.register_buffer("bias", torch.ones(1, 1, positions, positions, dtype=torch.bool), persistent=False)
    attention.register_buffer("masked_bias", torch.tensor(-1e4), persistent=False)


def _sdpa(
    module: nn.Module,  # transformers' interface
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """sdpa_attention_forward (integrations/sdpa_attention.py): contiguous copies of all that goes in and comes out."""
    contiguous = (query.contiguous(), key.contiguous(), value.contiguous())
    return _opt_sdpa(module, *contiguous, attention_mask, dropout, scaling)


def _opt_sdpa(
    module: nn.Module,  # noqa: ARG001  # transformers' interface
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """OPTSdpaAttention.forward (models/opt/modeling_opt.py): views of the projections go in as they are."""
    is_causal = attention_mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _t5_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """T5Attention.forward (models/t5/modeling_t5.py): the first layer adds the mask to the bias that all share."""
    assert position_bias is not None
    scores = query @ key.transpose(3, 2)
    bias: Any = position_bias
    if attention_mask is not None:
        if not hasattr(bias, "masked"):
            bias.masked = bias + attention_mask
        bias = bias.masked
    scores += bias
    weights = drop(scores.float().softmax(-1).type_as(scores), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _float_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """_prepare_4d_causal_attention_mask_for_sdpa (modeling_attn_mask_utils.py): made once, as numbers to be added."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": True})
    return None if mask is None else torch.where(mask, 0.0, torch.finfo(torch.float32).min)


_INTERFACES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    _SDPA: (_sdpa, _float_mask),
    _OPT: (_opt_sdpa, _float_mask),
    _T5: (_t5_attention, eager_mask),
}
for _name, (_attention, _mask) in _INTERFACES.items():
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
