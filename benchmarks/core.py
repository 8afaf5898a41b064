"""Whether a CPU core is this thread's own right now: what a clock is to a GPU.

A virtual machine's core is often one of two hardware threads of a real one. While the other computes, everything here
takes longer, and not alike: on an EPYC (Zen 5) Python 1.8 times, an exponential 1.5, oneDNN's products 1.2, MKL's 1.05,
so that a ratio of two times is another one. The system counts no steal time then, but a short loop of Python tells: it
takes 9 or 16 microseconds, and little in between. Whose work it is, another guest's or one's own, it does not tell.
"""

import time
from functools import cache

LOOP = 1000  # additions: some ten microseconds, a small part of any call that is timed
LOOPS = 2  # the faster one is what is read: an interrupt hits one
SHARED = 1.25  # times the fastest pace, beyond which someone else is on the core
SEARCH_S = 1.0  # for the fastest pace, before the first reading is judged


class Core:
    """Reads the pace of the core that the calling thread runs on.

    Where something else is on it all the time, there is one pace, and it is taken for the core's own: `Run` holds it.
    """

    def __init__(self) -> None:
        self.fastest = float("inf")
        deadline = time.monotonic() + SEARCH_S
        while time.monotonic() < deadline:
            self.pace()

    def pace(self) -> float:
        """Seconds of a short loop now."""
        now = min(_loop() for _ in range(LOOPS))
        self.fastest = min(self.fastest, now)
        return now

    def is_own(self, pace: float) -> bool:
        """Whether the core was nobody else's at this pace."""
        return pace <= SHARED * self.fastest


def _loop() -> float:
    began = time.perf_counter()
    sum(range(LOOP))
    return time.perf_counter() - began


@cache
def core() -> Core:
    """The one of this process, which knows the fastest pace that was seen so far."""
    return Core()
