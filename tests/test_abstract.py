"""`AbstractModel`, `untouched` and `preserved`: afterwards the model is as it was, whatever happened in between."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from imprint import Imprint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memplan.abstract import AbstractModel, preserved, untouched

every_workload = pytest.mark.parametrize("name", tiny.WORKLOADS)


def fakes() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def lived_in(make: Callable[[], tiny.Made]) -> nn.Module:
    """A model in the middle of somebody's work: gradients, hooks, a frozen part, modes and attributes of its own."""
    model, batch = make()
    model(**batch)["loss"].backward()
    modules = list(model.modules())
    modules[-1].register_forward_hook(lambda *_: None)
    modules[0].register_forward_pre_hook(lambda *_: None)
    modules[-1].eval()
    for parameter in modules[-1].parameters():
        parameter.requires_grad_(False)
    modules[0].notes = ["mine", {"deep": 1}]
    modules[0].seen = {"a", "b"}
    return model


def meddle(model: nn.Module) -> None:
    """All that a step, a plan or a careless forward may do to a model."""
    torch.rand(3), random.random(), np.random.rand()
    for module in model.modules():
        module.train(not module.training)
        module.scratch = torch.zeros(3)
    model.notes.append("somebody else's")
    model.seen.clear()
    model.register_forward_hook(lambda *_: None)
    model.register_buffer("extra", torch.zeros(2))
    model.forward = lambda **_: None
    name = next(iter(dict(model.named_children())))
    delattr(model, name)


@every_workload
def test_a_model_is_untouched(name: str) -> None:
    model = lived_in(tiny.WORKLOADS[name])
    before = Imprint(model)
    with AbstractModel(model, fakes()):
        meddle(model)
    assert before.differences() == []


@every_workload
def test_a_model_is_untouched_by_an_exception(name: str) -> None:
    model = lived_in(tiny.WORKLOADS[name])
    before = Imprint(model)
    for manager in (AbstractModel(model, fakes()), untouched(model)):
        with pytest.raises(KeyboardInterrupt), manager:  # noqa: PT012 -- meddling is what is to be undone
            meddle(model)
            raise KeyboardInterrupt
        assert before.differences() == []


def test_a_model_is_untouched_by_a_failure_to_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lived_in(tiny.plain)
    before = Imprint(model)
    swapped: list[nn.Module] = []
    swap = AbstractModel._swap

    def failing(self: AbstractModel, module: nn.Module) -> None:
        if len(swapped) == 5:
            raise MemoryError
        swapped.append(module)
        swap(self, module)

    monkeypatch.setattr(AbstractModel, "_swap", failing)
    with pytest.raises(MemoryError), AbstractModel(model, fakes()):
        raise AssertionError("not entered")
    assert before.differences() == []


@every_workload
def test_inside_floating_tensors_are_fake_and_no_others(name: str) -> None:
    model, _ = tiny.WORKLOADS[name]()
    shapes = {n: (t.shape, t.stride(), t.dtype) for n, t in model.state_dict(keep_vars=True).items()}
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    with AbstractModel(model, fakes()):
        inside = model.state_dict(keep_vars=True)
        assert {n: (t.shape, t.stride(), t.dtype) for n, t in inside.items()} == shapes
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
        for tensor in (*model.parameters(), *model.buffers()):
            assert isinstance(tensor, FakeTensor) == tensor.is_floating_point()
            assert tensor.device.type == "cpu"


def test_integer_buffers_keep_their_values_and_are_copies() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("positions", torch.arange(5))
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("scale", torch.ones(3))
    model.register_buffer("nothing", None)
    before = Imprint(model)
    with AbstractModel(model, fakes()):
        assert model.positions.tolist() == [0, 1, 2, 3, 4]
        assert model.mask.tolist() == [True, False]
        assert isinstance(model.scale, FakeTensor)
        assert model.nothing is None
        model.positions.zero_()
        model.mask.fill_(True)
    assert before.differences() == []


def test_tied_weights_stay_tied() -> None:
    model, _ = tiny.gpt2(layers=1)
    with AbstractModel(model, fakes()) as abstract:
        assert model.lm_head.weight is model.transformer.wte.weight
        assert len(abstract.stand_in) == len(list(model.parameters()))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert not isinstance(model.lm_head.weight, FakeTensor)


def test_stand_ins_are_known_by_their_originals() -> None:
    model, _ = tiny.plain(layers=2)
    originals = dict(model.named_parameters())
    with AbstractModel(model, fakes()) as abstract:
        assert all(abstract.stand_in[id(originals[n])] is p for n, p in model.named_parameters())


@every_workload
def test_models_on_meta(name: str) -> None:
    model, _ = tiny.WORKLOADS[name]()
    model.to("meta")
    before = Imprint(model)
    with AbstractModel(model, fakes()):
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert before.differences() == []
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 6).t(), torch.ones(1, 6).expand(4, 6), torch.ones(2, dtype=torch.bfloat16)]
)
def test_imitations_have_the_same_layout(tensor: Tensor) -> None:
    imitation = AbstractModel(nn.Linear(1, 1), fakes()).imitate(tensor)
    assert isinstance(imitation, FakeTensor)
    assert (imitation.shape, imitation.stride(), imitation.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


# --- preserved --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "plain", "gpt2"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_real_step_leaves_nothing_behind(name: str, fails: bool) -> None:
    make = tiny.WORKLOADS[name]
    model, batch = lived_in(make), make()[1]
    before = Imprint(model)
    try:
        with preserved(model):
            assert all(parameter.grad is None for parameter in model.parameters())
            model.train()
            model(**batch)["loss"].backward()
            assert before.differences()
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert fails
    assert before.differences() == []


def test_preserved_gives_back_gradients_and_buffers_themselves() -> None:
    model, batch = tiny.plain(layers=1)
    model(**batch)["loss"].backward()
    grads = [parameter.grad for parameter in model.parameters()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with preserved(model):
        model(**batch)["loss"].backward()
        assert int(model.blocks[0].norm.num_batches_tracked) == 2
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
