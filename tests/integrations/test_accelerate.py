"""A script with the one line trains what it trains without: the same weights, steps, learning rates and losses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.tracking import GeneralTracker
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

import memplan
from integrations import scripts
from integrations.scripts import Ran, train
from memplan import cache, means
from memplan.integrations import parts
from memplan.integrations.accelerate import MemplanAccelerator, MemplanPlugin, attach
from memplan.integrations.loaders import MicroBatches
from memplan.recipe import Recipe
from memplan.samples import Sample

CLOSE = 1e-5


def planned(micro_batch: int = 2, effective_batch: int = 8, **options: Any) -> Any:
    """The one line, with a plan that splits a step into micro-batches of this size."""
    return partial(attach, plan=scripts.plan_file("llama", micro_batch, effective_batch, **options))


def check_same(plain: Ran, other: Ran) -> None:
    assert other.differs_by(plain) <= CLOSE
    assert other.rates == pytest.approx(plain.rates, rel=1e-12)
    assert other.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("rows", [40, 39, 35, 33])
def test_same_weights_with_a_ragged_tail(rows: int) -> None:
    ours = train(planned(), rows=rows)
    assert ours.accelerator.memplan.plan.accumulation == 4
    check_same(train(None, rows=rows), ours)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("zero_first", [False, True])
def test_loops_as_people_write_them(accumulate: bool, zero_first: bool) -> None:
    # Accelerate itself loses gradients when zero_grad comes first inside accumulate(); of one batch a step it does not
    options: dict[str, Any] = {"rows": 35, "accumulate": accumulate, "zero_first": zero_first}
    check_same(train(None, **options), train(planned(), **options))


@pytest.mark.parametrize("rows", [40, 35])
@pytest.mark.parametrize("drop_last", [False, True])
def test_own_accumulation(rows: int, drop_last: bool) -> None:
    options: dict[str, Any] = {
        "rows": rows,
        "own_accumulation": 2,
        "accumulate": True,
        "loader": {"drop_last": drop_last},
        "rate": 5e-4,  # at 1e-3 it magnifies the rounding of some processors to 1.003e-5
    }
    ours = train(planned(2, 16), **options)
    assert ours.accelerator.memplan.plan.accumulation == 8
    check_same(train(None, **options), ours)


def test_batches_of_the_script_joined() -> None:
    """Where rows are equally long, the mean over a step is the mean of its batches' means."""
    options: dict[str, Any] = {"own_accumulation": 2, "accumulate": True, "dataset": Even(), "rows": 40}
    ours = train(planned(16, 16), **options)
    assert (ours.accelerator.memplan.plan.micro_batch, ours.accelerator.memplan.plan.accumulation) == (16, 1)
    check_same(train(None, **options), ours)


class Even(scripts.Texts):
    def __init__(self) -> None:
        super().__init__(40)
        self.rows = [(row * 16)[:12] for row in self.rows]


def test_an_optimizer_that_is_prepared_behind_the_model() -> None:
    check_same(train(None, rows=35, apart=True), train(planned(), rows=35, apart=True))


def test_dropout_where_the_batch_is_not_split() -> None:
    options: dict[str, Any] = {"model": "gpt2", "rows": 35}
    ours = train(partial(attach, gpu="cpu:1600KiB", micro_batch=8), **options)
    assert ours.accelerator.memplan.plan.changed
    check_same(train(None, **options), ours)


def test_a_blocks_plan_and_a_split() -> None:
    ours = train(planned(strategy="huggingface"), rows=35)
    assert len(ours.accelerator.memplan.plan.recomputed) == 4
    check_same(train(None, rows=35), ours)


def test_only_batches_that_are_whole() -> None:
    options: dict[str, Any] = {"rows": 35, "loader": {"drop_last": True}}
    check_same(train(None, **options), train(planned(), **options))


def test_workers_keep_the_order() -> None:
    check_same(train(None, loader={"num_workers": 1}), train(planned(), loader={"num_workers": 1}))


class Stream(IterableDataset[dict[str, list[int]]]):
    def __iter__(self) -> Any:
        return iter(scripts.Texts(35))


@pytest.mark.parametrize("dispatch", [False, True])
def test_stream(dispatch: bool) -> None:
    from accelerate import DataLoaderConfiguration

    config = {"dataloader_config": DataLoaderConfiguration(dispatch_batches=dispatch)}
    options: dict[str, Any] = {"dataset": Stream(), "rows": 35, "accelerator": config}
    check_same(train(None, **options), train(planned(), **options))


def test_mixed_precision() -> None:
    options: dict[str, Any] = {"accelerator": {"mixed_precision": "bf16"}, "rows": 35}
    plain = train(None, **options)
    ours = train(partial(attach, gpu="cpu:1GiB", micro_batch=8, strategy="huggingface"), **options)
    assert ours.accelerator.memplan.plan.autocast == "bfloat16"
    check_same(plain, ours)


def test_a_wrong_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.Split, "weights", lambda self, batches: [1 / len(batches)] * len(batches))
    assert train(planned()).differs_by(train(None)) > 100 * CLOSE


class Images(Dataset[dict[str, Any]]):
    """Of ten classes, each a label of its own."""

    def __init__(self, rows: int) -> None:
        chance = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(rows, 3, 32, 32, generator=chance)
        self.classes = torch.randint(10, (rows,), generator=chance)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[at], "labels": self.classes[at]}


def of(model: str, **settings: Any) -> Any:
    return partial(attach, plan=scripts.plan_file(model, 2, 8), **settings)


def test_a_mean_over_tokens_that_are_not_shifted() -> None:
    plain, ours = (train(line, model="bert", rows=35) for line in (None, of("bert")))
    check_same(plain, ours)
    by_rows = train(of("bert", normalise="samples"), model="bert", rows=35)
    assert by_rows.differs_by(plain) > 100 * CLOSE


def test_a_mean_over_samples() -> None:
    options: dict[str, Any] = {"model": "vit", "rows": 35, "loader": {"collate_fn": default_collate}}
    plain, ours, by_hand, by_count = (
        train(line, dataset=Images(35), **options)
        for line in (None, of("vit"), of("vit", normalise="samples"), of("vit", normalise=lambda b: len(b["labels"])))
    )
    check_same(plain, ours)
    assert by_hand.differs_by(ours) == by_count.differs_by(ours) == 0
    alike = train(
        of("vit", normalise=lambda _: 1.0), dataset=Images(35), **options
    )  # the last step has parts of 2 and 1
    assert alike.differs_by(plain) > 100 * CLOSE


def test_adapters_with_dropout_where_the_batch_is_not_split() -> None:
    plain, ours = (
        train(line, model="lora", rows=35)
        for line in (None, partial(attach, plan=scripts.plan_file("lora", 8, 8, strategy="huggingface")))
    )
    assert ours.accelerator.memplan.plan.recomputed
    check_same(plain, ours)


@pytest.mark.parametrize(
    "clip",
    [lambda own, weights: own.clip_grad_norm_(weights, 0.1), lambda own, weights: own.clip_grad_value_(weights, 1e-3)],
    ids=["norm", "value"],
)
def test_clipping_that_bites(clip: Any) -> None:
    plain, ours = (train(line, rows=35, clip=clip) for line in (None, planned()))
    check_same(plain, ours)
    free = train(None, rows=35, clip=lambda *_: None)
    assert free.differs_by(plain) > 10 * CLOSE  # Adam hardly cares for how long a gradient is


def named(worker: int) -> None:
    """A `worker_init_fn`."""


def test_the_loader_of_the_script_stays_as_it_was() -> None:
    loader = DataLoader(
        scripts.Texts(20),
        batch_size=8,
        shuffle=True,
        collate_fn=scripts.padded,
        num_workers=1,
        persistent_workers=True,
        prefetch_factor=3,
        worker_init_fn=named,
    )
    before = dict(vars(loader))
    with scripts.fresh_accelerate():
        accelerator, model = (
            attach(Accelerator(cpu=True), plan=scripts.plan_file("llama", 2, 8)),
            scripts.make_model("llama"),
        )
        prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)[2]
        assert vars(loader) == before
        assert len(loader) == 3
        ours = prepared.base_dataloader
        assert (ours.num_workers, ours.persistent_workers, ours.prefetch_factor) == (1, True, 3)
        assert ours.worker_init_fn is named
        assert len(ours) == 10


@pytest.mark.parametrize(("own", "most_steps"), [(1, 7), (2, 7)])
def test_numbers_that_scripts_make_of_lengths(own: int, most_steps: int) -> None:
    """As transformers' examples do: epochs out of a number of steps, and a mean loss out of what they have added up."""

    def run(attached: bool) -> tuple[int, list[int], list[float], list[Any]]:
        with scripts.fresh_accelerate():
            scripts.set_seed(0)
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=own)
            if attached:
                planned(effective_batch=8 * own)(accelerator)
            model = scripts.make_model("llama")
            loader = DataLoader(scripts.Texts(40), batch_size=8, collate_fn=scripts.padded)
            model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
            a_epoch = -(-len(loader) // own)
            assert a_epoch == -(-len(loader) // accelerator.gradient_accumulation_steps)
            epochs, done, lengths, losses = -(-most_steps // a_epoch), 0, [len(loader)], []
            for _ in range(epochs):
                total = 0.0
                for batch in loader:
                    with accelerator.accumulate(model):
                        loss = model(**batch).loss
                        total += float(loss.detach())
                        accelerator.backward(loss)
                        optimizer.step()
                        optimizer.zero_grad()
                    done += accelerator.sync_gradients
                    if done == most_steps:
                        break
                losses.append(total / len(loader))
                lengths.append(len(loader))
            return done, lengths, losses, [p.detach().clone() for p in model.parameters()]

    plain, ours = run(attached=False), run(attached=True)
    assert plain[0] == ours[0] == most_steps
    assert set(plain[1]) == {5}
    assert ours[1][0] == 5
    assert set(ours[1][1:]) == {20}
    assert ours[2][0] == pytest.approx(plain[2][0], rel=0.05)  # rows of other lengths count otherwise in such a mean
    assert max(float((a - b).abs().max()) for a, b in zip(plain[3], ours[3], strict=True)) <= CLOSE


def test_a_stream_has_no_length() -> None:
    with scripts.fresh_accelerate():
        accelerator = planned()(Accelerator(cpu=True))
        model = scripts.make_model("llama")
        loader = DataLoader(Stream(), batch_size=8, collate_fn=scripts.padded)
        loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)[2]
        for _ in range(2):
            with pytest.raises(TypeError, match="has no len"):
                len(loader)
            next(iter(loader))


class ByEpoch(BatchSampler):
    """Draws another order in each epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.sampler), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return (order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size))


def test_a_batch_sampler_is_told_the_epoch() -> None:
    rows = scripts.Texts(35)

    def made() -> dict[str, Any]:
        return {"batch_sampler": ByEpoch(SequentialSampler(rows), 8, False), "batch_size": 1, "shuffle": None}

    plain, ours = train(None, rows=35, loader=made()), train(planned(), rows=35, loader=made())
    check_same(plain, ours)


@pytest.mark.parametrize("rows", [32, 35])
def test_a_cut_loader_is_as_long_as_it_says(rows: int) -> None:
    inner = ByEpoch(SequentialSampler(range(rows)), 8, False)
    batches = MicroBatches(inner, 1, 2)
    assert len(batches) == len(list(batches)) == -(-rows // 2)
    for rank in range(2):
        shared = BatchSamplerShard(BatchSampler(range(rows), 8, False), 2, rank, split_batches=True)
        cut = MicroBatches(shared, 1, 2)
        assert len(cut) == len(list(cut))
        assert {len(batch) for batch in cut} == {2}


def test_a_router_s_loss_in_half_precision_has_no_parts() -> None:
    model, batch = tiny.llama(use_cache=False)
    model = model.bfloat16()
    assert means.mean_over(model, Recipe(), Sample.of(batch)) == means.SHIFTED
    model.config.output_router_logits = True
    assert means.mean_over(model, Recipe(), Sample.of(batch)) is None


def test_the_plugin_does_the_same() -> None:
    file = planned().keywords["plan"]
    assert train(MemplanPlugin(plan=file).attach).differs_by(train(planned())) == 0


def test_the_accelerator_with_a_plugin_does_the_same() -> None:
    made = partial(MemplanAccelerator, memplan_plugin=MemplanPlugin(plan=planned().keywords["plan"]))
    ours = train(None, kind=made)
    assert ours.accelerator.memplan.plan.accumulation == 4
    assert ours.differs_by(train(planned())) == 0


def test_prepare_is_the_line_and_accelerates_own_prepare_in_one_call() -> None:
    file = planned().keywords["plan"]

    def line(accelerator: Accelerator) -> None:
        def prepare(*objects: Any) -> Any:
            del accelerator.prepare  # Accelerate's own from here on
            return memplan.prepare(accelerator, *objects, plan=file)

        accelerator.prepare = prepare

    ours = train(line, rows=35)
    assert ours.accelerator.memplan.plan.accumulation == 4
    assert ours.differs_by(train(planned(), rows=35)) == 0
    check_same(train(None, rows=35), ours)


def test_prepare_gives_back_what_it_was_given_in_that_order() -> None:
    with scripts.fresh_accelerate():
        model = scripts.make_model("llama")
        loader = scripts.DataLoader(scripts.Texts(16), scripts.BATCH, collate_fn=scripts.padded)
        objects = (loader, torch.optim.AdamW(model.parameters()), model)
        accelerator = Accelerator(cpu=True)
        mine = memplan.prepare(accelerator, *objects, plan=planned().keywords["plan"])
        assert len(next(iter(mine[0]))["labels"]) == 2
        assert mine[1].optimizer is objects[1]
        assert mine[2] is model


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_ENABLED", "no")
    plain = train(None, own_accumulation=2, accumulate=True)
    off = train(planned(), own_accumulation=2, accumulate=True)
    assert off.differs_by(plain) == 0
    assert off.losses == pytest.approx(plain.losses)  # as `accelerator.memplan.loss` has them
    assert (off.accelerator.memplan.plan, off.accelerator.memplan.record()) == (None, {})
    backward = off.accelerator.backward
    off.accelerator.memplan.undo()
    assert off.accelerator.backward is not backward


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_steps_that_the_loop_leaves_out(micro_batch: int, caplog: pytest.LogCaptureFixture) -> None:
    """Half of them before the backward, as for a loss that is no number; half of them behind it, as for a spike."""

    def run(line: Any) -> tuple[list[torch.Tensor], int]:
        with scripts.fresh_accelerate():
            torch.manual_seed(0)
            accelerator = Accelerator(cpu=True)
            if line is not None:
                line(accelerator)
            model = scripts.make_model("llama")
            loader = scripts.DataLoader(scripts.Texts(48), scripts.BATCH, collate_fn=scripts.padded)
            optimizer = torch.optim.AdamW(model.parameters())
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            parts = 1 if line is None else scripts.BATCH // micro_batch
            for at, batch in enumerate(loader):
                step, is_last = at // parts, at % parts == parts - 1
                if step in (1, 3) and is_last:
                    continue
                accelerator.backward(model(**batch).loss)
                if step not in (2, 3) or not is_last:
                    optimizer.step()
                optimizer.zero_grad()
            return [p.detach().clone() for p in model.parameters()], at

    plain, ours = run(None)[0], run(partial(attach, plan=scripts.plan_file("llama", micro_batch, 8)))[0]
    assert max(float((a - b).abs().max()) for a, b in zip(plain, ours, strict=True)) <= CLOSE
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        "the loop left out step 2: no optimizer.step() behind its last micro-batch"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [3, 7])
def test_gradients_that_the_loop_drops_with_its_own_accumulation(bad: int) -> None:
    """The last batch of a step has no loss, also of the first step: what came before it is dropped by `zero_grad`."""

    def run(line: Any) -> list[torch.Tensor]:
        with scripts.fresh_accelerate():
            torch.manual_seed(0)
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
            if line is not None:
                line(accelerator)
            model = scripts.make_model("llama")
            loader = scripts.DataLoader(scripts.Texts(96), scripts.BATCH, collate_fn=scripts.padded)
            model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
            for at, batch in enumerate(loader):
                with accelerator.accumulate(model):
                    if at == bad:
                        optimizer.zero_grad()
                        continue
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            return [p.detach().clone() for p in model.parameters()]

    plain, ours = run(None), run(partial(attach, plan=scripts.plan_file("llama", 8, 32)))
    assert max(float((a - b).abs().max()) for a, b in zip(plain, ours, strict=True)) <= CLOSE


def test_a_loop_that_goes_on_by_counting_where_nothing_is_divided() -> None:
    with scripts.fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        attach(accelerator, plan=scripts.plan_file("llama", 8, 8))
        model = scripts.make_model("llama")
        loader = scripts.DataLoader(scripts.Texts(48), scripts.BATCH, collate_fn=scripts.padded)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        before = [p.detach().clone() for p in model.parameters()]
        for at, batch in enumerate(loader):
            if at < 4:
                continue
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Notebook(GeneralTracker):
    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []

    @property
    def tracker(self) -> Any:
        return self.records

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """A run's arguments."""

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.records.append(values)


@pytest.mark.parametrize("early", [False, True])
def test_trackers_are_told_the_plan(early: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with scripts.fresh_accelerate():
        notebook = Notebook()
        accelerator = Accelerator(cpu=True, log_with=[notebook])
        planned()(accelerator)
        model = scripts.make_model("llama")
        objects = (
            model,
            torch.optim.AdamW(model.parameters()),
            scripts.DataLoader(scripts.Texts(16), scripts.BATCH, collate_fn=scripts.padded),
        )
        if early:
            accelerator.init_trackers("run")
        accelerator.prepare(*objects)
        if not early:
            accelerator.init_trackers("run")
        (record,) = notebook.records
        assert record == accelerator.memplan.plan.record()
        assert record["memplan/micro_batch"] == 2
        said = capsys.readouterr().err
        assert "2 x 4 accumulated = 8 per step (was 8 x 1)" in said
        assert "memplan.attach(accelerator, enabled=False)" in said


@pytest.mark.parametrize("zero_first", [False, True])
def test_the_second_step_is_measured_and_remembered(zero_first: bool, cache_folder: Path) -> None:
    model, batch = tiny.llama(layers=6, rows=32, length=64, hidden_size=128, intermediate_size=352, use_cache=False)
    rows = [{name: value[at] for name, value in batch.items()} for at in range(32)]
    with scripts.fresh_accelerate():
        notebook = Notebook()
        accelerator = Accelerator(cpu=True, log_with=[notebook])
        accelerator.init_trackers("run")
        memplan.attach(accelerator, gpu="cpu:1GiB", micro_batch=2, strategy="huggingface")
        made = model, torch.optim.AdamW(model.parameters()), scripts.DataLoader(rows, scripts.BATCH)
        model, optimizer, loader = accelerator.prepare(*made)
        for batch in loader:
            output = model(**batch)
            if zero_first:
                optimizer.zero_grad()
            accelerator.backward(output.loss)
            optimizer.step()
            if not zero_first:
                optimizer.zero_grad()
    plan = accelerator.memplan.plan
    _, measured = notebook.records
    assert measured == {"memplan/peak_bytes": measured["memplan/peak_bytes"], **plan.record()}
    assert measured["memplan/peak_bytes"] == pytest.approx(plan.peak_bytes, rel=0.01)
    ((run,),) = cache.all_runs().values()
    assert (run.step_s, run.peak_bytes) == (None, measured["memplan/peak_bytes"])


def test_a_loop_that_ends_with_the_first_step_measures_nothing(cache_folder: Path) -> None:
    model, _ = tiny.llama()
    with scripts.fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        planned()(accelerator)
        loader = scripts.DataLoader(scripts.Texts(8), scripts.BATCH, collate_fn=scripts.padded)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert not cache.all_runs()
    assert not torch.autograd._profiler_enabled()  # the record of allocations is not kept any longer


def test_what_the_loss_counts_is_found_where_the_first_row_is_short() -> None:
    """Half of its labels is not half of the batch's length, most of which is padding there."""
    lengths = (4, 14, 17, 13)
    batch = scripts.padded([{"input_ids": list(range(1, n + 1))} for n in lengths])
    assert means.mean_over(scripts.make_model("llama"), Recipe(), Sample.of(batch)) == means.SHIFTED
