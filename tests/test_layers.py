"""What the source says of itself: imports point down, inside functions too; kernels and launches suit every Triton."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedmm.kernels.launch import LAUNCH_OPTIONS, LaunchConfig

ROOT = Path(__file__).resolve().parent.parent

# A part of the package may import parts of a lower level, and itself.
LEVELS = {
    "shapes": 0,
    "tree": 0,
    "impl": 0,
    "philox": 0,
    "kernels": 0,
    "visibility": 1,
    "layout": 2,
    "heads": 2,
    "reference": 3,
    "eager": 3,
    "testing": 4,
    "ops": 4,
    "score_log": 4,
    "selection": 4,
    "flops": 5,
    "scoring": 5,
    "nn": 6,
    "train": 7,
}
KERNELS_MAY_IMPORT = {"torch", "triton", "fusedmm", *sys.stdlib_module_names}


def part_of(module: str) -> str | None:
    """Name of the part of fusedmm that a dotted module name belongs to; None for another package or fusedmm itself."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if parts[0] == "fusedmm" and len(parts) > 1 else None


class RunTime(ast.NodeTransformer):
    """Drops the bodies of `if TYPE_CHECKING:`."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def imports(source: str, module: str) -> Iterator[str]:
    """Every module that a source imports, absolute, at any depth; for `from fusedmm import x` also `fusedmm.x`.

    What only type checkers see does not count.
    """
    tree = RunTime().visit(ast.parse(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield name
            if name == "fusedmm":
                yield from (f"fusedmm.{alias.name}" for alias in node.names if alias.name in LEVELS)


def offences(source: str, module: str) -> list[str]:
    """What a module imports against the direction of the layers."""
    own = part_of(module)
    found = []
    for name in imports(source, module):
        other = part_of(name)
        if own == "kernels" and (name.split(".")[0] not in KERNELS_MAY_IMPORT or (other not in (None, "kernels"))):
            found.append(f"{module} imports {name}: device code imports torch, triton and itself")
        elif own is not None and other is not None and own != other and LEVELS[other] >= LEVELS[own]:
            found.append(f"{module} imports {name}: {own} may not import {other}")
    return found


def modules() -> list[tuple[str, Path]]:
    files = [*(ROOT / "fusedmm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    named = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = ("fusedmm", *parts) if parts[0] == "kernels" else parts
        named[".".join(parts)] = file
    return sorted(named.items())


@pytest.mark.parametrize(("module", "file"), [pytest.param(*pair, id=pair[0]) for pair in modules()])
def test_imports_point_down(module: str, file: Path) -> None:
    part = part_of(module)
    assert part is None or part in LEVELS, f"{module}: say at which level it is, in LEVELS"
    assert offences(file.read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fusedmm.reference.attention", "from fusedmm.ops.attention import gated_multimodal_attention"),
        ("fusedmm.eager.attention", "def f():\n    import fusedmm.nn"),
        ("fusedmm.kernels.attention.forward", "from fusedmm import shapes"),
        ("fusedmm.kernels.softmax", "import numpy"),
        ("fusedmm.ops.attention", "from ..train import trainer"),
        ("fusedmm.shapes", "from fusedmm.impl import resolve_impl"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, source: str) -> None:
    assert len(offences(source, module)) == 1


def test_every_launch_has_the_options_of_every_launch() -> None:
    """Triton 3.9 warns of a launch that does not say whether products and sums are fused; a later one stops."""
    launches = []
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                unpacked = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
                launches.append((f"{file.name}: {ast.unparse(node.func)}", "options" in " ".join(unpacked).lower()))
    assert len(launches) > 15
    assert [launch for launch, has_options in launches if not has_options] == []
    assert LaunchConfig({}, num_warps=4, num_stages=1).launch_options().items() >= LAUNCH_OPTIONS.items()


def test_device_functions_return_no_none() -> None:
    """Triton 3.6 compiles none that does, interpreted or under 3.7 as it may run."""
    returned = []
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in (each for each in functions if any("jit" in ast.unparse(d) for d in each.decorator_list)):
            values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
            parts = [part for x in values for part in (x.elts if isinstance(x, ast.Tuple) else [x])]
            returned += [f"{file.name}: {function.name}" for x in parts if ast.unparse(x) == "None"]
    assert returned == []
