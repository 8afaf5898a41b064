"""Builds the wheel and the sdist from a copy of the tree and compares what is in them with what is in the tree.

A checkout without symbolic links builds a wheel that silently lacks `fusedmm.kernels`; a `kernels/__init__.py` would
hide the package `kernels` of Hugging Face for everyone who works in this folder. Run by `ci/check package`.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fusedmm"
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "gpu-results")


def modules_of_tree(root: Path) -> set[str]:
    """Every file of the package that belongs in a wheel, relative to ``root``; kernels through their link."""
    package = root / PACKAGE
    files = [*package.rglob("*.py"), *(root / "kernels").rglob("*.py"), package / "py.typed"]
    named = (file.relative_to(root) for file in files)
    return {str(Path(PACKAGE, name) if name.parts[0] == "kernels" else name) for name in named}


def problems_of_tree(root: Path) -> list[str]:
    """What about the tree itself would ship a wrong package."""
    link = root / PACKAGE / "kernels"
    problems = []
    if not link.is_symlink() or link.resolve() != (root / "kernels").resolve():
        problems.append(f"{PACKAGE}/kernels is not a symbolic link to ../kernels. Check out with core.symlinks=true.")
    if (root / "kernels" / "__init__.py").exists():
        problems.append("kernels/__init__.py hides Hugging Face's package `kernels`. Remove it.")
    return problems


def problems_of_archive(kind: str, names: Iterable[str], expected: set[str]) -> list[str]:
    """Differences between an archive's files and the tree's modules."""
    present = {name for name in names if name.endswith((".py", "py.typed"))}
    found = {name for name in present if name.startswith(f"{PACKAGE}/")}
    problems = [f"{kind} lacks {name}." for name in sorted(expected - found)]
    problems += [f"{kind} has {name}, which is not in the tree." for name in sorted(found - expected)]
    if kind == "wheel":
        problems += [f"wheel has {name} outside {PACKAGE}/." for name in sorted(present - found)]
    return problems


def build(root: Path, target: Path, hook: str) -> Path:
    """Run a hook of the build backend (`build_wheel` or `build_sdist`) in ``root``, offline, and return the archive."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"check_package: {hook} failed:\n{done.stdout}{done.stderr}")
    return target / done.stdout.split()[-1]


def problems_of_import(wheel: Path, scratch: Path) -> list[str]:
    """Import the unpacked wheel, alone, beside a package `kernels` of someone else."""
    site = scratch / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    theirs = scratch / "theirs" / "kernels"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text("OWNER = 'someone else'\n")
    code = (
        "import importlib.util, sys\n"
        f"sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}, {str(theirs.parent)!r}]\n"
        "import kernels, fusedmm\n"
        "assert kernels.OWNER == 'someone else', kernels\n"
        "assert 'triton' not in sys.modules, 'import fusedmm imports triton'\n"
        f"assert fusedmm.__file__.startswith({str(site)!r}), fusedmm.__file__\n"
        "assert importlib.util.find_spec('fusedmm.kernels.launch'), 'no fusedmm.kernels.launch'\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=scratch, capture_output=True, text=True)
    return [] if done.returncode == 0 else [f"the wheel does not import as it should:\n{done.stderr}"]


def main() -> int:
    """Print every problem; 0 where there is none."""
    problems = problems_of_tree(ROOT)
    expected = modules_of_tree(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # A copy, so that no build folder of an earlier version is taken up and none is left behind.
        copy = scratch / "tree"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_SOURCE)
        wheel = build(copy, scratch, "build_wheel")
        with zipfile.ZipFile(wheel) as archive:
            problems += problems_of_archive("wheel", archive.namelist(), expected)
        with tarfile.open(build(copy, scratch, "build_sdist")) as archive:
            names = (name.partition("/")[2] for name in archive.getnames())
            problems += problems_of_archive("sdist", names, expected)
        problems += problems_of_import(wheel, scratch)
    for problem in problems:
        print(f"check_package: {problem}", file=sys.stderr)
    print(f"check_package: {len(expected)} modules, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
