"""What a kernel became: compiles a `KernelSpec` ahead of time, without a GPU, and reads its machine code.

Registers, spills, shared memory and main loops of NVIDIA SASS (sm_80 to sm_120); the resource block only of AMD code
objects (gfx942: no instructions are read there).
Run it in a process without ``TRITON_INTERPRET``. One compilation takes 0.3 to 5 s.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.machine_code import Function, Loop, parse_sass
from fusedmm.kernels.launch import LAUNCH_OPTIONS, KernelSpec

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # that a program may take
SHARED_BYTES = {arch: kib << 10 for arch, kib in SHARED_KIB.items()}
MAX_WARPS = {"sm_80": 64, "sm_86": 48, "sm_90": 64, "sm_100": 64}
REGISTERS_PER_SM = 65536
TENSOR_COLUMNS = 512  # of an SM's tensor memory, where there is one


@dataclass(frozen=True)
class KernelReport:
    """Resources and machine code of one compiled kernel.

    Attributes:
        name: of the `KernelSpec`.
        arch: of the `KernelSpec`.
        threads: per CTA, all partitions of a warp-specialised kernel included.
        registers: a thread at launch.
        register_requests: operands of ``setmaxnreg`` in the order of the code; empty without warp specialisation.
        shared_bytes: a CTA, static and dynamic.
        tensor_columns: of tensor memory a CTA; 0 before sm_100.
        stack_bytes: local memory a thread.
        spills: local-memory loads and stores in the whole kernel; AMD's scalar registers that wait in lanes of a vector
            register touch no memory and do not count.
        functions: machine code, the largest function first; empty for AMD.
    """

    name: str
    arch: str
    threads: int
    registers: int
    register_requests: tuple[int, ...]
    shared_bytes: int
    tensor_columns: int
    stack_bytes: int
    spills: int
    functions: tuple[Function, ...] = field(repr=False)

    @property
    def main_loops(self) -> tuple[Loop, ...]:
        """Main loops of every function."""
        return tuple(loop for function in self.functions for loop in function.main_loops)

    @property
    def mix(self) -> Counter[str]:
        """Number of instructions in the whole kernel by opcode without modifiers."""
        return Counter(i.base for function in self.functions for i in function.instructions)

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that fit one SM at once by registers, shared memory, tensor memory and warps; 0: it does not fit. Not
        for AMD.
        """
        warps = -(-self.threads // 32)
        by_registers = REGISTERS_PER_SM // ((self.registers + 7) // 8 * 8 * 32 * warps)
        by_shared = SHARED_BYTES[self.arch] // (self.shared_bytes + 1024) if self.shared_bytes else 32
        return min(
            by_registers,
            by_shared if self.shared_bytes <= SHARED_BYTES[self.arch] - 1024 else 0,
            TENSOR_COLUMNS // max(1, self.tensor_columns),
            MAX_WARPS[self.arch] // warps,
            32,
        )


def compile_spec(spec: KernelSpec) -> Any:
    """Compile a kernel for its architecture, without a GPU.

    Args:
        spec: the kernel; `@triton.jit` and `@gluon.jit` functions both work.

    Returns:
        Triton's CompiledKernel: ``asm["cubin"]``, ``asm["ptx"]``, ``metadata``.

    Raises:
        RuntimeError: in a process with ``TRITON_INTERPRET``, where kernels are no longer compilable.
        ValueError: the signature misses an argument.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "compile_spec: TRITON_INTERPRET must be unset, got a process in which kernels are interpreted. "
            "Use a subprocess."
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    constexprs = {**spec.constexprs, **spec.config.blocks}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(spec.kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        if name not in spec.signature:
            raise ValueError(
                f"compile_spec: {spec.name} must give a type for every argument, got none for {name}. "
                "Add it to the signature or the constexprs."
            )
        signature[name] = spec.signature[name]
        if spec.signature[name].startswith("*") or name in spec.divisible_by_16:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if isinstance(spec.kernel, GluonJITFunction) else ASTSource)(
        fn=spec.kernel,
        signature=signature,
        constexprs={k: v for k, v in constexprs.items() if k in signature},
        attrs=attributes,
    )
    if spec.arch.startswith("gfx"):
        target = GPUTarget("hip", spec.arch, 64)
    else:
        target = GPUTarget("cuda", int(spec.arch.removeprefix("sm_")), 32)
    chosen = {"num_warps": spec.config.num_warps, "num_stages": spec.config.num_stages}
    options = {**chosen, **LAUNCH_OPTIONS, **spec.options}
    if spec.config.max_registers is not None and not spec.arch.startswith("gfx"):
        options["maxnreg"] = spec.config.max_registers
    return triton.compile(source, target=target, options=options)


def analyse(spec: KernelSpec) -> KernelReport:
    """Compile a kernel and read its machine code (see `compile_spec` for what it raises)."""
    return read_compiled(spec.name, spec.arch, compile_spec(spec))


def read_compiled(name: str, arch: str, compiled: Any) -> KernelReport:
    """Read the machine code of a kernel that is already compiled."""
    if arch.startswith("gfx"):
        return _read_amd(name, arch, compiled)
    text = _run_tool("nvdisasm", compiled.asm["cubin"], "-c")
    usage = _run_tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    threads = re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"]) or re.search(
        r"\.maxntid\s+(\d+)", compiled.asm["ptx"]
    )
    columns = re.findall(r"\btcgen05\.alloc\b.*, (\d+);", compiled.asm["ptx"])
    if resources is None or threads is None:
        raise RuntimeError(f"read_compiled: cuobjdump or PTX of {name} misses the resource usage: {usage[-200:]!r}")
    functions = tuple(sorted(parse_sass(text), key=lambda function: -len(function.instructions)))
    everything = [i for function in functions for i in function.instructions]
    return KernelReport(
        name=name,
        arch=arch,
        threads=int(threads.group(1)),
        registers=int(resources.group(1)),
        register_requests=tuple(
            int(i.operands.split(",")[-1].strip(), 16) for i in everything if i.base == "USETMAXREG"
        ),
        shared_bytes=int(compiled.metadata.shared),
        tensor_columns=sum(map(int, columns)),
        stack_bytes=int(resources.group(2)),
        spills=sum(i.is_spill for i in everything),
        functions=functions,
    )


def _run_tool(tool: str, cubin: bytes, *arguments: str) -> str:
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def _read_amd(name: str, arch: str, compiled: Any) -> KernelReport:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    return KernelReport(
        name=name,
        arch=arch,
        threads=number("max_flat_workgroup_size"),
        registers=number("vgpr_count"),
        register_requests=(),
        shared_bytes=int(compiled.metadata.shared),
        tensor_columns=0,
        stack_bytes=number("private_segment_fixed_size"),
        spills=len(re.findall(r"\bscratch_(?:load|store)", text)),
        functions=(),
    )
