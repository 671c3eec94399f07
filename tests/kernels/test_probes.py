"""Operators that are run for their workspace: at once where they are small, at smaller shapes where they are not."""

import pytest
import torch
from torch import Tensor

from memplan.kernels import probes
from memplan.kernels.probes import Probe, probed_bytes, wants_probe
from memplan.meter import workspaces_of

A = torch.ops.aten
BF16 = torch.bfloat16


def convolution(samples: int, side: int = 16) -> Probe:
    x, weight = torch.ones(samples, 8, side, side), torch.ones(16, 8, 3, 3)
    return Probe.of(A.convolution.default, (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), {})


def product(rows: int, inner: int, columns: int, *, turned: bool = False) -> Probe:
    left = torch.ones(inner, rows, dtype=BF16).t() if turned else torch.ones(rows, inner, dtype=BF16)
    return Probe.of(A.mm.default, (left, torch.ones(inner, columns, dtype=BF16)), {})


def run(probe: Probe) -> int:
    return workspaces_of([probe.prepare])[0]


def shapes(probe: Probe) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(arg.size, arg.stride) for arg in probe.args if isinstance(arg, probes._Shape)]


@pytest.mark.parametrize(
    ("func", "operands", "wanted"),
    [
        (A.convolution.default, [torch.ones(1, 1, 2, 2)], True),
        (A.mm.default, [torch.ones(2, 2)], False),
        (A.mm.default, [torch.ones(2, 2, dtype=BF16)], True),
        (A._scaled_dot_product_flash_attention_for_cpu_backward.default, [torch.ones(2, dtype=BF16)], True),
        (A._scaled_dot_product_flash_attention_for_cpu_backward.default, [torch.ones(2)], False),
        (A.exp.default, [torch.ones(2, dtype=BF16)], False),
    ],
)
def test_what_is_run(func: torch._ops.OpOverload, operands: list[Tensor], wanted: bool) -> None:
    assert wants_probe(func, operands) == wanted


def test_equal_shapes_are_one_probe() -> None:
    assert len({convolution(2), convolution(2), convolution(3)}) == 2
    assert len({product(4, 8, 4), product(4, 8, 4, turned=True)}) == 2


def test_small_operators_are_run_as_they_are() -> None:
    probe = convolution(4)
    assert probe.runs() == {probe: 1.0}
    assert probed_bytes([probe]) == {probe: run(probe)}


def test_nothing_is_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = product(24, 40, 56)
    first = probed_bytes([probe])
    monkeypatch.setattr(probes, "workspaces_of", lambda _: pytest.fail("run again"))
    assert probed_bytes([probe]) == first


def test_a_convolution_grows_by_the_same_with_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convolution(32)
    monkeypatch.setattr(probes, "_CONVOLUTION_LIMIT_BYTES", whole.operand_bytes // 4)
    weights = whole.runs()
    assert sorted(shapes(probe)[0][0][0] for probe in weights) == [4, 8]
    assert sum(weights.values()) == pytest.approx(1)
    assert probed_bytes([whole])[whole] == run(whole)


def test_a_large_sample_is_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convolution(4)
    monkeypatch.setattr(probes, "_CONVOLUTION_LIMIT_BYTES", whole.operand_bytes // 3)
    ((probe, weight),) = whole.runs().items()
    assert (shapes(probe)[0][0][0], weight) == (1, 4)


def test_what_is_too_large_even_so_counts_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convolution(4, side=24)
    monkeypatch.setattr(probes, "_CONVOLUTION_LIMIT_BYTES", 1)
    assert probed_bytes([whole]) == {whole: whole.operand_bytes}


def test_both_operands_of_a_backward_have_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = torch.ones(8, 4, 6, 6), torch.ones(4, 4, 1, 1), torch.ones(8, 4, 6, 6)
    options = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])
    probe = Probe.of(A.convolution_backward.default, (grad, x, weight, *options), {})
    monkeypatch.setattr(probes, "_CONVOLUTION_LIMIT_BYTES", probe.operand_bytes // 2)
    for smaller in probe.runs():
        (first, _), (second, _), (third, _) = shapes(smaller)
        assert first[0] == second[0] < 8
        assert third == (4, 4, 1, 1)


@pytest.mark.parametrize("turned", [False, True])
def test_sides_of_a_large_product_are_cut(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_PRODUCT_LIMIT_BYTES", 0)
    monkeypatch.setattr(probes, "_PRODUCT_SIDE", 64)
    ((probe, weight),) = product(100, 80, 32, turned=turned).runs().items()
    assert weight == 1.0
    assert shapes(probe) == [((64, 64), (1, 64) if turned else (64, 1)), ((64, 32), (32, 1))]


def test_attention_takes_the_same_for_every_head() -> None:
    def backward(batch: int, heads: int) -> Probe:
        q = torch.ones(batch, 40, heads, 16, dtype=BF16).transpose(1, 2)
        out, normalisers = A._scaled_dot_product_flash_attention_for_cpu(q, q, q)
        operands = (torch.ones_like(out), q, q, q, out, normalisers, 0.0, False)
        return Probe.of(A._scaled_dot_product_flash_attention_for_cpu_backward.default, operands, {})

    many = backward(3, 4)
    ((one, weight),) = many.runs().items()
    assert weight == 1.0
    assert {size[:2] for size, _ in shapes(one)} == {(1, 1)}
    assert probed_bytes([many])[many] == run(many)


def test_expanded_operands_stay_expanded() -> None:
    bias = torch.ones(1, 64).expand(4096, 64)
    shape = probes._Shape(tuple(bias.shape), tuple(bias.stride()), bias.dtype).cut((2048, 2048))
    assert (shape.size, shape.stride) == ((2048, 64), (0, 1))


def layer(steps: int, rows: int = 64, hidden: int = 32) -> tuple[torch.Tensor, ...]:
    weights = (torch.ones(4 * hidden, 16), torch.ones(4 * hidden, hidden), torch.ones(4 * hidden))
    state = torch.ones(1, rows, hidden)
    return torch.ones(steps, rows, 16), *weights, weights[2], state, state


OPTIONS = (False, [], 2, 32, 1, True, False, False, True)


@pytest.mark.parametrize("rows", [64, 5])
def test_a_long_sequence_is_told_by_two_short_ones(rows: int) -> None:
    operands = layer(300, rows)
    output, hidden, cell, kept = A.mkldnn_rnn_layer(*operands, *OPTIONS)
    forward = Probe.of(A.mkldnn_rnn_layer.default, (*operands, *OPTIONS), {})
    assert max(run.args[0].size[0] for run in forward.runs()) < 300
    assert forward.kept_bytes() == kept.numel()
    options = (False, 2, 32, 1, True, True, False, [], False, kept)
    states = (output, hidden, cell, torch.ones_like(output), None, None)
    backward = Probe.of(A.mkldnn_rnn_layer_backward.default, (*operands, *states, *options), {})
    sizes = probed_bytes([forward, backward])
    assert sizes == {forward: run(forward), backward: run(backward)}


def test_without_gradients_a_layer_keeps_nothing() -> None:
    with torch.no_grad():
        probe = Probe.of(A.mkldnn_rnn_layer.default, (*layer(4), *OPTIONS), {})
    assert probe.kept_bytes() == 0
    assert probed_bytes([probe]) == {probe: run(probe)}
