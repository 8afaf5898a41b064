"""Every kernel in every configuration, compiled ahead of time and read as machine code: no GPU needed.

A row holds what a compiler may silently lose: registers, spills, shared memory, occupancy, the main loop's
instructions, products in flight beside the exponentials, the modelled share of peak. The rows of one Triton version are
committed in `results/static-<version>.jsonl`, with a fingerprint of source and configuration: what has not changed
since is not compiled again, and what has changed may not get worse."""

import ast
import hashlib
import importlib
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.compiled import SHARED_BYTES, analyse
from benchmarks.model import WARP_GROUP, heaviest, in_flight, loop_flops, programs_of_amd, share_of_peak
from fusedmm.kernels.launch import ARCHITECTURES, KernelSpec

ROOT = Path(__file__).resolve().parent.parent
MIX_SHOWN = 12
LEAST_REGISTERS = 8  # a lane; the smallest kernels have 18
SHARE_NOISE = 0.02  # a share of peak may be lower by this before it counts as worse


@dataclass(frozen=True)
class Row:
    """What is known about one kernel in one configuration on one architecture.

    Attributes:
        arch, name: which; unique together.
        fingerprint: of source, signature, configuration.
        config: tile sizes, warps, stages.
        registers: a lane.
        spills: loads and stores of spilled registers in the whole kernel (``main_spills``: in the main loop).
        shared: bytes of shared memory of a program.
        programs: programs that a multiprocessor holds at once.
        instructions: of the main loop, 0 where there is no matrix work in a loop.
        mix: the main loop's most frequent instructions.
        matrix: matrix instructions in the main loop.
        in_flight: share of its exponentials issued while a product is in flight; None: no such instructions.
        share: modelled share of the dense 16-bit matrix peak; None: no matrix work, or no model of the chip's pipes.
        clocks: modelled clocks of each pipe in one iteration.
        copies: TMA loads (UTMALDG) in the whole kernel.
    """

    arch: str
    name: str
    fingerprint: str
    config: dict[str, int]
    registers: int
    spills: int
    main_spills: int
    shared: int
    programs: int
    instructions: int
    mix: dict[str, int]
    matrix: int
    in_flight: float | None
    share: float | None
    clocks: dict[str, int]
    copies: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Architecture and name."""
        return self.arch, self.name


@cache
def spec_modules() -> tuple[str, ...]:
    """Every module that lists kernel specs."""
    folder = ROOT / "kernels"
    files = sorted(folder.rglob("specs.py"))
    return tuple(".".join(("fusedmm.kernels", *file.relative_to(folder).with_suffix("").parts)) for file in files)


@cache
def specs(arch: str) -> dict[str, KernelSpec]:
    """Every kernel in every configuration for an architecture, by name.

    Raises:
        ValueError: where two have one name.
    """
    found: dict[str, KernelSpec] = {}
    for module in spec_modules():
        for spec in importlib.import_module(module).kernel_specs(arch):
            if spec.name in found:
                raise ValueError(f"static: name must be unique for {arch}, got {spec.name!r} twice. Mend {module}.")
            found[spec.name] = spec
    return found


def fingerprint(spec: KernelSpec) -> str:
    """Changes with the code of the kernel and of all it calls (not with comments), its signature, its configuration."""
    parts: list[object] = [sorted(code_of(spec.kernel).items()), sorted(spec.signature.items())]
    parts += [sorted(spec.constexprs.items(), key=repr), sorted(spec.config.chosen().items())]
    parts += [sorted(spec.divisible_by_16), sorted(spec.options.items(), key=repr)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@cache
def code_of(kernel: Any) -> dict[str, str]:
    """The syntax trees of a kernel and of every device function it calls, and the constants they read, by name."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        own = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if own in found:
            continue
        tree = ast.parse(textwrap.dedent(function.src))
        found[own] = ast.dump(_WithoutDocstrings().visit(tree))
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            value = function.fn.__globals__.get(name)
            if hasattr(value, "src") and hasattr(value, "fn"):
                waiting.append(value)
            elif isinstance(value, int | float | str) or type(value).__name__ == "constexpr":
                found[f"{own}:{name}"] = repr(getattr(value, "value", value))
    return found


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)


def analyse_row(spec: KernelSpec) -> Row:
    """Compile one kernel and read its machine code."""
    report = analyse(spec)
    amd = spec.arch.startswith("gfx")
    warps = max(1, report.threads // (64 if amd else 32))
    programs = programs_of_amd(report.registers, report.shared_bytes, warps) if amd else report.ctas_per_sm
    loops = heaviest(report.main_loops)
    loop = loops[0] if loops else None
    consumers = len(loops) if report.register_requests else 1
    share: float | None = None
    clocks: dict[str, float] = {}
    if loop is not None and programs:
        running = consumers * WARP_GROUP if consumers > 1 else spec.config.num_warps
        named = loop_flops(loop.steady_path) * running // (WARP_GROUP if "HGMMA" in loop.mix else 1)
        if flops := named or spec.main_loop_flops:
            share, clocks = share_of_peak(spec.arch, loop, running * programs, consumers * programs, flops * programs)
    return Row(
        arch=spec.arch,
        name=spec.name,
        fingerprint=fingerprint(spec),
        config=spec.config.chosen(),
        registers=report.registers,
        spills=report.spills,
        # AMD's code is not split into loops here: there a spill anywhere counts.
        main_spills=report.spills if amd else sum(each.spills for each in loops),
        shared=report.shared_bytes,
        programs=programs,
        instructions=len(loop.steady_path) if loop else 0,
        mix=dict(loop.mix.most_common(MIX_SHOWN)) if loop else {},
        matrix=sum(instruction.is_matrix for instruction in loop.steady_path) if loop else 0,
        in_flight=None if loop is None else _rounded(in_flight(loop)),
        share=_rounded(share),
        clocks={name: round(value) for name, value in clocks.items()},
        copies=report.mix["UTMALDG"],
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _analyse_by_name(key: tuple[str, str]) -> Row:
    arch, name = key
    try:
        return analyse_row(specs(arch)[name])
    except Exception as error:
        raise RuntimeError(f"static: {name} does not compile for {arch}: {error}") from error


def compile_rows(keys: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """Compile kernels in parallel processes; rows in the order of the keys."""
    if not keys:
        return
    workers = min(len(keys), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(max_workers=workers) as pool:
        yield from pool.map(_analyse_by_name, keys, chunksize=4)


def results_file() -> Path:
    """The committed rows of the Triton version that is installed."""
    import triton

    return ROOT / "benchmarks" / "results" / f"static-{triton.__version__}.jsonl"


def read_rows(file: Path) -> dict[tuple[str, str], Row]:
    """Committed rows by architecture and name; none where there is no file."""
    if not file.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    return {row.key: row for row in rows}


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows in a fixed order, one a line."""
    ordered = sorted(rows, key=lambda row: (ARCHITECTURES.index(row.arch), row.name))
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in ordered))


def faults(row: Row) -> list[str]:
    """What no kernel may have: spills, more shared memory or registers than the chip, no code."""
    found = []
    if row.registers < LEAST_REGISTERS:
        found.append(f"{row.registers} registers: nothing but a trap, as Triton writes where tensor memory runs out")
    if row.main_spills:
        found.append(f"{row.main_spills} spills in the main loop")
    elif row.spills:
        found.append(f"{row.spills} spills")
    if row.shared > SHARED_BYTES[row.arch]:
        found.append(f"{row.shared} bytes of shared memory, {row.arch} has {SHARED_BYTES[row.arch]}")
    if row.programs == 0:
        found.append("does not fit on a multiprocessor")
    return found


def worsened(before: Row, after: Row) -> list[str]:
    """In which respects a row is worse than the committed one."""
    found = []
    for what in ("spills", "main_spills"):
        if getattr(after, what) > getattr(before, what):
            found.append(f"{what} {getattr(before, what)} -> {getattr(after, what)}")
    if after.programs < before.programs:
        found.append(f"programs on a multiprocessor {before.programs} -> {after.programs}")
    if before.matrix and not after.matrix:
        found.append("no matrix instruction left in the main loop")
    if before.copies and not after.copies:
        found.append("no TMA load left")
    for what, allowed in (("in_flight", 0.0), ("share", SHARE_NOISE)):
        old, new = getattr(before, what), getattr(after, what)
        if old is not None and (new is None or new < old - allowed):
            found.append(f"{what} {old} -> {new}")
    return found
