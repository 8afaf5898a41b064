"""Few queries over many keys: every pass over query tiles with its keys shared out, against float64 and the whole."""

import random

import pytest
import torch

pytest.importorskip("triton")

from fusedmm.kernels.attention import launch as launch_module
from fusedmm.kernels.attention.config import key_splits
from tests.attention_launch import SOFTMAXES, complaints, draw_problem, fuzzed_problem, launch, set_blocks

H200 = {"processors": 132}


def force_splits(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    monkeypatch.setattr(launch_module, "key_splits", lambda *_, **__: splits)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("seed", range(5))
def test_fuzzed_batches(softmax: str, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty segments, hidden and switched-off ones, more splits than key tiles, more query tiles than one."""
    draw = random.Random(2000 + seed)
    set_blocks(monkeypatch, *draw.choice([(32, 16, 16, False), (32, 32, 16, True), (16, 32, 16, True)]))
    force_splits(monkeypatch, draw.choice([2, 3, 7]))
    problem = fuzzed_problem(draw, seed, softmax, [0, 1, 5, 18], device)
    assert complaints(problem) == []


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_splits_agree_with_the_whole(softmax: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within float32's rounding, infinities exactly; and bit for bit when repeated."""
    features = ("log_prior", "gate", "output_gate", "active", "times", "dropout")
    problem = draw_problem(4, softmax, [3, 1], [[50, 5], [0, 20]], features=features, device=device)
    set_blocks(monkeypatch, 16, 16, 16, True)
    force_splits(monkeypatch, 1)
    whole = launch(problem)
    force_splits(monkeypatch, 3)
    results, again = launch(problem), launch(problem)
    for name, expected in whole.items():
        torch.testing.assert_close(results[name], expected, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(results[name], again[name]), name


def test_short_segments_do_not_all_fall_to_one_split(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four segments of one tile goes to another of four splits."""
    problem = draw_problem(5, "partials", [1], [[3, 3, 3, 3]], heads=1, kv_heads=1, device=device)
    seen = []

    def look(_: torch.Tensor, split_lse: torch.Tensor, *__: object) -> None:
        seen.append(torch.isfinite(split_lse))

    monkeypatch.setattr(launch_module, "combine_splits", look)
    force_splits(monkeypatch, 4)
    inputs = (problem.tensors[name] for name in ("query", "key", "value"))
    launch_module.attention_forward(*inputs, problem.for_kernels())
    (finite,) = seen
    assert finite[:, 0, 0].sum(0).tolist() == finite[:, 0, 0].sum(1).tolist() == [1, 1, 1, 1]


def test_many_keys_are_split_on_their_own(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "multiprocessors", lambda _: 132)
    calls = []
    combine = launch_module.combine_splits

    def count(split_output: torch.Tensor, *arguments: object) -> None:
        calls.append(split_output.shape[0])
        combine(split_output, *arguments)

    monkeypatch.setattr(launch_module, "combine_splits", count)
    problem = draw_problem(6, "joint", [8], [[700, 30]], features=("log_prior", "gate"), heads=1, device=device)
    assert complaints(problem) == []
    assert calls == [2]


@pytest.mark.parametrize(
    ("sizes", "splits"),
    [
        ((64, 65536, 1, 1, 64), 64),  # one program: the most splits there are
        ((64, 65536, 1, 8, 64), 33),  # 8 programs, two on each of 132 multiprocessors
        ((16, 65536, 1, 8, 64), 33),
        ((64, 4096, 1, 8, 64), 8),  # 512 keys a split beside 64 queries
        ((16, 4096, 1, 8, 64), 16),  # 256 keys a split at least
        ((1, 256, 1, 1, 64), 1),
        ((1, 512, 1, 1, 64), 2),
        ((16 * 8, 4096 * 8, 8, 8, 64), 4),
        ((16 * 9, 4096 * 9, 9, 8, 64), 1),  # more than half of the chip is busy
        ((4096, 65536, 1, 8, 128), 1),
        ((0, 4096, 1, 1, 64), 1),
        ((64, 0, 1, 1, 64), 1),
        ((0, 0, 0, 1, 64), 1),
    ],
)
def test_the_number_of_splits(sizes: tuple[int, int, int, int, int], splits: int) -> None:
    assert key_splits(*sizes, **H200) == splits


def test_the_buffer_of_splits_is_bounded() -> None:
    """At most ``total_k Hq / 2`` rows of bytes and two programs' results a multiprocessor, as the docstring says."""
    draw = random.Random(0)
    split = 0
    for _ in range(5000):
        total_q, total_k, batch = draw.randint(1, 512), draw.randint(1, 200_000), draw.randint(1, 16)
        heads, block_q, results = draw.choice([1, 4, 8, 32]), draw.choice([16, 64, 128]), draw.choice([1, 5, 32])
        splits = key_splits(total_q, total_k, batch, heads, block_q, 132, results=results)
        if splits > 1:
            split += 1
            rows = splits * total_q * heads * results
            assert 4 * rows <= total_k * heads / 2
            assert rows <= 2 * 132 * block_q * results
    assert split > 100
