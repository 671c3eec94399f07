"""What cannot be planned inside an Accelerate script is refused with one clear error, before any step is run."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

import memplan
from integrations import scripts
from integrations.scripts import BATCH, Texts, fresh_accelerate, padded, train
from memplan import means
from memplan.errors import AlreadyApplied, BadBatch, DoesNotFit, PlanMismatch, UsageError
from memplan.integrations.accelerate import MemplanAccelerator, attach
from memplan.integrations.attachment import Attachment, Wishes
from memplan.integrations.scripts import own_batch_size
from memplan.means import SHIFTED
from memplan.recipe import Recipe
from memplan.samples import Sample
from memplan.settings import Settings


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with fresh_accelerate():
        yield Accelerator(cpu=True)


def parts(**loader: Any) -> tuple[Any, Any, DataLoader[Any]]:
    model = tiny.llama()[0]
    options = {"batch_size": BATCH, "collate_fn": padded, **loader}
    return model, torch.optim.AdamW(model.parameters()), DataLoader(Texts(20), **options)


def test_separate_prepare_calls(accelerator: Accelerator) -> None:
    model, optimizer, loader = parts()
    attach(accelerator)
    with pytest.raises(UsageError, match="this call has 1 models and 0 loaders"):
        accelerator.prepare(model, optimizer)
    with pytest.raises(UsageError, match="this call has 0 models and 1 loaders"):
        accelerator.prepare(loader)


def test_attached_late_or_twice(accelerator: Accelerator) -> None:
    accelerator.prepare(parts()[2])
    with pytest.raises(UsageError, match="has prepared a model or a loader already"):
        attach(accelerator)
    with fresh_accelerate(), pytest.raises(AlreadyApplied):
        attach(MemplanAccelerator(cpu=True))


@pytest.mark.parametrize(
    ("left_out", "settings", "kind", "words"),
    [
        ("loader", {}, UsageError, "this call has 1 models and 0 loaders"),
        ("model", {}, UsageError, "this call has 0 models and 1 loaders"),
        pytest.param(
            "", {"gpu": "cpu:600KiB", "strategy": "huggingface"}, DoesNotFit, "does not fit", marks=pytest.mark.slow
        ),
        ("", {"normalise": "letters"}, UsageError, "normalise = 'letters' is not one of auto"),
        ("", {"micro_batch": 0}, UsageError, "micro_batch"),
    ],
    ids=["no-loader", "no-model", "no-room", "normalise", "micro-batch"],
)
def test_prepare_in_one_call_refuses_what_both_calls_refuse(
    accelerator: Accelerator, left_out: str, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    objects = dict(zip(("model", "optimizer", "loader"), parts(), strict=True))
    objects.pop(left_out, None)
    with pytest.raises(kind, match=words):
        memplan.prepare(accelerator, *objects.values(), **settings)
    assert not accelerator._models
    assert not accelerator._dataloaders
    memplan.prepare(accelerator, *parts(), plan=scripts.plan_file("llama", 2, 8))  # what is right comes after all
    assert accelerator.memplan.plan.micro_batch == 2


def test_prepare_in_one_call_twice_or_late(accelerator: Accelerator) -> None:
    file = scripts.plan_file("llama", 2, 8)
    memplan.prepare(accelerator, *parts(), plan=file)
    with pytest.raises(AlreadyApplied, match="has memplan attached already"):
        memplan.prepare(accelerator, *parts(), plan=file)
    with fresh_accelerate():
        late = Accelerator(cpu=True)
        late.prepare(parts()[0])
        with pytest.raises(UsageError, match="has prepared a model or a loader already"):
            memplan.prepare(late, *parts(), plan=file)


def test_prepare_in_one_call_switched_off(accelerator: Accelerator) -> None:
    _, _, loader = memplan.prepare(accelerator, *parts(), enabled=False)
    assert accelerator.memplan.plan is None
    assert [len(batch["labels"]) for batch in loader] == [8, 8, 4]


def test_a_shared_batch_that_the_ranks_cannot_share_evenly() -> None:
    shared = SimpleNamespace(split_batches=True, num_processes=3)
    assert own_batch_size(shared, parts(batch_size=6)[2]) == 2
    with pytest.raises(UsageError, match="a batch of 8 has to be a multiple of the 3 processes"):
        own_batch_size(shared, parts()[2])


class ByTokens(BatchSampler):
    """Batches of a number of tokens, not of rows."""

    def __init__(self) -> None:
        self.sampler, self.drop_last = SequentialSampler(range(20)), False

    def __iter__(self) -> Iterator[list[int]]:
        yield list(range(20))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": None, "collate_fn": None}, "batch_size=None"),
        ({"batch_sampler": ByTokens(), "batch_size": 1}, "ByTokens has no batch_size"),
        ({"sampler": BatchSampler(range(20), 4, False), "batch_size": None}, "sampler makes the batches"),
    ],
)
def test_batches_that_cannot_be_split(accelerator: Accelerator, options: dict[str, Any], words: str) -> None:
    model, optimizer, loader = parts(**options)
    with pytest.raises(UsageError, match=words):
        attach(accelerator).prepare(model, optimizer, loader)


def test_a_loader_prepared_already(accelerator: Accelerator) -> None:
    model, optimizer, loader = parts()
    attach(accelerator)
    prepared = accelerator.memplan._own["prepare"](loader)
    with pytest.raises(UsageError, match="prepared already"):
        accelerator.prepare(model, optimizer, prepared)


def test_checkpointed_by_somebody_else(accelerator: Accelerator) -> None:
    model, optimizer, loader = parts()
    model.gradient_checkpointing_enable()
    with pytest.raises(AlreadyApplied, match="checkpointed by transformers already"):
        attach(accelerator).prepare(model, optimizer, loader)


def test_checkpointed_by_torch(accelerator: Accelerator) -> None:
    model, optimizer, loader = parts()
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    with pytest.raises(AlreadyApplied, match=r"model\.layers\.1 is inside torch's CheckpointWrapper already"):
        attach(accelerator).prepare(model, optimizer, loader)


class Contrastive(torch.nn.Module):
    """Each row is told from the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.llama()[0].model

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        texts = self.inner(input_ids, attention_mask).last_hidden_state.mean(1)
        return {"loss": torch.nn.functional.cross_entropy(texts @ texts.T, torch.arange(len(texts)))}


def test_a_loss_over_the_batch_is_not_split(accelerator: Accelerator) -> None:
    model = Contrastive()
    optimizer, loader = torch.optim.AdamW(model.parameters()), parts()[2]
    attach(accelerator, gpu="cpu:1GiB", strategy="huggingface")
    accelerator.prepare(model, optimizer, loader)
    assert (accelerator.memplan.plan.micro_batch, accelerator.memplan.plan.accumulation) == (BATCH, 1)


def test_a_loss_that_takes_too_long_to_try_is_taken_for_the_mean_that_its_name_says(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a large model that is not on its card yet; one that nothing is known of is kept whole."""
    monkeypatch.setattr(means, "_QUICK", 0)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    model = parts()[0]
    wishes = Wishes(Settings.found({"gpu": "cpu:1GiB"}), None, None, None)
    made = Attachment(accelerator, wishes)
    sample = Sample.of(padded([Texts(4)[at] for at in range(4)]))
    assert made._count_name(model, Recipe(), sample) == SHIFTED
    assert not made._can_try(model, sample)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert made._count_name(adapted, Recipe(), sample) == SHIFTED
    assert made._count_name(Contrastive(), Recipe(), sample) is None
    assert made._count_name(model, Recipe(loss=lambda *_: torch.zeros(())), sample) is None
    monkeypatch.setattr(means, "_QUICK", 10**12)
    assert made._can_try(model, sample)
    assert made._count_name(Contrastive(), Recipe(), sample) is None


def test_a_loss_over_the_batch_cannot_be_made_to_split(accelerator: Accelerator) -> None:
    model = Contrastive()
    optimizer, loader = torch.optim.AdamW(model.parameters()), parts()[2]
    with pytest.raises(UsageError, match="micro_batch=2 would split a batch of 8"):
        attach(accelerator, gpu="cpu:1GiB", micro_batch=2).prepare(model, optimizer, loader)


def test_a_plan_for_another_batch(accelerator: Accelerator) -> None:
    file = scripts.plan_file("llama", 2, 16)
    with pytest.raises(PlanMismatch, match="16 samples per optimizer step, the script has 8"):
        attach(accelerator, plan=file).prepare(*parts())


def test_a_plan_for_another_world(accelerator: Accelerator, tmp_path: Path) -> None:
    plan = memplan.Plan.load(scripts.plan_file("llama", 2, 8))
    plan.model_copy(update={"shards": 2}).save(tmp_path / "plan.json")
    with pytest.raises(
        PlanMismatch, match=r"for World\(replicas=1, shards=2\), this run is World\(replicas=1, shards=1\)"
    ):
        attach(accelerator, plan=tmp_path / "plan.json").prepare(*parts())


def test_a_plan_for_another_mixed_precision(accelerator: Accelerator, tmp_path: Path) -> None:
    plan = memplan.Plan.load(scripts.plan_file("llama", 2, 8))
    plan.model_copy(update={"mp_policy": "param_dtype=bfloat16"}).save(tmp_path / "plan.json")
    with pytest.raises(
        PlanMismatch, match="for FSDP2 with param_dtype=bfloat16, and this run is without mixed precision"
    ):
        attach(accelerator, plan=tmp_path / "plan.json").prepare(*parts())


def test_no_room(accelerator: Accelerator) -> None:
    with pytest.raises(DoesNotFit):
        attach(accelerator, gpu="cpu:600KiB", strategy="huggingface").prepare(*parts())


def test_a_micro_batch_that_does_not_divide(accelerator: Accelerator) -> None:
    with pytest.raises(BadBatch):
        attach(accelerator, gpu="cpu:1GiB", micro_batch=3).prepare(*parts())


def test_accumulation_across_epochs() -> None:
    with fresh_accelerate():
        plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
        with pytest.raises(UsageError, match="across the ends of epochs"):
            attach(Accelerator(cpu=True, gradient_accumulation_plugin=plugin))


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_stream_whose_rest_would_be_left_out_by_larger_batches(drop_last: bool) -> None:
    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([Texts(20)[at] for at in range(20)])

    def prepared(**settings: Any) -> Accelerator:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        attach(accelerator, **settings)
        model = parts()[0]
        loader = DataLoader(Rows(), batch_size=4, collate_fn=padded, drop_last=drop_last)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        return accelerator

    with fresh_accelerate():
        found = prepared(gpu="cpu:1GiB", strategy="largest-batch").memplan.plan
        assert (found.micro_batch, found.accumulation) == ((4, 2) if drop_last else (8, 1))
    with fresh_accelerate():
        file = scripts.plan_file("llama", 8, 8)
        if drop_last:
            with pytest.raises(PlanMismatch, match="more rows would be left out"):
                prepared(plan=file)
        else:
            prepared(plan=file)


def test_a_stateful_loader(accelerator: Accelerator) -> None:
    accelerator.dataloader_config.use_stateful_dataloader = True
    with pytest.raises(UsageError, match="saves its place in micro-batches"):
        attach(accelerator)


def test_ranks_with_batches_of_other_sizes(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.integrations.scripts.of_first", lambda _: 4)
    attach(accelerator, plan=scripts.plan_file("llama", 2, 8))
    with pytest.raises(UsageError, match="batches of 8 on this rank and of 4 on the first"):
        accelerator.prepare(*parts())


def test_no_accelerator() -> None:
    with pytest.raises(UsageError, match=r"memplan\.attach takes an accelerate\.Accelerator, not a NoneType"):
        attach(None)  # type: ignore[arg-type]  # what is refused


def test_a_plugin_and_its_arguments(accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match="pass one of the two"):
        attach(accelerator, memplan.MemplanPlugin(), gpu="24GiB")


def test_a_plan_that_was_made_for_shorter_samples(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short, batch = tiny.llama(rows=8, length=8)
    plan = memplan.plan(short, "cpu:1GiB", sample=batch, effective_batch=8, strategy=scripts.KEEP_ALL)
    file = tmp_path / "plan.json"
    plan.save(file)
    attach(accelerator, plan=str(file))
    accelerator.prepare(*parts())
    words = "made for samples with input_ids of [8], and the largest that was found in this run has [16]"
    assert any(words in line for line in accelerator.memplan.plan.assumptions)
    assert words in caplog.text


def test_weights_on_several_devices(accelerator: Accelerator) -> None:
    model, optimizer, loader = parts()
    model.hf_device_map = {"model": 0, "lm_head": 1}  # of a model that was moved since
    attach(accelerator, plan=scripts.plan_file("llama", 8, 8))
    accelerator.prepare(model, optimizer, loader)
    with fresh_accelerate():
        other = Accelerator(cpu=True)
        attach(other)
        model = tiny.llama()[0]
        model.hf_device_map = {"model": 0, "lm_head": "disk"}
        model.lm_head.to("meta")
        with pytest.raises(UsageError, match="device_map has spread the weights over 0, disk"):
            other.prepare(model, optimizer, loader)


def test_layers_that_are_exchanged_behind_the_plan(accelerator: Accelerator) -> None:
    accelerator.state._mixed_precision = "fp8"
    with pytest.raises(UsageError, match="mixed_precision='fp8' puts other layers into the model"):
        attach(accelerator)


@pytest.fixture
def driven(accelerator: Accelerator) -> tuple[Accelerator, Any, Any, Any]:
    attach(accelerator, plan=scripts.plan_file("llama", 2, 8))
    return accelerator, *accelerator.prepare(*parts())


def test_a_loop_that_calls_backward_itself(driven: Any) -> None:
    _, model, optimizer, loader = driven

    def train() -> None:
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()

    with pytest.raises(UsageError, match=r"no accelerator.backward\(loss\) was called"):
        train()


def test_a_loop_that_fetches_ahead(driven: Any) -> None:
    """Each backward would have the weight of the batch after."""
    accelerator, model, optimizer, loader = driven

    def train() -> None:
        batches = iter(loader)
        ahead = next(batches)
        for following in batches:
            accelerator.backward(model(**ahead).loss)
            optimizer.step()
            optimizer.zero_grad()
            ahead = following

    with pytest.raises(UsageError, match=r"before the second was fetched.*workers of the loader fetch ahead"):
        train()


@pytest.mark.parametrize("own", [1, 2])
def test_an_undivided_loop_that_calls_backward_itself(own: int) -> None:
    """Accelerate's `zero_grad` waits for the whole step, memplan's for its own `backward`."""
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=own)
        attach(accelerator, plan=scripts.plan_file("llama", 8, 8 * own))
        model, optimizer, loader = accelerator.prepare(*parts())

        def train() -> None:
            for batch in loader:
                with accelerator.accumulate(model):
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

        with pytest.raises(UsageError, match=r"no accelerator.backward\(loss\) was called"):
            train()


def test_an_undivided_loop_that_fetches_ahead(accelerator: Accelerator) -> None:
    attach(accelerator, plan=scripts.plan_file("llama", 8, 8))
    model, optimizer, loader = accelerator.prepare(*parts())
    batches = iter(loader)
    ahead = next(batches)
    while ahead is not None:
        following = next(batches, None)
        accelerator.backward(model(**ahead).loss)
        optimizer.step()
        optimizer.zero_grad()
        ahead = following


def test_two_losses_of_one_micro_batch(driven: Any) -> None:
    accelerator, model, _, loader = driven
    batches = iter(loader)
    batch = next(batches)
    accelerator.backward(model(**batch).loss)
    with pytest.raises(UsageError, match="a second time for one micro-batch"):
        accelerator.backward(model(**batch).loss)
    next(batches)  # which has one of its own
    accelerator.backward(model(**batch).loss)


def test_two_losses_of_a_whole_batch(accelerator: Accelerator) -> None:
    attach(accelerator, plan=scripts.plan_file("llama", 8, 8))
    model, optimizer, loader = accelerator.prepare(*parts())
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
    assert accelerator.memplan._group.steps == len(loader)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_loop_that_counts_itself(driven: Any, count: int) -> None:
    accelerator, model, optimizer, loader = driven

    def train() -> None:
        for at, batch in enumerate(loader, start=1):
            accelerator.backward(model(**batch).loss / count)
            if at % count == 0:
                optimizer.step()

    called = {2: 2, 4: 1, 8: 0}[count]
    with pytest.raises(UsageError, match=rf"optimizer.step\(\) was called for {called} of the 4 micro-batches"):
        train()


def test_a_loop_that_asks_when_a_step_ends(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven
    steps = 0
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                optimizer.step()
                steps += 1
    assert steps == 3


def test_a_schedule_that_accelerate_does_not_know(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def train() -> None:
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()

    with pytest.raises(UsageError, match=r"goes on changing between the micro-batches of a step, now from 0\.000333"):
        train()


def test_a_schedule_that_is_made_and_prepared_afterwards(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert schedule.get_last_lr() == [0.001 / 4]  # after three steps


def test_a_rate_that_is_set_where_a_step_ends(driven: Any) -> None:
    """By hand, before the optimizer steps, in a loop that asks for that itself."""
    accelerator, model, optimizer, loader = driven
    rates = []
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
    assert rates == [0.0005, 0.00025, 0.000125]


def test_a_batch_that_is_left_out(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven
    for at, batch in enumerate(loader):
        if at == 1:
            continue
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_with_a_closure(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven
    batches = iter(loader)
    batch = next(batches)
    accelerator.backward(model(**batch).loss)
    with pytest.raises(UsageError, match=r"optimizer\.step\(closure\) computes the loss of the batch at hand anew"):
        optimizer.step(lambda: model(**batch).loss)


def test_a_loop_that_clips_parts(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven

    def train() -> None:
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(UsageError, match=r"changed between two micro-batches.*Use accelerator\.clip_grad_norm_"):
        train()


def test_a_loop_that_drops_parts(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven

    def train() -> None:
        for batch in loader:
            model.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()

    with pytest.raises(UsageError, match=r"changed between two micro-batches.*model\.zero_grad\(\)"):
        train()


def test_a_loop_that_clips_the_whole(driven: Any) -> None:
    accelerator, model, optimizer, loader = driven
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (Texts(8)[at] for at in range(8))


def test_a_stream_that_several_workers_read(accelerator: Accelerator) -> None:
    """Each makes batches of its own part, so that cut ones would be of other rows."""
    model, optimizer, _ = parts()
    loader = DataLoader(Stream(), batch_size=BATCH, collate_fn=padded, num_workers=2)
    attach(accelerator, gpu="cpu:1GiB", micro_batch=2)
    with pytest.raises(UsageError, match="several workers read parts of a stream"):
        accelerator.prepare(model, optimizer, loader)


def test_a_compiled_model() -> None:
    with fresh_accelerate(), pytest.raises(UsageError, match="compiles the model"):
        attach(Accelerator(cpu=True, dynamo_backend="eager"))


def test_backward_outside_of_a_step(driven: Any) -> None:
    accelerator, model, _, _ = driven
    with pytest.raises(UsageError, match="outside of the training loader's batches"):
        accelerator.backward(model(**padded([Texts(2)[0]])).loss)


def test_skipping_to_the_middle_of_a_step() -> None:
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        attach(accelerator, plan=scripts.plan_file("llama", 2, 16))
        loader = accelerator.prepare(*parts())[2]
        with pytest.raises(UsageError, match="no whole number of optimizer steps of 16 samples"):
            accelerator.skip_first_batches(loader, 1)
        assert len(accelerator.skip_first_batches(loader, 2)) == len(loader) - 2 == 1


def test_evaluation_is_left_alone(driven: Any) -> None:
    accelerator, *_ = driven
    other = accelerator.prepare(parts()[2])
    assert [len(batch["input_ids"]) for batch in other] == [8, 8, 4]
    assert [len(batch["input_ids"]) for batch in accelerator.skip_first_batches(other, 1)] == [8, 4]


def test_undo(driven: Any) -> None:
    accelerator, model, _, _ = driven
    accelerator.memplan.undo()
    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook
    assert accelerator.backward.__func__ is Accelerator.backward
    assert memplan.apply(model, accelerator.memplan.plan)


def test_training_without_the_line_is_not_touched(accelerator: Accelerator) -> None:
    assert train(None, rows=8).rates


def test_prefix_tuning(accelerator: Accelerator) -> None:
    """PEFT looks at checkpointing when it makes the adapter, which is before anything is planned."""
    prefixes = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.llama()[0], prefixes)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    attach(accelerator, gpu="cpu:1GiB")
    with pytest.raises(UsageError, match=r"a cache of keys and values to every block \(prefix tuning\)"):
        accelerator.prepare(model, optimizer, parts()[2])


def test_a_batch_that_batch_norm_couples(accelerator: Accelerator) -> None:
    model, batch = tiny.resnet()
    rows = [{name: tensor[0] for name, tensor in batch.items()}] * 8
    attach(accelerator, gpu="cpu:1GiB", micro_batch=2)
    with pytest.raises(UsageError, match="micro_batch=2 would split a batch of 4"):
        accelerator.prepare(model, torch.optim.SGD(model.parameters()), DataLoader(rows, batch_size=4))


def test_ranks_that_divide_the_model(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "parallelism_config", object())
    with pytest.raises(UsageError, match="parallelism_config has ranks divide the model"):
        attach(accelerator)


@pytest.mark.parametrize("world", [DistributedType.MEGATRON_LM, DistributedType.XLA, DistributedType.MULTI_XPU])
def test_runs_that_are_not_known(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, world: DistributedType
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", world)
    with pytest.raises(UsageError, match=f"does not know what {world.value} keeps in memory"):
        attach(accelerator)


def test_a_loop_that_leaves_a_step_half_done(accelerator: Accelerator) -> None:
    attach(accelerator, gpu="cpu:1GiB", micro_batch=2)
    model, optimizer, loader = accelerator.prepare(*parts())
    before = [parameter.clone() for parameter in model.parameters()]

    def leave(after: int) -> None:
        for at, batch in enumerate(loader, start=1):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if at == after:
                return

    leave(1)
    with pytest.raises(UsageError, match="in the middle of a step, after 1 micro-batches of 4"):
        leave(1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))
    leave(4)
    leave(8)
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_collator_that_makes_more_rows(accelerator: Accelerator) -> None:
    attach(accelerator, gpu="cpu:1GiB")
    with pytest.raises(UsageError, match="the collator makes 16 rows of 8"):
        accelerator.prepare(*parts(collate_fn=lambda rows: padded([*rows, *rows])))


class ByLength(BatchSampler):
    """Batches of rows of one length, of which some are short."""

    def __init__(self) -> None:
        super().__init__(range(20), BATCH, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19])


def test_batches_of_other_sizes_in_the_middle(accelerator: Accelerator) -> None:
    attach(accelerator, gpu="cpu:1GiB", micro_batch=2)
    model, optimizer, _ = parts()
    loader = DataLoader(Texts(20), batch_sampler=ByLength(), collate_fn=padded)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch() -> None:
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(UsageError, match="the ByLength made a batch of 5 rows among those of 8"):
        epoch()


class Uncounted(Dataset):  # type: ignore[type-arg]
    """Rows, of which it does not say how many there are."""

    def __getitem__(self, at: int) -> Any:
        return Texts(20)[at]


def test_rows_that_are_not_counted(accelerator: Accelerator) -> None:
    model, optimizer, _ = parts()
    loader = DataLoader(Uncounted(), BATCH, sampler=range(16), collate_fn=padded)
    attach(accelerator, gpu="cpu:1GiB")
    with pytest.raises(UsageError, match="a Uncounted, does not say how many rows it has"):
        accelerator.prepare(model, optimizer, loader)


class Keyed(dict[str, Any]):
    """Rows that a sampler names."""

    def __init__(self) -> None:
        super().__init__({f"row {at}": Texts(20)[at] for at in range(20)})


def test_rows_that_have_names(accelerator: Accelerator) -> None:
    model, optimizer, _ = parts()
    rows: Any = Keyed()
    loader = DataLoader(rows, BATCH, sampler=list(rows), collate_fn=padded)
    attach(accelerator, gpu="cpu:1GiB", normalise="shifted-tokens")
    with pytest.raises(UsageError, match=r"a Keyed, has no row 0 \(KeyError: 0\).*Pass one: sample="):
        accelerator.prepare(model, optimizer, loader)


class Tagger(torch.nn.Module):
    """With a head of zeros: every row has the same loss."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = torch.nn.Embedding(tiny.VOCABULARY, 8), torch.nn.Linear(8, 5, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
        wanted = torch.where(labels < 0, labels, labels % 5)
        return {
            "loss": torch.nn.functional.cross_entropy(self.head(self.words(input_ids)).flatten(0, 1), wanted.flatten())
        }


class Pairs(Tagger):
    """Whose loss sets one half of a batch against the other."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
        one, other = self.words(input_ids).mean(1).chunk(2)
        return {"loss": (one * other).sum(-1).mean() + self.head(one).mean()}


@pytest.mark.parametrize(("model", "why"), [(Tagger, "all parts have the same loss"), (Pairs, "cannot be computed")])
def test_what_a_loss_is_a_mean_over_is_not_guessed(model: type[torch.nn.Module], why: str) -> None:
    sample = Sample.of(padded([Texts(20)[at] for at in range(8)]))
    with pytest.raises(means.Undecided, match=why):
        means.mean_over(model(), Recipe(), sample)


def test_such_a_batch_is_not_split(accelerator: Accelerator) -> None:
    attach(accelerator, gpu="cpu:1GiB", micro_batch=2)
    model = Tagger()
    with pytest.raises(UsageError, match="micro_batch=2 would split a batch of 8"):
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()), parts()[2])
