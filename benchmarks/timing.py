"""Times the variants of a case side by side: every round calls each of them once, so that drift hits all alike, in an
order of its own, so that none always comes after the same one and finds the caches as that one left them.

On a GPU a call lies between two events, and the L2 cache is flushed before it; the clock is read as it runs.
Launch-bound calls are timed a second time as replays of a CUDA graph.

On a CPU it is wall time, and a turn is two calls. The first comes after other work, the calls of the other variants:
whoever runs much code, Python's or oneDNN's, has to bring it into the core's caches then. The second, the same on
inputs in other memory, finds it there; it is kept beside, for the two differ by up to half. The core's pace is read
around each turn: turns during which something else was on the core (`benchmarks.core`) are kept apart. The pace of one
core says nothing of those of other threads, so that with several none is read. Quantiles are over rounds.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from benchmarks.case import Unavailable
from benchmarks.core import Core, core
from benchmarks.telemetry import ENERGY_SECONDS, Telemetry

T = TypeVar("T")
Calls = Mapping[str, Callable[[], object]]
CPU = torch.device("cpu")
L2_BYTES = 256 << 20  # more than that cache of any chip
MIN_ROUNDS = 9
MAX_ROUNDS = 200
OWN_ROUNDS = 25  # in which a CPU's core is nobody else's: so many are waited for,
PATIENCE = 4.0  # at most as many times as long as was asked for
CLOCKS_APART = 1.05  # how far two clocks may differ where a ratio of times is shown


@dataclass
class Times:
    """What was read of one variant: a time in milliseconds and, on a GPU, a clock in MHz for each round.

    Attributes:
        ms: on a CPU of the first calls of a turn, where nothing else was on the core, if those are enough.
        again_ms: of the second calls of the same turns.
        shared_ms: of the first calls of the other turns.
        own_core: whether the turns were so separated; None on a GPU, and on several threads.
    """

    ms: list[float] = field(default_factory=list)
    again_ms: list[float] = field(default_factory=list)
    shared_ms: list[float] = field(default_factory=list)
    own_core: bool | None = None
    clocks: list[float] = field(default_factory=list)
    power_w: float | None = None
    energy_mj: float | None = None
    throttled: str | None = None

    def quantile(self, share: float) -> float:
        """A quantile of `ms`."""
        return ranked(self.ms, share)

    @property
    def clock_mhz(self) -> float | None:
        """Median clock."""
        return sorted(self.clocks)[len(self.clocks) // 2] if self.clocks else None


def interleave(
    calls: Calls, device: torch.device, budget_s: float, telemetry: Telemetry, again: Calls | None = None
) -> dict[str, Times]:
    """Time calls in interleaved rounds until the budget is spent.

    Args:
        calls: by variant, at least one; already run once, so that nothing compiles here.
        device: where they run.
        budget_s: for all of them together; at least `MIN_ROUNDS` rounds are made.
        telemetry: of the device.
        again: by variant, the second call of a CPU's turn; None: the same as the first.
    """
    if device.type != "cuda":
        return _interleave_on_cpu(calls, again or calls, budget_s, core() if torch.get_num_threads() == 1 else None)
    found = {name: Times() for name in calls}
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
    deadline = time.monotonic() + budget_s
    for number, turns in enumerate(_rounds(calls)):
        if number >= MIN_ROUNDS and (number >= MAX_ROUNDS or time.monotonic() >= deadline):
            break
        for name, call in turns:
            flush.zero_()
            found[name].ms.append(time_once(call, device, partial(watch, found[name], telemetry)))
    return found


def _interleave_on_cpu(calls: Calls, again: Calls, budget_s: float, own: Core | None) -> dict[str, Times]:
    """The same on a CPU; longer, while someone else is on the core. Judged at the end, by the fastest pace of all: the
    core may have been someone else's too while the first rounds were made. Without a core, all rounds are alike.
    """
    read: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}  # pace, first call, second call
    counts = dict.fromkeys(calls, 0)  # of rounds that seemed to be nobody else's
    began = time.monotonic()
    for number, turns in enumerate(_rounds(calls)):
        spent = time.monotonic() - began
        waits = own and spent < PATIENCE * budget_s and min(counts.values()) < min(OWN_ROUNDS, number)
        if number >= MIN_ROUNDS and (number >= MAX_ROUNDS or spent >= budget_s) and not waits:
            break
        for name, call in turns:
            before = own.pace() if own else 0.0
            first, second = time_once(call, CPU), time_once(again[name], CPU)
            pace = max(before, own.pace()) if own else 0.0
            read[name].append((pace, first, second))
            counts[name] += own is not None and own.is_own(pace)
    found = {name: _judged(rounds, own) for name, rounds in read.items()}
    if own is None or all(len(times.ms) >= MIN_ROUNDS for times in found.values()):
        return found
    return {name: replace(_judged(rounds, None), own_core=False) for name, rounds in read.items()}


def _judged(rounds: Sequence[tuple[float, float, float]], own: Core | None) -> Times:
    """Times of calls by the pace of the core; without one, of all."""
    times = Times(own_core=None if own is None else True)
    for pace, first, second in rounds:
        if own is None or own.is_own(pace):
            times.ms.append(first)
            times.again_ms.append(second)
        else:
            times.shared_ms.append(first)
    return times


def _rounds(calls: Calls) -> Iterator[list[tuple[str, Callable[[], object]]]]:
    """Every call by name, each time in another order."""
    order = random.Random(len(calls))
    while True:
        yield order.sample(list(calls.items()), len(calls))


def watch(times: Times, telemetry: Telemetry) -> None:
    """Read the GPU's clock for a round."""
    reading = telemetry.read()
    if reading.clock_mhz is not None:
        times.clocks.append(reading.clock_mhz)
    times.throttled = throttles(times.throttled, reading.throttled)


def add_energy(calls: Calls, found: Mapping[str, Times], telemetry: Telemetry) -> None:
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


def ranked(ms: Sequence[float], share: float) -> float:
    """A quantile, by rank."""
    return sorted(ms)[min(len(ms) - 1, int(share * len(ms)))]


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
