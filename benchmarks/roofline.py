"""The ceilings that a share is a share of, measured in the same run: copying memory, and one large matrix product."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.telemetry import Telemetry
from benchmarks.timing import interleave, time_once

REPEATS = 10
WARM_S = 0.2
CPU_S = 0.5


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches.

    Attributes:
        copy_gb_s: a large copy, bytes read plus bytes written.
        matrix_tflops: a large square matrix product on random numbers, by dtype's name.
    """

    copy_gb_s: float
    matrix_tflops: Mapping[str, float]

    def floor_ms(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Least time of work with these FLOPs and bytes, if arithmetic and memory overlap fully."""
        arithmetic = flops / (self.matrix_tflops[name_of(dtype)] * 1e12)
        return max(arithmetic, moved / (self.copy_gb_s * 1e9)) * 1e3


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, device included, after a warm-up: an idle GPU takes a while to raise its clock."""
    if device.type != "cuda":
        call()
        return interleave({"": call}, device, CPU_S, Telemetry(device))[""].quantile(0.5) / 1e3
    deadline = time.monotonic() + WARM_S
    while time.monotonic() < deadline:
        time_once(call, device)
    return median(time_once(call, device) for _ in range(REPEATS)) / 1e3


def measure(device: torch.device) -> Ceilings:
    """Measure the ceilings of a device: two seconds or so."""
    cuda = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,)
    return Ceilings(
        copy_gb_s=_copy_rate(1 << (31 if cuda else 26), device) / 1e9,
        matrix_tflops={name_of(dtype): _matrix_rate(8192 if cuda else 1024, dtype, device) / 1e12 for dtype in dtypes},
    )


def _copy_rate(size: int, device: torch.device) -> float:
    """Bytes a second, read plus written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def _matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / seconds(lambda: left @ right, device)
