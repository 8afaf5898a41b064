"""Which attention kernels run: the portable ones in plain Triton, or the warp-specialised ones for Hopper.

The choice is a pure function of what is asked for and one committed table, `MEASURED`. An entry is added for a case in
which the Hopper kernels were measured to win, never before; the second command says which those are:

    python -m benchmarks attention --variants fusedmm-portable fusedmm-hopper --json FILE
    python -m benchmarks paths FILE
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from fusedmm.kernels.attention.backward import attention_backward as portable_backward
from fusedmm.kernels.attention.config import head_block, key_splits
from fusedmm.kernels.attention.forward import attention_forward as portable_forward
from fusedmm.kernels.attention.hopper.config import hopper_reasons
from fusedmm.kernels.launch import device_arch, multiprocessors

Path = Literal["auto", "portable", "hopper"]

# (pass, softmax) -> head sizes, as powers of two, at which Hopper's kernels are faster: nothing is measured yet
MEASURED: dict[tuple[str, str], frozenset[int]] = {}


def choose_path(
    direction: str,
    arch: str,
    head_dim: int,
    dtype: torch.dtype,
    softmax: str,
    features: Collection[str],
    triton_version: str,
    *,
    path: Path = "auto",
) -> Literal["portable", "hopper"]:
    """Kernels for one direction.

    Args:
        direction: "forward" or "backward".
        arch: such as "sm_90".
        head_dim: D.
        dtype: of query, key and value.
        softmax: "joint", "per_modality" or "partials".
        features: as in `hopper_reasons`, "empty" where there is no query or no key, and "split" where the portable
            kernels share out the keys because few queries meet many.
        triton_version: such as "3.6.0".
        path: "auto" asks the table; "hopper" insists.

    Raises:
        NotImplementedError: with all reasons, if ``path`` is "hopper" and its kernels cannot do it.
    """
    wins = head_block(head_dim) in MEASURED.get((direction, softmax), frozenset())
    if path == "portable" or (path == "auto" and (not wins or "split" in features)):
        return "portable"
    passes = ("forward",) if direction == "forward" else ("query", "key_value")
    case = (arch, head_dim, dtype, softmax, features, triton_version)
    reasons = [reason for which in passes for reason in hopper_reasons(which, *case)]
    if "empty" in features:
        reasons.append("a batch without queries or without keys")
    if path == "hopper":
        if reasons:
            listed = "; ".join(dict.fromkeys(reasons))
            raise NotImplementedError(f'attention: no Hopper kernel for {listed}. Pass path="portable".')
        return "hopper"
    return "portable" if reasons else "hopper"


def choose_forward(query: Tensor, key: Tensor, arguments: Mapping[str, Any], path: Path) -> str:
    """`choose_path` for the arguments of `attention_forward`."""
    return _choose("forward", query, key, arguments, path)


def choose_backward(query: Tensor, key: Tensor, arguments: Mapping[str, Any], path: Path) -> str:
    """`choose_path` for the arguments of `attention_backward`."""
    return _choose("backward", query, key, arguments, path)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *, path: Path = "auto", **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`fusedmm.kernels.attention.forward.attention_forward` on the kernels that `choose_path` picks."""
    if choose_forward(query, key, arguments, path) == "portable":
        return portable_forward(query, key, value, **arguments)
    from fusedmm.kernels.attention.hopper.launch import attention_forward as hopper_forward

    return hopper_forward(query, key, value, **arguments)


def attention_backward(
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    *,
    path: Path = "auto",
    **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`fusedmm.kernels.attention.backward.attention_backward` on the kernels that `choose_path` picks."""
    tensors = (grad_output, grad_mass, grad_lse, query, key, value, output, mass, lse)
    if choose_backward(query, key, arguments, path) == "portable":
        return portable_backward(*tensors, **arguments)
    from fusedmm.kernels.attention.hopper.launch import attention_backward as hopper_backward

    return hopper_backward(*tensors, **arguments)


def _choose(direction: str, query: Tensor, key: Tensor, arguments: Mapping[str, Any], path: Path) -> str:
    names = ("log_prior", "gate", "output_gate", "active", "visible")
    features = {name for name in names if arguments[name] is not None}
    if arguments["seed"] is not None:
        features.add("dropout")
    if query.shape[0] == 0 or key.shape[0] == 0:
        features.add("empty")
    elif MEASURED and _splits(query, key, arguments):
        features.add("split")
    case = (device_arch(query.device), query.shape[-1], query.dtype, arguments["softmax"], features)
    return choose_path(direction, *case, triton.__version__, path=path)


def _splits(query: Tensor, key: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether tiles of Hopper's 128 queries would leave most of the GPU without work."""
    batch = arguments["cu_seqlens_q"].numel() - 1
    return key_splits(query.shape[0], key.shape[0], batch, query.shape[1], 128, multiprocessors(query.device)) > 1
