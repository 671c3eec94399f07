"""The contract of the chunked loss head: the model's own loss and gradients, less memory, and no trace after undo.

Sums in another order are not equal to the bit. So both the plain and the chunked model are held against the same model
in float64, and the chunked one must not be further off than twice the plain one. The last section shows that this
notices levers that are wrong.
"""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import heads
import pytest
import tiny
import torch
import torch.distributed as dist
from imprint import Imprint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from memplan.errors import ModelError, PlanMismatch, PlanNotFollowed
from memplan.levers import chunked_loss, lazy_logits, loss_head, recompute
from memplan.levers.loss_head import find_head, install, uses
from memplan.levers.uses import Uses
from memplan.meter import reachable_storages
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample

OPTION = "chunked-5"  # divides none of the batches here

for_every_model = pytest.mark.parametrize("name", heads.MODELS)
reads_on_purpose = pytest.mark.filterwarnings("ignore::memplan.errors.PlanNotFollowed")


@contextmanager
def chunked(model: nn.Module, option: str = OPTION) -> Iterator[nn.Module]:
    """The model with its head in chunks; gives the head."""
    head = heads.head_of(model)
    undo = install(head, option)
    try:
        yield head
    finally:
        undo()


def check(make: Callable[[], tiny.Made], option: str = OPTION, **how: Any) -> None:
    """Chunked and plain are as close to float64, and every loss was computed in chunks."""
    exact, plain = heads.run(*make(), **{**how, "autocast": None}, double=True), heads.run(*make(), **how)
    model, batch = make()
    with chunked(model, option) as head:
        found = heads.run(model, batch, **how)
        assert (uses(head).losses, uses(head).reads) == (how.get("micro_steps", 1), 0)
    assert heads.worse(found, plain, exact) == []


# --- nothing changes but rounding, memory and time --------------------------------------------------------------------


@for_every_model
def test_loss_and_gradients(name: str) -> None:
    check(heads.MODELS[name])


@for_every_model
def test_over_two_micro_batches(name: str) -> None:
    check(heads.MODELS[name], micro_steps=2)


@for_every_model
def test_under_autocast(name: str) -> None:
    check(heads.MODELS[name], autocast=torch.bfloat16)


def test_together_with_recomputed_blocks() -> None:
    """Dropout falls the same way: the head draws no random numbers."""
    wanted = heads.run(*tiny.gpt2(layers=2))
    model, batch = tiny.gpt2(layers=2)
    for block in model.transformer.h:
        recompute.install(block, "recompute")
    with chunked(model) as head:
        found = heads.run(model, batch)
        assert uses(head) == Uses(losses=1)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rows", [1, 7, 31, 32, 33, 10**6])
def test_any_number_of_rows(rows: int) -> None:
    model, batch = tiny.llama(layers=1)
    wanted = heads.run(*tiny.llama(layers=1))
    with chunked(model, f"chunked-{rows}"):
        found = heads.run(model, batch)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("labels", ["some ignored", "a chunk ignored", "all ignored"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(labels: str, reduction: str, smoothing: float) -> None:
    head, hidden, target = heads.loose(bias=True)
    chosen = {"some ignored": slice(None, None, 3), "a chunk ignored": slice(5, 10), "all ignored": slice(None)}
    target[chosen[labels]] = -1

    def loss(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target, ignore_index=-1, reduction=reduction, label_smoothing=smoothing)

    wanted = heads.gradients(head, hidden, loss)
    with heads.installed(head, OPTION):
        found = heads.gradients(head, hidden, loss)
        assert uses(head).losses == 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert bool(found[0].isnan()) == (labels == "all ignored" and reduction == "mean")


def test_the_number_of_items_in_the_batch() -> None:
    check(partial(tiny.llama, layers=1), more={"num_items_in_batch": torch.tensor(41)})
    check(partial(tiny.gpt2, layers=1), more={"num_items_in_batch": 41}, micro_steps=2)


def test_labels_that_are_all_ignored() -> None:
    model, batch = tiny.llama(layers=1)
    batch["labels"].fill_(-100)
    wanted = heads.run(*tiny.llama(layers=1)[:1], batch)
    with chunked(model):
        found = heads.run(model, batch)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types(dtype: torch.dtype) -> None:
    def make() -> tiny.Made:
        model, batch = tiny.llama(layers=1)
        return model.to(dtype), batch

    check(make)


def test_a_head_that_learns_alone() -> None:
    def make() -> tiny.Made:
        model, batch = tiny.llama(layers=1)
        model.model.requires_grad_(False)
        return model, batch

    check(make)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("option", ["chunked-64", "chunked-512"])
def test_thousands_of_rows_of_one_class_in_float16(option: str, scale: float) -> None:
    """Their sum is beyond the largest number of the type, and the mean for a rare class near the smallest."""
    torch.manual_seed(0)
    head = nn.Linear(8, 40).half()
    hidden = (torch.randn(16384, 8) + 10).half().requires_grad_()
    target = torch.zeros(16384, dtype=torch.int64)
    with torch.no_grad():
        head.bias[39] = -10.0  # next to no gradient

    def loss(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), target) * scale

    exact = heads.gradients(copy.deepcopy(head).double(), hidden.detach().double().requires_grad_(), loss)
    plain = heads.gradients(head, hidden, loss)
    with heads.installed(head, option):
        found = heads.gradients(head, hidden, loss)
        assert uses(head) == Uses(losses=1)
    for value, other, true in zip(found, plain, exact, strict=True):
        assert value.dtype == other.dtype
        assert value.isfinite().all()
        off, plain_off = (float((t.double() - true).norm()) for t in (value, other))
        assert off <= 2 * max(plain_off, 1e-3 * float(true.norm()))
    rare, rare_plain = (t[1][39].double() / exact[1][39] for t in (found, plain))
    assert (rare - 1).abs().max() <= max(0.01, 2 * float((rare_plain - 1).abs().max()))


def test_a_frozen_head_gets_no_gradient() -> None:
    model, batch = tiny.lora(layers=1)
    with chunked(model) as head:
        assert heads.run(model, batch)
        assert head.weight.grad is None
        assert uses(head).losses == 1


def test_the_weight_keeps_the_gradient_that_was_made() -> None:
    """And no copy of it, which would take as much memory again."""
    head, hidden, target = heads.loose()
    made: list[int] = []
    head.weight.register_hook(lambda grad: made.append(grad.data_ptr()))
    with heads.installed(head, OPTION):
        functional.cross_entropy(head(hidden), target).backward()
    assert made == [head.weight.grad.data_ptr()]


def test_nothing_is_lazy_where_nothing_learns() -> None:
    model, batch = tiny.llama(layers=1)
    with chunked(model) as head:
        with torch.no_grad():
            assert type(model(**batch).logits) is Tensor
        model.eval()
        assert type(model(**batch).logits) is Tensor
        model.train().requires_grad_(False)
        assert type(model(**batch).logits) is Tensor
        assert uses(head) == Uses()


# --- backward, and again ----------------------------------------------------------------------------------------------


def test_a_second_backward() -> None:
    head, hidden, target = heads.loose()
    with heads.installed(head, OPTION):
        loss = functional.cross_entropy(head(hidden), target)
    (2 * loss).backward(retain_graph=True)
    first = head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.weight.grad, first * 1.5)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused() -> None:
    head, hidden, target = heads.loose()
    with heads.installed(head, OPTION):
        loss = functional.cross_entropy(head(hidden), target)
    with pytest.raises(ModelError, match=r"Plan without the chunked loss head"):
        torch.autograd.grad(loss, hidden, create_graph=True)


# --- on the way to the loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", heads.WAYS)
def test_what_models_do_with_logits_stays_lazy(way: str) -> None:
    head, hidden, target = heads.loose(bias=True, shape=(3, 7))
    wanted = heads.gradients(head, hidden, partial(heads.WAYS[way], target))
    with heads.installed(head, OPTION):
        found = heads.gradients(head, hidden, partial(heads.WAYS[way], target))
        assert uses(head) == Uses(losses=1)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert a.dtype == b.dtype


@reads_on_purpose
@pytest.mark.parametrize("way", heads.READS)
def test_whatever_else_is_done_is_done_to_the_true_logits(way: str) -> None:
    head, hidden, target = heads.loose(bias=True, shape=(3, 7))
    wanted = heads.gradients(head, hidden, partial(heads.READS[way], target))
    with heads.installed(head, OPTION):
        found = heads.gradients(head, hidden, partial(heads.READS[way], target))
        assert uses(head).reads >= 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_what_logits_are_is_known_without_them() -> None:
    head, hidden, _ = heads.loose(shape=(3, 7))
    true = head(hidden)
    with heads.installed(head, OPTION):
        logits = head(hidden)
        assert isinstance(logits, Tensor)
        assert logits.untyped_storage().nbytes() == 0
        for ask in (Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.is_contiguous, len):
            assert ask(logits) == ask(true)
        for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "nbytes"):
            assert getattr(logits, name) == getattr(true, name)
        assert uses(head).reads == 0


@reads_on_purpose
@for_every_model
def test_logits_in_the_output_are_the_true_ones(name: str) -> None:
    model, batch = heads.MODELS[name]()
    torch.manual_seed(7)
    wanted = model(**batch)["logits"]
    with chunked(model) as head:
        torch.manual_seed(7)
        output = model(**batch)
        output["loss"].backward()
        assert uses(head).reads == 0
        assert torch.equal(output["logits"].argmax(-1), wanted.argmax(-1))
        assert torch.equal(output["logits"].detach(), wanted)
        assert uses(head).reads == 1


@pytest.mark.parametrize("way", ["added", "without autograd", "own function"])
def test_who_reads_the_logits_of_a_step_is_told_once_what_it_takes(way: str) -> None:
    head, hidden, target = heads.loose(shape=(3, 7))
    with heads.installed(head, OPTION):
        with pytest.warns(PlanNotFollowed, match=r"3.29 KiB more than planned.*leave out 'loss-head'") as told:
            heads.gradients(head, hidden, partial(heads.READS[way], target))
        heads.gradients(head, hidden, partial(heads.READS[way], target))  # a second warning would be an error here
        assert uses(head).reads >= 2
    assert [warning.filename for warning in told] == [heads.__file__]  # where they are read


@pytest.mark.parametrize("how", ["fake", "recorded", "tried"])
def test_nobody_is_told_of_reads_before_there_is_a_plan(how: str) -> None:
    def reads(model: nn.Module, batch: Any) -> Tensor:
        output = model(**batch)
        values = float(output.logits.detach().sum()) if how == "recorded" else 0.0  # cannot be read of a fake tensor
        return output.loss + output.logits.square().mean() + values

    model, batch = tiny.llama(layers=1)
    with loss_head.unheard(chunked(model)) if how == "tried" else chunked(model):
        if how == "tried":
            reads(model, batch)
        else:
            trace = Recorder(model, Recipe(loss=reads)).record(Sample.of(batch))
            assert trace.how == how
        assert uses(heads.head_of(model)).reads > 0


def test_logits_that_cannot_be_made_any_more() -> None:
    model, batch = tiny.llama(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with chunked(model):
        output = model(**batch)
        output["loss"].backward()
        optimizer.step()
        with pytest.raises(ModelError, match="Read them before the optimizer's step"):
            output["logits"].argmax(-1)


def test_a_write_below_autograd_is_refused() -> None:
    """It would be lost."""
    head, hidden, _ = heads.loose()
    with heads.installed(head, OPTION):
        logits = head(hidden)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), pytest.raises(TypeError, match="LazyLogits"):
            logits.mul_(2)


def test_lazy_logits_hold_nothing_and_go_with_their_output() -> None:
    model, batch = tiny.llama(layers=1)
    with chunked(model) as head:
        output = model(**batch)
        reachable_storages()  # looks at every tensor there is
        assert uses(head).reads == 0
        logits = weakref.ref(output.logits)
        gc.disable()
        try:
            del output
            assert logits() is None
        finally:
            gc.enable()


@reads_on_purpose
def test_hooks_on_the_head_are_called() -> None:
    head, hidden, target = heads.loose()
    calls: list[str] = []
    head.register_forward_hook(lambda *_: calls.append("forward"))
    head.register_full_backward_hook(lambda *_: calls.append("backward"))
    with heads.installed(head, OPTION):
        functional.cross_entropy(head(hidden), target).backward()
    assert calls == ["forward", "backward"]


def test_autocast_that_ends_before_the_loss() -> None:
    head, hidden, target = heads.loose()

    def step() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(hidden)
        assert logits.dtype is torch.bfloat16
        loss = functional.cross_entropy(logits.float(), target)
        return loss, torch.autograd.grad(loss, head.weight)[0]

    wanted = step()
    with heads.installed(head, OPTION):
        found = step()
        assert uses(head) == Uses(losses=1)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


# --- the user's own errors --------------------------------------------------------------------------------------------


@reads_on_purpose
def test_errors_are_those_of_torch() -> None:
    head, hidden, target = heads.loose()
    with heads.installed(head, OPTION):
        with pytest.raises(IndexError, match=r"Target 999 is out of bounds"):
            functional.cross_entropy(head(hidden), target + 999 - target)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            head(hidden[:, :3])
        with pytest.raises(RuntimeError, match="same dtype"):
            head(hidden.double())
        with pytest.raises(RuntimeError, match="label_smoothing must be between"):
            functional.cross_entropy(head(hidden), target, label_smoothing=2.0)
    functional.cross_entropy(head(hidden), target).backward()


def test_an_exception_in_the_users_loss_passes() -> None:
    model, batch = tiny.llama(layers=1)

    def broken(*args: object, **kwargs: object) -> Tensor:
        raise ZeroDivisionError("mine")

    model.loss_function = broken
    with chunked(model), pytest.raises(ZeroDivisionError, match="mine"):
        model(**batch)


# --- undo and copies --------------------------------------------------------------------------------------------------


@for_every_model
def test_undo_leaves_no_trace(name: str) -> None:
    model, _ = heads.MODELS[name]()
    before = Imprint(model)
    undo = install(heads.head_of(model), OPTION)
    assert before.differences() != []
    undo()
    assert before.differences() == []
    undo()
    assert before.differences() == []


def test_a_plan_on_top_of_a_plan_replaces_it() -> None:
    head, hidden, _ = heads.loose()
    with heads.installed(head, OPTION):
        with heads.installed(head, "keep"):
            assert type(head(hidden)) is Tensor
        with heads.installed(head, "chunked-7"):
            assert head.forward.rows == 7
            with pytest.warns(PlanNotFollowed):
                assert head(hidden).argmax() == head.forward.__wrapped__(hidden).argmax()
        assert head.forward.rows == 5


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["copied", "saved and loaded"])
def test_a_copy_is_planned_and_stands_on_its_own(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = heads.MODELS[name]()
    with chunked(model) as head:
        copied = duplicate(model)
        wanted = heads.run(model, batch)
        model.zero_grad()
        found = heads.run(copied, batch)
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert uses(head).losses == uses(heads.head_of(copied)).losses == 1


# --- options and heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(1_000, 4096), (10_000, 256), (32_000, 128), (50_257, 128), (256_000, 128)]
)
def test_rows(vocabulary: int, rows: int) -> None:
    assert loss_head.rows_for(vocabulary) == rows
    assert loss_head.options(vocabulary) == ("keep", f"chunked-{rows}")
    assert all(loss_head.is_option(option) for option in loss_head.options(vocabulary))


@pytest.mark.parametrize("name", ["", "chunked", "chunked-", "chunked-0", "chunked--5", "chunked-1.5", "recompute"])
def test_names_that_are_no_options(name: str) -> None:
    assert not loss_head.is_option(name)
    with pytest.raises(PlanMismatch, match="its options are keep, chunked-<rows>"):
        install(nn.Linear(2, 4), name)


def test_heads_are_found() -> None:
    paths = {name: find_head(make()[0]) for name, make in heads.MODELS.items()}
    assert paths["bert"] == "cls.predictions.decoder"
    assert paths["lora"] == "base_model.model.lm_head"
    assert paths["own"] == "head"
    assert {path for name, path in paths.items() if name not in ("bert", "lora", "own")} == {"lm_head"}


def test_heads_that_are_left_alone() -> None:
    assert find_head(tiny.plain()[0]) is None  # narrower than what it is given
    assert find_head(tiny.vit()[0]) is None
    model, _ = tiny.llama(layers=1)
    model.lm_head.forward = lambda x: x
    assert find_head(model) is None
    scaled = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    assert find_head(nn.Sequential(scaled)) is None
    with pytest.raises(PlanMismatch, match=r"whose forward is not nn\.Linear's own"):
        install(model.lm_head, OPTION)
    assert loss_head.refusal_of(model) == "the head is a Linear whose forward or weight is not nn.Linear's own"
    assert loss_head.refusal_of(tiny.plain()[0]) is None
    assert loss_head.refusal_of(tiny.vit()[0]) is None


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "autocast"),
    [("llama", None), ("gpt2", torch.bfloat16), pytest.param("bert", None, marks=pytest.mark.slow)],
)
def test_the_saving_is_real_and_foreseen(name: str, autocast: torch.dtype | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny, "VOCABULARY", 4096)
    model, batch = tiny.WORKLOADS[name](layers=1, rows=8, length=32)  # type: ignore[call-arg]  # all of these have them
    recipe, sample, logits_bytes = Recipe(autocast=autocast), Sample.of(batch), 8 * 32 * 4096 * 4
    peaks = {}
    for option in ("keep", "chunked-32"):
        trace = Recorder(model, recipe).record(sample, partial(chunked, model, option))
        with chunked(model, option):
            measured = heads.real_peak(model, sample, recipe)
        assert abs(trace.peak_bytes - measured) <= 1024, (option, trace.peak_bytes, measured)
        peaks[option] = measured
    assert peaks["keep"] - peaks["chunked-32"] >= 2 * logits_bytes


# --- the comparison notices levers that are wrong ---------------------------------------------------------------------


def test_a_label_shift_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = chunked_loss.chunked_loss
    monkeypatch.setattr(lazy_logits, "chunked_loss", lambda h, w, b, target, how: plain(h, w, b, target.roll(1), how))
    with pytest.raises(AssertionError, match="loss 0"):
        check(heads.MODELS["llama"])


def test_a_factor_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right loss, wrong gradients: the soft cap's own derivative is left out."""
    handle = lazy_logits._HANDLERS[torch.tanh]
    monkeypatch.setitem(
        lazy_logits._HANDLERS,
        torch.tanh,
        lambda logits: (handle(logits)[0], (lambda z: z + (z.tanh() - z).detach(),), logits.dtype),
    )
    with pytest.raises(AssertionError, match="gradient of"):
        check(heads.MODELS["gemma2"])


def test_sums_in_low_precision_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def low(grad: Tensor, hidden: Tensor, total: Tensor) -> None:
        total.copy_((total.bfloat16() + grad.t() @ hidden).float())

    monkeypatch.setattr(chunked_loss, "_add_product", low)
    with pytest.raises(AssertionError, match="lm_head"):
        check(heads.MODELS["llama"], "chunked-1", autocast=torch.bfloat16)


# --- outputs that somebody waits for --------------------------------------------------------------------------------


def waits(grad: Tensor) -> Tensor:
    """As FSDP2 puts it on every output, to gather weights before the backward."""
    waited.append(grad.shape)
    return grad


waited: list[torch.Size] = []
waits.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"


def test_a_hook_of_those_who_share_weights_does_not_compute_the_logits() -> None:
    model, batch = tiny.llama(layers=1)
    with chunked(model) as head:
        output = model(**batch)
        waited.clear()
        assert output.logits._base is None
        output.logits.register_hook(waits)
        output.loss.backward()
        assert uses(head) == Uses(losses=1)
        assert waited == [torch.Size([*batch["labels"].shape, head.in_features])]


def test_a_head_that_is_sharded_by_itself_makes_its_logits_at_once() -> None:
    """Its weight is gone when the loss would come for it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, batch = tiny.llama(layers=1)
        plain = model(**batch).loss
        with chunked(model) as head:
            for part in (head, model):
                fully_shard(part)
            with pytest.warns(PlanNotFollowed, match="sharded by FSDP2 as a unit of its own"):
                output = model(**batch)
            output.loss.backward()
            assert torch.equal(output.loss, plain)
            assert uses(head) == Uses()
    finally:
        dist.destroy_process_group()


@reads_on_purpose
def test_a_hook_of_ones_own_gets_the_gradient_of_the_logits() -> None:
    model, batch = tiny.llama(layers=1)
    with chunked(model) as head:
        found: list[torch.Size] = []
        logits = model(**batch).logits
        logits.register_hook(lambda grad: found.append(grad.shape))
        assert uses(head).reads == 1
