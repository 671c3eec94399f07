"""What goes wrong in a recomputation is the user's to see, and what stands in a lever's way is said in the plan."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import heads
import peft
import pytest
import tiny
import torch
from imprint import Imprint
from test_recompute import MODELS, differences, run
from torch import Tensor, nn
from torch.nn import functional

import memplan
from memplan import levers
from memplan.blocks import find_blocks
from memplan.levers import RECOMPUTE, loss_head
from memplan.levers.host_pool import HostPool
from memplan.levers.offload import BOUNDARY
from memplan.levers.uses import Uses
from memplan.strategy import Lever, Strategy

HOST = 2**24
RERUNNING = {"recompute": RECOMPUTE, "offload": BOUNDARY}

for_every_rerun = pytest.mark.parametrize("option", RERUNNING.values(), ids=RERUNNING)
for_blocks = pytest.mark.parametrize("name", ["bert", "plain"])  # run by transformers' own switch, and by a forward


class Trouble(Exception):
    """The user's own."""


@contextmanager
def by(model: nn.Module, option: str) -> Iterator[None]:
    with levers.decided(model, dict.fromkeys(find_blocks(model), option), {}, HostPool(HOST, least_bytes=1)):
        yield


@contextmanager
def raising(module: nn.Module, at: int) -> Iterator[None]:
    """The module's forward number `at` from now on raises."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Trouble

    handle = module.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def leaf_of(model: nn.Module) -> nn.Module:
    """Something inside the first block, whose recomputation is the last."""
    block = model.get_submodule(find_blocks(model)[0])
    return next(module for module in block.modules() if isinstance(module, nn.Linear))


# --- exceptions -------------------------------------------------------------------------------------------------------


@for_blocks
@for_every_rerun
def test_an_exception_in_a_recomputation_is_the_users(name: str, option: str) -> None:
    """Planned or with the plan undone, the model is as usable afterwards as before."""
    wanted = run(*MODELS[name]())
    model, batch = MODELS[name]()
    before = Imprint(model)
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}  # of batch norms, which counted the batch

    def recover() -> None:
        model.zero_grad()
        for key, buffer in model.named_buffers():
            buffer.copy_(buffers[key])

    with by(model, option):
        with raising(leaf_of(model), at=2), pytest.raises(Trouble):
            run(model, batch)
        recover()
        assert differences(run(model, batch), wanted) == []
    recover()
    assert differences(run(model, batch), wanted) == []
    recover()
    torch.set_rng_state(torch.from_numpy(before.random[0]))
    assert before.differences() == []


@for_blocks
def test_a_checkpoint_can_be_run_backward_twice(name: str) -> None:
    def twice(model: nn.Module, batch: tiny.Batch) -> list[Tensor | None]:
        torch.manual_seed(7)
        loss = model(**batch)["loss"]
        loss.backward(retain_graph=True)
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    wanted = twice(*MODELS[name]())
    model, batch = MODELS[name]()
    with by(model, RECOMPUTE):
        found = twice(model, batch)
    pairs = zip(found, wanted, strict=True)
    assert all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


# --- what is refused --------------------------------------------------------------------------------------------------


def reads_the_logits(model: nn.Module, batch: object) -> Tensor:
    output = model(**batch)  # type: ignore[arg-type]  # a dict
    loss: Tensor = output.loss + 0 * output.logits.sum()
    return loss


def planned(made: tiny.Made, lever: Lever, **how: Any) -> memplan.Plan:
    model, batch = made
    strategy = Strategy("one", objective="peak", levers=(lever,))
    return memplan.plan(model, "cpu:1GiB", sample=batch, micro_batch=2, strategy=strategy, **how)


def test_logits_that_the_loss_reads_are_left_alone_and_the_plan_says_so() -> None:
    plan = planned(tiny.llama(layers=2), "loss-head", loss=reads_the_logits)
    assert "lm_head" not in plan.decisions
    assert "the loss cannot be computed in chunks: the loss reads the logits as a whole" in plan.assumptions


def test_blocks_whose_recomputation_differs_are_left_alone_and_the_plan_says_so() -> None:
    """The block takes another path the second time, as one that counts its calls does."""
    model, batch = tiny.plain()
    block = type(model.blocks[0])
    calls = [0]

    class Counting(block):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            calls[0] += 1
            out: Tensor = super().forward(x, scale=scale)
            return out if calls[0] % 2 else out.tanh().sin() + out.exp()

    for each in model.blocks:
        each.__class__ = Counting
    plan = planned((model, batch), "recompute")
    assert set(plan.decisions.values()) <= {"keep"}
    assert any(line.startswith("blocks cannot be recomputed: ") for line in plan.assumptions)


# --- the loss head, planned -----------------------------------------------------------------------------------------


def frozen_head() -> tiny.Made:
    model, batch = tiny.llama(layers=2)
    model.lm_head.requires_grad_(False)
    return model, batch


def ignored() -> tiny.Made:
    """Padded to the last token, as a batch of nothing but prompts is."""
    model, batch = tiny.llama(layers=2)
    return model, {**batch, "labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("make", [frozen_head, heads.gemma2, partial(tiny.llama, layers=2, tie_word_embeddings=True)])
def test_the_head_is_planned_in_chunks_where_it_is_frozen_capped_or_tied(make: Callable[[], tiny.Made]) -> None:
    plan = planned(make(), "loss-head")
    assert not [line for line in plan.assumptions if line.startswith("the loss cannot be computed")]
    wanted = run(*make())
    model, batch = make()
    with levers.decided(model, {"lm_head": "chunked-5"}):
        found = run(model, batch)
    assert all((a is None) == (found[name] is None) for name, a in wanted.items())
    torch.testing.assert_close(
        {k: v for k, v in found.items() if v is not None}, {k: v for k, v in wanted.items() if v is not None}
    )


def test_a_plan_whose_sample_has_no_label_to_learn() -> None:
    """Torch's mean over nothing is not a number, so nothing can be proved on it: the plan stands without the lever."""
    plan = planned(ignored(), "loss-head")
    assert "lm_head" not in plan.decisions
    (line,) = [line for line in plan.assumptions if line.startswith("the loss cannot be computed in chunks: ")]
    assert "every label of the sample is ignored (-100), so that its loss is nan" in line


def test_a_step_in_chunks_that_has_no_label_to_learn() -> None:
    """As a batch of a planned run may be, whatever the sample was."""
    model, batch = ignored()
    with levers.decided(model, {"lm_head": "chunked-5"}):
        loss = model(**batch)["loss"]
        loss.backward()
        assert loss_head.uses(model.lm_head) == Uses(losses=1)
    assert loss.isnan()
    assert model.lm_head.weight.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def label_smoother(model: nn.Module, batch: Any) -> Tensor:
    """As transformers' `LabelSmoother`, which takes the labels away from the model and does without `cross_entropy`."""
    logs = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    picked: Tensor = -logs.gather(-1, batch["labels"][:, 1:, None]).mean()
    return 0.9 * picked - 0.1 * logs.mean()


class Likelihood(nn.Module):
    """A cross-entropy by its parts."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.nll_loss(logits.log_softmax(-1), labels)


def without_name() -> tiny.Made:
    """A model that does not say what its head is."""
    model, batch = heads.own()
    model.loss = Likelihood()
    return model, batch


@pytest.mark.parametrize(("make", "loss"), [(tiny.llama, label_smoother), (without_name, None)])
def test_a_loss_without_cross_entropy_leaves_the_head_alone_and_the_plan_says_so(
    make: Callable[[], tiny.Made], loss: Callable[..., Tensor] | None
) -> None:
    plan = planned(make(), "loss-head", loss=loss)
    assert set(plan.decisions.values()) == {"keep"}
    assert "the loss cannot be computed in chunks: the loss reads the logits as a whole" in plan.assumptions


class Widening(nn.Module):
    """Its widest layer outside of blocks is no head."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.cross_entropy(self.narrow(torch.relu(self.wide(x))), labels)}


def test_a_layer_that_is_no_head_is_not_spoken_of() -> None:
    batch = {"x": torch.randn(8, 16), "labels": torch.randint(4, (8,))}
    plan = planned((Widening(), batch), "loss-head")
    assert not [line for line in plan.assumptions if line.startswith("the loss cannot be computed")]


def adapted(**how: Any) -> tiny.Made:
    base, batch = tiny.llama(layers=1)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **how)).train(), batch


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
        ({"target_modules": ["q_proj", "lm_head"]}, "Linear"),
    ],
)
def test_a_head_that_peft_has_replaced_is_left_alone_and_the_plan_says_so(how: Any, kind: str) -> None:
    plan = planned(adapted(**how), "loss-head")
    assert not [path for path in plan.decisions if "lm_head" in path]
    reason = f"the head is a {kind}, not a plain linear layer"
    assert f"the loss cannot be computed in chunks: {reason}" in plan.assumptions
