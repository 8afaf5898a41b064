"""The attention launchers alone, below the operator: every argument, layout, stride and tile size against float64."""

import random
import tempfile

import pytest
import torch

pytest.importorskip("triton")

from fusedmm.kernels.attention import config as config_module
from tests.attention_launch import SOFTMAXES, complaints, draw_problem, expect, fuzzed_problem, launch, set_blocks


@pytest.fixture(params=[0, 32], ids=["segments", "spans"])
def short_segment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one segment each, and tiles that span segments."""
    monkeypatch.setattr(config_module, "SHORT_SEGMENT", request.param)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("seed", range(8))
def test_fuzzed_batches_with_small_tiles(
    softmax: str, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1000 + seed)
    set_blocks(monkeypatch, *draw.choice([(32, 16, 16, False), (32, 32, 16, True), (16, 32, 16, True)]))
    monkeypatch.setattr(config_module, "SHORT_SEGMENT", draw.choice([0, 100]))  # key tiles of segments, or of samples
    problem = fuzzed_problem(draw, seed, softmax, [0, 1, 15, 33, 50], device)
    assert complaints(problem) == []


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(72, torch.float16), (40, torch.float32)])
def test_tiles_of_the_table(softmax: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """One problem with several whole tiles, tails and short segments at the sizes that run on a GPU."""
    features = ("log_prior", "gate", "output_gate")
    lengths = ([3, 60], [[5, 0], [150, 33]])
    sizes = {"heads": 1, "head_dim": head_dim, "dtype": dtype}
    problem = draw_problem(7, softmax, *lengths, features=features, device=device, **sizes)
    assert complaints(problem) == []


@pytest.mark.usefixtures("short_segment")
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_everything_is_bitwise_reproducible(softmax: str, device: torch.device) -> None:
    features = ("log_prior", "gate", "output_gate", "times", "dropout")
    problem = draw_problem(3, softmax, [9, 2], [[40, 3], [0, 5]], features=features, device=device)
    first, second = launch(problem), launch(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_empty_batches(softmax: str, device: torch.device) -> None:
    """No query, no key, or neither, in a sample or in all."""
    for q_lengths, k_lengths in (([0, 0], [[0], [0]]), ([0, 2], [[4], [0]])):
        problem = draw_problem(1, softmax, q_lengths, k_lengths, features=("gate", "output_gate"), device=device)
        results = launch(problem)
        assert complaints(problem, results) == []
        assert torch.equal(results["output"], torch.zeros_like(results["output"]))


@pytest.mark.usefixtures("short_segment")
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_queries_that_see_nothing_are_zero(softmax: str, device: torch.device) -> None:
    problem = draw_problem(2, softmax, [9], [[20, 3]], features=("times", "gate", "output_gate"), device=device)
    assert problem.layout.visibility is not None
    problem.layout.visibility.ranges[4] = problem.layout.visibility.ranges[4, :, :1]  # empty, wherever it starts
    results = launch(problem)
    for name in ("output", "mass", "grad_query"):
        assert torch.equal(results[name][4], torch.zeros_like(results[name][4])), name
    assert torch.isneginf(results["lse"][4]).all()
    assert all(torch.isfinite(x).all() for name, x in results.items() if name != "lse")


@pytest.mark.usefixtures("short_segment")
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy, beneath the interpreter
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_nan_stays_where_it_is(softmax: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a sample's keys, and in an inactive segment of another, changes nothing elsewhere, bit for bit."""
    set_blocks(monkeypatch, 16, 16, 16, True)
    problem = draw_problem(5, softmax, [7, 21, 3], [[19, 7], [18, 5], [3, 5]], features=("gate",), device=device)
    problem.active = torch.tensor([[1, 1], [1, 0], [1, 1]], dtype=torch.bool, device=device)[:, None].expand(3, 2, 2)
    clean = launch(problem)
    bounds = problem.layout.cu_seqlens_k.tolist()
    for name in ("key", "value", "query"):
        problem.tensors[name] = problem.tensors[name].clone()
    for name in ("key", "value"):
        problem.tensors[name][bounds[3] : bounds[4]] = torch.nan  # the inactive segment of the second sample
        problem.tensors[name][bounds[4] :] = torch.nan  # all of the third
    problem.tensors["query"][28:] = torch.nan
    dirty = launch(problem)
    for name in ("output", "mass", "lse", "grad_query", "grad_gate"):
        if name in clean:
            assert torch.equal(dirty[name][:28], clean[name][:28]), name
    for name in ("grad_key", "grad_value"):
        assert torch.equal(dirty[name][: bounds[4]], clean[name][: bounds[4]]), name
        assert not dirty[name][bounds[3] : bounds[4]].any()  # exact 0


@pytest.mark.usefixtures("short_segment")
def test_keys_in_the_future_of_all_queries_are_not_read(device: torch.device) -> None:
    problem = draw_problem(6, "joint", [5], [[40]], features=("times",), device=device)
    assert problem.layout.visibility is not None
    problem.layout.visibility.ranges[..., 1].clamp_(max=23)
    clean = launch(problem)
    for name in ("key", "value"):
        problem.tensors[name] = problem.tensors[name].clone()
        problem.tensors[name][23:] = torch.nan
    dirty = launch(problem)
    assert all(torch.equal(dirty[name], clean[name]) for name in clean)


@pytest.mark.usefixtures("short_segment")
@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.5])
def test_any_scale(scale: float, device: torch.device) -> None:
    problem = draw_problem(8, "joint", [7], [[33, 5]], features=("log_prior",), device=device)
    problem.scale = scale
    assert complaints(problem) == []


@pytest.mark.usefixtures("short_segment")
def test_far_apart_priors_neither_overflow_nor_vanish(device: torch.device) -> None:
    problem = draw_problem(9, "joint", [6], [[5, 40]], device=device)
    prior = torch.tensor([[-300.0, -310.0], [300.0, 290.0], [-1e4, -1e4], [0.0, 30.0], [30.0, 0.0], [-torch.inf, 1.0]])
    problem.tensors["log_prior"] = prior[:, None].expand(6, 2, 2).to(device)
    results = launch(problem)
    truth = expect(problem, torch.float64)
    assert all(torch.isfinite(x).all() for name, x in results.items() if name != "lse")
    torch.testing.assert_close(results["mass"].double(), truth["mass"], rtol=1e-4, atol=1e-30)


@pytest.mark.usefixtures("short_segment")
@pytest.mark.parametrize("features", [(), ("times",)])
def test_a_faint_modality_keeps_its_lse(
    features: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far a modality's scores lie below those before it, its lse is its own; its mass is 0."""
    set_blocks(monkeypatch, 32, 16, 16, True)
    problem = draw_problem(14, "joint", [20, 3], [[5, 40, 0, 7], [0, 1, 33, 2]], features=features, device=device)
    prior = torch.zeros(23, 2, 4)
    prior[:, :, 1:] = torch.tensor([-30.0, -70.0, -100.0])
    prior[::2, 1, 1:] = torch.tensor([-1000.0, -torch.inf, 100.0])
    problem.tensors["log_prior"] = prior.to(device)
    truth = expect(problem, torch.float64)
    assert (truth["lse"].amax(-1, keepdim=True) - truth["lse"]).isfinite().sum() > 10
    results = launch(problem)
    torch.testing.assert_close(results["lse"].double(), truth["lse"], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(results["mass"].double(), truth["mass"], rtol=1e-3, atol=1e-30)
    assert all(torch.isfinite(x).all() for name, x in results.items() if name != "lse")


@pytest.mark.usefixtures("short_segment")
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_strides(softmax: str, device: torch.device) -> None:
    """Packed query/key/value, head-major keys, broadcast gradients, last strides other than 1: the same results."""
    features = ("log_prior", "gate", "output_gate")
    problem = draw_problem(10, softmax, [11], [[20, 3]], features=features, heads=2, kv_heads=2, device=device)
    expected = launch(problem)
    tensors = problem.tensors
    total = tensors["key"].shape[0]
    tensors["key"], tensors["value"] = torch.stack((tensors["key"], tensors["value"]), 1).unbind(1)
    tensors["query"] = tensors["query"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("log_prior", "output_gate"):
        if name in tensors:
            tensors[name] = tensors[name].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert tensors["key"].stride(0) == 2 * tensors["value"].numel() // total
    results = launch(problem)
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    problem.grads["output"] = torch.ones((), dtype=torch.float32, device=device).expand(problem.grads["output"].shape)
    assert complaints(problem) == []


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_active_of_any_strides(modalities: int, device: torch.device) -> None:
    """[B, M] spread over heads, modality-major, and plain: the same as no argument where all is active."""
    problem = draw_problem(13, "joint", [3], [[5] * modalities], heads=4, device=device)
    expected = launch(problem)
    everything = torch.ones(1, modalities, dtype=torch.bool, device=device)
    spread = everything[:, None].expand(1, 4, modalities)
    for active in (spread, everything.T.contiguous().T[:, None].expand(1, 4, modalities), spread.contiguous()):
        problem.active = active
        results = launch(problem)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_addresses_past_32_bits(device: torch.device) -> None:
    """A head stride over 2^31 elements, in 8 GiB of a GPU or in a sparse file of which only the pages in use exist."""
    total_k, head_dim, far = 9, 16, 2**31 + 64
    size = far + total_k * head_dim
    plain = draw_problem(11, "joint", [4], [[5, 4]], heads=2, kv_heads=2, device=device)
    with tempfile.NamedTemporaryFile() as file:
        if device.type == "cuda":
            memory = torch.empty(size, device=device)
        else:
            memory = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32)
        wide = memory.as_strided((total_k, 2, head_dim), (head_dim, far, 1))
        wide.copy_(plain.tensors["key"])
        expected = launch(plain)
        plain.tensors["key"] = wide
        results = launch(plain)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("short_segment")
def test_dropout_depends_on_seed_query_head_and_key_only(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw_problem(12, "joint", [30], [[50, 7]], features=("dropout",), device=device)
    expected = launch(problem)
    set_blocks(monkeypatch, 16, 32, 16, False)
    other_tiles = launch(problem)
    torch.testing.assert_close(other_tiles["output"], expected["output"], rtol=1e-5, atol=1e-5)
    problem.seed = problem.seed + 1
    assert not torch.allclose(launch(problem)["output"], expected["output"], rtol=1e-2, atol=1e-2)
