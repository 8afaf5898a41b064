"""The operators that a call goes through on the host, and stand-ins for its kernels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fusedmm.ops import attention_op

# Operators whose result, or its size, the host has to know.
WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
INNER = {
    "fusedmm::attention_forward": attention_op._forward,
    "fusedmm::attention_backward": attention_op._backward,
}


class Operators(TorchDispatchMode):
    """Names of all operators called, those inside the registered ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        self.names.append(name)
        if name in INNER:
            with self:
                return INNER[name](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class NoKernel:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **_: None
