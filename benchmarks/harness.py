"""Runs a case: gate, calls to warm up and to read memory, then interleaved timing; a result for every variant and mode.

Nothing stops the run: a variant that is not installed, does not fit, or fails gets a row that says so.
"""

import gc
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch._functorch import config as functorch

from benchmarks.case import Case, Prepared, Unavailable, Variant
from benchmarks.gate import Gate
from benchmarks.memory import peak_bytes
from benchmarks.results import Result, timed
from benchmarks.roofline import Ceilings
from benchmarks.telemetry import Telemetry
from benchmarks.timing import Times, add_energy, captured, comparable, interleave

ALONE = "timed by itself, not in turn with the others"
Call = Callable[[], object]
Wrap = Callable[[Call], Call]


class Ready(NamedTuple):
    """A variant that has passed the gate.

    Attributes:
        variant: which.
        bound: to the case's inputs; on a CPU also to the same in other memory, for the second call of a turn.
        worst: error that the gate saw.
    """

    variant: Variant
    bound: tuple[Prepared, ...]
    worst: float


@dataclass(frozen=True)
class Harness:
    """How cases are run.

    Attributes:
        device: where.
        ceilings: measured in this run.
        telemetry: of the device.
        run: id for the results.
        seconds: timing budget of one case and mode, over all its variants.
        energy: also measure energy, about a second a variant and mode more.
        only: names of variants to run; empty: all.
        without: names of variants not to run.
        compiling: case and variant of what compiles and runs all the same; None: all.
        keep: is given every result as soon as it exists.
        begin: is told the case, and the variant that is made ready; none while all of them are timed.
    """

    device: torch.device
    ceilings: Ceilings
    telemetry: Telemetry
    run: str
    seconds: float = 2.0
    energy: bool = False
    only: Sequence[str] = field(default_factory=tuple)
    without: Sequence[str] = field(default_factory=tuple)
    compiling: Collection[tuple[str, str]] | None = None
    keep: Callable[[Result], None] = lambda result: None
    begin: Callable[[str, str], None] = lambda case, variant: None

    def results(self, case: Case) -> list[Result]:
        """Run one case."""
        found = []
        with functorch.patch(donated_buffer=False):  # or compiled graphs refuse a second backward
            for result in self._results(case):
                self.keep(result)
                found.append(result)
        gc.collect()
        with quiet():
            torch.compiler.reset()  # the next case compiles anew, not one shape more
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _results(self, case: Case) -> Iterator[Result]:
        blank = Result(self.run, case.name, "", "", dict(case.sizes), status="")
        ready: dict[str, Ready] = {}
        gate = Gate(case, self.device)
        problems = [case.problem(self.device) for _ in range(1 if self.device.type == "cuda" else 2)]
        for variant in case.variants:
            if (self.only and variant.name not in self.only) or variant.name in self.without:
                continue
            self.begin(case.name, variant.name)
            status, reason, bound, worst = self._prepare(case, variant, gate, problems)
            if bound:
                ready[variant.name] = Ready(variant, bound, worst)
                continue
            for mode in case.modes:
                if mode in variant.modes:
                    yield replace(blank, mode=mode, variant=variant.name, status=status, reason=reason)
        for mode in case.modes:
            yield from self._mode(case, mode, replace(blank, mode=mode), ready)
        if case.launch_bound and self.device.type == "cuda":
            for mode in case.modes:
                if mode != "backward":  # its operations belong to the stream of a forward that is not in the graph
                    yield from self._mode(case, mode, replace(blank, mode=f"{mode}-graph"), ready, captured)

    def _prepare(
        self, case: Case, variant: Variant, gate: Gate, problems: Sequence[object]
    ) -> tuple[str, str, tuple[Prepared, ...], float]:
        if not case.may_take(variant, self.compiling) and variant.name not in self.only:
            return "skipped", "it compiles for long: left out by --quick", (), 0.0
        try:
            with quiet():
                verdict = gate.check(variant)
                if verdict.complaints:
                    return "wrong", "; ".join(verdict.complaints), (), verdict.worst_error
                return "", "", tuple(variant.prepare(problem) for problem in problems), verdict.worst_error
        except Exception as error:
            if not usable(self.device):
                raise  # or everyone after it would seem to fail
            return *why(error), (), 0.0

    def _mode(
        self,
        case: Case,
        mode: str,
        blank: Result,
        ready: Mapping[str, Ready],
        wrap: Wrap = lambda call: call,
    ) -> Iterator[Result]:
        names = [name for name, each in ready.items() if mode in each.variant.modes]
        groups = [names] if names else []
        while groups:
            group = groups.pop(0)
            rows, failed = self._side_by_side(case, mode, blank, {name: ready[name] for name in group}, wrap)
            yield from rows
            groups += [[name] for name in failed]
            if failed:
                blank = replace(blank, reason=ALONE)
            gc.collect()  # what the others held

    def _side_by_side(
        self, case: Case, mode: str, blank: Result, group: Mapping[str, Ready], wrap: Wrap
    ) -> tuple[list[Result], list[str]]:
        """Rows of variants that are timed in turn, and those to time by themselves: no memory was left beside the
        others, or one of them failed while all were timed.
        """
        rows: list[Result] = []
        failed: list[str] = []
        calls: dict[str, Call] = {}
        second: dict[str, Call] = {}
        peaks: dict[str, float] = {}
        for name, each in group.items():
            self.begin(case.name, name)
            try:
                with quiet():
                    call, peaks[name] = self._warmed(each.bound[0], mode, wrap)
                    if self.device.type != "cuda":
                        second[name] = call_of(each.bound[1], mode)
                        second[name]()
                    calls[name] = call
            except Exception as error:
                if not usable(self.device):
                    raise
                if isinstance(error, torch.OutOfMemoryError) and len(group) > 1:
                    failed.append(name)
                else:
                    rows.append(untimed(replace(blank, variant=name), error))
        self.begin(case.name, "")
        if not calls:
            return rows, failed
        try:
            with quiet():
                times = interleave(calls, self.device, self.seconds, self.telemetry, second)
                if self.energy:
                    add_energy(calls, times, self.telemetry)
        except Exception as error:
            if not usable(self.device):
                raise
            if len(group) > 1:
                return rows, [*failed, *calls]
            return [untimed(replace(blank, variant=name), error) for name in calls], []
        for name in calls:
            worst = group[name].worst
            rows.append(self._timed(case, mode, replace(blank, variant=name), times[name], peaks[name], worst))
        return rows, failed

    def _warmed(self, prepared: Prepared, mode: str, wrap: Wrap) -> tuple[Call, float]:
        """A variant's call in a mode, compiled and warm, and the MiB that it holds at most."""
        call = call_of(prepared, mode)
        call()
        peak = peak_bytes(call, self.device) / 2**20  # not of a graph, whose memory is taken when it is captured
        call = wrap(call)
        call()
        return call, peak

    def _timed(self, case: Case, mode: str, blank: Result, times: Times, peak_mib: float, error: float) -> Result:
        median = times.quantile(0.5)
        floor = self.ceilings.floor_ms(case.flops[mode], case.bytes[mode], case.dtype)
        return replace(
            timed(blank, times),
            peak_mib=round(peak_mib, 2),
            tflops=round(case.flops[mode] / median / 1e9, 4),
            share=round(floor / median, 4),
            intensity=float(f"{case.flops[mode] / case.bytes[mode]:.4g}"),
            worst_error=float(f"{error:.3g}"),
            kernel=case.kernels.get((mode, blank.variant)),
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Other people's warnings are not this benchmark's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def call_of(prepared: Prepared, mode: str) -> Call:
    """What is timed in a mode. "backward" reuses one graph, so that it is the backward alone.

    In "forward" no leaf asks for a gradient, from here on: some libraries take it in the forward of every leaf that
    does, whether or not gradients are switched off.
    """
    for leaf in prepared.inputs.values():
        leaf.requires_grad_(mode != "forward")

    def forward() -> object:
        with torch.no_grad():
            return prepared.forward()

    def both() -> object:
        return prepared.gradients(prepared.forward())

    if mode == "forward":
        return forward
    if mode == "both":
        return both
    outputs = prepared.forward()
    return lambda: prepared.gradients(outputs, keep=True)


def usable(device: torch.device) -> bool:
    """Whether this process can go on: not after a fault in a kernel, nor where a capture left the allocator in use."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def why(error: Exception) -> tuple[str, str]:
    """Status and reason of a variant that did not come to be timed."""
    if isinstance(error, Unavailable):
        return "skipped", str(error)
    if isinstance(error, ModuleNotFoundError):
        return "skipped", f"it needs {error.name}, which is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory", str(error).split(". ")[0]
    lines = str(error).strip().splitlines() or [""]
    return "failed", f"{type(error).__name__}: {lines[0][:200]}"


def untimed(blank: Result, error: Exception) -> Result:
    """The row of a variant that an error kept from being timed."""
    status, reason = why(error)
    return replace(blank, status=status, reason=reason)


def ratio(ours: Result, other: Result) -> float | None:
    """How many times as long the other takes; None where either has no time, their clocks differ by more than 5 %, or
    only one of them had a CPU's core to itself.
    """
    if ours.median_ms is None or other.median_ms is None or ours.own_core != other.own_core:
        return None
    if not comparable([ours.clock_mhz, other.clock_mhz]):
        return None
    return other.median_ms / ours.median_ms
