"""Heads as the distillation kernels are given them: tensors, or the tensor descriptors that TMA reads, and the tiles
that suit them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedmm.kernels.distillation.config import Pass, has_descriptors, tile_config
from fusedmm.kernels.launch import LaunchConfig


class HeadTensors(NamedTuple):
    """One head as kernels take it.

    Attributes:
        source: hidden states [N, D] with a weight, else logits [N, V]; the last stride is 1.
        weight: [V, D] of source's dtype, the last stride 1, or None.
        bias: [V], or None.
        softcap: positive bound on a logit, or None.
    """

    source: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    softcap: float | None

    def arguments(self, role: str, num_classes: int, box: Mapping[str, int] | None) -> dict[str, object]:
        """Launch arguments under the names ``<role>_ptr``, ``<role>_weight_ptr`` and so on.

        With the tile sizes of a `box` the matrices of a head with a weight are tensor descriptors, which give 0 beyond
        the last row and beyond `num_classes`.
        """
        source, weight = _dense(self.source), None if self.weight is None else _dense(self.weight)
        arguments: dict[str, object] = {
            f"{role}_ptr": source,
            f"{role}_weight_ptr": weight,
            f"{role}_bias_ptr": None if self.bias is None else self.bias.contiguous(),
            f"{role}_stride_n": source.stride(0),
            f"{role}_weight_stride_v": 0 if weight is None else weight.stride(0),
            f"{role}_size_d": 0 if weight is None else weight.shape[1],
            f"{role}_softcap": self.softcap,
        }
        if box is not None and weight is not None:
            arguments[f"{role}_ptr"] = TensorDescriptor.from_tensor(source, [box["BLOCK_N"], box["BLOCK_D"]])
            arguments[f"{role}_weight_ptr"] = TensorDescriptor.from_tensor(
                weight[:num_classes], [box["BLOCK_V"], box["BLOCK_D"]]
            )
        return arguments

    @property
    def is_aligned(self) -> bool:
        """Whether tensor descriptors can serve: rows that do not overlap start at multiples of 16 bytes."""
        return self.weight is None or (_is_aligned(self.source) and _is_aligned(self.weight))


def _is_aligned(x: torch.Tensor) -> bool:
    """Of what `_dense` gives, without copying it."""
    stride = x.stride(0) if x.stride(-1) == 1 else x.shape[1]
    starts_aligned = x.stride(-1) != 1 or x.data_ptr() % 16 == 0
    return starts_aligned and stride >= x.shape[1] and stride * x.element_size() % 16 == 0


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def shares_weight(student: HeadTensors, teacher: HeadTensors) -> bool:
    """Whether both heads multiply with the same weight in memory."""
    a, b = student.weight, teacher.weight
    if a is None or b is None:
        return False
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )


def launch_heads(
    student: HeadTensors,
    teacher: HeadTensors | None = None,
    *,
    arch: str,
    kind: Pass,
    num_classes: int,
    columns: int,
) -> tuple[LaunchConfig, dict[str, object]]:
    """Tiles of a pass over `columns` of the `num_classes` classes of both heads, or of the student's alone, and the
    launch arguments that say where their logits come from.
    """
    heads = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    traits = {
        "has_matmul": any(head.weight is not None for head in heads.values()),
        "is_float32": any(head.source.dtype == torch.float32 for head in heads.values()),
        "is_aligned": all(head.is_aligned for head in heads.values()),
    }
    is_shared = teacher is not None and shares_weight(student, teacher)
    config = tile_config(arch, columns, kind=kind, is_shared=is_shared, **traits)
    has_rows = student.source.shape[0] > 0  # nothing is launched without, and no descriptor is of nothing
    box = config.blocks if has_rows and has_descriptors(arch, **traits) else None
    arguments: dict[str, object] = {} if teacher is None else {"IS_SHARED": is_shared}
    for role, head in heads.items():
        arguments |= head.arguments(role, num_classes, box)
    return config, arguments
