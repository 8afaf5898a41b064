"""How a kernel is launched: its tile sizes, and the description from which it can be compiled ahead of time.

Launch parameters come from pure functions of sizes and architecture (`_<op>_config`), never from tuning at run time:
every rank agrees, the first call does not stall, and every configuration in use can be compiled, inspected and tested
without a GPU.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
# Options of every launch. A product and a sum become one instruction: Triton's default until 3.9, which warns where a
# launch does not say so, because a later version will round twice.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and resources of one launch.

    Attributes:
        blocks: constexpr tile sizes by name, such as ``{"BLOCK_Q": 128, "BLOCK_K": 64}``.
        num_warps: warps per program.
        num_stages: software pipeline depth of the main loop.
        max_registers: cap on registers a thread (None: the compiler's choice).
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def chosen(self) -> dict[str, int]:
        """What was chosen for this launch: the tile sizes, ``num_warps``, ``num_stages`` and, where capped,
        ``maxnreg``.
        """
        chosen = {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            chosen["maxnreg"] = self.max_registers
        return chosen

    def launch_options(self) -> dict[str, Any]:
        """Keyword arguments of a Triton launch: `chosen` and `LAUNCH_OPTIONS`."""
        return {**self.chosen(), **LAUNCH_OPTIONS}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel in one configuration: all that ahead-of-time compilation needs.

    Attributes:
        name: unique within an architecture, such as ``attention_forward[joint,d128,bf16]``.
        kernel: the ``@triton.jit`` or ``@gluon.jit`` function.
        signature: Triton type of every run-time argument, in order, such as ``{"query_ptr": "*bf16", "size_q":
            "i32"}``.
        constexprs: value of every constexpr argument other than the tile sizes.
        config: tile sizes and resources.
        arch: one of `ARCHITECTURES`.
        divisible_by_16: run-time arguments known to be multiples of 16 (pointers always are).
        main_loop_flops: matrix FLOPs of one iteration of the main loop, for the modelled share of peak; 0 when there is
            no matrix work.
        options: further options of the compilation.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    config: LaunchConfig
    arch: str
    divisible_by_16: tuple[str, ...] = ()
    main_loop_flops: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kernel: Any,
        name: str,
        config: LaunchConfig,
        arch: str,
        *,
        constexprs: Mapping[str, Any],
        type_of: Callable[[str], str],
        is_multiple_of_16: Callable[[str], bool] = lambda name: False,
        main_loop_flops: int = 0,
    ) -> "KernelSpec":
        """The spec of a kernel whose run-time arguments have their types by name.

        Args:
            kernel, name, config, arch, main_loop_flops: see `KernelSpec`.
            constexprs: values of constexpr arguments; those that the kernel does not have are left out.
            type_of: Triton type of a run-time argument.
            is_multiple_of_16: whether a run-time argument is known to be one.
        """
        parameters = inspect.signature(kernel.fn).parameters
        values = {argument: value for argument, value in constexprs.items() if argument in parameters}
        fixed = {*values, *config.blocks}
        signature = {argument: type_of(argument) for argument in parameters if argument not in fixed}
        aligned = tuple(argument for argument in signature if is_multiple_of_16(argument))
        return cls(
            name=name,
            kernel=kernel,
            signature=signature,
            constexprs=values,
            config=config,
            arch=arch,
            divisible_by_16=aligned,
            main_loop_flops=main_loop_flops,
        )


@cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU (compute units of AMD's); 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def device_arch(device: torch.device) -> str:
    """Name of the tuning table for a device; on a machine without a GPU (the interpreter) the Hopper one."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return capability_arch(*torch.cuda.get_device_capability(device))


def capability_arch(major: int, minor: int) -> str:
    """Name of the tuning table for NVIDIA's compute capability: sm_86's, whose programs ask for the least, for all that
    have no other.

    8.6, 8.9 and 12.x have 99 KiB of shared memory a program, where 8.0 and 8.7 have 163 and the others 227, and 12.x
    multiplies as they do (``mma.sync``): it has neither wgmma nor tensor memory.
    """
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_86")
