"""Times the variants of a case side by side: every round calls each of them once, so that drift hits all alike, in an
order of its own, so that none always comes after the same one and finds the caches as that one left them.

On a GPU a call lies between two events, and the L2 cache is flushed before it; the clock is read as it runs.
Launch-bound calls are timed a second time as replays of a CUDA graph. On a CPU it is wall time. Quantiles are over
rounds.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from benchmarks.case import Unavailable
from benchmarks.telemetry import ENERGY_SECONDS, Telemetry

T = TypeVar("T")
L2_BYTES = 256 << 20  # more than any chip has
MIN_ROUNDS = 9
MAX_ROUNDS = 200
CLOCKS_APART = 1.05  # how far two clocks may differ where a ratio of times is shown


@dataclass
class Times:
    """What was read of one variant: a time in milliseconds and a clock in MHz for each round."""

    ms: list[float] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)
    power_w: float | None = None
    energy_mj: float | None = None
    throttled: str | None = None

    def quantile(self, share: float) -> float:
        """A quantile of the times, by rank."""
        return sorted(self.ms)[min(len(self.ms) - 1, int(share * len(self.ms)))]

    @property
    def clock_mhz(self) -> float | None:
        """Median clock."""
        return sorted(self.clocks)[len(self.clocks) // 2] if self.clocks else None


def interleave(
    calls: Mapping[str, Callable[[], object]], device: torch.device, budget_s: float, telemetry: Telemetry
) -> dict[str, Times]:
    """Time calls in interleaved rounds until the budget is spent.

    Args:
        calls: by variant; already run once, so that nothing compiles here.
        device: where they run.
        budget_s: for all of them together; at least `MIN_ROUNDS` rounds are made.
        telemetry: of the device.
    """
    found = {name: Times() for name in calls}
    order = random.Random(len(calls))
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    deadline = time.monotonic() + budget_s
    rounds = 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() < deadline):
        for name, call in order.sample(list(calls.items()), len(calls)):
            if flush is not None:
                flush.zero_()
            found[name].ms.append(time_once(call, device, partial(watch, found[name], telemetry)))
        rounds += 1
    return found


def watch(times: Times, telemetry: Telemetry) -> None:
    """Read the GPU's clock for a round."""
    reading = telemetry.read()
    if reading.clock_mhz is not None:
        times.clocks.append(reading.clock_mhz)
    times.throttled = throttles(times.throttled, reading.throttled)


def add_energy(calls: Mapping[str, Callable[[], object]], found: Mapping[str, Times], telemetry: Telemetry) -> None:
    """Energy of one call and power under load, from a loop of `ENERGY_SECONDS` for each variant."""
    if telemetry.missing is not None:
        return
    for name, call in calls.items():
        repeats = max(1, int(ENERGY_SECONDS * 1e3 / found[name].quantile(0.5)))
        torch.cuda.synchronize()
        before = telemetry.energy_mj()
        for _ in range(repeats):
            call()
        found[name].power_w = telemetry.power_w()
        torch.cuda.synchronize()
        after = telemetry.energy_mj()
        if before is not None and after is not None:
            found[name].energy_mj = round((after - before) / repeats, 3)


def throttles(seen: str | None, now: str | None) -> str | None:
    """Every reason for throttling that was read so far; "no" where none was, None where none could be."""
    reasons = [reason for text in (seen, now) if text not in (None, "no") for reason in str(text).split(", ")]
    return ", ".join(dict.fromkeys(reasons)) or seen or now


def captured(call: Callable[[], T]) -> Callable[[], T]:
    """The call as a CUDA graph that is replayed: what the GPU takes, without the host.

    Whether a call waits for the GPU is found out first: a capture that fails leaves PyTorch's allocator in a state in
    which no later one succeeds.

    Raises:
        Unavailable: where it waits.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up beside the default stream, as PyTorch's notes on graphs ask
        for _ in range(2):
            call()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise Unavailable("it waits for the GPU, which a CUDA graph cannot") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # a failed one keeps its stream
        results = call()

    def replay() -> T:
        graph.replay()
        return results  # holding them keeps their memory the graph's

    return replay


def comparable(clocks: Sequence[float | None]) -> bool:
    """Whether a ratio of times may be shown: all clocks were read and agree within 5 %, or none exist, as on a CPU. 0
    is that of a GPU that does not tell.
    """
    read = [clock for clock in clocks if clock is not None]
    return len(read) in (0, len(clocks)) and (not read or 0 < max(read) <= CLOCKS_APART * min(read))


def time_once(call: Callable[[], object], device: torch.device, meanwhile: Callable[[], None] = lambda: None) -> float:
    """Milliseconds of one call: between two events on a GPU, wall time on a CPU.

    ``meanwhile`` is called while a GPU works on what takes longer than to queue it: idle, its clock is another.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    meanwhile()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(stop))
