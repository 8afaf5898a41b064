"""Key tiles of the backward that span short segments: their gradients, and that they cover every sample once."""

import random

import pytest
import torch

from fusedmm.layout import ModalityLayout

pytest.importorskip("triton")

import triton
import triton.language as tl

from fusedmm.kernels.attention import backward_key_value_spans as spans_module
from tests.test_attention_kernels import FEATURES, complaints, draw_problem, set_blocks


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
@pytest.mark.parametrize("seed", range(4))
def test_key_tiles_that_span_short_segments(
    softmax: str, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of many segments of 0 to 9 keys."""
    draw = random.Random(2000 + seed)
    set_blocks(monkeypatch, 32, 16, 16, False)
    modalities = draw.choice([2, 5, 8])
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


@triton.jit
def _find_tiles_kernel(cu_seqlens_k_ptr, found_ptr, batch, num_modalities, BLOCK_K: tl.constexpr):
    tile = tl.program_id(0)
    sample, first_key = spans_module._find_tile(cu_seqlens_k_ptr, batch, num_modalities, tile, BLOCK_K)
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
