from collections import UserDict
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import nn

from memplan.errors import BadBatch, BadSample
from memplan.plan_record import SampleField
from memplan.samples import Sample, sample_for

# PEFT asks transformers by a name that it renamed in version 5.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TINY, "vocab_size": 50, "max_position_embeddings": 24, "intermediate_size": 16}
IMAGE = {**TINY, "image_size": 32, "patch_size": 8, "intermediate_size": 16, "num_labels": 3}
CONVOLUTIONS = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "num_labels": 3,
}
SPEECH = {**TINY, "vocab_size": 20, "intermediate_size": 16, "conv_dim": [8, 8], "conv_stride": [40, 8]} | {
    "conv_kernel": [40, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "classifier_proj_size": 8,
}
ENCODER_DECODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16} | {
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "use_cache": False,
}


def build(name: str, **values: object) -> transformers.PreTrainedModel:
    """A randomly made transformers model from its class's name and its config's values."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**values)).train()


def whisper() -> nn.Module:
    sizes = {"vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 12}
    special = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    return build("WhisperForConditionalGeneration", **ENCODER_DECODER, **sizes, **special)


def clip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {key: value for key, value in IMAGE.items() if key != "num_labels"}
    return build("CLIPModel", text_config=text, vision_config=vision, projection_dim=8)


def t5() -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return build("T5ForConditionalGeneration", **sizes, n_positions=32, decoder_start_token_id=0, use_cache=False)


def lora() -> nn.Module:
    base = build("LlamaForCausalLM", **TEXT, num_key_value_heads=1, use_cache=False)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "llama": (
        lambda: build("LlamaForCausalLM", **TEXT, num_key_value_heads=1, use_cache=False),
        {"input_ids": (24,), "labels": (24,)},
    ),
    "lora": (lora, {"input_ids": (24,), "labels": (24,)}),
    "gpt2": (
        lambda: build(
            "GPT2LMHeadModel", vocab_size=50, n_positions=20, n_embd=16, n_layer=1, n_head=2, use_cache=False
        ),
        {"input_ids": (20,), "labels": (20,)},
    ),
    "bert-mlm": (lambda: build("BertForMaskedLM", **TEXT), {"input_ids": (24,), "labels": (24,)}),
    "roberta-mlm": (lambda: build("RobertaForMaskedLM", **TEXT), {"input_ids": (22,), "labels": (22,)}),
    "t5": (t5, {"input_ids": (32,), "labels": (32,)}),
    "bart": (
        lambda: build("BartForConditionalGeneration", **ENCODER_DECODER, vocab_size=50, max_position_embeddings=24),
        {"input_ids": (24,), "labels": (24,)},
    ),
    "sequences": (lambda: build("BertForSequenceClassification", **TEXT), {"input_ids": (24,), "labels": ()}),
    "regression": (
        lambda: build("BertForSequenceClassification", **TEXT, num_labels=1),
        {"input_ids": (24,), "labels": ()},
    ),
    "multi-label": (
        lambda: build("BertForSequenceClassification", **TEXT, num_labels=3, problem_type="multi_label_classification"),
        {"input_ids": (24,), "labels": (3,)},
    ),
    "tokens": (lambda: build("BertForTokenClassification", **TEXT), {"input_ids": (24,), "labels": (24,)}),
    "answers": (
        lambda: build("BertForQuestionAnswering", **TEXT),
        {"input_ids": (24,), "start_positions": (), "end_positions": ()},
    ),
    "choices": (lambda: build("BertForMultipleChoice", **TEXT), {"input_ids": (2, 24), "labels": ()}),
    "next-sentence": (lambda: build("BertForNextSentencePrediction", **TEXT), {"input_ids": (24,), "labels": ()}),
    "vit": (lambda: build("ViTForImageClassification", **IMAGE), {"pixel_values": (3, 32, 32), "labels": ()}),
    "resnet": (
        lambda: build("ResNetForImageClassification", **CONVOLUTIONS, layer_type="basic"),
        {"pixel_values": (3, 224, 224), "labels": ()},
    ),
    "convnext": (
        lambda: build(
            "ConvNextForImageClassification", num_labels=3, hidden_sizes=[8] * 4, depths=[1] * 4, image_size=64
        ),
        {"pixel_values": (3, 64, 64), "labels": ()},
    ),
    "swin": (
        lambda: build(
            "SwinForImageClassification",
            num_labels=3,
            image_size=32,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
        {"pixel_values": (3, 32, 32), "labels": ()},
    ),
    "segmentation": (
        lambda: build(
            "SegformerForSemanticSegmentation",
            hidden_sizes=[8] * 4,
            depths=[1] * 4,
            num_attention_heads=[1] * 4,
            num_labels=3,
        ),
        {"pixel_values": (3, 224, 224), "labels": (224, 224)},
    ),
    "video": (
        lambda: build("VideoMAEForVideoClassification", **IMAGE, num_frames=2, tubelet_size=2),
        {"pixel_values": (2, 3, 32, 32), "labels": ()},
    ),
    "ctc": (lambda: build("Wav2Vec2ForCTC", **SPEECH), {"input_values": (160_000,), "labels": (50,)}),
    "sounds": (
        lambda: build("Wav2Vec2ForSequenceClassification", **SPEECH),
        {"input_values": (160_000,), "labels": ()},
    ),
    "spectrograms": (
        lambda: build(
            "ASTForAudioClassification", **TINY, intermediate_size=16, max_length=32, num_mel_bins=32, num_labels=3
        ),
        {"input_values": (32, 32), "labels": ()},
    ),
    "whisper": (whisper, {"input_features": (8, 40), "labels": (12,)}),
    "clip": (clip, {"input_ids": (10,), "pixel_values": (3, 32, 32)}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_gives_inputs_with_a_finite_loss(family: str) -> None:
    make, shapes = FAMILIES[family]
    model = make()
    before = torch.get_rng_state()
    sample = sample_for(model, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample.batch_size == 2
    assert {field.name: field.shape for field in sample.fields()} == shapes
    loss = sample.call(model).loss
    assert loss.dim() == 0
    assert loss.isfinite()
    loss.backward()


def test_the_same_config_gives_the_same_values() -> None:
    model = build("BertForMaskedLM", **TEXT)
    assert torch.equal(sample_for(model, 2).kwargs["input_ids"], sample_for(model, 2).kwargs["input_ids"])


def test_token_ids_are_ordinary() -> None:
    ids = sample_for(build("BertForMaskedLM", **TEXT, pad_token_id=3), 64, seq_len=24).kwargs["input_ids"]
    assert set(ids.unique().tolist()) == set(range(50)) - {3}


def test_images_have_the_dtype_of_the_model() -> None:
    model = build("ViTForImageClassification", **IMAGE).to(torch.bfloat16)
    assert sample_for(model, 1).kwargs["pixel_values"].dtype == torch.bfloat16


def test_a_model_on_meta_needs_no_weights() -> None:
    with torch.device("meta"):
        model = build("LlamaForCausalLM", **TEXT, num_key_value_heads=1, use_cache=False)
    sample = sample_for(model, 2)
    assert sample.kwargs["input_ids"].device.type == "cpu"
    assert sample.kwargs["input_ids"].shape == (2, 24)


def test_rotary_positions_have_no_end_but_learned_ones_do() -> None:
    rotary = build("LlamaForCausalLM", **TEXT, num_key_value_heads=1, use_cache=False)
    assert sample_for(rotary, 1, seq_len=100).kwargs["input_ids"].shape == (1, 100)
    for name, positions in (("BertForMaskedLM", 24), ("RobertaForMaskedLM", 22)):
        with pytest.raises(BadSample, match=f"seq_len is 25, but {name} has {positions} positions"):
            sample_for(build(name, **TEXT), 1, seq_len=25)


def test_seq_len_counts_samples_of_a_waveform() -> None:
    sample = sample_for(build("Wav2Vec2ForCTC", **SPEECH), 1, seq_len=16_000)
    assert [field.shape for field in sample.fields()] == [(16_000,), (5,)]


def test_seq_len_counts_the_tokens_of_a_transcript() -> None:
    sample = sample_for(whisper(), 1, seq_len=7)
    assert [field.shape for field in sample.fields()] == [(8, 40), (7,)]
    with pytest.raises(BadSample, match="has 12 positions"):
        sample_for(whisper(), 1, seq_len=13)


@pytest.mark.parametrize("seq_len", [0, -1])
def test_seq_len_has_to_be_positive(seq_len: int) -> None:
    with pytest.raises(BadSample, match=f"seq_len is {seq_len}, it has to be at least 1"):
        sample_for(build("BertForMaskedLM", **TEXT), 1, seq_len)


@pytest.mark.parametrize("family", ["vit", "spectrograms"])
def test_seq_len_is_refused_where_the_config_fixes_the_input(family: str) -> None:
    with pytest.raises(BadSample, match=r"seq_len is 8, but \w+ takes .*: leave seq_len out"):
        sample_for(FAMILIES[family][0](), 1, seq_len=8)


def test_a_head_without_a_rule_says_to_pass_a_sample() -> None:
    with pytest.raises(BadSample, match="BertModel: there is no rule for its head") as caught:
        sample_for(build("BertModel", **TEXT), 1)
    assert "sample=sample" in str(caught.value)


def test_pictures_in_a_text_model_are_not_left_out_silently() -> None:
    text = {**TEXT, "model_type": "llama", "num_key_value_heads": 1}
    vision = {**IMAGE, "model_type": "clip_vision_model"}
    with torch.device("meta"):
        model = build("LlavaForConditionalGeneration", text_config=text, vision_config=vision)
    with pytest.raises(BadSample, match=r"it takes more than text \(vision_config\)"):
        sample_for(model, 1)


def test_a_model_that_is_not_from_transformers_needs_a_sample() -> None:
    with pytest.raises(BadSample, match="no sample can be made for Linear: it is not a transformers model"):
        sample_for(nn.Linear(2, 2), 1)


def test_a_class_derived_from_a_known_one_keeps_its_rule() -> None:
    class Mine(transformers.BertForMaskedLM):
        pass

    assert set(sample_for(Mine(transformers.BertConfig(**TEXT)), 1).kwargs) == {"input_ids", "labels"}


class TestSample:
    def test_a_dict_is_passed_by_name(self) -> None:
        sample = Sample.of({"a": torch.ones(3, 2), "scale": torch.tensor(2.0), "flag": True})
        assert sample.batch_size == 3
        assert sample.args == ()
        assert sample.call(lambda a, scale, flag: (a * scale).sum() if flag else None) == 12

    @pytest.mark.parametrize("kind", [tuple, list])
    def test_a_sequence_is_passed_by_position(self, kind: type) -> None:
        sample = Sample.of(kind([torch.ones(3, 2), torch.zeros(3)]))
        assert isinstance(sample.content, tuple)
        assert sample.kwargs == {}
        assert sample.call(lambda x, y: (x.shape, y.shape)) == ((3, 2), (3,))

    def test_a_tensor_is_the_only_argument(self) -> None:
        sample = Sample.of(torch.ones(3, 2))
        assert isinstance(sample.content, torch.Tensor)
        assert len(sample.args) == 1
        assert sample.call(torch.sum) == 6

    def test_a_tokenizer_s_output_is_a_dict(self) -> None:
        encoding = transformers.BatchEncoding({"input_ids": torch.zeros(2, 4, dtype=torch.long)})
        assert set(Sample.of(encoding).kwargs) == {"input_ids"}
        assert set(Sample.of(UserDict(x=torch.zeros(2))).kwargs) == {"x"}

    def test_a_sample_stays_itself(self) -> None:
        sample = Sample.of(torch.ones(3))
        assert Sample.of(sample) is sample

    def test_first_dimensions_that_disagree_are_named(self) -> None:
        with pytest.raises(BadSample, match=r"x \(4, 2\), y\.0 \(3,\)"):
            Sample.of({"x": torch.zeros(4, 2), "y": [torch.zeros(3)], "z": torch.tensor(1)})

    @pytest.mark.parametrize("sample", [{}, (), {"x": 1}, torch.tensor(1.0), {"x": torch.tensor(1.0)}])
    def test_without_a_batch_dimension_there_is_no_sample(self, sample: object) -> None:
        with pytest.raises(BadSample, match="no tensor with a batch dimension"):
            Sample.of(sample)

    def test_a_batch_of_nothing_is_refused(self) -> None:
        with pytest.raises(BadSample, match=r"x \(0, 2\)"):
            Sample.of({"x": torch.zeros(0, 2)})

    @pytest.mark.parametrize("sample", [None, 3, "text", object()])
    def test_other_types_are_refused(self, sample: object) -> None:
        with pytest.raises(BadSample, match=f"a dict, a tuple or a tensor, got {type(sample).__name__}"):
            Sample.of(sample)

    def test_keys_are_names(self) -> None:
        with pytest.raises(BadSample, match="names of the model's inputs, got 1"):
            Sample.of({1: torch.zeros(2)})

    def test_indexes_on_meta_have_no_values(self) -> None:
        assert Sample.of(torch.zeros(2, 3, device="meta")).resized(5).content.is_meta
        with pytest.raises(BadSample, match="ids is an integer tensor on the meta device"):
            Sample.of({"ids": torch.zeros(2, 3, dtype=torch.long, device="meta")})

    def test_resizing_repeats_the_rows_in_order(self) -> None:
        x = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64, requires_grad=True)
        sample = Sample.of({"x": x, "inner": {"y": torch.tensor([1, 2, 3])}, "n": torch.tensor(7), "flag": True})
        larger, smaller = sample.resized(5), sample.resized(2)
        assert larger.batch_size == 5
        assert larger.kwargs["x"].flatten().tolist() == [1, 2, 3, 1, 2]
        assert larger.kwargs["x"].dtype == torch.float64
        assert not larger.kwargs["x"].requires_grad
        assert larger.kwargs["inner"]["y"].tolist() == [1, 2, 3, 1, 2]
        assert (larger.kwargs["n"], larger.kwargs["flag"]) == (7, True)
        assert smaller.kwargs["x"].flatten().tolist() == [1, 2]
        assert x.requires_grad

    def test_resizing_copies(self) -> None:
        x = torch.ones(2)
        Sample.of(x).resized(2).content.add_(1)
        assert x.tolist() == [1, 1]

    @pytest.mark.parametrize("size", [0, -2])
    def test_there_is_always_a_row(self, size: int) -> None:
        with pytest.raises(BadBatch, match=f"batch size of {size}"):
            Sample.of(torch.ones(2)).resized(size)

    def test_moving_to_meta_and_back(self) -> None:
        there = Sample.of((torch.ones(2), 3)).to("meta")
        assert there.args[0].is_meta
        back = there.to("cpu")
        assert back.args[0].tolist() == [0, 0]
        assert back.args[1] == 3

    def test_fields_give_a_sample_of_the_same_kind(self) -> None:
        sample = Sample.of(
            {
                "ids": torch.tensor([[3, 9], [0, 1]]),
                "x": torch.randn(2, 4, dtype=torch.bfloat16),
                "mask": torch.tensor([True, False]),
                "ignored": torch.full((2, 2), -100),
                "scalar": torch.tensor(1),
            }
        )
        fields = sample.fields()
        assert fields == (
            SampleField(name="ids", shape=(2,), dtype="int64", below=10),
            SampleField(name="x", shape=(4,), dtype="bfloat16", below=None),
            SampleField(name="mask", shape=(), dtype="bool", below=2),
            SampleField(name="ignored", shape=(2,), dtype="int64", below=1),
        )
        again = Sample.from_fields(fields, batch_size=64, seed=1)
        assert again.batch_size == 64
        assert again.kwargs["ids"].max() == 9
        assert again.kwargs["x"].dtype == torch.bfloat16
        assert again.kwargs["mask"].dtype == torch.bool
        assert [f.shape for f in again.fields()] == [f.shape for f in fields]

    def test_positional_fields_are_numbered(self) -> None:
        sample = Sample.of((torch.ones(2, 3), torch.zeros(2, dtype=torch.long)))
        assert [field.name for field in sample.fields()] == ["0", "1"]
        again = Sample.from_fields(sample.fields(), batch_size=4)
        assert [tuple(value.shape) for value in again.args] == [(4, 3), (4,)]
        assert Sample.from_fields(Sample.of(torch.ones(2, 3)).fields(), 1).call(lambda x: x.shape) == (1, 3)

    def test_random_fields_leave_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        fields = (SampleField(name="x", shape=(2,), dtype="float32", below=None),)
        first, second = (Sample.from_fields(fields, 2, seed=3) for _ in range(2))
        assert torch.equal(first.kwargs["x"], second.kwargs["x"])
        assert torch.equal(torch.get_rng_state(), before)

    def test_nested_fields_cannot_be_given_back(self) -> None:
        fields = Sample.of({"x": {"y": torch.ones(2)}}).fields()
        assert fields[0].name == "x.y"
        with pytest.raises(BadSample, match=r"'x\.y' lies inside a structure"):
            Sample.from_fields(fields, 2)

    def test_no_fields_give_no_sample(self) -> None:
        with pytest.raises(BadSample, match="no tensor"):
            Sample.from_fields((), 2)


def test_rows_are_made_longer_where_they_hold_tokens() -> None:
    ids = torch.arange(6).reshape(2, 3)
    shown = Sample.of(
        {"scale": torch.ones(2), "input_ids": ids, "states": torch.ones(2, 3, 4), "wide": torch.ones(2, 4)}
    )
    assert shown.tokens == 3
    longer = shown.lengthened(5).content
    assert longer["input_ids"].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    assert {name: tuple(t.shape) for name, t in longer.items() if name != "input_ids"} == {
        "scale": (2,),
        "states": (2, 5, 4),
        "wide": (2, 4),
    }


def test_what_has_no_tokens_is_not_made_longer() -> None:
    with pytest.raises(BadSample, match="no tensor of tokens"):
        Sample.of(torch.ones(2, 3)).lengthened(5)
