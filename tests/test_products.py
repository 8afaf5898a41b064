"""Products of the CPU path: exact in every layout, whoever multiplies, and by oneDNN where they are large."""

import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedmm.eager import products
from fusedmm.eager.products import class_blocks, multiply

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()), reason="a build without both"
)


class Operators(TorchDispatchMode):
    """Namespaces of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def uses_onednn(rows: int, depth: int, columns: int) -> bool:
    a, b, out = torch.randn(rows, depth), torch.randn(depth, columns), torch.empty(rows, columns)
    with Operators() as ran:
        multiply(a, b, out)
    return "mkldnn" in ran.namespaces


@needs_onednn
def test_onednn_multiplies_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_onednn(256, 128, 128)
    assert not uses_onednn(8, 128, 128)  # few FLOPs
    assert not uses_onednn(4096, 16, 128)  # short sums
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not uses_onednn(256, 128, 128)


@pytest.mark.parametrize("flops", [1, 1 << 60])
@pytest.mark.parametrize("out_is_turned", [False, True])
@pytest.mark.parametrize("a_is_turned", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(7, 300), (300, 7), (1, 40), (40, 1)])
def test_products_in_every_layout(
    rows: int, columns: int, a_is_turned: bool, out_is_turned: bool, flops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "ONEDNN_FLOPS", flops)
    a, b = torch.randn(rows, 64), torch.randn(64, columns)
    a = a.t().contiguous().t() if a_is_turned else a
    out = torch.full((columns, rows), torch.nan).t() if out_is_turned else torch.full((rows, columns), torch.nan)
    exact = a.double() @ b.double()
    torch.testing.assert_close(multiply(a, b, out, 0.5).double(), 0.5 * exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(multiply(a, b, out, 2.0, add=True).double(), 2.5 * exact, rtol=1e-5, atol=1e-4)


def test_blocks_cover_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, logits = torch.randn(10, 4), torch.randn(3, 10)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 12)
    blocks = list(class_blocks(weight, logits))
    assert [part.shape[0] for part, _ in blocks] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([part for part, _ in blocks]), weight)
    assert torch.equal(torch.cat([part for _, part in blocks], 1), logits)


@needs_onednn
def test_operands_with_gaps_take_no_slow_loop() -> None:
    """oneDNN multiplies a right operand with gaps element by element: 1.5 s for what takes half a millisecond."""
    a, b = torch.randn(256, 512), torch.randn(256, 1024)
    calls = {
        "weight": lambda: multiply(a[:, :256], b[:, :512], torch.empty(256, 512)),
        "weight in columns": lambda: multiply(a[:, :256], b[:, ::2], torch.empty(256, 512)),
        "turned": lambda: multiply(a[:, :256], b[:, :512], torch.empty(512, 256).t()),
        "hidden": lambda: multiply(b[:, :512].t(), a[:, :256], torch.empty(512, 256)),
    }
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        assert time.perf_counter() - began < 0.3, name
