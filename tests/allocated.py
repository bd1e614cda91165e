"""How many bytes of tensors exist at one time, as torch's CPU allocator counts them."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated while it runs, beyond what was there before; kernels' own too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    found: Any = watched.profiler
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
