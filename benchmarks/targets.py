"""`python -m benchmarks targets`: writes docs/targets.md, one row for each target, from committed results alone.

A target is a list of checks; a check is one number of the result rows, or of two rows of one device and commit at
comparable clocks, and its bound. What is not measured says so, with the command that will measure it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.harness import ratio
from benchmarks.results import ROOT, TIMED, Result, Run, latest

PAGE = ROOT / "docs" / "targets.md"
NOT_MEASURED = "not measured yet"
Key = tuple[str, str, str]  # case, mode, variant
Rows = Mapping[Key, tuple[Run, Result]]
FLEXIBLE = ("flex", "flex+mask", "varlen+merge", "compile")
MIB = 2**20


@dataclass(frozen=True)
class Check:
    """One measured number and its bound.

    Attributes:
        label: what the number is, short.
        keys: rows it is made of.
        measure: the number; None where a row is missing, has no time, or cannot be compared.
        bound: what it is held to.
        at_least: whether the bound is a lower one.
        form: how the number is shown.
    """

    label: str
    keys: tuple[Key, ...]
    measure: Callable[[Rows], float | None]
    bound: float
    at_least: bool
    form: str

    def holds(self, value: float) -> bool:
        """Whether a value meets the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def show(self, value: float | None) -> str:
        """The number, its bound, and in which direction it misses."""
        if value is None:
            return f"{self.label}: {NOT_MEASURED}"
        relation = ">=" if self.at_least else "<="
        missed = "" if self.holds(value) else ", MISSED"
        return f"{self.label}: {value:{self.form}} ({relation} {self.bound:{self.form}}{missed})"


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


def pair(rows: Rows, ours: Key, other: Key) -> tuple[Result, Result] | None:
    """Two timed results of one device and commit; None where there are none."""
    found = [rows[key] for key in (ours, other) if key in rows]
    if len(found) < 2 or any(result.status != TIMED for _, result in found):
        return None
    (run, mine), (other_run, theirs) = found
    same = (run.device, run.commit) == (other_run.device, other_run.commit)
    return (mine, theirs) if same else None


def faster(ours: Key, variants: tuple[str, ...], least: float, case: str = "") -> Check:
    """How many times as long the fastest of some others takes, on our case or on ``case``."""
    keys = [(case or ours[0], ours[1], variant) for variant in variants]

    def measure(rows: Rows) -> float | None:
        found = [both for key in keys if (both := pair(rows, ours, key)) is not None]
        times = [ratio(mine, theirs) for mine, theirs in found]
        known = [value for value in times if value is not None]
        return min(known) if known and len(known) == len(times) else None

    return Check(f"{_short(ours)} against {_any(variants)}", (ours, *keys), measure, least, True, ".2f")


def at_most(ours: Key, other: Key, most: float, label: str) -> Check:
    """Our time over another row's, at most so much."""

    def measure(rows: Rows) -> float | None:
        both = pair(rows, ours, other)
        share = None if both is None else ratio(both[1], both[0])
        return share

    return Check(label, (ours, other), measure, most, False, ".3f")


def rate(ours: Key, least: float) -> Check:
    """TFLOP/s on visible pairs."""

    def measure(rows: Rows) -> float | None:
        return rows[ours][1].tflops if ours in rows and rows[ours][1].status == TIMED else None

    return Check(f"{_short(ours)} TFLOP/s", (ours,), measure, least, True, ".0f")


def rate_share(ours: Key, other: Key, least: float) -> Check:
    """Our rate on visible pairs over that of another row."""

    def measure(rows: Rows) -> float | None:
        both = pair(rows, ours, other)
        if both is None or ratio(*both) is None or not both[1].tflops:
            return None
        return (both[0].tflops or 0.0) / both[1].tflops

    return Check(f"{_short(ours)} rate over {_short(other)}", (ours, other), measure, least, True, ".2f")


def milliseconds(ours: Key, most: float) -> Check:
    """Median time."""

    def measure(rows: Rows) -> float | None:
        return rows[ours][1].median_ms if ours in rows and rows[ours][1].status == TIMED else None

    return Check(f"{_short(ours)} ms", (ours,), measure, most, False, ".1f")


def memory(ours: Key, most: float, outputs: Callable[[Mapping[str, float]], float]) -> Check:
    """Peak MiB beyond the inputs and beyond ``outputs`` bytes, which follow from the case's sizes."""

    def measure(rows: Rows) -> float | None:
        if ours not in rows or rows[ours][1].peak_mib is None:
            return None
        result = rows[ours][1]
        return (result.peak_mib or 0.0) - outputs(result.sizes) / MIB

    return Check(f"{_short(ours)} extra MiB", (ours,), measure, most, False, ".1f")


def counted(ours: Key, name: str, most: int) -> Check:
    """A count among a row's sizes."""

    def measure(rows: Rows) -> float | None:
        return float(rows[ours][1].sizes[name]) if ours in rows and rows[ours][1].status == TIMED else None

    return Check(name, (ours,), measure, float(most), False, ".0f")


def ran(ours: Key) -> Check:
    """1 where a row was timed, 0 where it failed."""

    def measure(rows: Rows) -> float | None:
        return float(rows[ours][1].status == TIMED) if ours in rows else None

    return Check(f"{_short(ours)} runs", (ours,), measure, 1.0, True, ".0f")


def _short(key: Key) -> str:
    return f"{key[0].partition('/')[2]} {key[1]}"


def _any(variants: tuple[str, ...]) -> str:
    return variants[0] if len(variants) == 1 else f"the fastest of {', '.join(variants)}"


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
    return (*attention_targets(), *distillation_targets())


def attention_targets() -> tuple[Target, ...]:
    """Those of attention."""
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
    active = [
        at_most(attention(f"active-{on:g}", mode), attention("active-1", mode), on + 0.1, f"f = {1 - on:g} {mode}")
        for on in (0.5, 0.25, 0.125)
        for mode in ("forward", "backward")
    ]
    separate = [
        faster(attention(f"per-modality-{length}", "forward"), ("varlen+merge",), least)
        for length, least in ((512, 1.3), (2048, 1.3), (8192, 1.0))
    ]
    saved = [
        memory(attention(case, "forward"), 16.0, _attention_outputs)
        for case in ("dense-gated-d128-4k", "jagged-market-day")
    ]
    launch = at_most(
        ("overheads/launch", "host", "module"), ("overheads/launch", "host", "sdpa"), 1.5, "module over SDPA"
    )
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
        Target(
            "attention",
            "jagged multimodal batches",
            ">= 3x the best of FlexAttention, varlen and merge, compile",
            tuple(jagged),
        ),
        Target("attention", "time-causal streams", ">= 85 % of the plain rate per visible pair", tuple(causal)),
        Target("attention", "metadata of a time-causal batch", "< 1 % of the forward", (metadata,)),
        Target(
            "attention",
            "lengths or times change",
            "no recompilation",
            (counted(("overheads/recompile", "host", "fusedmm"), "compilations", 0),),
        ),
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
        Target(
            "attention",
            "CUDA graphs",
            "a module's forward can be captured",
            (ran(("overheads/capture", "forward", "module")),),
        ),
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
