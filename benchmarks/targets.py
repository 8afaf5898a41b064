"""`python -m benchmarks targets`: writes docs/targets.md, one row for each target, from committed results alone.

A target is a list of checks, or a test that holds it. What is not measured says so, with the command that will measure
it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.checks import (
    NOT_MEASURED,
    Check,
    Key,
    Rows,
    at_most,
    counted,
    faster,
    memory,
    milliseconds,
    ran,
    rate,
    rate_share,
)
from benchmarks.results import ROOT, latest

PAGE = ROOT / "docs" / "targets.md"
FLEXIBLE = ("flex", "flex+mask", "varlen+merge", "compile")


@dataclass(frozen=True)
class Target:
    """A row of the table: of which operator, what, how much; its checks, or the test that holds it."""

    operator: str
    what: str
    bar: str
    checks: tuple[Check, ...] = ()
    held_by: str = ""

    @property
    def command(self) -> str:
        """What measures it on a machine with a GPU."""
        if self.held_by:
            return f"pytest {self.held_by}"
        keys = [key for check in self.checks for key in check.keys]
        cases = dict.fromkeys(case for case, _, _ in keys if not case.startswith("overheads/"))
        variants = dict.fromkeys(variant for case, _, variant in keys if case in cases)
        parts = [f"python -m benchmarks {' '.join(cases)} --save --variants {' '.join(variants)}"] * bool(cases)
        parts += ["python -m benchmarks overheads --save"] * any(case not in cases for case, _, _ in keys)
        return "; ".join(parts)


@dataclass(frozen=True)
class Verdict:
    """Whether a target is met (None: not known yet), and the numbers in words."""

    met: bool | None
    text: str


def verdict(target: Target, rows: Rows) -> Verdict:
    """Hold a target to result rows: met if all checks hold, missed if one does not, else unknown."""
    if target.held_by:
        return Verdict(True, f"held by `{target.held_by}`")
    values = [check.measure(rows) for check in target.checks]
    text = "; ".join(check.show(value) for check, value in zip(target.checks, values, strict=True))
    known = [check.holds(value) for check, value in zip(target.checks, values, strict=True) if value is not None]
    if not known:
        return Verdict(None, NOT_MEASURED)
    return Verdict(False if not all(known) else True if len(known) == len(values) else None, text)


def attention(case: str, mode: str, variant: str = "fusedmm") -> Key:
    """A row of an attention case."""
    return f"attention/{case}", mode, variant


def distillation(case: str, mode: str = "both", variant: str = "fusedmm") -> Key:
    """A row of a distillation case."""
    return f"distillation/{case}", mode, variant


def _attention_outputs(sizes: Mapping[str, float]) -> float:
    """Bytes of output, mass and lse."""
    return sizes["total_q"] * sizes["heads"] * (2 * sizes["head_dim"] + 8 * sizes["modalities"])


def _loss_outputs(sizes: Mapping[str, float]) -> float:
    """Bytes of the gradients of hidden states and weight."""
    return 2 * (sizes["rows"] + sizes["classes"]) * sizes["student_dim"]


def targets() -> tuple[Target, ...]:
    """Every target, in the order of the issues."""
    return (*dense_targets(), *multimodal_targets(), *system_targets(), *distillation_targets())


def wanted() -> dict[tuple[str, str], None]:
    """Case and variant of every row that a target needs, in the order of the targets."""
    keys = (key for target in targets() for check in target.checks for key in check.keys)
    return {(case, variant): None for case, _, variant in keys}


def dense_targets() -> tuple[Target, ...]:
    """Those of attention at the libraries' own shapes, where everything about modalities comes on top."""
    passes = (("forward", 620.0, 0.95), ("backward", 500.0, 0.9))
    wide = [
        check
        for length in ("4k", "16k")
        for mode, least, share in passes
        for check in (
            rate(attention(f"dense-gated-d128-{length}", mode), least),
            faster(
                attention(f"dense-gated-d128-{length}", mode),
                ("sdpa-cudnn",),
                share,
                f"attention/dense-plain-d128-{length}",
            ),
        )
    ]
    narrow = [
        faster(attention(f"dense-gated-d64-{length}", mode), (rival,), least, f"attention/dense-plain-d64-{length}")
        for length in ("4k", "16k")
        for mode, _, _ in passes
        for rival, least in (("sdpa-flash", 1.3), ("sdpa-cudnn", 0.95))
    ]
    extras = [
        at_most(
            attention(f"dense-gated-d{dim}-4k", mode),
            attention(f"dense-single-d{dim}-4k", mode),
            most,
            f"d{dim} {mode}",
        )
        for dim in (64, 128)
        for mode, most in (("forward", 1.03), ("backward", 1.05))
    ]
    return (
        Target(
            "attention",
            "dense-equivalent, head dim 128, prior, gate and mass on",
            "forward >= 620 TFLOP/s and >= 0.95x cuDNN; backward >= 500 and >= 0.9x",
            tuple(wide),
        ),
        Target("attention", "the same, head dim 64", ">= 1.3x FlashAttention-2 and >= 0.95x cuDNN", tuple(narrow)),
        Target(
            "attention",
            "prior, gate, mass and lse of 4 modalities over one plain modality",
            "<= 3 % forward, <= 5 % backward",
            tuple(extras),
        ),
    )


def multimodal_targets() -> tuple[Target, ...]:
    """Those of attention over ragged, time-causal and switched-off modalities."""
    jagged = [
        faster(attention(case, mode), rivals, 3.0)
        for case in ("jagged-market-day", "jagged-long")
        for mode, rivals in (("forward", FLEXIBLE), ("both", ("flex", "flex+mask", "compile")))
    ]
    causal = [
        rate_share(attention("time-causal", mode), attention("dense-plain-d64-4k", mode), 0.85)
        for mode in ("forward", "backward")
    ]
    metadata = at_most(
        ("overheads/metadata", "forward", "metadata"),
        ("overheads/metadata", "forward", "fusedmm"),
        0.01,
        "layout and ranges over forward",
    )
    recompiled = counted(("overheads/recompile", "host", "fusedmm"), "compilations", 0)
    active = [
        at_most(attention(f"active-{on:g}", mode), attention("active-1", mode), on + 0.1, f"f = {1 - on:g} {mode}")
        for on in (0.5, 0.25, 0.125)
        for mode in ("forward", "backward")
    ]
    separate = [
        faster(attention(f"per-modality-{length}", "forward"), ("varlen+merge",), least)
        for length, least in ((512, 1.3), (2048, 1.3), (8192, 1.0))
    ]
    return (
        Target(
            "attention",
            "jagged multimodal batches",
            ">= 3x the best of FlexAttention, varlen and merge, compile",
            tuple(jagged),
        ),
        Target("attention", "time-causal streams", ">= 85 % of the plain rate per visible pair", tuple(causal)),
        Target("attention", "metadata of a time-causal batch", "< 1 % of the forward", (metadata,)),
        Target("attention", "lengths or times change", "no recompilation", (recompiled,)),
        Target(
            "attention",
            "`active` off for a share f of the modalities",
            "time <= (1 - f) of the full + 10 %",
            tuple(active),
        ),
        Target(
            "attention",
            "per_modality, 5 modalities",
            ">= 1.3x M calls and a gated sum up to 2k, >= 1.0x beyond",
            tuple(separate),
        ),
    )


def system_targets() -> tuple[Target, ...]:
    """Those of what surrounds attention: memory, determinism, the host, CUDA graphs."""
    saved = [
        memory(attention(case, "forward"), 16.0, _attention_outputs)
        for case in ("dense-gated-d128-4k", "jagged-market-day")
    ]
    launch = at_most(
        ("overheads/launch", "host", "module"), ("overheads/launch", "host", "sdpa"), 1.5, "module over SDPA"
    )
    captured = ran(("overheads/capture", "forward", "module"))
    return (
        Target(
            "attention", "memory of the forward beyond output, mass and lse", "<= 16 MiB of work lists", tuple(saved)
        ),
        Target(
            "attention",
            "deterministic backward",
            ">= 82 % of the fastest other, or there is only one",
            held_by="tests/test_attention_kernels.py -k bitwise_reproducible",
        ),
        Target("attention", "tiny shapes, host time", "module forward <= 1.5x one SDPA call", (launch,)),
        Target("attention", "CUDA graphs", "a module's forward can be captured", (captured,)),
    )


def distillation_targets() -> tuple[Target, ...]:
    """Those of distillation."""
    scores = distillation("scores-2048-4096", "forward")
    products: Key = ("overheads/matmuls-4096-4096", "both", "cublas")
    losses = [
        check
        for loss in ("kl", "jsd")
        for check in (
            at_most(distillation(f"{loss}-4096-4096"), products, 1.2, f"{loss} over its four matmuls"),
            faster(distillation(f"{loss}-4096-4096"), ("liger",), 2.5),
            memory(distillation(f"{loss}-4096-4096"), 1024.0, _loss_outputs),
        )
    ]
    lean = distillation("kl-4096-4096", variant="fusedmm-lean")
    return (
        Target(
            "distillation",
            "scores, Ds 2048, Dt 4096",
            "<= 21.5 ms, extra memory <= 16 MiB",
            (milliseconds(scores, 21.5), memory(scores, 16.0, lambda sizes: 0.0)),
        ),
        Target(
            "distillation",
            "loss forward and backward, Ds = Dt = 4096",
            "<= 1.2x its four matmuls, >= 2.5x Liger, workspace <= 1 GiB",
            tuple(losses),
        ),
        Target(
            "distillation",
            "the same, Ds 2048, Dt 4096",
            "<= 36 ms",
            tuple(milliseconds(distillation(f"{loss}-2048-4096"), 36.0) for loss in ("kl", "jsd")),
        ),
        Target(
            "distillation",
            "lean",
            "outputs + 64 MiB, <= 1.9x the fast time",
            (memory(lean, 64.0, _loss_outputs), at_most(lean, distillation("kl-4096-4096"), 1.9, "lean over fast")),
        ),
        Target(
            "distillation",
            "N 1024",
            "never slower than PyTorch",
            tuple(faster(distillation(f"{loss}-n1024"), ("eager", "compile"), 1.0) for loss in ("kl", "jsd")),
        ),
        Target(
            "distillation",
            "accuracy of dX and dW",
            "within 1 % of float64, identical heads 0 within 1e-6",
            held_by="tests/test_distillation_accuracy.py",
        ),
        Target(
            "distillation",
            "few classes, N 64 to 1M",
            "never slower than eager",
            tuple(
                faster(distillation(case), ("eager",), 1.0)
                for case in ("small-v-64", "small-v-1k", "small-v", "small-v-1000", "small-v-1m")
            ),
        ),
    )


def page(rows: Rows) -> str:
    """docs/targets.md."""
    lines = ["# Targets", "", "Written by `python -m benchmarks targets` from benchmarks/results.", ""]
    lines += ["| operator | what | target | measured | met | command |", "|---|---|---|---|---|---|"]
    for target in targets():
        found = verdict(target, rows)
        met = {True: "yes", False: "**no**", None: "-"}[found.met]
        lines.append(
            f"| {target.operator} | {target.what} | {target.bar} | {found.text} | {met} | `{target.command}` |"
        )
    return "\n".join(lines) + "\n"


def run(*, check: bool) -> int:
    """Write the page; with ``check`` only say whether it would change."""
    new = page(latest("cuda"))
    if check:
        stale = not PAGE.exists() or PAGE.read_text() != new
        print(f"targets: {PAGE.name} is out of date. Run python -m benchmarks targets." if stale else "targets: fresh")
        return int(stale)
    PAGE.write_text(new)
    print("targets: wrote docs/targets.md")
    return 0
