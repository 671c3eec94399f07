"""A loop that trains by another loss than the output's is told so before anything is learnt."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from integrations import scripts
from memplan.errors import UsageError
from memplan.integrations.accelerate import attach
from memplan.integrations.trained_loss import OutputLoss


def own(output: Any, labels: Tensor) -> Tensor:
    """A mean over the labels where the model's is over those that have one before them."""
    return cross_entropy(output.logits.flatten(0, 1), labels.flatten())


NOTHING, ANOTHER, MORE = "", "another loss than the one in the output", "more of the output of LlamaForCausalLM in it"

TRAINED: dict[str, tuple[Callable[[nn.Module, Any, Any], Tensor], str]] = {
    "the output's": (lambda _, output, __: output.loss, NOTHING),
    "the output's by its key, divided": (lambda _, output, __: output["loss"].float().mean() / 3, NOTHING),
    "with a penalty": (lambda m, o, _: sum((p.square().sum() for p in m.parameters()), o.loss * 2), NOTHING),
    "with a penalty before": (lambda m, o, _: sum(p.square().sum() for p in m.parameters()) + o.loss, NOTHING),
    "with a penalty on a product": (lambda m, o, _: o.loss + (m.lm_head.weight @ m.lm_head.weight.T).norm(), NOTHING),
    "with a term of the logits": (lambda _, output, __: output.loss + output.logits.square().mean(), MORE),
    "with a term of the logits before": (lambda _, o, __: o.logits.square().mean() + o.loss, MORE),
    "with another one's of the logits": (lambda _, o, batch: o.loss / 2 + own(o, batch["labels"]) / 2, MORE),
    "of the logits": (lambda _, output, batch: own(output, batch["labels"]), ANOTHER),
    "a penalty alone": (lambda m, _, __: sum((p.square().sum() for p in m.parameters()), torch.zeros(())), ANOTHER),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained(name: str) -> None:
    trained, words = TRAINED[name]
    model, batch = tiny.llama()
    hooks = len(model._forward_hooks)
    watched = OutputLoss(model)
    loss = trained(model, model(**batch), batch)
    if not words:
        watched.check(loss)
    else:
        with pytest.raises(UsageError, match=words):
            watched.check(loss)
    assert len(model._forward_hooks) == hooks
    watched.check(own(model(**batch), batch["labels"]))  # it looks once


def test_a_model_that_was_not_called_is_not_judged() -> None:
    model, batch = tiny.llama()
    watched = OutputLoss(model)
    watched.check(model.forward(**batch).logits.sum())


@pytest.mark.parametrize("said", [{}, {"normalise": "tokens"}, {"loss": lambda m, b: own(m(**b), b["labels"])}])
def test_in_a_script(said: dict[str, Any]) -> None:
    plan = scripts.plan_file("llama", 2, 8)
    with scripts.fresh_accelerate():
        accelerator = scripts.Accelerator(cpu=True)
        partial(attach, plan=plan, **said)(accelerator)
        net = scripts.make_model("llama")
        before = [p.detach().clone() for p in net.parameters()]
        loader = DataLoader(scripts.Texts(40), batch_size=8, collate_fn=scripts.padded)
        optimizer = torch.optim.AdamW(net.parameters())
        net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        batches = iter(loader)
        batch = next(batches)
        loss = own(net(**batch), batch["labels"])
        if said:
            accelerator.backward(loss)
        else:
            with pytest.raises(UsageError, match=r"Pass the function that computes the whole loss to memplan\.attach"):
                accelerator.backward(loss)
            assert all(p.grad is None for p in net.parameters())
        assert all(map(torch.equal, before, net.parameters()))


def test_undo_leaves_the_model_alone() -> None:
    with scripts.fresh_accelerate():
        accelerator = attach(scripts.Accelerator(cpu=True), plan=scripts.plan_file("llama", 2, 8))
        net = scripts.make_model("llama")
        hooks = len(net._forward_hooks)
        loader = DataLoader(scripts.Texts(40), batch_size=8, collate_fn=scripts.padded)
        accelerator.prepare(net, torch.optim.AdamW(net.parameters()), loader)
        accelerator.memplan.undo()
        assert len(net._forward_hooks) == hooks
