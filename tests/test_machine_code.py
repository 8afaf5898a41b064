"""The readers of machine code: blocks and loops of a kernel, products in flight, and what a loop costs on paper."""

import pytest

from benchmarks.machine_code import parse_sass
from benchmarks.model import in_flight, loop_flops, pipe_clocks

SASS = """
.section .text.kernel,"ax"
.L_x_0:
        /*0000*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0010*/  MUFU.EX2 R1, R2 ;
        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/  MUFU.EX2 R3, R4 ;
        /*0040*/  FFMA R1, R2, R3, R4 ;
        /*0050*/  @P0 BRA `(.L_x_0) ;
        /*0060*/  EXIT ;
"""


def test_the_model_reads_a_main_loop() -> None:
    (function,) = parse_sass(SASS)
    (loop,) = function.main_loops
    assert in_flight(loop) == 0.5
    assert loop_flops(loop.steady_path) == 2 * 64 * 128 * 16
    assert pipe_clocks(loop.mix) == {"issue": 6, "fma": 1, "alu": 0, "exponential": 16}


LOOP = """
	.section	.text.kernel,"ax",@progbits
.L_x_0:
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], R88, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   {detour} ;
.L_x_1:
        /*0050*/                   MUFU.EX2 R24, R24 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("detour", "in_flight"), [("NOP", {1: 1}), ("WARPGROUP.DEPBAR.LE gsb0, 0x0", {0: 1})], ids=["kept", "lost"]
)
def test_products_in_flight_are_the_least_over_all_paths(detour: str, in_flight: dict[int, int]) -> None:
    (function,) = parse_sass(LOOP.replace("{detour}", detour))
    (loop,) = function.main_loops
    assert dict(loop.in_flight_at("MUFU")) == in_flight
    assert loop.spills == 1
    assert len(loop.instructions) == 9
    assert len(loop.steady_path) == 8
    assert loop.mix["HGMMA"] == 2


UNIFORM_BRANCH = """
.section .text.kernel,"ax"
.L_x_0:
        /*0000*/  BRA.U !UP0, `(.L_x_1) ;
        /*0010*/  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT ;
.L_x_1:
        /*0020*/  @P0 BRA `(.L_x_0) ;
        /*0030*/  BRA `(.L_x_2) ;
        /*0040*/  NOP ;
.L_x_2:
        /*0050*/  EXIT ;
"""


def test_a_branch_with_its_condition_among_its_operands_may_fall_through() -> None:
    (function,) = parse_sass(UNIFORM_BRANCH)
    assert function.successors == {
        0x00: (0x20, 0x10),
        0x10: (0x20,),
        0x20: (0x00, 0x30),
        0x30: (0x50,),
        0x40: (0x50,),
        0x50: (),
    }
    (loop,) = function.main_loops
    assert [instruction.base for instruction in loop.steady_path] == ["BRA", "UTCHMMA", "BRA"]
