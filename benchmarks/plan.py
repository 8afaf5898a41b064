"""Which cases run, in which order, and how long they should take: what the targets ask for comes first."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from benchmarks import results, targets
from benchmarks.case import Case
from benchmarks.cases import Builder, builders
from benchmarks.peers import missing
from benchmarks.telemetry import ENERGY_SECONDS

# The most telling rows of the targets; the other targets', then every other case, follow in the order of definition.
FIRST = (
    "attention/dense-gated-d128-4k",
    "attention/dense-plain-d128-4k",
    "distillation/jsd-4096-4096",
    "distillation/scores-2048-4096",
    "attention/jagged-market-day",
    "attention/dense-gated-d64-4k",
    "attention/dense-plain-d64-4k",
    "attention/time-causal",
    "attention/active-1",
    "attention/active-0.125",
    "attention/per-modality-2048",
    "attention/tiny",
    "distillation/kl-2048-4096",
    "distillation/small-v",
    "distillation/jsd-n1024",
    "attention/jagged-long",
)
# What compiles for long and is part of ``--quick`` beside what the targets need: the libraries on their own shapes, by
# case and variant, where the distribution is installed.
RIVALS = {
    ("attention/dense-plain-d128-4k", "flash-attn-4"): "flash-attn-4",
    ("attention/dense-plain-d64-4k", "flash-attn-4"): "flash-attn-4",
    ("distillation/cross-entropy", "quack"): "quack-kernels",
}
SHARING = ("flex+mask",)  # what it compiles, another variant of its case has compiled
# Assumed until a run on a GPU says otherwise, from caches that `benchmarks.warm` has filled.
START_S = 20.0
VARIANT_S = 0.5
COMPILE_S = 6.0  # of what torch.compile traces anew


def chosen(kind: str, wanted: Sequence[str], seen: Path | None, *, quick: bool) -> dict[str, Builder]:
    """Cases by name, or by a part of it where there is none of that name, in the order in which they run: quickly means
    what has no row first, neither a committed one nor one in the file ``seen``.
    """
    known = builders(kind)
    names = {name for word in wanted for name in ([word] if word in known else [n for n in known if word in n])}
    measured = {case for case, _, _ in results.latest(kind)} if quick else set()
    if seen is not None and seen.exists():
        measured |= {row.case for row in results.read(seen)[1]}
    asked = (name for name in known if name in names or not wanted)
    return {name: known[name] for name in ordered(asked, measured)}


def no_case(kind: str, wanted: Sequence[str]) -> str:
    """The message where `chosen` finds none."""
    return f"benchmarks: no case for {kind} contains {', '.join(wanted)}. See --list."


def ordered(names: Iterable[str], measured: Collection[str] = ()) -> list[str]:
    """Names in the order in which they should run: first what has not been ``measured``, then `FIRST`, then what a
    target needs.
    """
    rank = {name: place for place, name in enumerate(dict.fromkeys((*FIRST, *(case for case, _ in targets.wanted()))))}
    return sorted(names, key=lambda name: (name in measured, rank.get(name, len(rank))))


def compiled_quickly() -> frozenset[tuple[str, str]]:
    """Case and variant of what compiles for long and is part of ``--quick``."""
    return frozenset((*targets.wanted(), *(key for key, peer in RIVALS.items() if missing(peer) is None)))


def estimate_s(case: Case, seconds: float, *, quick: bool, energy: bool) -> float:
    """Seconds that a case should take on a GPU; 0 where ``--quick`` leaves it out."""
    if quick and not case.quick:
        return 0.0
    compiling = [variant.name for variant in case.variants if variant.compiles]
    plain = len(case.variants) - len(compiling)
    modes = len(case.modes) + case.launch_bound * sum(mode != "backward" for mode in case.modes)
    wanted = compiled_quickly() if quick else {(case.name, name) for name in compiling}
    compiled = sum((case.name, name) in wanted and name not in SHARING for name in compiling)
    measured = modes * (seconds + energy * (plain + compiled) * ENERGY_SECONDS)
    return measured + plain * VARIANT_S + compiled * COMPILE_S


def table(cases: Sequence[Case], seconds: float, *, quick: bool, energy: bool) -> str:
    """The plan: every case with when it should be done."""
    at, count = START_S, 0
    lines = [f"{'start':<40}{at:>8.0f} s"]
    for case in cases:
        took = estimate_s(case, seconds, quick=quick, energy=energy)
        at, count = at + took, count + (took > 0)
        lines.append(f"{case.name:<40}{at:>8.0f} s" if took else f"{case.name:<40}left out by --quick")
    lines.append(f"{count} cases, an estimated {at:.0f} s, of which {seconds:g} s of timing for each case and mode")
    return "\n".join(lines)
