"""Packed weights of bitsandbytes': what is counted, against what torch's allocator says, and plans that are applied."""

import sys

import pytest
import torch
from real import bytes_of, peak_of
from tiny import VOCABULARY, tokens
from torch import Tensor, nn

import memplan
from memplan import levers, packed
from memplan.blocks import signature
from memplan.errors import ModelError, PlanNotFollowed
from memplan.kernels import quantised as kernels
from memplan.kernels.cpu import CpuBackend
from memplan.kernels.cuda import CudaBackend
from memplan.levers import eight_bit
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.summary import unseen_bytes
from memplan.trace import Trace

bitsandbytes = pytest.importorskip("bitsandbytes")

import peft  # noqa: E402  # after the question whether its layers for bitsandbytes are there
import transformers  # noqa: E402
from quantised import layers_of, quantised  # noqa: E402

# peft leaves it to torch, which says so
pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant")

KINDS = {
    "nf4 double": layers_of(4, compute=torch.float32),
    "nf4": layers_of(4, double=False, compute=torch.float32),
    "fp4 bf16": layers_of(4, "fp4", compute=torch.bfloat16),
    "int8": layers_of(8),
}
for_every_kind = pytest.mark.parametrize("kind", KINDS)


def config(layers: int = 2) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_cache=False,
    )


def base(kind: str, device: str = "cpu", layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return quantised(config(layers), KINDS[kind], device, dtype)


def adapted(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    adapters = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters).train()


def trace_of(model: nn.Module, backend: object = CpuBackend(), rows: int = 2, length: int = 64) -> Trace:
    return Recorder(model, Recipe(), backend).record(Sample.of(tokens(rows, length)))


def names_in(trace: Trace) -> set[str]:
    return {trace.op_names[name] for name in trace.op_name}


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prepared", "dropout", "autocast"),
    [
        ("nf4 double", None, 0.1, None),
        ("nf4", "checkpointed", 0.0, None),
        ("nf4 double", "upcast", 0.0, torch.bfloat16),  # to another type than the layers compute in
        ("fp4 bf16", None, 0.0, None),
        ("fp4 bf16", "upcast", 0.0, torch.bfloat16),
        ("int8", None, 0.1, None),
        ("int8", "checkpointed", 0.0, None),
        ("int8", "upcast", 0.0, torch.bfloat16),
    ],
)
def test_a_predicted_peak_is_the_measured_one(
    kind: str, prepared: str | None, dropout: float, autocast: torch.dtype | None
) -> None:
    model = base(kind)
    if prepared is not None:
        checkpointed = prepared == "checkpointed"
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointed)
    model, batch = adapted(model, dropout), tokens(2, 64)
    recipe = Recipe(autocast=autocast)
    trace = Recorder(model, recipe).record(Sample.of(batch))
    assert 0 <= peak_of(model, Sample.of(batch), recipe) - trace.peak_bytes <= unseen_bytes(trace)


def test_what_bitsandbytes_keeps_for_itself_is_known() -> None:
    models = {kind: base(kind) for kind in KINDS}
    tables = sys.modules["bitsandbytes.backends.utils"].CODE.values()
    codes = sys.modules["bitsandbytes.backends.utils"]._code_4bit_cache.values()
    bounds = sys.modules["bitsandbytes.backends.default.ops"]._get_4bit_quantize_bounds
    of_four = [tensor for name in ("nf4", "fp4") for tensor in bounds(name, torch.device("cpu"))]
    kept = bytes_of([*tables, *codes, *of_four, *bitsandbytes.functional.name2qmap.values()])
    assert {kind: packed.kept_bytes(model) for kind, model in models.items()} == {
        **dict.fromkeys(("nf4 double", "nf4", "fp4 bf16"), kept),
        "int8": bytes_of(list(tables)),
    }
    assert packed.kept_bytes(nn.Linear(2, 2)) == 0


@for_every_kind
def test_packed_weights_and_their_scales_are_counted_by_their_storages(kind: str) -> None:
    model = adapted(base(kind))
    static = trace_of(model).breakdown(0)
    assert static["params"] == bytes_of(list(model.parameters()))
    scales = [tensor for _, tensor in packed.named_scales(model)]
    assert len(scales) == 14 * {"nf4 double": 5, "nf4": 2, "fp4 bf16": 5, "int8": 1}[kind]
    assert static["buffers"] == bytes_of([*model.buffers(), *scales])


@for_every_kind
def test_a_model_without_weights_is_counted_as_the_loaded_one(kind: str) -> None:
    def prepared(model: nn.Module) -> nn.Module:
        return adapted(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))

    loaded, bare = prepared(base(kind)), prepared(base(kind, "meta"))
    batch = tokens(2, 64)
    assert memplan.predict(bare, batch).peak_bytes == memplan.predict(loaded, batch).peak_bytes
    assert signature(bare) == signature(loaded)


def test_a_model_is_left_as_it_was() -> None:
    for kind in KINDS:
        model = adapted(base(kind))
        before = [(path, id(value)) for path, module in model.named_modules() for value in vars(module).values()]
        buffers = [name for name, _ in model.named_buffers()]
        memplan.predict(model, tokens(2, 16))
        after = [(path, id(value)) for path, module in model.named_modules() for value in vars(module).values()]
        assert after == before
        assert [name for name, _ in model.named_buffers()] == buffers


def test_one_matrix_is_dequantised_at_a_time_in_forward_and_backward() -> None:
    trace = trace_of(adapted(base("nf4")), rows=1, length=2)  # next to nothing beside the matrices
    (step,) = trace.steps
    name = trace.op_names.index("bitsandbytes::dequantize_4bit")
    counts = [
        sum(trace.op_name[at] == name for at in range(span.start, span.stop))
        for span in (step.forward_ops, step.backward_ops)
    ]
    assert counts == [14, 11]  # what goes into the first layer's queries, keys and values has no gradient
    largest = 64 * 128 * 4
    assert largest < trace.peak_in(step.forward) - sum(trace.breakdown(0).values()) < 2 * largest


def test_layers_are_told_apart_by_what_they_say_of_themselves() -> None:
    nf4, fp4, int8 = (base(kind).model.layers[0].mlp.up_proj for kind in ("nf4", "fp4 bf16", "int8"))
    assert packed.told(nf4.quant_state) == packed.told(base("nf4").model.layers[1].mlp.up_proj.quant_state)
    assert packed.told(nf4.quant_state) != packed.told(fp4.quant_state)
    assert packed.told(int8.state) is not None
    assert packed.told(nf4) is None
    assert [packed.bits_of(layer.weight) for layer in (nf4, fp4, int8, nn.Linear(2, 2))] == [4, 4, 8, None]


def test_a_long_model_is_traced_short() -> None:
    model = adapted(base("nf4 double", layers=12))
    whole = peft.PeftModel.named_modules(model)  # all of its layers are in the trace, though not all were run
    assert {path for path, _ in whole} == set(trace_of(model).modules)


# -- plans -------------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None) -> list[Tensor]:
    """Loss and gradients of the first two forwards: levers learn in the first."""
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**batch).loss
        loss.backward()
        found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        for parameter in model.parameters():
            parameter.grad = None
    return found


@pytest.mark.filterwarnings("error::memplan.errors.PlanNotFollowed")
@pytest.mark.parametrize(
    ("kind", "autocast", "share"),
    [
        pytest.param("nf4 double", None, 0.2, marks=pytest.mark.slow),
        pytest.param("fp4 bf16", torch.bfloat16, 0.2, marks=pytest.mark.slow),
        ("int8", None, 0.2),
        ("nf4", torch.bfloat16, 0.4),  # autocast to another type than the layers compute in
    ],
)
def test_a_plan_keeps_gradients_and_meets_its_peak(kind: str, autocast: torch.dtype | None, share: float) -> None:
    assert issubclass(PlanNotFollowed, UserWarning)
    model, batch = adapted(base(kind), dropout=0.1), tokens(2, 64)
    plain = gradients(model, batch, autocast)
    bare = adapted(base(kind, "meta"), dropout=0.1)  # nothing is timed
    asked = {"sample": batch, "micro_batch": 2, "autocast": autocast}
    full = memplan.plan(bare, "cpu:1TiB", strategy="huggingface", **asked)
    budget = full.peak_bytes + int(share * (full.unplanned_bytes - full.peak_bytes))
    plan = memplan.plan(bare, f"cpu:{budget}B", strategy="recompute-only", **asked)
    assert plan.selections
    with memplan.apply(model, plan):
        planned = gradients(model, batch, autocast)
        measured = peak_of(model, Sample.of(batch), Recipe(autocast=autocast))
    assert all(map(torch.equal, planned, plain))
    assert plan.peak_bytes <= measured
    assert measured + packed.kept_bytes(model) <= budget
    assert measured < full.unplanned_bytes


@pytest.mark.parametrize("backend", [CpuBackend(), CudaBackend((8, 9))], ids=["cpu", "cuda"])
def test_a_recomputed_block_of_8_bits_holds_its_input_only(backend: object) -> None:
    model = adapted(base("int8", layers=3))
    blocks = {f"base_model.model.model.layers.{n}": "recompute" for n in range(3)}
    with levers.decided(model, blocks):
        trace = trace_of(model, backend)
    (step,) = trace.steps
    held = trace.breakdown(step.loss.start)
    hidden = 2 * 64 * 64 * 4
    of_blocks = sum(size for name, size in held.items() if name.startswith("activations/") and ".layers." in name)
    assert of_blocks <= 3 * (hidden + 9216)  # and the random state, and on a card which columns have outliers


def test_what_is_let_go_comes_back_with_the_plan() -> None:
    layer = base("int8").model.layers[0].mlp.up_proj.train()
    undo = eight_bit.install(layer)
    x = torch.randn(2, 3, 64, requires_grad=True)
    assert layer(x).grad_fn.A is None
    undo()
    assert layer(x).grad_fn.A is x


# -- CUDA --------------------------------------------------------------------------------------------------------------


def test_a_card_dequantises_a_matrix_for_many_rows_and_none_for_a_few() -> None:
    model = adapted(base("nf4", "meta"))
    many, few = (trace_of(model, CudaBackend((8, 9)), rows=1, length=length) for length in (64, 4))
    for trace, count in ((many, 14), (few, 0)):
        (step,) = trace.steps
        name = trace.op_names.index("bitsandbytes::dequantize_4bit")  # the backward's is there in any case
        assert sum(trace.op_name[at] == name for at in range(step.forward_ops.start, step.forward_ops.stop)) == count


def test_a_card_takes_8_bit_products_and_the_cpu_does_not() -> None:
    plain = bitsandbytes.matmul
    model = adapted(base("int8", "meta"))
    assert "aten::_int_mm" in names_in(trace_of(model, CudaBackend((8, 9))))
    assert "aten::_int_mm" not in names_in(trace_of(model))
    assert bitsandbytes.matmul is plain


def test_a_large_model_has_figures_for_a_card() -> None:
    """8 billion weights: 7 x 32 matrices in 4 bits, embedding and head in float32."""
    big = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    model = quantised(big, layers_of(4), "meta", torch.bfloat16)
    model = adapted(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    ids = torch.zeros(1, 512, dtype=torch.long)
    found = memplan.predict(model, {"input_ids": ids, "labels": ids}, gpu="rtx-4090", autocast=torch.bfloat16)
    matrices = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336)
    words = 2 * 128_256 * 4096 * 4
    assert found.breakdown["params"] == pytest.approx(matrices / 2 + words, rel=0.01)
    assert found.breakdown["buffers"] == pytest.approx(matrices / 64 * (1 + 4 / 256), rel=0.01)
    assert found.peak_bytes > found.breakdown["params"] + found.breakdown["buffers"]


def test_without_bitsandbytes_nothing_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    with kernels.routed("cuda"):
        assert "bitsandbytes" not in sys.modules


# -- what is refused, and what is said ---------------------------------------------------------------------------------


def test_packed_weights_that_are_to_be_trained_are_refused() -> None:
    model = base("nf4", "meta")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    with pytest.raises(ModelError, match=r"weight of Linear4bit is of 4 bits .* adapters"):
        memplan.predict(model, tokens(1, 8))


def test_weights_that_are_quantised_in_every_forward_are_refused() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=True)
    layer.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="has_fp16_weights=False"):
        memplan.predict(nn.Sequential(nn.Linear(8, 8), layer), torch.zeros(2, 8), loss=lambda m, x: m(x).sum())


def test_a_prediction_says_what_is_packed() -> None:
    loaded = memplan.predict(adapted(base("nf4")), tokens(1, 8)).assumptions
    assert "14 weights are packed in 4 bits and not trained" in loaded
    assert not any("not packed yet" in line for line in loaded)
    bare = packed.statements(peft.prepare_model_for_kbit_training(base("int8", "meta")))
    assert any("not packed yet" in line for line in bare)
    assert any("non-reentrant" in line for line in bare)
    assert any("outliers" in line for line in bare)
    assert packed.statements(nn.Linear(2, 2)) == ()
