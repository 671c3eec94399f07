"""What a transformers model takes: inputs and labels made from its config, without a download.

A rule is chosen by the model's main input and the ending of its class's name, and reads sizes from the config; there is
no list of models. A head without a rule is refused, because a guess would be planned for and believed.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from memplan.errors import BadSample

EXAMPLE: Final = """\
    sample = {"input_ids": torch.zeros(1, 128, dtype=torch.long), "labels": torch.zeros(1, 128, dtype=torch.long)}
    memplan.plan(model, "24GiB", sample=sample)"""

Inputs = dict[str, Any]


def inputs_for(model: nn.Module, batch_size: int, seq_len: int | None) -> Inputs:
    """Keyword arguments for the model's forward, with labels so that its output has a loss; see `samples.sample_for`.

    Raises:
        BadSample: not a transformers model, a head without a rule, or a `seq_len` that does not go.
    """
    main_input = getattr(model, "main_input_name", None)
    if not isinstance(main_input, str):
        raise _no_rule(model, "it is not a transformers model, whose config would say what it takes")
    if seq_len is not None and not (type(seq_len) is int and seq_len >= 1):
        raise BadSample(f"seq_len is {seq_len!r}, it has to be at least 1 and a whole number")
    maker = _Maker(model, model.config, batch_size, seq_len, torch.Generator().manual_seed(0))
    return _rule_for(maker, main_input)(maker)


def _no_rule(model: object, why: str) -> BadSample:
    return BadSample(f"no sample can be made for {type(model).__name__}: {why}. Pass one, for example\n{EXAMPLE}")


@dataclass(frozen=True, slots=True)
class _Maker:
    """What the rules below are written with: the model, its config, the sizes that were asked for, random values."""

    model: Any
    config: Any
    batch_size: int
    seq_len: int | None
    generator: torch.Generator

    def need(self, field: str) -> Any:
        """A value of the config that the rule cannot do without."""
        value = getattr(self.config, field, None)
        if value is None:
            raise _no_rule(self.model, f"its config has no {field}")
        return value

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch_size, *shape, generator=self.generator).to(self.model.dtype)

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, (self.batch_size, *shape), generator=self.generator)

    def tokens(self, *shape: int) -> torch.Tensor:
        """Ids of ordinary tokens: padding, end-of-text and the like change what a model computes."""
        special = {name: value for name, value in vars(self.config).items() if name.endswith("_token_id")}
        ordinary = torch.ones(self.need("vocab_size"), dtype=torch.bool)
        for value in special.values():
            for index in value if isinstance(value, list | tuple) else [value]:
                if isinstance(index, int) and 0 <= index < len(ordinary):
                    ordinary[index] = False
        ids = ordinary.nonzero()[:, 0] if ordinary.any() else torch.arange(len(ordinary))
        return ids[self.integers(len(ids), *shape)]

    def class_labels(self, *shape: int) -> torch.Tensor:
        """Targets of a classification or regression head, by the rules of transformers' own losses."""
        classes, problem = self.need("num_labels"), getattr(self.config, "problem_type", None)
        if problem == "multi_label_classification":
            return self.floats(*shape, classes)
        if problem == "regression" or (problem is None and classes == 1):
            return self.floats(*shape, *([classes] if classes > 1 else []))
        return self.integers(classes, *shape)

    def length(self) -> int:
        """Tokens per row: what was asked for if the model has that many positions, or else all of them up to 2048."""
        learned = _learned_positions(self.model)
        if self.seq_len is None:
            names = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "seq_length")
            declared = [value for name in names if isinstance(value := getattr(self.config, name, None), int)]
            return min([2048, *(value for value in declared if value > 0), *([learned] if learned else [])])
        if learned is not None and self.seq_len > learned:
            name = type(self.model).__name__
            raise BadSample(
                f"seq_len is {self.seq_len}, but {name} has {learned} positions: pass seq_len={learned} or less"
            )
        return self.seq_len

    def length_or(self, default: int) -> int:
        return self.seq_len or default

    def fixed(self, what: str) -> None:
        """Refuse a `seq_len` where the config alone says how long an input is."""
        if self.seq_len is not None:
            raise BadSample(
                f"seq_len is {self.seq_len}, but {type(self.model).__name__} takes {what}: leave seq_len out"
            )


def _learned_positions(model: nn.Module) -> int | None:
    """The most positions for which `model` has a table row, or None where positions are computed (rotary, relative)."""
    names = {"wpe", "position_embeddings", "position_embedding", "embed_positions", "positions_embed"}
    rows = []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names and isinstance(module, nn.Embedding):
            # RoBERTa counts from after the padding index; the first rows of BART's and OPT's tables are no positions.
            unused = module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0))
            rows.append(module.num_embeddings - unused)
    return min(rows, default=None)


Rule = Callable[[_Maker], Inputs]


def _language_model(m: _Maker) -> Inputs:
    ids = m.tokens(m.length())
    return {"input_ids": ids, "labels": ids.clone()}


def _seq2seq(m: _Maker) -> Inputs:
    if not getattr(m.config, "is_encoder_decoder", False):
        raise _no_rule(m.model, "it is no encoder-decoder, and what else it takes beside tokens is not known")
    return {"input_ids": m.tokens(m.length()), "labels": m.tokens(m.length())}


def _sequence_classification(m: _Maker) -> Inputs:
    return {"input_ids": m.tokens(m.length()), "labels": m.class_labels()}


def _token_classification(m: _Maker) -> Inputs:
    length = m.length()
    return {"input_ids": m.tokens(length), "labels": m.integers(m.need("num_labels"), length)}


def _question_answering(m: _Maker) -> Inputs:
    length = m.length()
    return {
        "input_ids": m.tokens(length),
        "start_positions": m.integers(length),
        "end_positions": m.integers(length),
    }


def _multiple_choice(m: _Maker) -> Inputs:
    return {"input_ids": m.tokens(2, m.length()), "labels": m.integers(2)}


def _next_sentence(m: _Maker) -> Inputs:
    return {"input_ids": m.tokens(m.length()), "labels": m.integers(2)}


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _pixels(m: _Maker, *frames: int) -> torch.Tensor:
    m.fixed("images")
    return m.floats(*frames, getattr(m.config, "num_channels", 3), *_image_size(m.config))


def _image_classification(m: _Maker) -> Inputs:
    return {"pixel_values": _pixels(m), "labels": m.class_labels()}


def _semantic_segmentation(m: _Maker) -> Inputs:
    return {"pixel_values": _pixels(m), "labels": m.integers(m.need("num_labels"), *_image_size(m.config))}


def _video_classification(m: _Maker) -> Inputs:
    return {"pixel_values": _pixels(m, m.need("num_frames")), "labels": m.class_labels()}


def _sound(m: _Maker, *, free_length: bool = True) -> Inputs:
    """The audio input. Where `free_length` is false, `seq_len` speaks of something else."""
    config, length_or = m.config, m.length_or if free_length else lambda default: default
    if m.model.main_input_name == "input_values":
        if getattr(config, "conv_kernel", None) is None and getattr(config, "num_mel_bins", None) is not None:
            m.fixed(f"{config.num_mel_bins} x {m.need('max_length')} spectrograms")  # AST
            return {"input_values": m.floats(config.max_length, config.num_mel_bins)}
        return {"input_values": m.floats(length_or(160_000))}  # a waveform: wav2vec 2.0 and its kin
    if getattr(config, "feature_projection_input_dim", None):  # wav2vec2-bert, two frames of 10 ms in each
        return {"input_features": m.floats(length_or(500), config.feature_projection_input_dim)}
    if getattr(config, "input_feat_per_channel", None):  # speech-to-text, frames of 10 ms
        return {"input_features": m.floats(length_or(1000), config.input_feat_per_channel * m.need("input_channels"))}
    if free_length:
        m.fixed(f"{m.need('num_mel_bins')} x {2 * m.need('max_source_positions')} spectrograms")
    return {"input_features": m.floats(m.need("num_mel_bins"), 2 * m.need("max_source_positions"))}  # whisper


def _transcription(m: _Maker) -> Inputs:
    inputs = _sound(m)
    (sound,) = inputs.values()
    # About five characters a second; far fewer than the frames that the model makes of either kind of input.
    labels = max(1, sound.shape[1] // (3200 if sound.dim() == 2 else 20))
    return {**inputs, "labels": m.tokens(labels)}


def _speech_seq2seq(m: _Maker) -> Inputs:
    return {**_sound(m, free_length=False), "labels": m.tokens(m.length())}


def _sound_classification(m: _Maker) -> Inputs:
    return {**_sound(m), "labels": m.class_labels()}


def _image_text_contrast(m: _Maker) -> Inputs:
    text = _Maker(m.model, m.config.text_config, m.batch_size, m.seq_len, m.generator)
    vision = _Maker(m.model, m.config.vision_config, m.batch_size, None, m.generator)
    return {"input_ids": text.tokens(text.length()), "pixel_values": _pixels(vision), "return_loss": True}


_SOUND_RULES: Final[dict[str, Rule]] = {
    "ForCTC": _transcription,
    "ForConditionalGeneration": _speech_seq2seq,
    "ForSequenceClassification": _sound_classification,
    "ForAudioClassification": _sound_classification,
}
_RULES: Final[dict[str, dict[str, Rule]]] = {
    "input_ids": {
        "ForCausalLM": _language_model,
        "LMHeadModel": _language_model,
        "ForMaskedLM": _language_model,
        "ForConditionalGeneration": _seq2seq,
        "ForSequenceClassification": _sequence_classification,
        "ForTokenClassification": _token_classification,
        "ForQuestionAnswering": _question_answering,
        "ForMultipleChoice": _multiple_choice,
        "ForNextSentencePrediction": _next_sentence,
    },
    "pixel_values": {
        "ForImageClassification": _image_classification,
        "ForSemanticSegmentation": _semantic_segmentation,
        "ForVideoClassification": _video_classification,
    },
    "input_values": _SOUND_RULES,
    "input_features": _SOUND_RULES,
}


def _rule_for(m: _Maker, main_input: str) -> Rule:
    """By what the model takes first and how its class, or the class that it was derived from, is named."""
    parts = set(getattr(m.config, "sub_configs", {}))
    if {"text_config", "vision_config"} <= parts and "return_loss" in inspect.signature(
        type(m.model).forward
    ).parameters:
        return _image_text_contrast
    if main_input == "input_ids" and (other := sorted(parts & {"vision_config", "audio_config", "image_config"})):
        raise _no_rule(m.model, f"it takes more than text ({', '.join(other)})")
    rules = _RULES.get(main_input, {})
    for ancestor in type(m.model).__mro__:
        for suffix, rule in rules.items():
            if ancestor.__name__.endswith(suffix):
                return rule
    if not rules:
        raise _no_rule(m.model, f"there is no rule for models that take {main_input!r}")
    raise _no_rule(m.model, f"there is no rule for its head; those for {main_input!r} are {', '.join(rules)}")
