"""`Data`: what comes in a run, as far as memory goes. The worst batch that can come decides, not the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from memplan.errors import BadSample


@dataclass(frozen=True, slots=True)
class Worst:
    """The batch of a run that needs the most memory: every one of its rows is padded to the same length."""

    rows: int
    tokens: int  # of each row
    samples: tuple[int, ...]  # positions in the data set: the longest, or in a fixed order all that come with it


@dataclass(frozen=True)
class Data:
    """The lengths of a data set's samples, and how batches are made of them.

    A batch is padded to its longest sample, so the worst batch is one with the longest sample of all: with a random or
    a length-grouping sampler any rows may come with it, in a fixed order those that lie beside it.

    Attributes:
        lengths: tokens of each sample, in the order of the data set. Of a large set the longest ones are enough.
        shuffled: whether the sampler draws at random or groups by length; False: samples come in their order.
        packed_to: tokens of a row where samples are packed, or joined without padding; then lengths do not matter.
        cut_to: longer samples are cut to this (a tokenizer's max_length); None: they are not.
        multiple_of: what the collator pads lengths up to a multiple of.

    Raises:
        BadSample: no lengths, one below 1, or a number of tokens below 1.
    """

    lengths: Sequence[int]
    shuffled: bool = True
    packed_to: int | None = None
    cut_to: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if len(self.lengths) == 0:
            raise BadSample("the data has no lengths: pass the tokens of each sample, such as [len(x) for x in data]")
        if min(self.lengths) < 1:
            at = min(range(len(self.lengths)), key=self.lengths.__getitem__)
            raise BadSample(f"sample {at} of the data has {self.lengths[at]} tokens; each has at least 1")
        for name in ("packed_to", "cut_to", "multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadSample(f"{name} = {value} has to be at least 1")

    @property
    def tokens(self) -> int:
        """Of a row of the worst batch, whatever the micro-batch is."""
        if self.packed_to is not None:
            return self.packed_to
        return self._padded(max(self.lengths))

    def worst(self, micro_batch: int) -> Worst:
        """The worst batch of so many samples. In a fixed order one of shorter rows may be larger than the longest's."""
        if self.packed_to is not None:
            return Worst(micro_batch, self.packed_to, ())
        count = len(self.lengths)
        if self.shuffled:
            longest = max(range(count), key=self.lengths.__getitem__)
            return Worst(min(micro_batch, count), self.tokens, (longest,))
        batches = [range(start, min(start + micro_batch, count)) for start in range(0, count, micro_batch)]
        worst = max(batches, key=lambda batch: len(batch) * self._padded(max(self.lengths[i] for i in batch)))
        return Worst(len(worst), self._padded(max(self.lengths[i] for i in worst)), tuple(worst))

    def _padded(self, longest: int) -> int:
        return -(-min(longest, self.cut_to or longest) // self.multiple_of) * self.multiple_of

    def describe(self, micro_batch: int) -> str:
        """The worst batch in a sentence."""
        worst = self.worst(micro_batch)
        shape = f"the worst batch that can come has {worst.rows} rows of {worst.tokens:,} tokens"
        if self.packed_to is not None:
            return f"{shape}: the data is packed"
        which = (
            f"sample {worst.samples[0]:,}"
            if self.shuffled
            else f"samples {worst.samples[0]:,} to {worst.samples[-1]:,}"
        )
        count, usual = len(self.lengths), median_low(self.lengths)
        return f"{shape}: that of {which} of {count:,}, whose median is {usual:,} tokens"
