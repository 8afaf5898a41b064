"""Which attention kernels run: the portable ones in plain Triton, or the warp-specialised ones for Hopper.

The choice is a pure function of what is asked for and one committed table, `MEASURED`. An entry is added for a case in
which the Hopper kernels were measured to win, never before; the second command says which those are:

    python -m benchmarks attention --variants fusedmm-portable fusedmm-hopper --json FILE
    python -m benchmarks paths FILE
"""

from collections.abc import Collection
from types import ModuleType
from typing import Literal

import torch
import triton
from torch import Tensor

from fusedmm.kernels.attention import launch as portable
from fusedmm.kernels.attention.arguments import AttentionProblem
from fusedmm.kernels.attention.config import head_block, key_splits
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


def launchers(direction: str, query: Tensor, key: Tensor, problem: AttentionProblem, path: Path = "auto") -> ModuleType:
    """The module with the `attention_forward` and `attention_backward` of the kernels that `choose_path` picks.

    Raises:
        NotImplementedError: as `choose_path`.
    """
    names = ("log_prior", "gate", "output_gate", "active", "visible")
    features = {name for name in names if getattr(problem, name) is not None}
    if problem.seed is not None:
        features.add("dropout")
    if query.shape[0] == 0 or key.shape[0] == 0:
        features.add("empty")
    elif MEASURED and _splits(query, key, problem):
        features.add("split")
    case = (device_arch(query.device), query.shape[-1], query.dtype, problem.softmax, features)
    if choose_path(direction, *case, triton.__version__, path=path) == "portable":
        return portable
    from fusedmm.kernels.attention.hopper import launch as hopper

    return hopper


def _splits(query: Tensor, key: Tensor, problem: AttentionProblem) -> bool:
    """Whether tiles of Hopper's 128 queries would leave most of the GPU without work."""
    sizes = query.shape[0], key.shape[0], problem.batch, query.shape[1], 128
    return key_splits(*sizes, multiprocessors(query.device)) > 1
