"""What to do when nothing fits: the cheapest ways out, in words. Pure arithmetic over a breakdown."""

from collections.abc import Mapping

from memplan.gpus import all_gpus
from memplan.plan_record import Budget
from memplan.units import format_bytes

# Two 8-bit states and their scales (4 bytes per 256 elements each) instead of two of 32 bits.
_EIGHT_BIT_SHARE = (2 + 2 * 4 / 256) / 8


def ways_out(
    breakdown: Mapping[str, int], smallest_bytes: int, budget: Budget, micro_batch: int, can_split: bool
) -> tuple[str, ...]:
    """Three sentences, those that suffice first, then by how much they save.

    Args:
        breakdown: bytes at the peak of the smallest plan, by category.
        smallest_bytes: the least usable budget that would do.
        micro_batch: of that plan.
        can_split: whether the batch may be split at all.
    """
    missing = smallest_bytes - budget.usable_bytes
    grads_and_states = breakdown.get("grads", 0) + breakdown["optimizer"]
    data = smallest_bytes - sum(breakdown[name] for name in ("params", "buffers", "optimizer"))
    options: list[tuple[int, str]] = []
    if breakdown["optimizer"] > breakdown["params"]:
        saved = int(breakdown["optimizer"] * (1 - _EIGHT_BIT_SHARE))
        options.append((saved, f"An 8-bit optimizer (optimizer='adam8bit') saves about {format_bytes(saved)}."))
    if grads_and_states > 0:
        options.append(
            (
                int(grads_and_states * 0.95),
                f"LoRA instead of full fine-tuning saves most of {format_bytes(grads_and_states)} "
                "of gradients and optimizer state.",
            )
        )
    options.append((data // 2, f"Half the sequence length saves about {format_bytes(data // 2)}."))
    if micro_batch > 1:
        smaller = data - data // micro_batch
        how = "more accumulation" if can_split else "a smaller batch, since batch norm forbids to split it"
        options.append((smaller, f"A micro-batch of 1 ({how}) saves about {format_bytes(smaller)}."))
    card = _smallest_card(smallest_bytes + budget.margin_bytes + budget.context_bytes)
    if card is not None:
        options.append((missing, f"The smallest card that is large enough is {card}."))
    options.sort(key=lambda option: (option[0] < missing, -option[0] if option[0] < missing else 0))
    return tuple(text for _, text in options[:3])


def _smallest_card(total_bytes: int) -> str | None:
    cards = [gpu for gpu in all_gpus() if gpu.total_bytes is not None and gpu.total_bytes >= total_bytes]
    return min(cards, key=lambda gpu: gpu.total_bytes or 0).name if cards else None
