"""Who is compared: the manifest `peers.toml`, what of it is installed here, and gathering the wheels for a machine
offline.
"""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.case import Unavailable

MANIFEST = Path(__file__).with_name("peers.toml")


def manifest() -> dict[str, Any]:
    """The manifest as it stands in the file."""
    return tomllib.loads(MANIFEST.read_text())


def missing(distribution: str) -> str | None:
    """Why a peer cannot run: not installed, with the command that would change it; None where it is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} is not installed (ci/wheels gathers it)"
    return None


def require(distribution: str) -> None:
    """Raise `Unavailable` where a peer is not installed."""
    if why := missing(distribution):
        raise Unavailable(why)


def versions() -> dict[str, str]:
    """Version of every peer of the manifest that is installed here."""
    names = [name for group in manifest()["group"].values() for name in group]
    return {name: importlib.metadata.version(name) for name in names if missing(name) is None}


def gather(group: str, out: Path) -> int:
    """Download the wheels of one group for the target machine; 1 where one is not to be had. A wheel that no transfer
    may carry is cut into parts, which ``ci/gpu --wheels`` joins.

    Raises:
        ValueError: for a group that the manifest does not have.
    """
    facts = manifest()
    if group not in facts["group"]:
        raise ValueError(f"wheels: group must be one of {', '.join(facts['group'])}, got {group!r}.")
    target = facts["target"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--pre", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", target["python"], "--dest", str(out)]
    command += [word for platform in target["platforms"] for word in ("--platform", platform)]
    lacking = []
    for name, version in facts["group"][group].items():
        requirement = name if version == "*" else f"{name}=={version}"
        print(f"wheels: {requirement}", flush=True)
        if subprocess.run([*command, requirement]).returncode:
            lacking.append(requirement)
    limit = facts["limit"]["megabytes"] * 1_000_000
    for wheel in out.glob("*.whl"):
        if wheel.stat().st_size > limit:
            split(wheel, facts["limit"]["part_megabytes"] * 1_000_000)
    total = sum(file.stat().st_size for file in out.glob("*.whl*"))
    verdict = f", over the {limit / 1e6:.0f} MB that one transfer may carry: take several, into one folder there"
    print(f"wheels: {total / 1e6:.1f} MB in {out}{verdict if total > limit else ''}")
    if lacking:
        print(f"wheels: not to be had for this target: {', '.join(lacking)}; its cases will say that it is skipped")
    return 1 if lacking else 0


def split(wheel: Path, size: int) -> None:
    """Replace a file by its parts, ``NAME.0of2`` and so on."""
    whole = wheel.read_bytes()
    count = -(-len(whole) // size)
    for place in range(count):
        wheel.with_name(f"{wheel.name}.{place}of{count}").write_bytes(whole[place * size : (place + 1) * size])
    wheel.unlink()


def join(folder: Path, out: Path) -> list[Path]:
    """The wheels of a folder, those that came in parts put together in ``out``; none of which a part is missing."""
    found = sorted(folder.glob("*.whl"))
    for first in sorted(folder.glob("*.whl.0of*")):
        count = int(first.name.rpartition("of")[2])
        parts = [first.with_name(f"{first.stem}.{place}of{count}") for place in range(count)]
        if all(part.exists() for part in parts):
            found.append(out / first.stem)
            found[-1].write_bytes(b"".join(part.read_bytes() for part in parts))
    return found
