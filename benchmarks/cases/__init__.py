"""The cases by name: built only when they are asked for."""

from collections.abc import Callable

from benchmarks.case import Case
from benchmarks.cases import attention, distillation, modules, scaling, trainer

Builder = Callable[[], Case]


def builders(kind: str) -> dict[str, Builder]:
    """Every case for a kind of device, "cuda" or "cpu", by name."""
    parts = (attention, distillation, modules, trainer, scaling)
    return {name: build for part in parts for name, build in part.builders(kind).items()}
