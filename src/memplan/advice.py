"""What to do when nothing fits: the cheapest ways out, in words. Pure arithmetic over a breakdown."""

from collections.abc import Iterator, Mapping

from memplan.gpus import all_gpus, with_like_kernels
from memplan.plan_record import Budget
from memplan.units import format_bytes

# Two 8-bit states and their scales (4 bytes per 256 elements each) instead of two of 32 bits.
_EIGHT_BIT_SHARE = (2 + 2 * 4 / 256) / 8

# What LoRA leaves of gradients and optimizer state: adapters of rank 16 have about 1 % of the parameters.
_LORA_SHARE = 0.01

# Gradients and states below this share of the weights say that adapters are all that is trained.
_TRAINED_SHARE = 0.1


def ways_out(
    breakdown: Mapping[str, int], phase: str, smallest_bytes: int, budget: Budget, micro_batch: int, can_split: bool
) -> tuple[str, ...]:
    """At most three sentences: first what saves enough, the least change to the training first; then what saves most.

    Args:
        breakdown: bytes at the peak of the smallest plan, by category.
        phase: where that peak is.
        smallest_bytes: the least usable budget that would do.
        micro_batch: of that plan.
        can_split: whether the batch may be split at all.
    """
    missing = smallest_bytes - budget.usable_bytes
    found = [way for way in _savings(breakdown, phase, micro_batch, can_split) if way[0] > 0]
    enough = [text for saved, text in found if saved >= missing]
    card = None if budget.gpu.startswith("cpu") else _smallest_card(smallest_bytes, budget)
    if card is not None:
        enough.append(f"The smallest card that is large enough is {card}.")
    rest = sorted(((saved, text) for saved, text in found if saved < missing), reverse=True)
    return (*enough, *(text for _, text in rest))[:3]


def _savings(breakdown: Mapping[str, int], phase: str, micro_batch: int, can_split: bool) -> Iterator[tuple[int, str]]:
    """(bytes saved, sentence), the least change to the training first. Estimates: each is to be planned in its turn."""
    states, grads = breakdown["optimizer"], breakdown["grads"]
    data = breakdown["inputs"] + breakdown["logits/loss"]
    data += sum(size for name, size in breakdown.items() if name.startswith("activations/"))
    if phase == "optimizer":
        saved = breakdown["temporaries"]
        yield saved, f"A fused optimizer (optimizer='adamw-fused') saves about {format_bytes(saved)} of temporaries."
    else:
        data += breakdown["temporaries"]
    if micro_batch > 1:
        saved = data - data // micro_batch
        how = "more accumulation" if can_split else "a smaller batch: batch norm forbids to split it"
        yield saved, f"A micro-batch of 1 ({how}) saves about {format_bytes(saved)}."
    if states > breakdown["params"]:
        saved = int(states * (1 - _EIGHT_BIT_SHARE))
        yield saved, f"An 8-bit optimizer (optimizer='adam8bit') saves about {format_bytes(saved)}."
    if phase != "optimizer":
        yield data // 2, f"Half the sequence length or image area saves about {format_bytes(data // 2)}."
    if states + grads > _TRAINED_SHARE * breakdown["params"]:
        saved = grads + (breakdown["temporaries"] if phase == "optimizer" else 0)
        how = "a live one, a strategy with 'step-in-backward', no accumulation, no clipping of the global norm"
        yield saved, f"Stepping the optimizer inside the backward ({how}) saves about {format_bytes(saved)}."
        saved += states
        yield (
            saved,
            "Stepping inside the backward with an optimizer whose state is paged to the host "
            f"(bnb.optim.PagedAdamW8bit) saves about {format_bytes(saved)}.",
        )
    if states + grads > _TRAINED_SHARE * breakdown["params"]:
        saved = int((states + grads) * (1 - _LORA_SHARE))
        yield saved, f"LoRA instead of training all weights saves about {format_bytes(saved)} of gradients and states."
    saved = breakdown["params"] // 2
    yield saved, f"Weights of half the bits (bfloat16; where they are frozen, also 8 or 4) save {format_bytes(saved)}."


def _smallest_card(needed_bytes: int, budget: Budget) -> str | None:
    """The smallest in the catalogue of which so much is usable, if it gives up the same share and the same context."""
    share = 1 - budget.margin_bytes / budget.total_bytes
    known = with_like_kernels(budget.gpu, all_gpus())
    sizes = {gpu.name: gpu.total_bytes for gpu in known if gpu.total_bytes is not None}
    enough = {name: size for name, size in sizes.items() if size * share - budget.context_bytes >= needed_bytes}
    return min(enough, key=enough.__getitem__) if enough else None
