"""Key tiles that span short segments: results and gradients, products in parts, and that every key has its tile."""

import random

import pytest
import torch

from fusedmm.layout import ModalityLayout

pytest.importorskip("triton")

import triton
import triton.language as tl

from fusedmm.kernels.attention import backward_key_value_spans, spans
from tests.attention_launch import FEATURES, complaints, draw_problem, launch, set_blocks


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
@pytest.mark.parametrize("seed", range(4))
def test_key_tiles_that_span_short_segments(
    softmax: str, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of many segments of 0 to 9 keys."""
    draw = random.Random(2000 + seed)
    set_blocks(monkeypatch, 32, 16, 16, False)
    modalities = [2, 5, 8, 25][seed]
    problem = draw_problem(
        seed,
        softmax,
        [draw.choice([0, 1, 40]), 20],
        [[draw.choice([0, 0, 1, 2, 5, 9]) for _ in range(modalities)] for _ in range(2)],
        features=tuple(name for name in FEATURES if draw.random() < 0.5),
        device=device,
        dtype=draw.choice([torch.float32, torch.float16]),
    )
    assert complaints(problem) == []


@pytest.mark.parametrize("features", [(), ("times",), ("active", "gate", "dropout")])
def test_a_query_from_which_priors_hide_all_is_zero(
    features: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden in a row, hidden in all rows of a tile, and beside a row that sees the same keys."""
    set_blocks(monkeypatch, 16, 16, 16, False)
    problem = draw_problem(21, "joint", [20, 18], [[3, 9, 2], [7, 0, 5]], features=features, device=device)
    prior = torch.randn(38, 2, 3, generator=torch.Generator().manual_seed(21))
    prior[[1, 20, 37]] = -torch.inf
    prior[:16, :, 1] = -torch.inf
    problem.tensors["log_prior"] = prior.to(device)
    results = launch(problem)
    assert complaints(problem, results) == []
    for name in ("output", "mass", "grad_query", "grad_log_prior"):
        assert not results[name][[1, 20, 37]].any(), name
    assert torch.isneginf(results["lse"][[1, 20, 37]]).all()


@triton.jit
def _product_kernel(x_ptr, modality_ptr, pairs_ptr, sums_ptr, ONE_HOT: tl.constexpr, PARTS: tl.constexpr):
    rows = tl.arange(0, 16)[:, None]
    x = tl.load(x_ptr + rows * 16 + tl.arange(0, 16)[None, :])
    offs_k = tl.arange(0, 32)[None, :]
    one_hot = (tl.load(modality_ptr + offs_k) == rows).to(ONE_HOT)
    pairs = spans.spread(x, one_hot, PARTS)
    tl.store(pairs_ptr + rows * 32 + offs_k, pairs)
    sums = spans.add_product(tl.zeros([16, 16], tl.float32), pairs, one_hot.T, PARTS)
    tl.store(sums_ptr + rows * 16 + tl.arange(0, 16)[None, :], sums)


@pytest.mark.parametrize(("parts", "error"), [(1, 2**-8), (2, 2**-16), (3, 0.0)])
def test_products_in_parts_keep_float32(parts: int, error: float, device: torch.device) -> None:
    """On a CPU in float16, which holds a part as well as bfloat16 does at these sizes, and Triton's interpreter too."""
    x = (torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) * 99 + 1).to(device)
    modality = (torch.arange(32) // 3).to(torch.int32).to(device)
    pairs, sums = x.new_empty(16, 32), x.new_empty(16, 16)
    one_hot = tl.bfloat16 if x.is_cuda else tl.float16
    _product_kernel[(1,)](x, modality, pairs, sums, ONE_HOT=one_hot, PARTS=parts)
    expected = x[:, modality.long()]
    assert ((pairs - expected).abs() <= error * expected).all()
    expected = expected.double() @ torch.nn.functional.one_hot(modality.long(), 16).double()
    assert ((sums - expected).abs() <= (2 * error + 2**-22) * expected).all()
    if parts < 3:
        assert ((pairs - x[:, modality.long()]).abs() > error / 8).any()


@triton.jit
def _find_tiles_kernel(cu_seqlens_k_ptr, found_ptr, batch, num_modalities, BLOCK_K: tl.constexpr):
    tile = tl.program_id(0)
    sample, first_key = backward_key_value_spans._find_tile(cu_seqlens_k_ptr, batch, num_modalities, tile, BLOCK_K)
    tl.store(found_ptr + 2 * tile, sample)
    tl.store(found_ptr + 2 * tile + 1, first_key)


def test_tiles_that_span_segments_cover_every_sample_once(device: torch.device) -> None:
    """More samples than one step of the search looks at, empty ones among them."""
    lengths = torch.randint(0, 9, (600, 3)) * torch.randint(0, 2, (600, 1))
    lengths[[0, 300, 599]] = torch.tensor([[0, 16, 0], [100, 30, 3], [16, 15, 2]])
    layout = ModalityLayout.from_lengths(torch.ones(600, dtype=torch.int64).to(device), lengths.to(device))
    found = torch.empty(layout.total_k // 16 + 600, 2, dtype=torch.int32, device=device)
    _find_tiles_kernel[(found.shape[0],)](layout.cu_seqlens_k, found, batch=600, num_modalities=3, BLOCK_K=16)
    stops = layout.cu_seqlens_k[3::3]
    used = {(int(sample), int(key)) for sample, key in found.tolist() if key < stops[sample]}
    starts, totals = layout.cu_seqlens_k[:-1:3].tolist(), lengths.sum(1).tolist()
    assert used == {(b, starts[b] + first) for b, total in enumerate(totals) for first in range(0, total, 16)}
    assert sum(key < stops[sample] for sample, key in found.tolist()) == len(used)
