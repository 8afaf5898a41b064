"""What every test runs under: Triton's interpreter where there is no GPU, fixed seeds, and fresh memory full of NaN."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; its setter reaches this thread alone

import torch

from tests.interpreter import mend_interpreter

if not torch.cuda.is_available():
    # Read when triton is first imported, which importing torch and fusedmm does not do.
    os.environ["TRITON_INTERPRET"] = "1"
    mend_interpreter()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, in plain sight, what needs a GPU where there is none; refuse what would fail where there is one.

    Raises:
        pytest.UsageError: a test of kernels holds its tensors on the CPU.
    """
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        runs_kernels = any(type(value) is str and value == "triton" for value in parameters.values())
        if runs_kernels and "device" not in item.fixturenames:
            raise pytest.UsageError(f"{item.nodeid} must take its tensors' device from the fixture `device`.")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; ci/gpu runs it on one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (or the largest integer), so that an element that no kernel wrote shows.

    PyTorch fills fresh memory only while deterministic algorithms are on.
    """
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])
