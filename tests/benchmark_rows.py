"""A run and a result of it as result files hold them: what the tests of files, pages and comparisons start from."""

from benchmarks.results import Result, Run

RUN = Run(
    id="run",
    device="GPU",
    kind="cuda",
    began="2026-01-01T00:00:00Z",
    commit="abc",
    command="x",
    versions={"torch": "2", "triton": "3"},
    threads=0,
    power_limit_w=700.0,
    processors=132,
    copy_gb_s=4000.0,
    matrix_tflops={"bfloat16": 700.0},
)
RESULT = Result(
    run=RUN.id,
    case="case",
    mode="forward",
    variant="fusedmm",
    sizes={},
    status="timed",
    median_ms=1.0,
    p20_ms=0.9,
    p80_ms=1.1,
    repeats=10,
    peak_mib=100.0,
)
