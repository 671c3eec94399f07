"""`lengthened`: the trace made from a few blocks against that of all of them, column by column."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import memplan.recorder
from memplan import levers
from memplan.blocks import find_blocks
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.repeat import NotPeriodic, lengthened
from memplan.runs import ENOUGH, FEWEST, Run, long_runs, shortened
from memplan.samples import Sample
from memplan.trace import Trace


@dataclass
class Watch:
    """What the recorder did with its long runs."""

    runs: list[Run] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch, original = Watch(), memplan.recorder.lengthened

    def watched(trace: Trace, runs: Sequence[Run]) -> Trace:
        try:
            made = original(trace, runs)
        except NotPeriodic as reason:
            watch.refusals.append(str(reason))
            raise
        watch.runs += runs
        return made

    monkeypatch.setattr(memplan.recorder, "lengthened", watched)
    return watch


def traced(
    made: tiny.Made,
    accumulation: int = 1,
    options: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    times: int = 1,
) -> Trace:
    """As the recorder does it; the second time of few blocks too, the third time of them alone."""
    model, batch = made
    decisions = dict(zip(find_blocks(model), options, strict=True)) if options else {}
    installed = (lambda: levers.decided(model, decisions)) if options else nullcontext
    recorder = Recorder(model, Recipe(autocast=autocast, accumulation=accumulation))
    return [recorder.record(Sample.of(batch), installed) for _ in range(times)][-1]


def whole(
    made: tiny.Made,
    accumulation: int = 1,
    options: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
) -> Trace:
    """The same, every block of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memplan.recorder, "long_runs", lambda *_: [])
        return traced(made, accumulation, options, autocast)


def settled(trace: Trace) -> Trace:
    """With the tensors that go one right after the other in the order of their births: chance decides about some."""
    died, births = trace.died.copy(), set(trace.born.tolist())
    dying = [int(row) for row in np.argsort(died, kind="stable") if died[row] < trace.ticks]
    moment: list[int] = []
    for row in [*dying, None]:
        if moment and (row is None or died[row] != trace.died[moment[-1]] + 1 or int(trace.died[row]) in births):
            ticks = sorted(trace.died[moment])
            died[sorted(moment, key=lambda each: trace.born[each])] = ticks
            moment = []
        if row is not None:
            moment.append(row)
    return replace(trace, died=died)


def differences(a: Trace, b: Trace) -> list[str]:
    """Which columns are not the same, tables that they point to looked up and storages in order of birth."""
    found = [name for name in ("ticks", "steps", "optimizer", "optimizer_ops") if getattr(a, name) != getattr(b, name)]
    first, second = _columns(a), _columns(b)
    found += [name for name, column in first.items() if not np.array_equal(column, second[name])]
    if a.breakdown(a.peak_tick) != b.breakdown(b.peak_tick):
        found.append("breakdown")
    return found


def _columns(trace: Trace) -> dict[str, np.ndarray]:
    order = np.lexsort((trace.storage_bytes, trace.storage_category, trace.died, trace.born))
    modules, names, dtypes = np.array(trace.modules), np.array(trace.op_names), np.array(trace.dtypes)
    return {
        "live": trace.live,
        "storage_bytes": trace.storage_bytes[order],
        "storage_category": trace.storage_category[order],
        "storage_module": modules[trace.storage_module[order]],
        "born": trace.born[order],
        "died": trace.died[order],
        "op_name": names[trace.op_name],
        "op_module": modules[trace.op_module],
        "op_flops": trace.op_flops,
        "op_bytes": trace.op_bytes,
        "op_dtype": dtypes[trace.op_dtype],
    }


LAYERS = 9  # seven are traced at first, then five

LONG: dict[str, Callable[[], tiny.Made]] = {
    "llama": partial(tiny.llama, layers=LAYERS, use_cache=False),
    "bert": partial(tiny.bert, layers=LAYERS),
    "lora": partial(tiny.lora, layers=LAYERS),
}
KEEP, RECOMPUTE = "keep", "recompute"


@pytest.mark.parametrize(
    ("name", "option", "accumulation"), [("llama", RECOMPUTE, 2), ("bert", KEEP, 2), ("lora", RECOMPUTE, 1)]
)
def test_a_lengthened_trace_is_the_whole_one(name: str, option: str, accumulation: int, watch: Watch) -> None:
    made = LONG[name]()
    trace = traced(made, accumulation, [option] * LAYERS, times=3)
    assert [len(run.omitted) for run in watch.runs] == [2, 2, 4, 4]
    assert differences(trace, whole(made, accumulation, [option] * LAYERS)) == []
    assert set(trace.modules) == {path for path, _ in made[0].named_modules()}


@pytest.mark.parametrize(("name", "accumulation"), [("llama", 1), ("bert", 2), ("lora", 1)])
def test_what_autocast_has_cast_goes_at_the_end_of_its_region(name: str, accumulation: int, watch: Watch) -> None:
    """Of all blocks at one moment, in an order of its own, where nothing else keeps it: blocks are recomputed."""
    made, options = LONG[name](), [RECOMPUTE] * LAYERS
    trace = traced(made, accumulation, options, torch.bfloat16, times=3)
    assert [len(run.omitted) for run in watch.runs] == [2, 2, 4, 4]
    assert differences(settled(trace), settled(whole(made, accumulation, options, torch.bfloat16))) == []


def test_transformers_own_checkpointing(watch: Watch) -> None:
    made = LONG["llama"]()
    made[0].gradient_checkpointing_enable()
    trace = traced(made)
    assert len(watch.runs) == 1
    assert differences(trace, whole(made)) == []


MIXED = {
    "one long run": [KEEP] * 9 + [RECOMPUTE] * 2,
    "two long runs": [RECOMPUTE] * 8 + [KEEP] * 9,
    "two, then three": [RECOMPUTE] * 8 + [KEEP] * 8 + [RECOMPUTE] * 6,
}


@pytest.mark.parametrize(("flags", "accumulation"), list(zip(MIXED, (1, 2, 1), strict=True)))
def test_mixed_plans(flags: str, accumulation: int, watch: Watch) -> None:
    options = MIXED[flags]
    made = Chain(len(options)), {"x": torch.randn(4, 8)}
    trace = traced(made, accumulation, options, times=3)
    assert differences(trace, whole(made, accumulation, options)) == []
    lengths = [len(list(group)) for _, group in groupby(options)]
    assert len(watch.runs) == sum(length > kept for kept in (7, 7, 5, 5) for length in lengths)


def test_a_plan_with_no_long_run_is_traced_whole(watch: Watch) -> None:
    options = [KEEP, RECOMPUTE] * 5
    made = Chain(10), {"x": torch.randn(4, 8)}
    assert differences(traced(made, 1, options), whole(made, 1, options)) == []
    assert not watch.runs
    assert not watch.refusals


@pytest.mark.parametrize(("kept", "copies"), [(5, 4), (5, 6), (7, 2), (7, 4)])
def test_a_wrong_number_of_copies_is_seen(kept: int, copies: int) -> None:
    """The comparison above would not pass whatever it is given."""
    made = Chain(10), {"x": torch.randn(4, 8)}
    model, _ = made
    (run,) = long_runs(model, find_blocks(model), kept)
    with shortened(model, [run]):
        short = whole(made)
    ends = kept // 2
    names = (*run.blocks[: ends + 1], *(f"{run.container}.{100 + k}" for k in range(copies)), *run.blocks[-ends:])
    wrong = differences(lengthened(short, [replace(run, blocks=names)]), whole(made))
    assert {"ticks", "live", "steps", "op_flops"} <= set(wrong)


def test_shortened_puts_every_block_back() -> None:
    model, _ = LONG["llama"]()
    layers = list(model.model.layers)
    (run,) = long_runs(model, find_blocks(model), FEWEST)
    with pytest.raises(KeyboardInterrupt), shortened(model, [run]):  # noqa: PT012 -- what is left by it is put back
        assert len(model.model.layers) == FEWEST
        raise KeyboardInterrupt
    assert all(a is b for a, b in zip(model.model.layers, layers, strict=True))
    assert [name for name, _ in model.model.layers.named_children()] == [str(k) for k in range(LAYERS)]


# --- where blocks look the same and are not ---------------------------------------------------------------------------


class Chain(nn.Module):
    """Blocks that look the same; the model around them may treat them differently."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.narrow(torch.relu(self.wide(x)))

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(layers))

    def chain(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x).square().mean()


class EveryOther(Chain):
    def chain(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x).sin() if number % 2 else block(x)
        return x


class EveryFifth(Chain):
    """Of five blocks none would differ in what it does up to the next."""

    def chain(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x).sin() if number % 5 == 4 else block(x)
        return x


class Tapped(Chain):
    """The sixth block's output is used twice, which five blocks do not show."""

    def chain(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 5:
                x = x + x.tanh()
        return x


class OddFirst(Chain):
    def chain(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) if number else block(x).sin()
        return x


class Backwards(Chain):
    def chain(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Twice(Chain):
    def chain(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(block(x))
        return x


class Skips(Chain):
    """Each block reads what the one three before it made."""

    def chain(self, x: Tensor) -> Tensor:
        seen = [x, x, x]
        for block in self.blocks:
            x = block(x) * seen.pop(0).tanh()
            seen.append(x)
        return x


class Collects(Chain):
    """All intermediate results are held to the end of the forward, and all are in the loss."""

    def chain(self, x: Tensor) -> Tensor:
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return torch.stack(seen)


class Grows(Chain):
    def chain(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.cat([x, block(x)[:1]])
        return x


class Fixed(Chain):
    """It counts on all of its blocks."""

    def chain(self, x: Tensor) -> Tensor:
        for number in range(LAYERS):
            x = self.blocks[number](x)
        return x


@pytest.mark.parametrize(("kind", "accumulation"), [(Chain, 1), (Chain, 2), (Backwards, 2), (Collects, 2), (Fixed, 1)])
def test_whatever_is_done_the_trace_is_the_whole_one(kind: type[Chain], accumulation: int, watch: Watch) -> None:
    made = kind(), {"x": torch.randn(4, 8)}
    assert long_runs(made[0], find_blocks(made[0]), ENOUGH)
    assert differences(traced(made, accumulation, times=3), whole(made, accumulation)) == []
    assert bool(watch.runs) or kind is not Chain


@pytest.mark.parametrize("kind", [EveryOther, EveryFifth, Twice, Skips, Grows])
def test_differences_are_found_and_said_and_all_blocks_traced(kind: type[Chain], watch: Watch) -> None:
    made = kind(), {"x": torch.randn(4, 8)}
    trace = traced(made)
    assert not watch.runs
    assert len(watch.refusals) == 1
    assert "blocks.3" in watch.refusals[0]
    assert differences(trace, whole(made)) == []


def test_where_five_are_too_few_seven_are_traced_from_there_on(watch: Watch) -> None:
    model, batch = OddFirst(), {"x": torch.randn(4, 8)}
    recorder = Recorder(model, Recipe())
    for _ in range(3):
        assert differences(recorder.record(Sample.of(batch)), whole((model, batch))) == []
    assert [run.kept for run in watch.runs] == [ENOUGH] * 3
    assert len(watch.refusals) == 1
    assert "blocks.2" in watch.refusals[0]


def test_what_only_seven_show_is_not_traced_by_five(watch: Watch) -> None:
    model, batch = Tapped(12), {"x": torch.randn(4, 8)}
    recorder = Recorder(model, Recipe())
    for _ in range(3):
        recorder.record(Sample.of(batch))
    assert [run.kept for run in watch.runs] == [ENOUGH, ENOUGH, FEWEST, ENOUGH]


# --- which runs are worth it ------------------------------------------------------------------------------------------


def test_a_run_is_longer_than_what_is_kept() -> None:
    for layers, kept, expected in ((7, 7, []), (8, 7, [1]), (9, 7, [2]), (5, 5, []), (6, 5, [1])):
        model = Chain(layers)
        assert [len(run.omitted) for run in long_runs(model, find_blocks(model), kept)] == expected


def test_a_run_names_its_parts() -> None:
    model = Chain(9)
    (run,) = long_runs(model, find_blocks(model), ENOUGH)
    assert (run.container, run.template, run.omitted) == ("blocks", "blocks.3", ("blocks.4", "blocks.5"))


def test_a_sequential_is_not_shortened() -> None:
    model = nn.Sequential(*(Chain.Block() for _ in range(9)))
    assert long_runs(model, find_blocks(model), FEWEST) == []


def test_a_config_with_a_list_per_layer_is_believed() -> None:
    model, _ = LONG["llama"]()
    assert long_runs(model, find_blocks(model), FEWEST)
    model.config.rates = [0.1] * LAYERS
    assert long_runs(model, find_blocks(model), FEWEST)
    model.config.rates = [0.1] * (LAYERS - 1) + [0.2]
    assert long_runs(model, find_blocks(model), FEWEST) == []
