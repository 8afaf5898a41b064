"""Which implementation runs: the choice is made here, with its reasons, and never falls back silently."""

import importlib.util
import os
from collections.abc import Sequence

import torch

IMPLEMENTATIONS = ("auto", "triton", "reference", "eager")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # not asked while torch.compile traces


def resolve_impl(op: str, impl: str, device: torch.device, *, unsupported: Sequence[str] = ()) -> str:
    """Turn ``impl`` into the implementation that runs.

    ``"auto"`` means ``"triton"`` on CUDA and ``"eager"`` elsewhere; every other value is what it says, or an error.

    Args:
        op: name of the public function, the first word of a message.
        impl: one of `IMPLEMENTATIONS`.
        device: where the tensors are.
        unsupported: reasons why there is no Triton kernel for these arguments.

    Returns:
        ``"triton"``, ``"reference"`` or ``"eager"``.

    Raises:
        ValueError: for a name that is no implementation.
        NotImplementedError: where Triton was asked for, or is what "auto" means, and cannot run; all reasons are in the
            message.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}.")
    resolved = impl if impl != "auto" else ("triton" if device.type == "cuda" else "eager")
    if resolved != "triton":
        return resolved
    reasons = list(unsupported)
    if device.type != "cuda" and not interpreting():
        reasons.append(
            f"Triton needs a GPU, the tensors are on {device} (set TRITON_INTERPRET=1 before importing triton to "
            "interpret kernels)"
        )
    if not HAS_TRITON:
        reasons.append("the package triton is not installed")
    if reasons:
        raise NotImplementedError(f'{op}: no Triton kernel for this call: {"; ".join(reasons)}. Pass impl="eager".')
    return "triton"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
