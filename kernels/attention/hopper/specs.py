"""Every Hopper attention kernel in every configuration the table chooses, for ahead-of-time compilation.

The variants are those that differ in code: dtype, head size, softmax, which optional tensors are there, grouped
heads."""

import inspect
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
            names = [name for name in kernel.arg_names if name not in blocks and name not in absent]
            types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names}
            yield KernelSpec(
                name=f"{kernel.fn.__name__.strip('_').removesuffix('_kernel')}[{variant}]",
                kernel=kernel,
                signature={**types, "active_ptr": "*u8"} if "active_ptr" in types else types,
                constexprs=absent,
                config=LaunchConfig(blocks=blocks, num_warps=4, num_stages=1),
                arch=arch,
            )


def _faint_specs(arch: str) -> Iterator[KernelSpec]:
    for head_dim in HEAD_DIMS:
        for variant, absent in (("plain", {"log_prior_ptr": None, "visible_ptr": None}), ("timed", {})):
            config = faint_config(head_dim)
            constexprs = {"HEAD_DIM": head_dim, "BLOCK_M": MODALITIES, **absent}
            names = [name for name in _attention_faint_kernel.arg_names if name not in {*constexprs, *config.blocks}]
            half, float32 = ("query_ptr", "key_ptr"), ("mass_ptr", "lse_ptr", "log_prior_ptr", "scale2")
            types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names}
            types |= {name: f"{'*' * name.endswith('_ptr')}fp32" for name in float32 if name in names}
            yield KernelSpec(
                name=f"attention_faint[{variant},d{head_dim},bf16]",
                kernel=_attention_faint_kernel,
                signature={**types, **dict.fromkeys(half, "*bf16")},
                constexprs=constexprs,
                config=config,
                arch=arch,
                divisible_by_16=tuple(name for name in names if name.startswith(("query_stride", "key_stride"))),
                main_loop_flops=2 * config.blocks["BLOCK_Q"] * config.blocks["BLOCK_K"] * config.blocks["BLOCK_D"],
            )


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
    parameters = inspect.signature(kernel.fn).parameters
    for delta_only in (False, True) if (which, softmax) == ("query", "per_modality") else (False,):
        values: dict[str, Any] = {
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
        values = {name: value for name, value in values.items() if name in parameters}
        signature = {
            name: _argument_type(name, boxes, dtype)
            for name in parameters
            if name not in values and name not in config.blocks
        }
        label = ",".join([softmax, variant, *(["delta"] if delta_only else []), f"d{head_dim}", dtype.name])
        products = {"forward": 2, "query": 2 if delta_only else 3, "key_value": 4}[which]
        yield KernelSpec(
            name=f"attention_hopper_{which}[{label}]",
            kernel=kernel,
            signature=signature,
            constexprs=values,
            config=config,
            arch=arch,
            divisible_by_16=tuple(
                name for name in signature if name == "padded_rows" or name.startswith("output_gate_stride")
            ),
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
