"""Whether the batch of a step may be divided into micro-batches: the loss itself is asked, on four rows.

A loop of one's own adds up the losses of micro-batches, each divided by the accumulation. That trains what the whole
batch would where the loss is a mean over samples; of any other loss a plan that divides says what to know of it.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from memplan.blocks import is_batch_coupled
from memplan.means import SAMPLES, SUM, can_try, mean_over
from memplan.recipe import Recipe
from memplan.samples import Sample

UNTRIED: Final = (
    "the loss is taken to be a mean over samples, so that a batch may be divided: trying it on four rows told nothing, "
    "as of a loss that draws random numbers, or where memory runs out"
)
NO_MEAN: Final = (
    "the batch is not divided: the loss of four rows was neither a mean nor the sum of the losses of its parts, so it "
    "compares the rows of a batch with each other"
)
NO_MEAN_OF_THESE: Final = (
    "the loss of four rows was neither a mean nor the sum of the losses of its parts: divided as asked, a step trains "
    "something else than the whole batch would"
)
A_SUM: Final = "the loss is a sum over rows: the losses of micro-batches are added up, not averaged"
MEAN_OVER_TOKENS: Final = (
    "the loss is a mean over label tokens, so a loop that divides each micro-batch's loss by the accumulation gives "
    "rows of few labels more weight than the whole batch would; memplan.attach and the Trainer weigh them by tokens"
)


@dataclass(frozen=True, slots=True)
class Division:
    """What is known of dividing a batch.

    Attributes:
        is_sound: whether the parts of a batch make its loss; True also where that could not be found out.
        divided: lines for a plan that divides the batch.
        whole: lines for one that does not, where smaller micro-batches were asked about too.
    """

    is_sound: bool = True
    divided: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def is_doubtful(self) -> bool:
        """Whether parts of a batch may not make its loss."""
        return not self.is_sound or UNTRIED in self.divided

    def said(self, accumulation: int) -> tuple[str, ...]:
        """Lines for a plan of so many micro-batches."""
        return self.whole if accumulation == 1 else self.divided


def division_of(model: nn.Module, recipe: Recipe, sample: Sample, device: torch.device | None) -> Division:
    """Tries the loss, where it can be computed in reasonable time and whoever has made it has not tried it already.

    Not where batch norm keeps the batch whole, whatever the loss.

    Args:
        device: what the plan is for; None if it is not here.
    """
    is_known = getattr(recipe.loss, "is_tried", False)
    if is_known or is_batch_coupled(model) or not can_try(model, sample, device):
        return Division()
    try:
        mean = mean_over(model, recipe, sample)
    except Exception:  # anything: it is the user's model, run in eval mode, where it may do something else
        return Division(divided=(UNTRIED,))
    if mean is None:
        return Division(False, (NO_MEAN_OF_THESE,), (NO_MEAN,))
    return Division(divided={SAMPLES: (), SUM: (A_SUM,)}.get(mean, (MEAN_OVER_TOKENS,)))
