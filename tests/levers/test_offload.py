"""The lever `offload`: results to the bit, a pool that is used again, copies neither too early nor too late."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import pytest
import tiny
import torch
from imprint import Imprint
from real import bytes_of, peak_of
from torch import Tensor, nn

from memplan import levers
from memplan.blocks import alike, find_blocks
from memplan.errors import PlanMismatch, PlanNotFollowed, UsageError
from memplan.levers import host_pool, offload
from memplan.levers.host_memory import HostMemory, NoRoom, pieces_of, usable_bytes
from memplan.levers.host_pool import HostPool, Parcel
from memplan.levers.lanes import Direct, Pairs, Streams, lanes_for, queued_on_paper
from memplan.levers.offload import BOUNDARY, OPTIONS, SAVED
from memplan.link import DEPTH
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import Trace

Results = dict[str, Tensor | None]

MIB = 2**20
MODELS: dict[str, Callable[[], tiny.Made]] = {
    **tiny.WORKLOADS,
    "llama": partial(tiny.llama, use_cache=False),
    "gpt2": partial(tiny.gpt2, use_cache=False),
    "t5": partial(tiny.t5, use_cache=False),
}
for_every_model = pytest.mark.parametrize("name", MODELS)
for_every_option = pytest.mark.parametrize("option", OPTIONS)


def small(limit_bytes: int = 64 * MIB, **settings: Any) -> HostPool:
    """A pool that takes the small tensors of small models."""
    return HostPool(limit_bytes, **{"least_bytes": 512, **settings})


@contextmanager
def offloaded(model: nn.Module, option: str, pool: HostPool, every: int = 1) -> Iterator[nn.Module]:
    """The model with each, or each second, of its blocks offloaded."""
    blocks = find_blocks(model)
    undos = [offload.install(model.get_submodule(path), path, option, pool) for path in blocks[::every]]
    undos.append(offload.install_end(model.get_submodule(blocks[-1]), pool))
    try:
        yield model
    finally:
        for undo in reversed(undos):
            undo()


def run(model: nn.Module, batch: Mapping[str, Tensor], *, bf16: bool = False, micro_steps: int = 1) -> Results:
    """One step without an optimizer: the losses, and all that it leaves behind."""
    torch.manual_seed(7)
    found: Results = {}
    for parameter in model.parameters():
        parameter.grad = None
    for number in range(micro_steps):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model(**batch)["loss"]
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    return found | left_behind(model)


def left_behind(model: nn.Module) -> Results:
    found: Results = {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in named(model)}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    found["random state"] = torch.get_rng_state()
    return found


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters()


def differences(found: Results, wanted: Results) -> list[str]:
    assert found.keys() == wanted.keys()
    pairs = {name: (found[name], wanted[name]) for name in found}
    return [n for n, (a, b) in pairs.items() if a is not b and (a is None or b is None or not torch.equal(a, b))]


@cache
def plain(name: str, bf16: bool = False, micro_steps: int = 1) -> Results:
    return run(*MODELS[name](), bf16=bf16, micro_steps=micro_steps)


# --- nothing changes but where tensors lie ---------------------------------------------------------------------------


@for_every_model
@for_every_option
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
def test_results_are_the_same(name: str, option: str, bf16: bool) -> None:
    model, batch = MODELS[name]()
    pool = small()
    with offloaded(model, option, pool):
        assert differences(run(model, batch, bf16=bf16), plain(name, bf16)) == []
    assert sum(pool.copied.values()) > 0
    assert pool.used_bytes == 0


@for_every_model
def test_results_are_the_same_over_two_micro_batches(name: str) -> None:
    model, batch = MODELS[name]()
    with offloaded(model, SAVED, small(), every=2):
        assert differences(run(model, batch, micro_steps=2), plain(name, micro_steps=2)) == []


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_cache_in_training_changes_nothing(make: Callable[..., tiny.Made]) -> None:
    wanted = run(*make())
    model, batch = make()
    with offloaded(model, SAVED, small()):
        assert differences(run(model, batch), wanted) == []


@for_every_option
def test_two_forwards_before_two_backwards(option: str) -> None:
    def both(model: nn.Module, batch: tiny.Batch) -> Results:
        torch.manual_seed(3)
        losses = [model(**batch)["loss"] for _ in range(2)]
        for loss in losses:
            loss.backward()
        return left_behind(model)

    wanted = both(*MODELS["bert"]())
    model, batch = MODELS["bert"]()
    for lanes in (lambda _: Direct(), queued_on_paper):
        model.zero_grad()
        with offloaded(model, option, small(lanes=lanes)):
            assert differences(both(model, batch), wanted) == []


@pytest.mark.parametrize("option", [SAVED, BOUNDARY])
@pytest.mark.parametrize("name", ["bert", "plain"])
def test_a_retained_graph_runs_backward_again(name: str, option: str) -> None:
    def twice(model: nn.Module, batch: tiny.Batch) -> Results:
        torch.manual_seed(3)
        loss = model(**batch)["loss"]
        loss.backward(retain_graph=True)
        loss.backward()
        return left_behind(model)

    wanted = twice(*MODELS[name]())
    model, batch = MODELS[name]()
    pool = small()
    with offloaded(model, option, pool):
        assert differences(twice(model, batch), wanted) == []
    assert pool.used_bytes == 0


def test_a_gradient_of_a_gradient() -> None:
    def penalty(model: nn.Module, batch: tiny.Batch) -> list[Tensor]:
        torch.manual_seed(3)
        loss = model(**batch)["loss"]
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters())))

    wanted = penalty(*tiny.plain())
    model, batch = tiny.plain()
    with offloaded(model, SAVED, small()):
        assert all(torch.equal(a, b) for a, b in zip(penalty(model, batch), wanted, strict=True))


@for_every_option
def test_nothing_is_copied_where_nothing_runs_back(option: str) -> None:
    model, batch = MODELS["bert"]()
    pool = small()
    with offloaded(model, option, pool):
        with torch.no_grad():
            model(**batch)
        model.eval()
        model(**batch)["loss"].backward()
    assert (pool.copied, pool.bytes) == ({}, 0)


# --- what is copied ---------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """Autograd saves its input, one tensor of its own making, a mask and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64, 64))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return ((x @ self.weight).sin() * mask).sigmoid()


def test_only_what_lives_for_the_block_alone_is_copied() -> None:
    block, pool = Doubled(), small()
    x, mask = torch.rand(64, 64, requires_grad=True), torch.rand(64, 64)
    offload.install(block, "block", SAVED, pool)
    block(x, mask).sum().backward()
    own = 1  # what sin saves; the product of sin needs no gradient of the mask
    assert pool.copied == {"block": (1 + own) * x.nbytes}
    offload.install(block, "block", BOUNDARY, pool)
    block(x, mask).sum().backward()
    assert pool.copied == {"block": x.nbytes}
    assert pool.bytes == 2 * x.nbytes


def test_small_tensors_stay() -> None:
    block, pool = Doubled(), HostPool(MIB)
    offload.install(block, "block", SAVED, pool)
    block(torch.rand(64, 64), torch.rand(64, 64)).sum().backward()
    assert (pool.copied, pool.bytes) == ({"block": 0}, 0)


def test_views_of_one_storage_are_copied_once() -> None:
    class Split(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = super().forward(x).chunk(3, dim=-1)
            return (q * k.t().contiguous().t()) * v

    torch.manual_seed(0)
    block, pool, x = Split(16, 48), small(), torch.rand(16, 16, requires_grad=True)
    block(x).sum().backward()
    wanted = left_behind(block)
    block.zero_grad()
    offload.install(block, "block", SAVED, pool)
    block(x).sum().backward()
    assert differences(left_behind(block), wanted) == []
    assert pool.copied["block"] <= x.nbytes + 3 * x.nbytes + 2 * x.nbytes  # input, q k v, and the copy and a product


def test_unknown_options_are_refused() -> None:
    with pytest.raises(PlanMismatch, match="the options are offload-boundary, offload-saved"):
        offload.install(nn.Linear(1, 1), "block", "offload-half", small())


# --- the pool ---------------------------------------------------------------------------------------------------------


@for_every_option
def test_the_pool_does_not_grow_after_the_first_step(option: str) -> None:
    model, batch = MODELS["gpt2"]()
    pool = small()
    sizes = []
    with offloaded(model, option, pool):
        for _ in range(4):
            run(model, batch)
            sizes.append(pool.bytes)
    assert sizes == [sizes[0]] * 4
    assert 0 < sum(pool.copied.values()) <= sizes[0]


def test_shorter_batches_use_what_longer_ones_left() -> None:
    pool = small()
    model, _ = MODELS["llama"]()
    with offloaded(model, SAVED, pool):
        run(model, tiny.tokens(4, 32))
        size = pool.bytes
        for length in (7, 20, 31, 13):
            run(model, tiny.tokens(4, length))
    assert pool.bytes <= size * 1.5


@pytest.mark.parametrize("size", [1, 4096, 4097, 5000, 100_000, 3 * MIB - 1, 10**9 + 7])
def test_pieces_are_few_and_hold_what_they_should(size: int) -> None:
    pieces = pieces_of(size)
    assert len(pieces) <= 4
    assert all(piece & (piece - 1) == 0 for piece in pieces)
    assert size <= sum(pieces) <= max(4096, size + max(4096, size // 8))
    assert sum(pieces_of(usable_bytes(9 * size))) <= max(4096, 9 * size + 4096)


@for_every_option
def test_what_passes_the_limit_stays_on_the_device(option: str) -> None:
    model, batch = MODELS["bert"]()
    pool = small(8 * 1024)
    with offloaded(model, option, pool):
        with pytest.warns(PlanNotFollowed, match=r"would pass the host limit of 8.00 KiB.*Raise the host limit"):
            found = run(model, batch)
        assert pool.bytes == 8 * 1024
        assert differences(found, plain("bert")) == []
    assert pool.used_bytes == 0


class Refusing:
    """Lanes of a system that has no host memory left."""

    is_queued = False

    def host_buffer(self, size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nand more lines")


def test_a_system_without_memory_is_told_and_survived() -> None:
    model, batch = MODELS["bert"]()
    with offloaded(model, SAVED, small(lanes=lambda _: Refusing())):
        with pytest.warns(PlanNotFollowed, match=r"the system gave no .* of host memory .*CUDA error: out of memory"):
            found = run(model, batch)
        assert differences(found, plain("bert")) == []


def test_a_warning_that_is_an_error_leaves_no_memory_in_use() -> None:
    model, batch = MODELS["bert"]()
    pool = small(16 * 1024)
    with offloaded(model, SAVED, pool), pytest.raises(PlanNotFollowed):  # as all warnings are in these tests
        run(model, batch)
    assert pool.used_bytes == 0


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="a host pool of 0 bytes"):
        HostPool(0)


def test_smaller_pieces_make_room_for_a_larger_one() -> None:
    memory, flat = HostMemory(16 * 1024), torch.zeros(16 * 1024, dtype=torch.uint8)
    for size in (4096, 8192):
        memory.lease(size, flat, Direct())
    first = memory.lease(16 * 1024, flat, Direct())
    assert (memory.bytes, memory.idle_bytes) == (16 * 1024, 0)
    with pytest.raises(NoRoom):
        memory.lease(1, flat, Direct())
    del first
    assert len(memory.lease(5000, flat, Direct()).pieces) == 1  # the larger piece, as it is at hand


# --- faults -----------------------------------------------------------------------------------------------------------


@for_every_option
@pytest.mark.parametrize("where", ["in a later block", "in the backward"])
def test_the_users_error_passes_and_the_pool_gets_its_memory_back(option: str, where: str) -> None:
    model, batch = MODELS["bert"]()
    pool = small()
    last = model.get_submodule(find_blocks(model)[-1])

    def fail(*_: object) -> None:
        raise ZeroDivisionError("the user's own")

    def in_backward(_module: nn.Module, _args: object, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).register_hook(fail)

    with offloaded(model, option, pool):
        handle = last.register_forward_hook(fail if where == "in a later block" else in_backward)
        with pytest.raises(ZeroDivisionError, match="the user's own"):
            run(model, batch)
        handle.remove()
        assert pool.used_bytes == 0
        assert differences(run(model, batch), plain("bert")) == []


def test_a_device_without_room_for_a_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error passes, and nothing that was not filled is ever given."""
    fetch, left = Direct.fetch, [3]

    def failing(self: Direct, pairs: Pairs) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("the device is full")
        return fetch(self, pairs)

    monkeypatch.setattr(Direct, "fetch", failing)
    model, batch = MODELS["plain"]()
    pool = small()
    with offloaded(model, SAVED, pool):
        torch.manual_seed(7)
        loss = model(**batch)["loss"]
        with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
            loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        found = {"loss 0": loss.detach(), **left_behind(model)}
        del loss
    assert differences(found, plain("plain")) == []
    gc.collect()  # the error's frames hold a part of the graph
    assert pool.used_bytes == 0


class Late:
    """Copies only when they are waited for, and only what is still there: a stream that is as slow as can be."""

    is_queued = True

    def __init__(self) -> None:
        self.flying: dict[int, tuple[str, list[Any], int]] = {}
        self.most = {"out": 0, "back": 0}
        self.log: list[str] = []
        self.lost = 0
        self.tickets = 0

    def send(self, pairs: Pairs) -> object:
        return self._begun("out", pairs)

    def fetch(self, pairs: Pairs) -> object:
        for target, _ in pairs:
            target.view(torch.uint8).fill_(255)  # whoever reads it too early reads no number
        return self._begun("back", pairs)

    def _begun(self, lane: str, pairs: Pairs) -> int:
        self.tickets += 1
        ends = [tuple(_where(tensor) for tensor in pair) for pair in pairs]
        self.flying[self.tickets] = lane, ends, sum(target.nbytes for target, _ in pairs)
        self.log.append(f"{lane} {self.tickets}")
        self.most[lane] = max(self.most[lane], sum(size for on, _, size in self.flying.values() if on == lane))
        return self.tickets

    def wait(self, ticket: object) -> None:
        assert isinstance(ticket, int)
        lane = self.flying[ticket][0] if ticket in self.flying else ""  # or it is done already
        for earlier in [n for n, (on, _, _) in self.flying.items() if on == lane and n <= ticket]:
            for target, source in self.flying.pop(earlier)[1]:
                ends = _there(target), _there(source)
                if ends[0] is None or ends[1] is None:
                    self.lost += 1
                else:
                    ends[0].copy_(ends[1])
        self.log.append(f"waited {ticket}")

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def trim(self) -> None:
        pass


def _where(tensor: Tensor) -> tuple[Any, ...]:
    storage = weakref.ref(tensor.untyped_storage())
    return storage, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _there(end: tuple[Any, ...]) -> Tensor | None:
    storage = end[0]()
    if storage is None:
        return None
    return torch.empty(0, dtype=end[1]).set_(storage, *end[2:])


def late(name: str, option: str, every: int = 1) -> tuple[Late, HostPool, Results]:
    lanes = Late()
    pool = small(lanes=lambda _: lanes)
    model, batch = MODELS[name]()
    before = copy.deepcopy(model.state_dict())  # with the running statistics
    with offloaded(model, option, pool, every):
        for _ in range(2):
            model.load_state_dict(before)
            found = run(model, batch)
    return lanes, pool, found


@for_every_option
@pytest.mark.parametrize(("name", "every"), [*((name, 1) for name in MODELS), ("t5", 2), ("resnet", 2)])
def test_copies_are_waited_for_and_few_are_in_flight(name: str, option: str, every: int) -> None:
    lanes, pool, found = late(name, option, every)
    assert differences(found, plain(name)) == []
    assert (lanes.lost, lanes.flying, pool.used_bytes) == (0, {}, 0)
    assert max(lanes.most.values()) <= DEPTH * max(pool.copied.values())


def test_tensors_are_fetched_before_they_are_needed() -> None:
    """Of three equal blocks: two copies are in flight, none during the head, and two are fetched ahead."""
    lanes, _, _ = late("bert", BOUNDARY)
    assert lanes.log[: len(lanes.log) // 2] == [
        *("out 1", "out 2", "waited 1", "out 3", "waited 2", "waited 3"),
        *("back 4", "back 5", "waited 4", "back 6", "waited 5", "waited 6"),
    ]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_graph_that_is_dropped_waits_for_its_copies(name: str) -> None:
    lanes = Late()
    pool = small(lanes=lambda _: lanes)
    model, batch = MODELS[name]()
    with offloaded(model, SAVED, pool):
        loss = model(**batch)["loss"]
        del loss
        blocks = find_blocks(model)
        handle = model.get_submodule(blocks[-1]).register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        gc.collect()  # the error's frames hold the graph
        assert (lanes.lost, lanes.flying, pool.used_bytes) == (0, {}, 0)
        assert differences(run(model, batch), plain(name)) == []


def test_a_tensor_that_is_written_to_while_it_is_copied_is_noticed() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            self.inner = x @ self.weight
            return self.inner.sin()

    block, lanes = Leaky(), Late()
    offload.install(block, "block", SAVED, small(lanes=lambda _: lanes))
    out = block(torch.rand(64, 64))
    with torch.no_grad():
        block.inner.add_(1)
    with pytest.raises(RuntimeError, match="written to in place"):
        out.sum().backward()


class Driver:
    """What torch has of a device with streams; tells what it is asked to do."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names = iter(("out", "back"))

    def Stream(self, device: torch.device) -> "Driver.Queue":  # noqa: N802  # as torch calls it
        return self.Queue(self.log, next(self.names))

    def Event(self) -> "Driver.Mark":  # noqa: N802  # as torch calls it
        return self.Mark(self.log)

    def current_stream(self, device: torch.device) -> "Driver.Queue":
        return self.Queue(self.log, "main")

    @contextmanager
    def stream(self, queue: "Driver.Queue") -> Iterator[None]:
        self.log.append(f"on {queue.name}")
        yield
        self.log.append("off")

    class Queue:
        def __init__(self, log: list[str], name: str) -> None:
            self.log, self.name = log, name

        def wait_stream(self, other: "Driver.Queue") -> None:
            self.log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, mark: "Driver.Mark") -> None:
            self.log.append(f"{self.name} waits for the mark of {mark.name}")

    class Mark:
        def __init__(self, log: list[str]) -> None:
            self.log = log

        def record(self, queue: "Driver.Queue") -> None:
            self.name = queue.name
            self.log.append(f"marked on {queue.name}")


def test_streams_wait_for_what_was_computed_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(torch, "get_device_module", lambda _: driver)
    lanes = Streams(torch.device("cuda", 0))
    source, host, target = torch.rand(3), torch.empty(3), torch.empty(3)
    lanes.wait(lanes.send([(host, source)]))
    lanes.wait(lanes.fetch([(target, host)]))
    assert torch.equal(target, source)
    assert driver.log == [
        line
        for lane in ("out", "back")
        for line in (
            f"{lane} waits for main",
            f"on {lane}",
            f"marked on {lane}",
            "off",
            f"main waits for the mark of {lane}",
        )
    ]


# --- the tests notice executors that are wrong ------------------------------------------------------------------------


def test_memory_that_is_used_again_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    lease = HostMemory.lease

    def careless(self: HostMemory, size: int, source: Tensor, lanes: Any) -> Any:
        found = lease(self, size, source, lanes)
        self._give_back(found.pieces)
        return found

    monkeypatch.setattr(HostMemory, "lease", careless)
    model, batch = MODELS["gpt2"]()
    with offloaded(model, SAVED, small()):
        assert any("gradient" in name for name in differences(run(model, batch), plain("gpt2")))


def test_sources_that_are_let_go_too_early_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Parcel.send

    def careless(self: Parcel) -> None:
        send(self)
        for item in self.items:
            item.source = host_pool.Held(torch.empty(0))

    monkeypatch.setattr(Parcel, "send", careless)
    lanes, _, found = late("gpt2", SAVED)
    assert lanes.lost > 0
    assert differences(found, plain("gpt2")) != []


@pytest.mark.parametrize("lane", ["out", "back"])
def test_a_wait_that_is_left_out_is_noticed(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Late.wait

    def careless(self: Late, ticket: object) -> None:
        if ticket in self.flying and self.flying[ticket][0] != lane:
            wait(self, ticket)

    monkeypatch.setattr(Late, "wait", careless)
    assert differences(late("gpt2", SAVED)[2], plain("gpt2")) != []


def test_copies_without_a_limit_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pool, "DEPTH", 3)
    lanes, pool, _ = late("bert", BOUNDARY)
    assert max(lanes.most.values()) > DEPTH * max(pool.copied.values())


# --- undo and copies --------------------------------------------------------------------------------------------------


@for_every_model
@for_every_option
def test_undo_leaves_no_trace(name: str, option: str) -> None:
    model, batch = MODELS[name]()
    before = Imprint(model)
    with offloaded(model, option, small(), every=2):
        assert before.differences() != []
    assert before.differences() == []
    assert differences(run(model, batch), plain(name)) == []


@for_every_option
def test_undo_of_the_models_own_checkpointing(option: str) -> None:
    model, _ = MODELS["bert"]()
    model.gradient_checkpointing_enable()
    before = Imprint(model)
    with offloaded(model, option, small()):
        pass
    assert before.differences() == []


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("name", ["bert", "plain", "lora", "resnet"])
@for_every_option
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["copied", "saved and loaded"])
def test_a_copy_has_a_pool_of_its_own(name: str, option: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = MODELS[name]()
    pool = small()
    with offloaded(model, option, pool):
        copied = duplicate(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
        assert differences(run(copied, batch), plain(name)) == []
    assert pool.bytes == 0
    pools = {getattr(part, "pool", None) for module in copied.modules() for part in vars(module).values()} - {None}
    assert len(pools) == 1
    assert pools.pop().bytes > 0


@for_every_option
@pytest.mark.parametrize("make", [tiny.plain, tiny.bert])
def test_offloaded_blocks_are_alike(make: Callable[..., tiny.Made], option: str) -> None:
    model, _ = make(layers=4)
    with offloaded(model, option, small()):
        assert [len(group) for group in alike(model, find_blocks(model))] == [3, 1]  # the last one ends them


# --- predicted and measured -------------------------------------------------------------------------------------------


def wide(name: str) -> tiny.Made:
    if name == "llama":
        return tiny.llama(layers=4, rows=2, length=64, hidden_size=64, intermediate_size=192, use_cache=False)
    return tiny.gpt2(layers=4, rows=2, length=64, n_embd=64, use_cache=False)


def predicted(model: nn.Module, batch: tiny.Batch, installed: Callable[[], Any] = nullcontext, micro: int = 1) -> Trace:
    return Recorder(model, Recipe(optimizer="sgd", accumulation=micro)).record(Sample.of(batch), installed)


@for_every_option
@pytest.mark.parametrize(("name", "micro"), [("llama", 1), ("gpt2", 2)])
def test_the_peak_is_what_was_predicted(name: str, option: str, micro: int) -> None:
    """A trace has the device's memory alone; on a CPU that of the pool comes on top, unless it was there before."""
    model, batch = wide(name)
    recipe = Recipe(optimizer="sgd", accumulation=micro)
    abstract, pool = small(), small()
    trace = predicted(model, batch, lambda: offloaded(model, option, abstract), micro)
    with offloaded(model, option, pool):
        first = peak_of(model, Sample.of(batch), recipe)
        steady = peak_of(model, Sample.of(batch), recipe)
    assert abs(steady - int(trace.live.max())) <= 512
    assert abs(first - int(trace.live.max()) - pool.bytes) <= 512
    assert abstract.copied == pool.copied
    assert abstract.bytes == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_copied_is_not_held(name: str) -> None:
    model, batch = wide(name)
    pool, none = small(), predicted(model, batch)
    held = {}
    for option in OPTIONS:
        trace = predicted(model, batch, lambda option=option: offloaded(model, option, pool))
        held[option] = int(trace.live_at(trace.steps[0].loss.start) - trace.live_at(trace.steps[0].forward.start))
        if option == SAVED:
            plainly = int(none.live_at(none.steps[0].loss.start) - none.live_at(none.steps[0].forward.start))
            freed, copied = plainly - held[SAVED], sum(pool.copied.values())
            assert 0.95 * copied <= freed <= copied
    batch_bytes = bytes_of([batch["input_ids"]]) * 64 * 4
    assert max(held.values()) < plainly / 4 + batch_bytes
    assert trace.how == "fake"


def test_a_trace_on_paper_has_the_copies_in_flight() -> None:
    model, batch = wide("llama")
    direct, queued = small(), small(lanes=queued_on_paper)
    plain_trace = predicted(model, batch, lambda: offloaded(model, SAVED, direct))
    trace = predicted(model, batch, lambda: offloaded(model, SAVED, queued))
    assert direct.copied == queued.copied
    extra = int(trace.live.max() - plain_trace.live.max())
    assert 0 < extra <= DEPTH * max(queued.copied.values())
    start = trace.steps[0].loss.start
    assert trace.live_at(start) == plain_trace.live_at(plain_trace.steps[0].loss.start)  # nothing in flight


def test_a_long_model_is_traced_by_a_few_blocks() -> None:
    model, batch = tiny.llama(layers=12, use_cache=False)
    pool = small()
    short = predicted(model, batch, lambda: offloaded(model, SAVED, pool))
    assert 0 < len(pool.copied) < 12
    model.config.told = [*range(11), 0]  # a list per layer: traced whole
    whole = predicted(model, batch, lambda: offloaded(model, SAVED, pool))
    assert len(pool.copied) == 12
    assert int(short.live.max()) == int(whole.live.max())


def test_the_cpu_has_no_streams() -> None:
    assert not lanes_for(torch.device("cpu")).is_queued


def test_the_link_is_measured() -> None:
    assert 1e7 < offload.measured_link(torch.device("cpu")) < 1e12


@pytest.mark.parametrize("head", ["keep", "chunked-5"])
def test_copies_end_with_the_blocks_whatever_the_head_does(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace says "keep" of the head, and the plan that is applied says nothing of it."""
    ends: list[object] = []
    monkeypatch.setattr(offload, "install_end", lambda module, _: ends.append(module) or (lambda: None))
    model, _ = tiny.llama(layers=2)
    decisions = {**dict.fromkeys(find_blocks(model), SAVED), "lm_head": head}
    with levers.decided(model, decisions, pool=small()):
        assert ends == [model.model.layers[1]]
