"""Under FSDP2 with accumulation: which of the storages in a later backward are gradients."""

from collections import Counter

import numpy as np
import tiny

from memplan import levers
from memplan.blocks import find_blocks, units
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.samples import Sample
from memplan.trace import BlockRun


def test_the_same_is_there_to_be_scattered_in_every_backward() -> None:
    """As many tokens as the model is wide: gradients of weights and recomputed activations have the same sizes."""
    model, batch = tiny.llama(layers=3, rows=2, length=16, use_cache=False)
    recorder = Recorder(model, Recipe(accumulation=2, shards=2))
    decisions = dict.fromkeys(find_blocks(model), "recompute")
    trace = recorder.record(Sample.of(batch), lambda: levers.decided(model, decisions))
    flat_bytes = units(model, tuple(decisions), 2)[0].grad_bytes

    def there(run: BlockRun) -> Counter[tuple[int, str]]:
        """What the block's backward has made and the buffer that its gradients are copied to finds, but for FSDP's."""
        inside = (trace.born >= run.backward.start) & (trace.born < run.backward.stop)
        copied = trace.born[inside & (trace.storage_bytes == flat_bytes)].max()
        rows = np.flatnonzero(inside & (trace.born < copied) & (trace.died > copied) & (trace.storage_module > 0))
        return Counter((int(trace.storage_bytes[row]), trace.modules[trace.storage_module[row]]) for row in rows)

    first, second = trace.steps
    for one, other in zip(first.blocks, second.blocks, strict=True):
        assert there(one) == there(other)
        assert there(one)
