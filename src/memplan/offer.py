"""`Offer`: what one card would do for one way to train a model. Frozen, made by `survey`."""

from pydantic import Field

from memplan.plan_record import Verdict
from memplan.records import Record


class Offer(Record):
    """Whether a step fits a card, how it would be run there, and how fast by the card's figures."""

    method: str = Field(description="what is trained, in the user's word")
    gpu: str
    total_bytes: int
    verdict: Verdict
    least_bytes: int = Field(description="what the leanest plan needs of the card, checked by a trace of it")
    is_bound: bool = Field(description="`least_bytes` is only what is always there, which is too much already")
    samples: int = Field(description="per optimizer step")
    assumed: str = Field(default="", description="the weights by their type, the tokens of a sample, the optimizer")
    micro_batch: int | None = Field(default=None, description="None, like all below, where it does not fit")
    blocks: int | None = None
    recomputed: int | None = Field(default=None, description="of the blocks, whole")
    chunked: bool | None = Field(default=None, description="whether the loss is computed in chunks")
    samples_per_s: float | None = Field(default=None, description="an estimate; None for a card of unknown speed too")
    band: tuple[float, float] | None = Field(default=None, description="where real runs may lie; see roofline.BAND")

    @property
    def fits(self) -> bool:
        """Whether it may be tried at all: "uncertain" counts."""
        return self.verdict is not Verdict.DOES_NOT_FIT
