"""The command line: `python -m benchmarks [case ...]`, and one more command for each name in `COMMANDS`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import (
    compare,
    overheads,
    paths,
    peers,
    plot,
    readme,
    results,
    roofline,
    run_command,
    static_command,
    targets,
    warm,
)
from benchmarks.arguments import new_file, result_file
from benchmarks.results import ROOT
from benchmarks.telemetry import Telemetry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]][0](words[1:])
    return _bench(words)


def _bench(words: list[str]) -> int:
    described = (f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure cases side by side with what else does the same work, on one device in one run.",
        epilog="other commands, each with a --help of its own:\n" + "\n".join(described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_command.add_arguments(parser)
    return run_command.run(parser, words)


def _static(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=static_command.__doc__)
    static_command.add_arguments(parser)
    args = parser.parse_args(words)
    status = static_command.run(args)
    return readme.run(check=False) or status if args.update else status  # the README shows the table


def _compare(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    parser.add_argument("before", type=result_file)
    parser.add_argument("after", type=result_file)
    args = parser.parse_args(words)
    return compare.run(args.before, args.after)


def _plot(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=plot.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    return plot.run(parser.parse_args(words).out)


def _keep(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks keep", description=results.keep.__doc__)
    parser.add_argument("results", type=result_file, help="a result file, such as ci/gpu leaves")
    for kept in results.keep(parser.parse_args(words).results):
        print(f"keep: appended to {kept}")
    return max(plot.run(ROOT / "docs" / "figures"), readme.run(check=False), targets.run(check=False))


def _readme(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=readme.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is out of date")
    return readme.run(check=parser.parse_args(words).check)


def _targets(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks targets", description=targets.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is out of date")
    return targets.run(check=parser.parse_args(words).check)


def _paths(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks paths", description=paths.__doc__)
    parser.add_argument("results", type=Path, help="a result file; its newest run of each case counts")
    return paths.run(parser.parse_args(words).results)


def _overheads(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overheads", description=overheads.__doc__)
    run_command.add_device(parser)
    parser.add_argument("--json", type=new_file, help="append the results to this file")
    parser.add_argument("--save", action="store_true", help="append the results to this device's in benchmarks/results")
    parser.add_argument("--list", action="store_true", help="only name what is measured")
    args = parser.parse_args(words)
    if args.list:
        print("\n".join(overheads.CASES))
        return 0
    kind = run_command.device_kind(args.device)
    if run_command.is_missing(kind, "overheads of a GPU skipped"):
        return 2
    device = torch.device(kind)
    telemetry = Telemetry(device)
    run = results.describe_run(device, roofline.measure(device), telemetry)
    found = list(overheads.Overheads(device, telemetry, run.id).rows())
    print(overheads.table(found))
    for file in run_command.files(args, run):
        results.append(file, [run, *found])
    return int(any(row.status not in (results.TIMED, "skipped") for row in found))


def _warm(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks warm", description=warm.__doc__)
    warm.add_arguments(parser)
    return warm.run(parser.parse_args(words))


def _wheels(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ci/wheels", description=peers.__doc__)
    parser.add_argument("--group", default="default")
    parser.add_argument("--out", type=Path, default=ROOT / ".wheels")
    args = parser.parse_args(words)
    return peers.gather(args.group, args.out)


COMMANDS = {
    "warm": (_warm, "what a run would compile, compiled side by side before it"),
    "static": (_static, "registers, spills and modelled share of every kernel, compiled without a GPU"),
    "compare": (_compare, "what got slower or larger from one result file to another"),
    "overheads": (_overheads, "host time, CUDA graphs, metadata, recompilation"),
    "paths": (_paths, "which Hopper kernels a measurement justifies"),
    "keep": (_keep, "a result file's rows to benchmarks/results, and all that is written from there anew"),
    "plot": (_plot, "figures from committed results"),
    "readme": (_readme, "the README's performance section and the tables of docs/, from committed results"),
    "targets": (_targets, "docs/targets.md, from committed results"),
    "wheels": (_wheels, "the peers' wheels, for a machine without a network"),
}
