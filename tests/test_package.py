"""ci/check_package.py finds what would ship a wrong package; that this tree's wheel is right is `ci/check package`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def check_package() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_package", ROOT / "ci" / "check_package.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "fusedmm").mkdir()
    (tmp_path / "fusedmm" / "__init__.py").touch()
    (tmp_path / "fusedmm" / "py.typed").touch()
    (tmp_path / "kernels" / "attention").mkdir(parents=True)
    (tmp_path / "kernels" / "attention" / "forward.py").touch()
    (tmp_path / "fusedmm" / "kernels").symlink_to("../kernels")
    return tmp_path


MODULES = {"fusedmm/__init__.py", "fusedmm/py.typed", "fusedmm/kernels/attention/forward.py"}


def test_modules_include_the_kernels_once(check_package: ModuleType, tree: Path) -> None:
    assert check_package.modules_of_tree(tree) == MODULES
    assert check_package.problems_of_tree(tree) == []


def test_a_copied_link_is_a_problem(check_package: ModuleType, tree: Path) -> None:
    (tree / "fusedmm" / "kernels").unlink()
    (tree / "fusedmm" / "kernels").write_text("../kernels")  # what git writes where it cannot make links
    assert "symbolic link" in check_package.problems_of_tree(tree)[0]


def test_shadowing_another_package_is_a_problem(check_package: ModuleType, tree: Path) -> None:
    (tree / "kernels" / "__init__.py").touch()
    assert "Hugging Face" in check_package.problems_of_tree(tree)[0]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (MODULES - {"fusedmm/kernels/attention/forward.py"}, "wheel lacks fusedmm/kernels/attention/forward.py."),
        (MODULES | {"fusedmm/gone.py"}, "wheel has fusedmm/gone.py, which is not in the tree."),
        (MODULES | {"kernels/attention/forward.py"}, "wheel has kernels/attention/forward.py outside fusedmm/."),
    ],
)
def test_a_wrong_wheel_is_a_problem(check_package: ModuleType, names: set[str], problem: str) -> None:
    assert check_package.problems_of_archive("wheel", names, MODULES) == [problem]


def test_a_right_wheel_is_none(check_package: ModuleType) -> None:
    assert check_package.problems_of_archive("wheel", {*MODULES, "fusedmm-0.1.0.dist-info/METADATA"}, MODULES) == []


def test_no_package_index_is_named() -> None:
    """Where packages come from is the user's configuration (pip's), never this project's."""
    for file in [*(ROOT / "ci").iterdir(), ROOT / "pyproject.toml"]:
        if file.is_file():
            text = file.read_text()
            assert "index-url" not in text, file
            assert "://" not in text, file
