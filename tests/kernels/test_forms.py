"""Results by form: what is made again is what the operator would have given, and what cannot be known is run."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memplan.kernels import forms
from memplan.kernels.cuda import CudaBackend
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample

aten = torch.ops.aten

MODE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return forms.empty(MODE, shape, dtype)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_KNOWN", {})


def ran(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> tuple[Any, bool]:
    """The result, and whether the operator was run for it."""
    runs: list[int] = []

    def run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        runs.append(1)
        return func(*args, **kwargs)

    with torch.utils._python_dispatch._disable_current_modes():
        return forms.results(MODE, run, func, args, kwargs or {}), bool(runs)


def told(tensor: Any) -> tuple[object, ...] | None:
    """All that a fake tensor says."""
    if tensor is None:
        return None
    assert type(tensor) is FakeTensor
    rest = {name: value for name, value in vars(tensor).items() if not name.endswith(("_vc", "_epoch"))}
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.untyped_storage().nbytes(),
        torch._C._dispatch_key_set(tensor),
        rest,
    )


KNOWN: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "a product": (aten.mm.default, lambda: (fake(3, 4), fake(4, 5))),
    "a view": (aten.view.default, lambda: (fake(3, 4), [12])),
    "a view that is transposed": (aten.t.default, lambda: (fake(3, 4),)),
    "a part": (aten.slice.Tensor, lambda: (fake(6, 4), 0, 2, 5)),
    "a view that does not say so": (aten._unsafe_view.default, lambda: (fake(3, 4), [4, 3])),
    "expanded": (aten.expand.default, lambda: (fake(1, 4), [3, 4])),
    "lists": (aten.cat.default, lambda: ([fake(2, 4), fake(3, 4)], 0)),
    "several views": (aten.split.Tensor, lambda: (fake(6, 4), 2)),
    "several tensors": (aten.native_dropout.default, lambda: (fake(3, 4), 0.5, True)),
    "some of several": (
        aten.convolution_backward.default,
        lambda: (
            *(fake(2, 3, 4), fake(2, 3, 4), fake(3, 3, 1), [3], [1], [0], [1], False, [0], 1),
            [False, True, True],
        ),
    ),
    "in place": (aten.add_.Tensor, lambda: (fake(3, 4), fake(3, 4))),
    "another type": (aten._to_copy.default, lambda: (fake(3, 4),)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_made_again_is_what_the_operator_gives(name: str) -> None:
    func, arguments = KNOWN[name]
    kwargs = {"dtype": torch.bfloat16} if func is aten._to_copy.default else {}
    first, ran_first = ran(func, arguments(), kwargs)
    args = arguments()
    again, ran_again = ran(func, args, kwargs)
    assert (ran_first, ran_again) == (True, False)
    assert type(again) is type(first)
    each = again if isinstance(again, list | tuple) else [again]
    assert [told(t) for t in each] == [told(t) for t in (first if isinstance(first, list | tuple) else [first])]
    given = {t.untyped_storage()._cdata for t in forms.leaves(args) if isinstance(t, Tensor)}
    with MODE:
        true = func(*args, **kwargs)
    true = true if isinstance(true, list | tuple) else [true]
    shares = [t is not None and t.untyped_storage()._cdata in given for t in true]
    assert [t is not None and t.untyped_storage()._cdata in given for t in each] == shares


def test_an_operator_in_place_gives_its_operand() -> None:
    ran(aten.mul_.Tensor, (fake(3), fake(3)))
    mine = fake(3)
    again, has_run = ran(aten.mul_.Tensor, (mine, fake(3)))
    assert again is mine
    assert not has_run


@pytest.mark.parametrize(
    "other",
    [
        lambda: (fake(4, 3).t(), fake(4, 5)),
        lambda: (fake(3, 4, dtype=torch.bfloat16), fake(4, 5, dtype=torch.bfloat16)),
        lambda: (fake(6, 4)[3:], fake(4, 5)),
    ],
    ids=["strides", "type", "place in its storage"],
)
def test_another_form_is_run(other: Callable[[], tuple[Any, ...]]) -> None:
    ran(aten.mm.default, (fake(3, 4), fake(4, 5)))
    assert ran(aten.mm.default, other())[1]


@pytest.mark.parametrize("pair", [(1, 1.0), (1, True), (0, False), (2, None)])
def test_equal_numbers_of_other_types_are_other_arguments(pair: tuple[Any, Any]) -> None:
    made = [forms._described(aten.mm.default, (value,), {}, []) for value in pair]
    assert made[0] != made[1]


def test_lists_are_told_from_what_is_beside_them() -> None:
    a, b = fake(2), fake(2)
    made = {forms._described(aten.mm.default, args, {}, []) for args in [([a], b), (a, [b]), ([a, b],), (a, b)]}
    assert len(made) == 4


@pytest.mark.parametrize(
    ("func", "arguments"),
    [
        (aten.add.Tensor, lambda: (fake(3), torch.ones(3))),
        (aten.mul.Tensor, lambda: (fake(3, dtype=torch.complex64), fake(3))),
        (aten.t_.default, lambda: (fake(3, 4),)),
        (aten.resize_.default, lambda: (fake(3, 4), [2, 2])),
        (aten.set_.source_Tensor, lambda: (fake(3), fake(3))),
    ],
    ids=["a tensor with values", "complex numbers", "transposed in place", "another size", "another storage"],
)
def test_what_the_form_does_not_say_is_run_each_time(func: Any, arguments: Callable[[], tuple[Any, ...]]) -> None:
    assert [ran(func, arguments())[1] for _ in range(3)] == [True] * 3


@pytest.mark.slow
def test_an_lstm_keeps_nothing_without_gradients_and_something_with_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm = nn.Linear(16, 16), nn.LSTM(16, 32, batch_first=True)
            self.start = nn.Parameter(torch.zeros(1, 4, 32))

        def forward(self, x: Tensor) -> Tensor:
            states = self.start * 2, self.start * 3
            kept: Tensor = checkpoint(lambda x: self.lstm(x, states)[0], self.first(x), use_reentrant=True)
            return kept

    def peak(model: nn.Module) -> int:
        batch = torch.randn(4, 64, 16)
        recipe = Recipe(loss=lambda model, batch: model(batch).square().mean())
        return Recorder(model, recipe).record(Sample.of(batch)).peak_bytes

    model = Net()
    known = peak(model), peak(model)
    forms._KNOWN.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_described", lambda *_: None)
        assert known == (peak(model),) * 2


def test_a_view_in_inference_mode_is_what_torch_makes_of_it() -> None:
    ran(aten.slice.Tensor, (fake(6, 4), 0, 2, 5))
    mine = fake(6, 4)
    with torch.inference_mode():
        view, has_run = ran(aten.slice.Tensor, (mine, 0, 2, 5))
        assert has_run
    assert not view.is_inference()


def test_what_is_not_torch_s_own_is_run_each_time() -> None:
    rows = 3

    @torch.library.custom_op("memplan_tests::padded", mutates_args=())
    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(rows)

    @padded.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_zeros(rows)

    func = torch.ops.memplan_tests.padded.default
    assert ran(func, (fake(2),))[0].shape == (3,)
    rows = 5
    assert ran(func, (fake(2),))[0].shape == (5,)


def test_an_error_is_raised_each_time() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="reduction dim"):
            ran(aten.mm.default, (fake(3, 4), fake(5, 6)))


def test_no_more_is_known_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_MOST_KNOWN", 3)
    for size in range(1, 12):
        ran(aten.neg.default, (fake(size),))
        assert len(forms._KNOWN) <= 3


def test_an_access_to_data_that_is_not_there_is_refused_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="data pointer"):
        fake(3).data_ptr()


@pytest.mark.parametrize("backend", [None, CudaBackend((8, 0))])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_step_is_recorded_the_same_without_knowing_anything(
    make: Callable[..., Any], backend: CudaBackend | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make()

    def recorded() -> dict[str, Any]:
        recorder = Recorder(model, Recipe(), *([backend] if backend else []))
        trace = recorder.record(Sample.of(batch), accumulation=2)
        return {name: getattr(trace, name) for name in trace.__dataclass_fields__}

    recorded()
    known = recorded()
    monkeypatch.setattr(forms, "_described", lambda *_: None)  # nothing is known by its form
    for name, value in recorded().items():
        same = np.array_equal(known[name], value) if isinstance(value, np.ndarray) else known[name] == value
        assert same, name
