"""The Hopper kernels' machine code for sm_90: no spills, TMA, and a matrix product in flight at every special-function
instruction of the main loops. ptxas can undo the last without a word. And their PTX: one thread releases a buffer for
the 128 of a consumer, so a barrier of theirs has to lie between their last reads of it and the release.

Compiled in a process of its own, for here kernels may be interpreted.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# One of each kind of main loop; `python -m benchmarks static` compiles and holds all of them.
NAMES = (
    "attention_hopper_forward[joint,gated,d64,bf16]",
    "attention_hopper_forward[joint,gated,d128,bf16]",
    "attention_hopper_forward[joint,timed,d128,bf16]",
    "attention_hopper_forward[per_modality,plain,d128,bf16]",
    "attention_hopper_query[joint,gated,d128,bf16]",
    "attention_hopper_key_value[joint,gated,d128,bf16]",
    "attention_hopper_key_value[joint,timed,d128,bf16]",
)
# Reads of shared memory, waits for products, barriers and labels in PTX, by the start of their names.
ORDERED = (
    r"(mbarrier\.init|fence\.proxy\.async|barrier\.sync|bar\.sync|mbarrier\.arrive\.shared|ld\.shared|ldmatrix"
    r"|wgmma\.wait_group|^\$L__BB)"
)
REPORT = """
import json, re, sys
from benchmarks.compiled import SHARED_BYTES, compile_spec, read_compiled
from fusedmm.kernels.attention.hopper.specs import kernel_specs

specs = {spec.name: spec for spec in kernel_specs("sm_90")}
for name in json.loads(sys.argv[1]):
    compiled = compile_spec(specs[name])
    report = read_compiled(name, "sm_90", compiled)
    loops = report.main_loops
    steps = re.findall(sys.argv[2], compiled.asm["ptx"], re.MULTILINE)
    print(json.dumps({
        "name": name,
        "spills": report.spills,
        "fits": report.shared_bytes <= SHARED_BYTES["sm_90"],
        "registers": report.register_requests,
        "copies": report.mix["UTMALDG"],
        "products": [loop.mix["HGMMA"] for loop in loops],
        "waits": [loop.group_waits for loop in loops],
        "barriers": [i.operands for loop in loops for i in loop.instructions if i.base == "BAR"],
        "in_flight": [loop.in_flight_at("MUFU") for loop in loops],
        "setup": [step for step in steps if step.startswith(("mbarrier.init", "fence", "barrier.sync"))],
        "before_release": [before for before, step in zip(steps, steps[1:]) if step == "mbarrier.arrive.shared"],
    }))
"""


@pytest.mark.slow
def test_softmax_runs_under_matrix_products() -> None:
    root = Path(__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", REPORT, json.dumps(NAMES), ORDERED]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [report["name"] for report in reports] == list(NAMES)
    for report in reports:
        assert report["spills"] == 0, report
        assert report["fits"], report
        assert {24, 240} <= set(report["registers"]), report
        assert report["copies"] > 0, report
        assert len(report["products"]) == 2, report  # one main loop for each consumer
        assert min(report["products"]) > 0, report
        # as many waits as the source has: ptxas adds some where it serialises products
        assert max(len(waits) for waits in report["waits"]) <= 3, report
        # of one consumer's 128 threads: one of all threads would wait for the producer for ever
        assert all(operands.endswith(", 0x80") for operands in report["barriers"]), report
        assert set(report["before_release"]) == {"bar.sync"}, report
        # TMA counts its bytes on barriers whose initialisation it sees, in any partition
        setup = [step for step, _ in itertools.groupby(report["setup"])]
        assert setup[:3] == ["mbarrier.init", "fence.proxy.async", "barrier.sync"], report
        assert "mbarrier.init" not in setup[3:], report
        for counts in report["in_flight"]:
            assert "0" not in counts, report
            assert sum(counts.values()) >= 16, report
