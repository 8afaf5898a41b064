"""What a kernel's main loop costs on paper: clocks of each pipe of one multiprocessor, and the share of the matrix
peak.

It assumes: the main loop is all there is (no prologue, masked tile, epilogue, launch, or last half-empty wave); its
operands are there when they are wanted (no memory or L2 limit); the clock holds (no power limit, under which a bare
matrix product reaches about 80 % of the same peak). Work of different pipes overlaps fully between independent programs
or consumers. So 100 % says only that the matrix pipe is the busiest one.

Calibration: an exponential takes 8 clocks of its scheduler, integer and comparison work 2, everything else 1, as on
Hopper; one warp on a scheduler keeps its busiest pipe at 62 %, two or more at 90 %. The two constants reproduce the
published effect of warp specialisation and pipelining on FlashAttention-3 (Shah et al. 2024, table 2). Rankings are to
be trusted more than values, and a measurement more than either: where one is committed the static table shows it, and
the model's error, beside the model. On AMD nothing is modelled, and HMMA only where the shape is in its name."""

from collections.abc import Mapping, Sequence

from benchmarks.machine_code import Instruction, Loop

# Dense 16-bit with float32 sums, a clock of one multiprocessor. sm_86: A10, L4, L40S; GeForce has half of it.
MATRIX_FLOPS = {"sm_80": 2048, "sm_86": 1024, "sm_90": 4096, "sm_100": 8192}
ALONE = 0.62  # share of its busiest pipe that a scheduler with one warp keeps busy
CROWDED = 0.90  # and one with two warps or more
BARRIER_CLOCKS = 30
EXPONENTIAL_CLOCKS = 8
ALU_CLOCKS = 2
SCHEDULERS = 4
WARP_GROUP = 4
AMD_SIMDS = 4
AMD_REGISTERS = 512  # of a lane, vector and accumulation registers together
AMD_WAVES = 8
AMD_SHARED_BYTES = 64 << 10

_ALU = {
    *("FMNMX", "FSETP", "FSEL", "ISETP", "IADD3", "LOP3", "SHF", "SEL", "PRMT", "LEA", "IMNMX", "VIADD", "VIMNMX"),
    *("PLOP3", "F2FP", "F2F", "I2F", "I2FP", "F2I", "SGXT", "BMSK", "MOV", "POPC", "FLO", "FSET", "IABS", "VIADDMNMX"),
    *("R2P", "P2R", "CS2R", "SHFL"),
}
_FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "FFMA2", "FMUL2", "FADD2"}


def programs_of_amd(registers: int, shared: int, waves: int) -> int:
    """Programs that one compute unit of gfx942 holds at once."""
    waves_a_simd = min(AMD_WAVES, AMD_REGISTERS // max(8, -(-registers // 8) * 8))
    return min(waves_a_simd * AMD_SIMDS // waves, AMD_SHARED_BYTES // max(1, shared))


def matrix_flops(instruction: Instruction) -> int:
    """FLOPs of a matrix instruction of one warp (one warp group for HGMMA); 0 where its name does not tell."""
    parts = instruction.opcode.split(".")
    if parts[0] == "HGMMA":
        rows, columns, depth = (int(size) for size in parts[1].split("x"))
        return 2 * rows * columns * depth
    return {"16816": 2 * 16 * 8 * 16, "1688": 2 * 16 * 8 * 8}.get(parts[1], 0) if parts[0] == "HMMA" else 0


def loop_flops(path: Sequence[Instruction]) -> int:
    """Matrix FLOPs of one warp, or one warp group for HGMMA, over a path."""
    return sum(matrix_flops(instruction) for instruction in path)


def heaviest(loops: Sequence[Loop]) -> list[Loop]:
    """The loops with the most matrix work; among equals the shortest, which has no masks.

    One for an ordinary kernel, one for each consumer of a warp-specialised one.
    """
    work = [(loop_flops(loop.steady_path), sum(i.is_matrix for i in loop.steady_path)) for loop in loops]
    best = [loop for loop, done in zip(loops, work, strict=True) if done == max(work)]
    shortest = min((len(loop.steady_path) for loop in best), default=0)
    return [loop for loop in best if len(loop.steady_path) <= 1.05 * shortest]


def in_flight(loop: Loop) -> float | None:
    """Share of the exponentials issued while a group of matrix products is in flight; None without either."""
    counts = loop.in_flight_at("MUFU.EX2")
    if not counts or not any(instruction.commits_group for instruction in loop.instructions):
        return None
    return 1.0 - counts[0] / counts.total()


def pipe_clocks(mix: Mapping[str, int]) -> dict[str, int]:
    """Clocks that one warp keeps each pipe of its scheduler busy in one iteration, if nothing waits."""
    return {
        "issue": sum(mix.values()),
        "fma": sum(mix.get(name, 0) for name in _FMA) + 2 * mix.get("IMAD", 0),
        "alu": ALU_CLOCKS * sum(mix.get(name, 0) for name in _ALU),
        "exponential": EXPONENTIAL_CLOCKS * mix.get("MUFU", 0),
    }


def shared_clocks(path: Sequence[Instruction], warps: float) -> float:
    """Clocks of shared memory, 128 bytes each, for ordinary loads and stores and for the operands of HGMMA."""
    lane_bytes = operand_bytes = 0
    for instruction in path:
        modifiers = instruction.opcode.split(".")[1:]
        if instruction.base in ("LDS", "STS"):
            lane_bytes += 16 if "128" in modifiers else 8 if "64" in modifiers else 4
        elif instruction.base in ("LDSM", "STSM"):
            lane_bytes += 16 if "4" in modifiers else 8 if "2" in modifiers else 4
        elif instruction.base == "HGMMA":
            _, columns, depth = (int(size) for size in modifiers[0].split("x"))
            left_is_shared = "gdesc" in instruction.operands.split(",")[1]
            operand_bytes += 2 * depth * (columns + (64 if left_is_shared else 0))
    return (lane_bytes * 32 * warps + operand_bytes * warps / WARP_GROUP) / 128


def share_of_peak(
    arch: str, loop: Loop, warps: float, overlapping: int, flops: float
) -> tuple[float, dict[str, float]]:
    """Modelled share of the dense 16-bit matrix peak in the main loop, and the clocks of each pipe.

    Matrix and vector work overlap fully where independent programs or consumers run side by side, else as far as
    exponentials are issued with a product in flight; the rest is serial.

    Args:
        arch: a key of `MATRIX_FLOPS`.
        loop: the main loop.
        warps: resident warps of a multiprocessor that run it.
        overlapping: independent programs or consumers among them.
        flops: matrix FLOPs of one iteration of all of them.
    """
    path = loop.steady_path
    a_scheduler = warps / SCHEDULERS
    clocks: dict[str, float] = {name: each * a_scheduler for name, each in pipe_clocks(loop.mix).items()}
    vector = max(clocks.values()) / (CROWDED if a_scheduler > 1 else ALONE)
    clocks["shared"] = shared_clocks(path, warps)
    clocks["matrix"] = flops / MATRIX_FLOPS[arch]
    feeding = max(clocks["matrix"], clocks["shared"])
    overlap = 1.0 if overlapping > 1 else in_flight(loop) or 0.0
    barriers = BARRIER_CLOCKS * (loop.mix["BAR"] + loop.mix["SYNCS"])
    total = overlap * max(feeding, vector) + (1.0 - overlap) * (feeding + vector + barriers)
    return clocks["matrix"] / total, clocks
