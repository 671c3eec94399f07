"""What a tape says a call allocates, against torch's own allocator: on hand-made functions and on random programs."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real import growth_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from memplan.kernels.probes import probed_bytes
from memplan.tape import Tape

Function = Callable[..., object]


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def backward(result: Tensor, *leaves: Tensor) -> None:
    """Gradients of the sum, dense from its root on, and none kept."""
    (result * torch.ones(result.shape)).sum().backward()
    for tensor in leaves:
        tensor.grad = None


def taped(function: Function, *inputs: Tensor) -> Tape:
    """The tape of a call on fakes of the inputs. Autograd runs inside it, so all of it counts as backward's."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        fakes = [torch.empty_strided(t.shape, t.stride()).requires_grad_(t.requires_grad) for t in inputs]
    tape = Tape(nn.Module(), fake)
    for tensor in fakes:
        tape.pass_over(tensor)
    tape.backward = True
    with tape:
        function(*fakes)
    tape.forget()
    for probe, size in probed_bytes(tape.notes.probes).items():
        for row in tape.notes.probes[probe]:
            tape.notes.bytes[row] = size
    return tape


def growth_on(tape: Tape) -> int:
    events = [(tick, size) for tick, size in zip(tape.notes.born, tape.notes.bytes, strict=True)]
    events += [(tick, -size) for tick, size in zip(tape.notes.died, tape.notes.bytes, strict=True) if tick is not None]
    return max(accumulate(size for _, size in sorted(events)), default=0)


def views(x: Tensor) -> None:
    z = x.exp().view(-1)[3:].reshape(-1, 1).t().expand(5, -1)
    backward(z.sum(0).tanh(), x)


def written_in_place(x: Tensor) -> None:
    y = x.exp().clone()
    y.add_(torch.ones(x.shape[-1])).sigmoid_()
    backward(y, x)


def aliases(x: Tensor) -> None:
    y = x.tanh()
    kept = [y, y.detach(), y.data, nn.Parameter(y.detach())]
    z = y.exp()
    del y
    kept.clear()
    backward(z, x)


def copies_that_are_none(x: Tensor) -> None:
    backward(x.exp().contiguous().float().reshape(x.shape).to(torch.float32), x)


def transposed(x: Tensor) -> None:
    backward(x.exp().t().contiguous().tanh(), x)


def dropped_early(x: Tensor) -> None:
    y = x.exp().exp().exp()
    del y
    backward(x.tanh(), x)


def residual(x: Tensor) -> None:
    weight, h = torch.ones(x.shape[-1], x.shape[-1]), x.tanh()
    for _ in range(3):
        h = h + (h @ weight).relu()
    backward(h, x)


def many_uses(x: Tensor) -> None:
    h = x.exp()
    backward(h.sin() + h.cos() + h.tanh() + h * h, x)


def expanded_gradients(x: Tensor) -> None:
    """The gradient of a sum is expanded: the engine cannot write to it."""
    h = x.tanh()
    (h.sum() + h.exp().sum()).backward()
    x.grad = None


def a_shared_gradient(x: Tensor) -> None:
    """Both operands of an addition get the very same gradient."""
    h = x.tanh()
    g = h.exp()
    backward((h + g) + (g.sin() + h), x)


def used_through_views(x: Tensor) -> None:
    h = x.exp()
    backward(h.view(-1).tanh().view(h.shape) + h.t().sin().t() + h, x)


def gathered(x: Tensor) -> None:
    backward(x.tanh().gather(1, torch.zeros(x.shape[0], 3, dtype=torch.long)), x)


def selected(x: Tensor) -> None:
    backward(x.tanh().index_select(0, torch.arange(5)), x)


def indexed(x: Tensor) -> None:
    backward(x.tanh()[torch.arange(5)], x)


def sliced(x: Tensor) -> None:
    h = x.tanh()
    backward(h[:5] + h[5:10], x)


def largest(x: Tensor) -> None:
    backward(x.tanh().max(1).values, x)


def embedded(x: Tensor) -> None:
    backward(functional.embedding(torch.arange(40).view(8, 5) % x.shape[0], x), x)


def normalised(x: Tensor) -> None:
    backward(functional.layer_norm(x.t(), (x.shape[0],), torch.ones(x.shape[0], requires_grad=True)), x)


def attended(x: Tensor) -> None:
    heads = x.tanh().view(1, 2, -1, 16)
    backward(functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True), x)


def in_pieces(x: Tensor) -> None:
    first, second = x.exp().chunk(2, dim=-1)
    backward(torch.cat([first.sin(), second.cos(), first * second]), x)


def checkpointed(x: Tensor) -> None:
    h = x.tanh()
    for _ in range(3):
        h = checkpoint(lambda h: h.tanh().exp().sin(), h, use_reentrant=False)
    backward(h, x)


def in_low_precision(x: Tensor) -> None:
    """oneDNN has scratch for the products, which only running them tells."""
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.gelu(functional.linear(x, x)).softmax(-1)
    backward(y.float(), x)


def with_dropout(x: Tensor) -> None:
    """The only one here that wraps Python numbers, which are a few bytes each."""
    h = x.tanh()
    for _ in range(3):
        h = checkpoint(lambda h: functional.dropout(h.exp(), 0.5).sin(), h, use_reentrant=False)
    backward(h, x)


FUNCTIONS = [
    views,
    written_in_place,
    aliases,
    copies_that_are_none,
    transposed,
    dropped_early,
    residual,
    many_uses,
    expanded_gradients,
    a_shared_gradient,
    used_through_views,
    gathered,
    selected,
    indexed,
    sliced,
    largest,
    embedded,
    normalised,
    attended,
    in_pieces,
    checkpointed,
    in_low_precision,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_followed_to_the_byte(function: Function) -> None:
    x = leaf(32, 64)
    assert growth_on(taped(function, x)) == growth_of(function, x)


def test_followed_but_for_wrapped_numbers() -> None:
    x = leaf(64, 64)
    assert abs(growth_on(taped(with_dropout, x)) - growth_of(with_dropout, x)) < 64


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "through a view": lambda x: x.view(-1).sin().view(x.shape),
    "turned": lambda x: x.t().contiguous().cos(),
    "averaged": lambda x: x - x.mean(0, keepdim=True),
    "again": lambda x: checkpoint(lambda y: y.sigmoid().tanh(), x, use_reentrant=False, preserve_rng_state=False),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "mul": torch.mul, "matmul": torch.matmul}


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """A few steps that each make a tensor of earlier ones."""
    length = draw(st.integers(2, 9))
    names = st.sampled_from([*UNARY, *BINARY])
    return [(draw(names), draw(st.integers(0, i)), draw(st.integers(0, i))) for i in range(length)]


def run_program(program: Sequence[tuple[str, int, int]], x: Tensor) -> None:
    made = [x.tanh()]
    for name, first, second in program:
        made.append(UNARY[name](made[first]) if name in UNARY else BINARY[name](made[first], made[second]))
    result = torch.stack(made[-2:])
    made.clear()
    backward(result, x)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_any_program_is_followed_to_the_byte(program: list[tuple[str, int, int]]) -> None:
    function, x = partial(run_program, program), leaf(16, 16)
    assert growth_on(taped(function, x)) == growth_of(function, x)


class TestValues:
    """Integers, booleans and constants have values; what comes of weights and floating inputs has none."""

    def run(self, function: Callable[[Tensor], object]) -> object:
        found: list[object] = []
        taped(lambda x: found.append(function(x)), torch.ones(4, 8))
        return found[0]

    def test_masks_can_be_read(self) -> None:
        assert self.run(lambda x: bool((torch.ones(x.shape) > 0).all())) is True
        assert self.run(lambda x: bool(torch.ones_like(x, dtype=torch.long).all())) is True
        assert self.run(lambda x: int(torch.arange(8).sum())) == 28

    def test_abstract_values_cannot(self) -> None:
        with pytest.raises(DataDependentOutputException):
            self.run(lambda x: bool((x > 0).all()))

    def test_what_is_written_over_by_an_abstract_value_is_unknown_too(self) -> None:
        with pytest.raises(DataDependentOutputException):
            self.run(lambda x: bool(torch.zeros(4, 8).copy_(x).sum() > 0))

    def test_what_is_written_over_by_a_known_one_is_written_once(self) -> None:
        assert self.run(lambda x: torch.zeros(3).add_(1).tolist()) == [1, 1, 1]

    def test_a_tensor_that_the_model_holds_is_not_written_to(self) -> None:
        own = torch.zeros(3, dtype=torch.long)
        self.run(lambda x: own.add_(1))
        assert own.tolist() == [0, 0, 0]

    def test_writing_in_place_allocates_nothing(self) -> None:
        assert taped(lambda x: torch.zeros(4, 8).copy_(x).add_(x), torch.ones(4, 8)).notes.bytes == [4 * 8 * 4]

    def test_no_layer_is_skipped_by_chance(self) -> None:
        assert self.run(lambda x: bool(torch.rand([]) < 0.999)) is False

    def test_large_constants_are_only_shapes(self) -> None:
        assert isinstance(self.run(lambda x: torch.zeros(1024, 1024)), FakeTensor)
        assert not isinstance(self.run(lambda x: torch.zeros(16, 16)), FakeTensor)
