"""Clocks, power, energy and throttling of a GPU, through NVML; where there is no NVML every reading is None."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

ENERGY_SECONDS = 1.0  # NVML's energy counter moves every 10 ms or so: a loop shorter than this says little
_THROTTLES = {
    "power cap": "nvmlClocksThrottleReasonSwPowerCap",
    "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    "thermal": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "software thermal": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
}


@dataclass(frozen=True)
class Reading:
    """State of a device at one moment: its clock (None on a CPU, 0 where a GPU does not tell), and why it throttles."""

    clock_mhz: float | None = None
    throttled: str | None = None


class Telemetry:
    """Reads one device; `missing` says why it reads nothing, and is None where it does."""

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        self._unknown = 0.0 if device.type == "cuda" else None
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.missing = "no GPU"
        elif importlib.util.find_spec("pynvml") is None:
            self.missing = "nvidia-ml-py is not installed"
        else:
            import pynvml

            try:
                pynvml.nvmlInit()
                # NVML counts all cards of the machine, CUDA only the visible ones: the identifier is the same in both.
                identifier = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(identifier)
                self._nvml = pynvml
            except pynvml.NVMLError as error:
                self.missing = f"NVML: {error}"

    def read(self) -> Reading:
        """The state now; what takes NVML longer is asked for by itself."""
        clock = None if self._nvml is None else self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        return Reading(clock or self._unknown, self._throttled())

    def power_w(self) -> float | None:
        """What the card draws."""
        return self._scaled("nvmlDeviceGetPowerUsage", 1e-3)

    def energy_mj(self) -> float | None:
        """What it has used since an arbitrary start."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def power_limit_w(self) -> float | None:
        """The limit that the card enforces."""
        return self._scaled("nvmlDeviceGetEnforcedPowerLimit", 1e-3)

    def _ask(self, function: str, *arguments: Any) -> float | None:
        if self._nvml is None:
            return None
        try:
            return float(getattr(self._nvml, function)(self._handle, *arguments))
        except self._nvml.NVMLError:
            return None  # this card or driver does not tell

    def _scaled(self, function: str, factor: float) -> float | None:
        value = self._ask(function)
        return None if value is None else round(value * factor, 1)

    def _throttled(self) -> str | None:
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is None:
            return None
        names = [name for name, constant in _THROTTLES.items() if int(reasons) & getattr(self._nvml, constant)]
        return ", ".join(names) or "no"
