"""Every attention kernel in every configuration the table chooses, for ahead-of-time compilation.

The variants are those that differ in code: dtype, head size, kind of softmax, and whether an optional tensor is
there. Not every combination is listed, but every option is, at every size: plain, with everything about modalities,
with times, with dropout.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from fusedmm.kernels.attention.backward_key_value import _attention_backward_key_value_kernel
from fusedmm.kernels.attention.backward_key_value_spans import _attention_backward_key_value_spans_kernel
from fusedmm.kernels.attention.backward_query import _attention_backward_query_kernel
from fusedmm.kernels.attention.backward_query_spans import _attention_backward_query_spans_kernel
from fusedmm.kernels.attention.backward_rows import _attention_backward_rows_kernel
from fusedmm.kernels.attention.combine import _attention_combine_kernel
from fusedmm.kernels.attention.config import (
    _attention_backward_key_value_config,
    _attention_backward_query_config,
    _attention_backward_rows_config,
    _attention_combine_config,
    _attention_forward_config,
    _attention_spans_config,
)
from fusedmm.kernels.attention.forward import _attention_forward_kernel
from fusedmm.kernels.attention.forward_spans import _attention_forward_spans_kernel
from fusedmm.kernels.launch import KernelSpec, LaunchConfig

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # float16 compiles to the code of bfloat16
HEAD_DIMS = {torch.bfloat16: (64, 96, 128, 256), torch.float32: (64, 128, 256)}
SEGMENTS = {"long": 1024, "short": 5}  # mean keys of a segment
# Optional tensors present in each variant.
VARIANTS = {
    "plain": (),
    "gated": (
        "log_prior_ptr",
        "gate_ptr",
        "output_gate_ptr",
        "grad_statistic_ptr",
        "grad_gated_ptr",
        "grad_output_gate_ptr",
    ),
    "timed": ("log_prior_ptr", "gate_ptr", "visible_ptr"),
    "dropout": ("seed_ptr",),
}
# The same where few queries meet few keys, and many.
FEW_VARIANTS = {
    "few,gated": VARIANTS["gated"],
    "few,timed": VARIANTS["timed"],
    "split": ("log_prior_ptr", "gate_ptr", "visible_ptr", "split_rows"),
}
FEW, MANY = 16, 4096  # queries of a sample
OPTIONAL = frozenset(name for names in (*VARIANTS.values(), *FEW_VARIANTS.values()) for name in names) | {"shift_ptr"}
FLOAT32 = frozenset(
    f"{name}_ptr"
    for name in (
        *("log_prior", "gate", "mass", "lse", "row_terms", "shift"),
        *("grad_statistic", "grad_log_prior", "grad_gate", "split_output", "split_lse"),
    )
)
SPLIT_SUMS = ("output_ptr", "grad_query_ptr")  # float32 where the keys are split
INT32 = frozenset(
    f"{name}_ptr" for name in ("query_tiles", "key_tiles", "cu_seqlens_q", "cu_seqlens_k", "key_ranges", "visible")
)
MULTIPLES_OF_16 = frozenset(
    f"{name}_stride_{dim}"
    for name, dims in (("query", "qh"), ("key", "kh"), ("value", "kh"), ("grad_output", "qhm"), ("output_gate", "qh"))
    for dim in dims
) | {"padded_rows"}


def _argument_type(name: str, element: str) -> str:
    if name in FLOAT32:
        return "*fp32"
    if name in INT32:
        return "*i32"
    if name == "seed_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return f"*{element}"
    return "fp32" if name in ("scale", "dropout_p") else "i32"


def _spec(
    kernel: Any,
    name: str,
    config: LaunchConfig,
    dtype: torch.dtype,
    arch: str,
    present: tuple[str, ...],
    **constexprs: Any,
) -> KernelSpec:
    in_float32 = SPLIT_SUMS if "split_rows" in present and kernel is not _attention_combine_kernel else ()
    aligned = MULTIPLES_OF_16 if constexprs["HEAD_DIM"] % 16 == 0 else ()
    return KernelSpec.of(
        kernel,
        name,
        config,
        arch,
        constexprs={
            **constexprs,
            "PRECISION": "ieee",
            "ONE_HOT": tl.float32 if dtype == torch.float32 else tl.bfloat16,
            **dict.fromkeys(OPTIONAL.difference(present)),
        },
        type_of=lambda argument: "*fp32" if argument in in_float32 else _argument_type(argument, DTYPES[dtype]),
        is_multiple_of_16=lambda argument: argument in aligned,
        main_loop_flops=_main_loop_flops(kernel, config, constexprs),
    )


def _main_loop_flops(kernel: Any, config: LaunchConfig, constexprs: dict[str, Any]) -> int:
    products = {
        _attention_forward_kernel: 2,
        _attention_forward_spans_kernel: 2,
        _attention_backward_key_value_kernel: 4,
        _attention_backward_key_value_spans_kernel: 4,
        _attention_backward_query_kernel: 2 if constexprs.get("DELTA_ONLY") else 3,
        _attention_backward_query_spans_kernel: 2 if constexprs.get("DELTA_ONLY") else 3,
        _attention_backward_rows_kernel: 0,
        _attention_combine_kernel: 0,
    }[kernel]
    return products * 2 * config.blocks.get("BLOCK_Q", 0) * config.blocks.get("BLOCK_K", 0) * config.blocks["BLOCK_D"]


def kernel_specs(arch: str) -> Iterator[KernelSpec]:
    """All attention kernels that run on ``arch``."""
    for dtype, head_dims in HEAD_DIMS.items():
        for head_dim in head_dims:
            for variant, present in VARIANTS.items():
                if variant in ("plain", "gated") or dtype == torch.bfloat16:
                    yield from _joint_specs(arch, dtype, head_dim, variant, present)
            yield from _other_softmax_specs(arch, dtype, head_dim)
            yield from _spans_specs(arch, dtype, head_dim)
            if dtype == torch.bfloat16:
                yield from _few_query_specs(arch, dtype, head_dim)


def _joint_specs(
    arch: str, dtype: torch.dtype, head_dim: int, variant: str, present: tuple[str, ...]
) -> Iterator[KernelSpec]:
    label = f"[joint,{variant},d{head_dim},{DTYPES[dtype]}]"
    common: dict[str, Any] = {"dtype": dtype, "arch": arch, "present": present, "HEAD_DIM": head_dim}
    options = {"visible": "visible_ptr" in present, "dropout": "seed_ptr" in present}
    gated = "output_gate_ptr" in present
    forward = _attention_forward_config(head_dim, dtype, arch, MANY, wide_end=gated, output_gate=gated, **options)
    yield _spec(_attention_forward_kernel, f"attention_forward{label}", forward, SOFTMAX="joint", **common)
    for length, mean_segment in SEGMENTS.items():
        if length == "long" or variant == "gated":
            key_value = _attention_backward_key_value_config(
                head_dim, dtype, arch, mean_segment, spans=False, **options
            )
            name = f"attention_backward_key_value[joint,{variant},{length},d{head_dim},{DTYPES[dtype]}]"
            yield _spec(_attention_backward_key_value_kernel, name, key_value, HAS_GATE="gate_ptr" in present, **common)
    spans = _attention_backward_key_value_config(head_dim, dtype, arch, SEGMENTS["long"], spans=True, **options)
    name = f"attention_backward_key_value_spans{label}"
    yield _spec(_attention_backward_key_value_spans_kernel, name, spans, HAS_GATE="gate_ptr" in present, **common)
    if variant in ("plain", "gated"):  # times and dropout change nothing in it
        rows = _attention_backward_rows_config(head_dim)
        yield _spec(_attention_backward_rows_kernel, f"attention_backward_rows{label}", rows, SOFTMAX="joint", **common)
    if variant != "gated":  # the gate is in row_terms: the same code as plain
        query = _attention_backward_query_config(head_dim, dtype, arch, MANY, dropout=options["dropout"])
        flags: dict[str, Any] = {"DELTA_ONLY": False, "IS_PARTIALS": False}
        yield _spec(_attention_backward_query_kernel, f"attention_backward_query{label}", query, **flags, **common)


def _other_softmax_specs(arch: str, dtype: torch.dtype, head_dim: int) -> Iterator[KernelSpec]:
    common: dict[str, Any] = {"dtype": dtype, "arch": arch, "present": ("shift_ptr",), "HEAD_DIM": head_dim}
    forward = _attention_forward_config(head_dim, dtype, arch, MANY, wide_end=True)
    rows = _attention_backward_rows_config(head_dim)
    query = _attention_backward_query_config(head_dim, dtype, arch, MANY)
    for softmax in ("per_modality", "partials"):
        label = f"[{softmax},plain,d{head_dim},{DTYPES[dtype]}]"
        yield _spec(_attention_forward_kernel, f"attention_forward{label}", forward, SOFTMAX=softmax, **common)
        yield _spec(_attention_backward_rows_kernel, f"attention_backward_rows{label}", rows, SOFTMAX=softmax, **common)
        flags: dict[str, Any] = {"DELTA_ONLY": softmax == "per_modality", "IS_PARTIALS": softmax == "partials"}
        yield _spec(_attention_backward_query_kernel, f"attention_backward_query{label}", query, **flags, **common)


def _spans_specs(arch: str, dtype: torch.dtype, head_dim: int) -> Iterator[KernelSpec]:
    """Passes over queries whose key tiles span segments, for up to 16 modalities and for more."""
    size = f"d{head_dim},{DTYPES[dtype]}"
    common: dict[str, Any] = {"dtype": dtype, "arch": arch, "HEAD_DIM": head_dim}
    few, many = 8, 25
    cases = [(variant, few, present) for variant, present in VARIANTS.items() if dtype == torch.bfloat16]
    cases += (
        [("many,timed", many, VARIANTS["timed"])] if dtype == torch.bfloat16 else [("gated", few, VARIANTS["gated"])]
    )

    def config_of(which: str, modalities: int, present: tuple[str, ...]) -> LaunchConfig:
        visible = "visible_ptr" in present
        return _attention_spans_config(which, head_dim, dtype, arch, modalities, visible=visible)

    for variant, modalities, present in cases:
        name = f"attention_forward_spans[joint,{variant},{size}]"
        config = config_of("forward", modalities, present)
        yield _spec(_attention_forward_spans_kernel, name, config, present=present, **common)
        name = f"attention_backward_query_spans[joint,{variant},{size}]"
        if variant != "gated" or dtype == torch.float32:  # as in _joint_specs
            kernel, config = _attention_backward_query_spans_kernel, config_of("query", modalities, present)
            yield _spec(kernel, name, config, present=present, DELTA_ONLY=False, **common)
    name = f"attention_backward_query_spans[per_modality,plain,{size}]"
    kernel, config = _attention_backward_query_spans_kernel, config_of("query", few, ())
    yield _spec(kernel, name, config, present=("shift_ptr",), DELTA_ONLY=True, **common)


def _few_query_specs(arch: str, dtype: torch.dtype, head_dim: int) -> Iterator[KernelSpec]:
    """Tiles for few queries, and passes whose keys are split."""
    query = _attention_backward_query_config(head_dim, dtype, arch, FEW)
    size = f"d{head_dim},{DTYPES[dtype]}"
    common: dict[str, Any] = {"dtype": dtype, "arch": arch, "HEAD_DIM": head_dim}
    flags: dict[str, Any] = {"DELTA_ONLY": False, "IS_PARTIALS": False}
    for variant, present in FEW_VARIANTS.items():
        name = f"attention_forward[joint,{variant},{size}]"
        forward = _attention_forward_config(head_dim, dtype, arch, FEW, visible="visible_ptr" in present)
        yield _spec(_attention_forward_kernel, name, forward, SOFTMAX="joint", present=present, **common)
        if variant != "few,gated":
            name = f"attention_backward_query[joint,{variant},{size}]"
            yield _spec(_attention_backward_query_kernel, name, query, present=present, **flags, **common)
    split: dict[str, Any] = {**common, "present": ("split_rows", "shift_ptr")}
    name = f"attention_forward[partials,split,{size}]"
    forward = _attention_forward_config(head_dim, dtype, arch, FEW, wide_end=True)
    yield _spec(_attention_forward_kernel, name, forward, SOFTMAX="partials", **split)
    name = f"attention_backward_query[per_modality,split,{size}]"
    yield _spec(_attention_backward_query_kernel, name, query, DELTA_ONLY=True, IS_PARTIALS=False, **split)
    combine = _attention_combine_config(head_dim)
    split["present"] = ("split_rows", "gate_ptr", "output_gate_ptr")
    for softmax in ("joint", "per_modality", "partials"):
        yield _spec(
            _attention_combine_kernel, f"attention_combine[{softmax},{size}]", combine, SOFTMAX=softmax, **split
        )
