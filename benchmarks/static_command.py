"""`python -m benchmarks static`: the static table, what of it is out of date, and whether anything got worse.

Each Triton version has a table of its own: `--update --arch sm_90` under Triton 3.6 writes that of Hopper's kernels,
portable ones too, for 3.6.
"""

import argparse
import os
import random
from collections.abc import Iterable, Sequence

from benchmarks.arguments import new_file
from benchmarks.compiled import SHARED_BYTES
from benchmarks.results import measured_shares
from benchmarks.static import (
    Row,
    compile_rows,
    faults,
    fingerprint,
    read_rows,
    results_file,
    specs,
    worsened,
    write_rows,
)
from fusedmm.kernels.launch import ARCHITECTURES

MIX_TABLED = 6  # instructions of a loop in the table; the committed rows have more
PROGRESS = 50  # kernels between two signs of life


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--all", action="store_true", help="also the dtypes that the table leaves out")
    parser.add_argument("--recompile", action="store_true", help="compile also what has not changed")
    parser.add_argument("--update", action="store_true", help="write the committed table anew")
    parser.add_argument("--check", action="store_true", help="fail where a kernel is worse than its committed row")
    parser.add_argument("--sample", type=int, default=8, help="with --check: unchanged rows to compile all the same")
    parser.add_argument("--limit", type=int, help="changed kernels to compile at most")
    parser.add_argument("--json", type=new_file, help="write the rows to this file too")


def run(args: argparse.Namespace) -> int:
    """Print the table; with --check, 1 where something is worse than what is committed.

    Raises:
        SystemExit: where Triton's interpreter is on, which leaves nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("static: TRITON_INTERPRET must be 0, got 1. Kernels are compiled here, not interpreted.")
    committed = read_rows(results_file())
    wanted = {
        (arch, name): fingerprint(spec)
        for arch in args.arch
        for name, spec in specs(arch).items()
        if args.only in name and (args.all or is_tabled(arch, name))
    }
    if not wanted:
        raise SystemExit(f"static: --only must be part of a kernel's name, got {args.only!r}.")
    fresh = [key for key, mark in wanted.items() if key in committed and committed[key].fingerprint == mark]
    sampled = min(args.sample, len(fresh)) if args.check else 0
    again = fresh if args.recompile else random.Random(0).sample(fresh, sampled)
    stale = [key for key in wanted if key not in set(fresh)]
    later = stale[args.limit :] if args.limit is not None else []
    stale = stale[: len(stale) - len(later)]
    count = f"{len(wanted)} kernels, {len(fresh)} as committed, compiling {len(stale) + len(again)}"
    put_off = f", {len(later)} changed and not compiled (--limit {args.limit})" if later else ""
    print(f"static: {count}{put_off}", flush=True)
    compiled = {}
    for row in compile_rows([*stale, *again]):
        compiled[row.key] = row
        if len(compiled) % PROGRESS == 0:
            print(f"static: {len(compiled)} compiled", flush=True)
            if args.update:  # what is compiled stays compiled when this is interrupted
                write_rows(results_file(), list({**committed, **compiled}.values()))
    rows = [compiled.get(key) or committed[key] for key in wanted if key not in set(later)]
    print(table(rows))
    if args.json is not None:
        write_rows(args.json, rows)
    if args.update:
        others = [row for row in committed.values() if row.arch not in args.arch or args.only not in row.name]
        others += [committed[key] for key in later if key in committed]
        write_rows(results_file(), [*others, *rows])
        print(f"static: wrote {results_file()}")
    if not args.check:
        return 0
    gone = [key for key in committed if key[0] in args.arch and args.only in key[1] and key not in wanted]
    found = problems(rows, committed, again, gone)
    print(
        "\n".join([f"static: {problem}" for problem in found] or ["static: nothing is worse than the committed table"])
    )
    return 1 if found else 0


def is_tabled(arch: str, name: str) -> bool:
    """Whether the committed table lists a kernel: bfloat16 everywhere, float32 on Hopper, and of sm_86 the
    configurations that sm_80 has not.

    float16 differs from bfloat16 in the type of its instructions only; the table would be thrice as long. The
    warp-specialised kernels, which have no register to spare, are listed with both.
    """
    if arch == "sm_86" and specs(arch)[name].config == specs("sm_80")[name].config:
        return False
    return ("fp16" not in name or "hopper" in name) and ("fp32" not in name or arch == "sm_90")


def problems(
    rows: Sequence[Row],
    committed: dict[tuple[str, str], Row],
    recompiled: Iterable[tuple[str, str]],
    gone: Iterable[tuple[str, str]],
) -> list[str]:
    """What fails the check: faults, rows worse than committed, unchanged rows that compile to something else."""
    unchanged = set(recompiled)
    found = []
    for row in rows:
        label = f"{row.arch} {row.name}"
        found += [f"{label}: {fault}" for fault in faults(row)]
        before = committed.get(row.key)
        if before is not None:
            found += [f"{label} is worse than committed: {change}" for change in worsened(before, row)]
        if row.key in unchanged and before != row:
            found.append(
                f"{label} has not changed, but compiles to something else. Run python -m benchmarks static --update."
            )
    stale = "The table lists {}, which is no more. Run python -m benchmarks static --update."
    return found + [stale.format(f"{arch} {name}") for arch, name in gone]


def table(rows: Sequence[Row]) -> str:
    """The rows for people, one line each, with a measured share of peak beside the model's where one exists."""
    measured = measured_shares()
    width = max((len(row.name) for row in rows), default=4)
    head = f"{'arch':<7} {'kernel':<{width}} warps stages  regs spills(loop)  "
    head += "smem KiB  programs  loop  matrix   tma  flight  model"
    lines = [head + ("  measured" if measured else "") + "  most of the loop"]
    for row in rows:
        share = "-" if row.share is None else f"{row.share:.0%}"
        flight = "-" if row.in_flight is None else f"{row.in_flight:.0%}"
        line = (
            f"{row.arch:<7} {row.name:<{width}} {row.config['num_warps']:>5} {row.config['num_stages']:>6} "
            f"{row.registers:>5} {row.spills:>6} ({row.main_spills:>2})  {row.shared / 1024:>8.0f}  {row.programs:>8}  "
            f"{row.instructions:>4}  {row.matrix:>6}  {row.copies:>4}  {flight:>6}  {share:>5}"
        )
        if row.key in measured and row.share is not None:
            real = measured[row.key]
            line += f"  {real:.0%} (model {row.share - real:+.0%})"
        most = sorted(row.mix.items(), key=lambda item: -item[1])[:MIX_TABLED]
        lines.append(line + "  " + " ".join(f"{name}:{count}" for name, count in most))
    chips = {row.arch for row in rows}
    limits = ", ".join(f"{arch} {SHARED_BYTES[arch] >> 10} KiB" for arch in ARCHITECTURES if arch in chips)
    return "\n".join([*lines, f"shared memory a program may take: {limits}"])
