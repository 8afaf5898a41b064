"""Memory: a heap as that of a process at work, and the most that a call holds beyond its inputs, where every allocation
counts, also those inside an operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

HEAP_BYTES = 1 << 24  # beyond any block that a case takes again and again; from 32 MiB on glibc learns nothing


def use_heap() -> None:
    """Leave the heap as in any process that has computed: until glibc has freed something larger once, it returns every
    block of scores to the system, and whoever asks for it next pays for its pages.
    """
    torch.zeros(HEAP_BYTES, dtype=torch.uint8)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that ``call`` holds, its result included: from the allocator's statistics, or on a CPU its events."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
