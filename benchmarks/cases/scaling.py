"""How cost grows: with tokens, modalities, rows and classes, one at a time, forward and backward; for `plot`.

The share of modalities that is active is among the attention cases already. On a CPU also a grid of few rows and few
classes, where calls cost more than passes; `readme` writes it into docs/distillation.md.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks.case import Case
from benchmarks.cases import attention, distillation

MODALITIES = (2, 4, 8, 16, 32)
# One sample of as many queries as keys; keys over all modalities; rows and classes of two heads.
TOKENS = {"cpu": (128, 256, 512, 1024), "cuda": (1024, 2048, 4096, 8192, 16384)}
KEYS = {"cpu": 512, "cuda": 8192}
ROWS = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (256, 1024, 4096, 16384)}
CLASSES = {"cpu": (256, 1024, 4096, 16384), "cuda": (1024, 8192, 32768, 131072)}
FIXED = {"cpu": (512, 2048, 128), "cuda": (4096, 32768, 1024)}  # rows, classes, hidden sizes
GRID = ((64, 2), (64, 16), (64, 100), (64, 1000), (1024, 2), (1024, 16), (1024, 1000), (16384, 2), (16384, 64))
GRID_DIM = 64
LOSSES = {"kl": (0.0, 1.0), "half-kl": (0.0, 0.5), "jsd": (0.5, 1.0)}  # beta, alpha


def builders(kind: str) -> dict[str, Callable[[], Case]]:
    """Every point of every curve."""
    heads: dict[str, object] = {"heads": 4 if kind == "cpu" else 16, "head_dim": 64}
    heads["kv_heads"] = heads["heads"]
    found: dict[str, Callable[[], Case]] = {}
    for tokens in TOKENS[kind]:
        found[f"scaling/tokens-{tokens}"] = partial(_attention, kind, {**attention.dense(1, tokens), **heads})
    for count in MODALITIES:
        lengths = attention.dense(1, KEYS[kind], count)
        found[f"scaling/modalities-{count}"] = partial(_attention, kind, {**lengths, **heads})
    rows, classes, width = FIXED[kind]
    for size in ROWS[kind]:
        found[f"scaling/rows-{size}"] = partial(_distillation, kind, distillation.Shape(size, classes, width, width))
    for size in CLASSES[kind]:
        found[f"scaling/classes-{size}"] = partial(_distillation, kind, distillation.Shape(rows, size, width, width))
    for rows, classes in GRID if kind == "cpu" else ():
        for loss, (beta, alpha) in LOSSES.items():
            shape = distillation.Shape(rows, classes, GRID_DIM, GRID_DIM, beta=beta, alpha=alpha)
            found[grid_name(rows, classes, loss)] = partial(_distillation, kind, shape)
    return {name: partial(_point, name, build) for name, build in found.items()}


def grid_name(rows: int, classes: int, loss: str) -> str:
    """Name of a grid point's case."""
    return f"scaling/grid-{rows}x{classes}-{loss}"


def _attention(kind: str, arguments: dict[str, object]) -> Case:
    return attention.build("", kind, arguments)


def _distillation(kind: str, shape: distillation.Shape) -> Case:
    return distillation.build("", kind, shape)


def _point(name: str, build: Callable[[], Case]) -> Case:
    case = build()
    return replace(
        case,
        name=name,
        variants=tuple(variant for variant in case.variants if not variant.compiles),
        flops={"both": case.flops["both"]},
        bytes={"both": case.bytes["both"]},
        quick=False,
        launch_bound=False,
        kernels={},
    )
