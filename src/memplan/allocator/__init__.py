"""CUDA's caching allocator of PyTorch, simulated on integers: what a stream of requests reserves, and under which cap.

Whether a step runs is decided by reserved segments, not by allocated bytes. Written from the rules in
c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.{h,cpp} of torch 2.6 to 2.13, which agree in what matters
here; where a setting came later it says so.

    events = Events.from_history(torch.cuda.memory._snapshot()["device_traces"][0])
    usage = replayed(events, Settings.from_snapshot(snapshot["allocator_settings"]))
"""

from memplan.allocator.caching import CachingAllocator, OutOfMemory
from memplan.allocator.events import FREE, REQUEST_FREE, Events
from memplan.allocator.pools import Segment, SegmentEvent
from memplan.allocator.replay import Usage, replayed, usage_after
from memplan.allocator.settings import Settings

__all__ = [
    "FREE",
    "REQUEST_FREE",
    "CachingAllocator",
    "Events",
    "OutOfMemory",
    "Segment",
    "SegmentEvent",
    "Settings",
    "Usage",
    "replayed",
    "usage_after",
]
