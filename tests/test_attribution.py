"""Whom a tape says each operator and each byte belongs to: in forward, backward, and when a block is recomputed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memplan.tape import Tape


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Tree(nn.Module):
    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(8) for _ in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = checkpoint(branch, x, use_reentrant=False, preserve_rng_state=False) if self.recompute else branch(x)
        return x.exp()


def owners(tape: Tape, operator: str, first: int = 0) -> list[str]:
    """Whose operators of a name are, in order."""
    number = tape.notes.op_names[f"aten::{operator}"]
    return [tape.notes.modules[column[1]] for column in tape.notes.op_columns[first:] if column[0] == number]


def recorded(model: nn.Module, x: Tensor) -> tuple[Tape, int]:
    """The tape of a forward and a backward of a real model, and its operator where the backward begins."""
    tape = Tape(model, None)
    with tape:
        loss = model(x).sum()
        border = len(tape.notes.op_columns)
        tape.backward = True
        loss.backward()
    return tape, border


class TestModules:
    def test_forward(self) -> None:
        tape, _ = recorded(Tree(), torch.ones(4, 8))
        assert owners(tape, "addmm") == [f"branches.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
        assert owners(tape, "tanh") == ["branches.0", "branches.1"]
        assert owners(tape, "exp") == [""]

    def test_backward_belongs_to_whoever_ran_forward(self) -> None:
        tape, border = recorded(Tree(), torch.ones(4, 8))
        assert owners(tape, "tanh_backward", border) == ["branches.1", "branches.0"]
        products = list(dict.fromkeys(owners(tape, "mm", border)))
        assert products == ["branches.1.down", "branches.1.up", "branches.0.down", "branches.0.up"]

    def test_recomputation_belongs_to_the_block_and_is_told_apart(self) -> None:
        tape, border = recorded(Tree(recompute=True), torch.ones(4, 8))
        assert owners(tape, "tanh", border) == ["branches.1", "branches.0"]
        assert owners(tape, "tanh_backward", border) == ["branches.1", "branches.0"]
        again = [row for row, flag in enumerate(tape.notes.recomputed) if flag]
        assert {tape.notes.modules[tape.notes.module[row]].split(".")[0] for row in again} == {"branches"}

    def test_early_stop_leaves_no_module_open(self) -> None:
        """Recomputation ends by an exception as soon as the last saved tensor is there: before `down` has run."""
        tape, border = recorded(Tree(recompute=True), torch.ones(4, 8))
        assert owners(tape, "addmm", border) == ["branches.1.up", "branches.0.up"]
        assert tape.stack == [0]

    def test_visits_are_the_forwards(self) -> None:
        tape, border = recorded(Tree(), torch.ones(4, 8))
        paths = [tape.notes.modules[visit[0]] for visit in tape.notes.visits]
        assert paths == [*(f"branches.{i}{name}" for i in (0, 1) for name in (".up", ".down", "")), ""]
        assert all(first <= last <= border for _, _, _, first, last in tape.notes.visits)

    def test_modules_of_other_models_are_passed_over(self) -> None:
        stranger = nn.Linear(8, 8)
        tape = Tape(Tree(), None)
        with tape:
            stranger(torch.ones(1, 8))
        assert owners(tape, "addmm") == [""]
        assert not tape.notes.visits

    def test_nothing_stays_behind(self) -> None:
        before = [dict(hooks) for hooks in global_hooks()]
        random_state = torch.get_rng_state
        with pytest.raises(RuntimeError, match="shapes"), Tape(Tree(), None):
            Branch(8)(torch.ones(1, 7))
        assert [dict(hooks) for hooks in global_hooks()] == before
        assert torch.get_rng_state is random_state


def global_hooks() -> list[dict[int, Any]]:
    return [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
