"""The ways out of a plan that does not fit: sentences with numbers, the least change that suffices first."""

from typing import Any

import pytest

from memplan.advice import large_enough, ways_out
from memplan.gpus import Gpu
from memplan.plan_record import Budget

MIB, GIB = 2**20, 2**30

FULL = {"params": 4, "buffers": 0, "inputs": 0, "optimizer": 8, "grads": 3, "activations/a": 5, "activations/b": 1}
FULL = {name: size * GIB for name, size in {**FULL, "logits/loss": 1, "temporaries": 1}.items()}
LORA = {**FULL, "optimizer": 80 * MIB, "grads": 40 * MIB}


def ways(missing_bytes: int, breakdown: dict[str, int] = FULL, **changes: Any) -> tuple[str, ...]:
    needed = sum(breakdown.values())
    usable = needed - missing_bytes
    given = {"phase": "backward", "smallest_bytes": needed, "micro_batch": 1, "can_split": True, **changes}
    gpu = given.pop("gpu", "24GiB")
    budget = Budget(gpu=gpu, total_bytes=usable + 2 * GIB, others_bytes=0, context_bytes=GIB, margin_bytes=GIB)
    return ways_out(breakdown, given.pop("phase"), budget=budget, **given)


def test_three_ways_the_least_change_that_suffices_first() -> None:
    first, second, third = ways(GIB)
    assert first == "An 8-bit optimizer (optimizer='adam8bit') saves about 5.97 GiB."
    assert second == "Half the sequence length or image area saves about 4.00 GiB."
    assert third.startswith("Stepping the optimizer inside the backward (a live one, ")
    assert third.endswith(" saves about 3.00 GiB.")


def test_what_is_not_enough_by_itself_comes_after_what_is_by_how_much_it_saves() -> None:
    first, second, third = ways(7 * GIB)
    paged = "an optimizer whose state is paged to the host (bnb.optim.PagedAdamW8bit)"
    assert first == f"Stepping inside the backward with {paged} saves about 11.00 GiB."
    assert second == "LoRA instead of training all weights saves about 10.89 GiB of gradients and states."
    assert third.startswith("The smallest card that is large enough is ")


@pytest.mark.parametrize(("can_split", "how"), [(True, "more accumulation"), (False, "this one is not split")])
def test_a_smaller_micro_batch(can_split: bool, how: str) -> None:
    first = ways(GIB, micro_batch=4, can_split=can_split)[0]
    assert first.startswith("A micro-batch of 1 (")
    assert how in first
    assert "6.00 GiB" in first  # three quarters of activations, loss and temporaries


def test_a_peak_in_the_optimizer_is_helped_by_a_fused_one_and_not_by_shorter_sequences() -> None:
    found = ways(MIB, phase="optimizer")
    assert found[0] == "A fused optimizer (optimizer='adamw-fused') saves about 1.00 GiB of temporaries."
    assert not any("sequence" in sentence for sentence in found)


def test_what_saves_nothing_is_not_said() -> None:
    assert not any("fused" in s for s in ways(MIB, {**FULL, "temporaries": 0}, phase="optimizer"))


def test_adapters_are_not_told_to_become_adapters() -> None:
    found = ways(GIB, LORA)
    assert len(found) == 3
    assert not any("LoRA" in sentence or "8-bit" in sentence for sentence in found)
    assert any("Weights of half the bits" in sentence and "2.00 GiB" in sentence for sentence in found)


def test_the_card_has_room_for_context_and_margin() -> None:
    """24 GiB usable are not to be had on a card of 24 GiB."""
    breakdown = {**LORA, "params": 0}
    needed = 24 * GIB - sum(breakdown.values())
    breakdown["params"] = needed
    (card,) = (s for s in ways(12 * GIB, breakdown) if "card" in s)
    assert "4090" not in card
    assert "3090" not in card


def test_where_no_card_is_large_enough_none_is_named() -> None:
    assert not any("card" in sentence for sentence in ways(GIB, {**FULL, "params": 10_000 * GIB}))


def test_the_processor_is_not_told_to_become_a_card() -> None:
    assert any("card" in sentence for sentence in ways(7 * GIB))
    assert not any("card" in sentence for sentence in ways(7 * GIB, gpu="cpu:8MiB"))


def test_where_only_a_bound_is_known_no_card_is_named() -> None:
    found = ways(7 * GIB, is_bound=True)
    assert "`memplan fit` names the cards that are large enough." in found
    assert not any("The smallest card" in sentence for sentence in found)


def test_a_processor_has_no_host_to_page_states_to() -> None:
    assert any("paged" in sentence for sentence in ways(7 * GIB))
    assert not any("paged" in sentence for sentence in ways(7 * GIB, gpu="cpu:8MiB"))


def test_the_same_share_of_each_card_is_kept_free() -> None:
    """Of 24 GiB one is the context's, and an eighth of the rest is kept free."""
    budget = Budget(gpu="a", total_bytes=25 * GIB, others_bytes=0, context_bytes=GIB, margin_bytes=3 * GIB)
    cards = [Gpu(name, "cuda", size * GIB) for name, size in (("d", 33), ("c", 17), ("b", 25), ("e", 9))]
    assert large_enough(14 * GIB, budget, cards) == ("c", "b", "d")
    assert large_enough(14 * GIB + 1, budget, cards) == ("b", "d")
    assert large_enough(29 * GIB, budget, cards) == ()
