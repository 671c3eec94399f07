"""What to do when nothing fits: the cheapest ways out, in words. Pure arithmetic over a breakdown."""

from collections.abc import Iterable, Iterator, Mapping

from memplan.gpus import Gpu, all_gpus, with_like_kernels
from memplan.plan_record import Budget
from memplan.units import format_bytes

# Two 8-bit states and their scales (4 bytes per 256 elements each) instead of two of 32 bits.
_EIGHT_BIT_SHARE = (2 + 2 * 4 / 256) / 8

# What LoRA leaves of gradients and optimizer state: adapters of rank 16 have about 1 % of the parameters.
_LORA_SHARE = 0.01

# Gradients and states below this share of the weights say that adapters are all that is trained.
_TRAINED_SHARE = 0.1


def ways_out(
    breakdown: Mapping[str, int],
    phase: str,
    smallest_bytes: int,
    budget: Budget,
    micro_batch: int,
    can_split: bool,
    *,
    is_bound: bool = False,
) -> tuple[str, ...]:
    """At most three sentences: first what saves enough, the least change to the training first; then what saves most.

    Args:
        breakdown: bytes at the peak of the smallest plan, by category.
        phase: where that peak is.
        smallest_bytes: the least usable budget that would do.
        micro_batch: of that plan.
        can_split: whether the batch may be split at all.
        is_bound: whether a plan needs more than `smallest_bytes`, so that no card can be named.
    """
    on_cpu = budget.gpu.startswith("cpu")
    missing = smallest_bytes - budget.usable_bytes
    found = [way for way in _savings(breakdown, phase, micro_batch, can_split, on_cpu) if way[0] > 0]
    enough = [text for saved, text in found if saved >= missing]
    if is_bound and not on_cpu:
        enough.append("`memplan fit` names the cards that are large enough.")
    elif not on_cpu and (cards := large_enough(smallest_bytes, budget, all_gpus())):
        enough.append(f"The smallest card that is large enough is {cards[0]}.")
    rest = sorted(((saved, text) for saved, text in found if saved < missing), reverse=True)
    return (*enough, *(text for _, text in rest))[:3]


def large_enough(needs_bytes: int, budget: Budget, gpus: Iterable[Gpu]) -> tuple[str, ...]:
    """The cards on which a plan of such needs fits, from the smallest: those with kernels like the budget's card.

    The same context is taken off each, and then the same share kept free.
    """
    room = budget.usable_bytes + budget.margin_bytes
    totals = {gpu.name: gpu.total_bytes for gpu in with_like_kernels(budget.gpu, gpus) if gpu.total_bytes is not None}
    usable = {name: (n - budget.context_bytes) * budget.usable_bytes // room for name, n in totals.items()}
    return tuple(name for name, size in sorted(usable.items(), key=lambda item: item[1]) if size >= needs_bytes)


def _savings(
    breakdown: Mapping[str, int], phase: str, micro_batch: int, can_split: bool, on_cpu: bool
) -> Iterator[tuple[int, str]]:
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
        how = "more accumulation" if can_split else "a smaller batch: this one is not split"
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
        if not on_cpu:  # whose states are on the host already
            yield (
                saved,
                "Stepping inside the backward with an optimizer whose state is paged to the host "
                f"(bnb.optim.PagedAdamW8bit) saves about {format_bytes(saved)}.",
            )
        trained = states + grads + (breakdown["temporaries"] if phase == "optimizer" else 0)
        saved = int(trained * (1 - _LORA_SHARE))
        yield saved, f"LoRA instead of training all weights saves about {format_bytes(saved)} of gradients and states."
    saved = breakdown["params"] // 2
    yield saved, f"Weights of half the bits (bfloat16; where they are frozen, also 8 or 4) save {format_bytes(saved)}."
