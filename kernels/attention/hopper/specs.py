"""Every Hopper attention kernel in every configuration the table chooses, for ahead-of-time compilation.

The variants are those that differ in code: dtype, head size, softmax, which optional tensors are there, grouped
heads."""

from collections.abc import Iterator
from typing import Any

from triton.experimental.gluon import language as gl

from fusedmm.kernels.attention.config import head_block
from fusedmm.kernels.attention.hopper.backward_key_value import TERMS, _attention_backward_key_value_hopper_kernel
from fusedmm.kernels.attention.hopper.backward_query import _attention_backward_query_hopper_kernel
from fusedmm.kernels.attention.hopper.config import code_path, faint_config, hopper_config, hopper_reasons
from fusedmm.kernels.attention.hopper.faint import _attention_faint_kernel
from fusedmm.kernels.attention.hopper.forward import _attention_forward_hopper_kernel
from fusedmm.kernels.attention.hopper.passes import GLUON_DTYPES
from fusedmm.kernels.attention.hopper.ragged import tile_layout
from fusedmm.kernels.attention.hopper.tiles import CONSUMERS, ROWS
from fusedmm.kernels.attention.hopper.work import (
    BLOCK_ROWS,
    TILE,
    _attention_key_work_kernel,
    _attention_query_work_kernel,
)
from fusedmm.kernels.launch import KernelSpec, LaunchConfig

HEAD_DIMS = (64, 96, 128, 256)
QUERY_HEADS, MODALITIES = 16, 4
TRITON = "3.6.0"  # the oldest that the kernels support
# name -> (optional arguments in use, query heads that share a key head)
VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "plain": ((), 1),
    "gated": (("log_prior", "gate", "output_gate"), 1),
    "grouped": (("log_prior", "gate", "output_gate"), 4),
    "active": (("log_prior", "gate", "active"), 1),  # that differs by head, so each has work of its own
    "timed": (("log_prior", "gate", "visible"), 1),
}
GRADIENTS = {"log_prior": "grad_log_prior", "gate": "grad_gate"}
OPTIONAL = {"log_prior", "gate", "output_gate", "visible", *GRADIENTS.values()}
HALF = {"output", "output_gate", "grad_query", "grad_key", "grad_value"}
INT32 = {"visible", "work"}


def kernel_specs(arch: str) -> Iterator[KernelSpec]:
    """All Hopper attention kernels; none on other architectures."""
    if arch != "sm_90":
        return
    yield from _work_specs(arch)
    yield from _faint_specs(arch)
    for head_dim in HEAD_DIMS:
        for variant, (features, group) in VARIANTS.items():
            for softmax in ("joint", "per_modality", "partials"):
                if not _is_distinct(head_dim, variant, softmax):
                    continue
                used = _accepted(softmax, features)
                for dtype in GLUON_DTYPES:
                    for which in ("forward", "query", "key_value"):
                        if not hopper_reasons(which, arch, head_dim, dtype, softmax, used, TRITON):
                            yield from _specs(arch, which, softmax, variant, used, group, head_dim, GLUON_DTYPES[dtype])


def _is_distinct(head_dim: int, variant: str, softmax: str) -> bool:
    """Whether a combination does not compile to the code of another: of its plain variant, or of a wider head."""
    if head_dim != head_block(head_dim):
        return softmax == "joint" and variant in ("gated", "timed")
    return {
        "joint": True,
        "per_modality": variant in ("plain", "gated", "timed"),
        "partials": variant in ("plain", "timed"),
    }[softmax]


def _work_specs(arch: str) -> Iterator[KernelSpec]:
    for kernel, blocks in (
        (_attention_query_work_kernel, {"BLOCK_K": 128, "BLOCK_M": MODALITIES, "TILE_ROWS": TILE}),
        (_attention_key_work_kernel, {"BLOCK_Q": 64, "BLOCK_ROWS": BLOCK_ROWS, "TILE_ROWS": TILE}),
    ):
        for variant, absent in (("plain", {"active_ptr": None, "visible_ptr": None}), ("timed", {})):
            yield KernelSpec.of(
                kernel,
                f"{kernel.fn.__name__.strip('_').removesuffix('_kernel')}[{variant}]",
                LaunchConfig(blocks=blocks, num_warps=4, num_stages=1),
                arch,
                constexprs=absent,
                type_of=lambda name: {"active_ptr": "*u8"}.get(name, "*i32" if name.endswith("_ptr") else "i32"),
            )


def _faint_specs(arch: str) -> Iterator[KernelSpec]:
    for head_dim in HEAD_DIMS:
        for variant, absent in (("plain", {"log_prior_ptr": None, "visible_ptr": None}), ("timed", {})):
            config = faint_config(head_dim)
            yield KernelSpec.of(
                _attention_faint_kernel,
                f"attention_faint[{variant},d{head_dim},bf16]",
                config,
                arch,
                constexprs={"HEAD_DIM": head_dim, "BLOCK_M": MODALITIES, **absent},
                type_of=_faint_type,
                is_multiple_of_16=lambda name: name.startswith(("query_stride", "key_stride")),
                main_loop_flops=2 * config.blocks["BLOCK_Q"] * config.blocks["BLOCK_K"] * config.blocks["BLOCK_D"],
            )


def _faint_type(name: str) -> str:
    if name in ("query_ptr", "key_ptr"):
        return "*bf16"
    if name in ("mass_ptr", "lse_ptr", "log_prior_ptr"):
        return "*fp32"
    return "*i32" if name.endswith("_ptr") else "fp32" if name == "scale2" else "i32"


def _accepted(softmax: str, features: tuple[str, ...]) -> tuple[str, ...]:
    """The features that a softmax takes: a prior cancels in per_modality; partials have no gates."""
    refused = {"joint": (), "per_modality": ("log_prior",), "partials": ("log_prior", "gate", "output_gate")}[softmax]
    return tuple(feature for feature in features if feature not in refused)


def _specs(
    arch: str, which: str, softmax: str, variant: str, used: tuple[str, ...], group: int, head_dim: int, dtype: gl.dtype
) -> Iterator[KernelSpec]:
    kernel = {
        "forward": _attention_forward_hopper_kernel,
        "query": _attention_backward_query_hopper_kernel,
        "key_value": _attention_backward_key_value_hopper_kernel,
    }[which]
    block, config = hopper_config(code_path(which, softmax, visible="visible" in used), head_dim)
    rows = {"query": block, "grad_output": block, "key": ROWS.value, "value": ROWS.value}
    if which != "key_value":
        rows = {"query": ROWS.value, "grad_output": ROWS.value, "key": block, "value": block}
    boxes = {name: _box(dtype, size, max(64, head_block(head_dim))) for name, size in rows.items()}
    terms = gl.NVMMASharedLayout.get_default_for([TERMS.value, 1, block], gl.float32)
    boxes["terms"] = f"tensordesc<fp32[{TERMS.value}, 1, {block}],{terms!r}>"
    present = {*used, *(GRADIENTS[name] for name in used if name in GRADIENTS)}
    for delta_only in (False, True) if (which, softmax) == ("query", "per_modality") else (False,):
        constexprs: dict[str, Any] = {
            "HEAD_DIM": head_dim,
            "QUERY_HEADS": QUERY_HEADS,
            "KEY_HEADS": QUERY_HEADS // group,
            "GROUP": group,
            "MODALITIES": MODALITIES,
            "WORK_HEADS": QUERY_HEADS if "active" in used else 1,
            "SOFTMAX": softmax,
            "IS_PARTIALS": softmax == "partials",
            "HAS_GATE": "gate" in used,
            "DELTA_ONLY": delta_only,
            **{f"{name}_ptr": None for name in OPTIONAL - present},
        }
        label = ",".join([softmax, variant, *(["delta"] if delta_only else []), f"d{head_dim}", dtype.name])
        products = {"forward": 2, "query": 2 if delta_only else 3, "key_value": 4}[which]
        yield KernelSpec.of(
            kernel,
            f"attention_hopper_{which}[{label}]",
            config,
            arch,
            constexprs=constexprs,
            type_of=lambda name: _argument_type(name, boxes, dtype),
            is_multiple_of_16=lambda name: name == "padded_rows" or name.startswith("output_gate_stride"),
            main_loop_flops=products * 2 * CONSUMERS.value * ROWS.value * block * max(64, head_block(head_dim)),
        )


def _box(dtype: gl.dtype, rows: int, block_d: int) -> str:
    return f"tensordesc<{dtype.name}[1, 1, {rows}, 1, {block_d}],{tile_layout(rows, block_d, dtype)!r}>"


def _argument_type(name: str, boxes: dict[str, str], dtype: gl.dtype) -> str:
    if name.endswith("_desc"):
        return boxes[name.removesuffix("_desc")]
    if name.endswith("_ptr"):
        tensor = name.removesuffix("_ptr")
        return f"*{dtype.name}" if tensor in HALF else "*i32" if tensor in INT32 else "*fp32"
    if name in ("scale", "scale2"):
        return "fp32"
    return "i64" if "_stride_" in name or name == "padded_rows" else "i32"
