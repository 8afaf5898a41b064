"""Every distillation kernel in every configuration the table chooses, for ahead-of-time compilation.

The variants are those that differ in code: scores or losses, heads with weights, with a shared weight or logits that
exist, with and without bias and soft-cap, a temperature a row or 1, labels or none, and the kind of divergence. Not
every combination is listed, but every option is.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from fusedmm.kernels.distillation.config import Pass, has_descriptors, row_threads, tile_config
from fusedmm.kernels.distillation.gradient import _gradient_kernel
from fusedmm.kernels.distillation.mixture import _mixture_kernel
from fusedmm.kernels.distillation.statistics import (
    MERGE_WARPS,
    MERGED_ROWS,
    _merge_statistics_kernel,
    _statistics_kernel,
)
from fusedmm.kernels.distillation.top_gradient import _top_gradient_kernel
from fusedmm.kernels.distillation.top_statistics import (
    BLOCK_K,
    TOP_MERGE_WARPS,
    _top_merge_kernel,
    _top_sweep_kernel,
)
from fusedmm.kernels.launch import KernelSpec, LaunchConfig

INPUTS = (
    "student_ptr",
    "student_weight_ptr",
    "student_bias_ptr",
    "teacher_ptr",
    "teacher_weight_ptr",
    "teacher_bias_ptr",
)
WEIGHTS = ("student_weight_ptr", "teacher_weight_ptr")
MATRICES = ("student_ptr", "teacher_ptr", *WEIGHTS)
OPTIONAL = (
    "student_bias_ptr",
    "teacher_bias_ptr",
    "student_softcap",
    "teacher_softcap",
    "labels_ptr",
    "row_temperature_ptr",
)
LABELS = ("labels_ptr",)
CLASSES = {"large": 128256, "small": 64}  # a vocabulary, and classes that fit one tile
FLOATS = (
    "student_softcap",
    "teacher_softcap",
    "inverse_temperature",
    "beta",
    "odds",
    "alpha",
    "label_smoothing",
)
STRIDES = (
    "student_stride_n",
    "student_weight_stride_v",
    "student_size_d",
    "teacher_stride_n",
    "teacher_weight_stride_v",
    "teacher_size_d",
    "grad_stride_n",
)


def _argument_type(name: str, element: str, box: Mapping[str, int] | None) -> str:
    if name == "labels_ptr":
        return "*i64"
    if name == "classes_ptr":
        return "*i32"
    if name == "grad_logits_ptr":
        return "*bf16" if element == "fp32" else f"*{element}"
    if name in MATRICES and box is not None:
        return f"tensordesc<{element}[{box['BLOCK_V' if name in WEIGHTS else 'BLOCK_N']},{box['BLOCK_D']}]>"
    if name in INPUTS:
        return f"*{element}"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in FLOATS else "i32"


def _spec(
    kernel: Any,
    name: str,
    config: LaunchConfig,
    arch: str,
    element: str,
    absent: frozenset[str],
    *,
    box: Mapping[str, int] | None = None,
    is_aligned: bool = True,
    **constexprs: Any,
) -> KernelSpec:
    return KernelSpec.of(
        kernel,
        name,
        config,
        arch,
        constexprs={**constexprs, **dict.fromkeys(absent)},
        type_of=lambda argument: _argument_type(argument, element, box),
        is_multiple_of_16=lambda argument: argument in STRIDES and is_aligned,
        main_loop_flops=0
        if "student_weight_ptr" in absent
        else 2 * config.blocks["BLOCK_N"] * config.blocks["BLOCK_V"] * config.blocks["BLOCK_D"],
    )


def _tile_spec(
    kernel: Any,
    name: str,
    kind: Pass,
    *,
    arch: str,
    columns: int,
    element: str,
    absent: frozenset[str],
    traits: Mapping[str, bool],
    is_shared: bool = False,
    **constexprs: Any,
) -> KernelSpec:
    """A kernel over tiles of logits; `columns` and `traits` as `tile_config` takes them."""
    config = tile_config(arch, columns, kind=kind, is_shared=is_shared, **traits)
    return _spec(
        kernel,
        f"distillation_{name}",
        config,
        arch,
        element,
        absent,
        box=config.blocks if has_descriptors(arch, **traits) else None,
        is_aligned=traits["is_aligned"],
        **constexprs,
    )


def kernel_specs(arch: str) -> Iterator[KernelSpec]:
    """All distillation kernels that run on ``arch``."""
    for kind, element, label, present in (
        ("heads", "bf16", "labels", LABELS),
        ("heads", "bf16", "everything", OPTIONAL),
        ("heads", "fp16", "plain", ()),
        ("heads", "fp32", "plain", ()),
        ("shared", "bf16", "labels", LABELS),
        ("unaligned", "bf16", "everything", OPTIONAL),
    ):
        absent = frozenset(OPTIONAL) - set(present)
        traits = {"has_matmul": True, "is_float32": element == "fp32", "is_aligned": kind != "unaligned"}
        columns = CLASSES["large"]
        yield from _specs(f"{kind},{label},{element}", columns, arch, element, absent, traits, kind == "shared")
    traits = {"has_matmul": False, "is_float32": True, "is_aligned": True}
    for size, columns in CLASSES.items():
        for label, present in (("labels", LABELS), ("everything", OPTIONAL)):
            absent = frozenset((*OPTIONAL, *WEIGHTS)) - set(present)
            yield from _specs(f"logits,{size},{label}", columns, arch, "fp32", absent, traits, False)
    yield from _merge_specs(_merge_statistics_kernel, "merge_statistics", arch, MERGE_WARPS)
    yield from _top_specs(arch)


def _top_specs(arch: str) -> Iterator[KernelSpec]:
    """The kernels of top-k teachers."""
    for label, element, classes, present in (
        ("heads,labels,bf16", "bf16", "large", LABELS),
        ("heads,everything,bf16", "bf16", "large", OPTIONAL),
        ("heads,plain,fp16", "fp16", "large", ()),
        ("heads,plain,fp32", "fp32", "large", ()),
        ("unaligned,everything,bf16", "bf16", "large", OPTIONAL),
        ("logits,large,labels", "fp32", "large", LABELS),
        ("logits,large,everything", "fp32", "large", OPTIONAL),
        ("logits,small,labels", "fp32", "small", LABELS),
    ):
        has_matmul = not label.startswith("logits")
        absent = frozenset((*OPTIONAL, *(() if has_matmul else WEIGHTS))) - set(present)
        traits = {
            "has_matmul": has_matmul,
            "is_float32": element == "fp32",
            "is_aligned": not label.startswith("unaligned"),
        }
        spec = partial(_tile_spec, arch=arch, columns=CLASSES[classes], element=element, absent=absent, traits=traits)
        for kind in ("scores", "loss"):
            yield spec(
                _top_sweep_kernel,
                f"top_sweep[{kind},{label}]",
                "top_sweep",
                LANES=row_threads(arch),
                IS_SCORES=kind == "scores",
                IS_UNIT="row_temperature_ptr" in absent,
            )
        yield spec(_top_gradient_kernel, f"top_gradient[{label}]", "top_gradient")
    yield from _merge_specs(_top_merge_kernel, "top_merge", arch, TOP_MERGE_WARPS, HAS_REST=True, BLOCK_K=BLOCK_K)


def _merge_specs(kernel: Any, name: str, arch: str, num_warps: int, **constexprs: Any) -> Iterator[KernelSpec]:
    """A kernel that merges the splits of rows."""
    for is_scores, unit in ((True, True), (True, False), (False, True), (False, False)):
        yield _spec(
            kernel,
            f"distillation_{name}[{'scores' if is_scores else 'loss'},{'unit' if unit else 'tempered'}]",
            LaunchConfig({"BLOCK_N": MERGED_ROWS}, num_warps=num_warps, num_stages=2),
            arch,
            "fp32",
            frozenset((*WEIGHTS, "row_temperature_ptr") if unit else WEIGHTS),
            IS_SCORES=is_scores,
            IS_UNIT=unit,
            **constexprs,
        )


def _specs(
    label: str,
    columns: int,
    arch: str,
    element: str,
    absent: frozenset[str],
    traits: Mapping[str, bool],
    is_shared: bool,
) -> Iterator[KernelSpec]:
    """The kernels over tiles of logits in one variant; `columns` and `traits` as `tile_config` takes them."""
    spec = partial(
        _tile_spec,
        arch=arch,
        columns=columns,
        element=element,
        absent=absent,
        traits=traits,
        is_shared=is_shared,
        IS_SHARED=is_shared,
    )
    kinds: tuple[Pass, ...] = ("scores", "loss")
    for kind in kinds:
        yield spec(
            _statistics_kernel,
            f"statistics[{kind},{label}]",
            kind,
            LANES=row_threads(arch),
            IS_SCORES=kind == "scores",
            IS_UNIT="row_temperature_ptr" in absent,
        )
    yield spec(_mixture_kernel, f"mixture[{label}]", "mixture")
    for index, name in enumerate(("forward_kl", "reverse_kl", "mixture")):
        kind = "mixture_gradient" if name == "mixture" else "gradient"
        yield spec(_gradient_kernel, f"gradient[{name},{label}]", kind, KIND=index)
