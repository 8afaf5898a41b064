"""gated_multimodal_attention: every implementation against the float64 reference, and what the contract promises."""

import functools
import math
import random

import pytest
import torch

import fusedmm
from fusedmm.philox import keep_mask
from fusedmm.reference import attention as reference
from fusedmm.testing import (
    AttentionExample,
    attention_example,
    check_attention,
    run_attention,
)

IMPLEMENTATIONS = ("reference", "eager", "triton")
FEATURES = ("log_prior", "gate", "output_gate", "active", "times", "lookback")


def attend(impl: str):
    return functools.partial(fusedmm.gated_multimodal_attention, impl=impl)


def dtypes(device: torch.device) -> list[torch.dtype]:
    """bfloat16 products are wrong in Triton's interpreter: they are tested on a GPU."""
    half = [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float16]
    return [torch.float32, *half]


def random_example(seed: int, device: torch.device, impl: str) -> AttentionExample:
    draw = random.Random(seed)
    batch, modalities = draw.randint(1, 4), draw.choice([1, 2, 3, 5])
    return attention_example(
        seed,
        [draw.choice([0, 1, 5, 17, 40]) for _ in range(batch)],
        [[draw.choice([0, 0, 1, 3, 16, 33, 70]) for _ in range(modalities)] for _ in range(batch)],
        heads=4,
        kv_heads=draw.choice([1, 2, 4]),
        head_dim=draw.choice([16, 40, 64]),
        dtype=draw.choice(dtypes(device) if impl == "triton" else [torch.float32, torch.float16, torch.bfloat16]),
        device=device,
        softmax=draw.choice(["joint", "per_modality"]),
        features=[name for name in FEATURES if draw.random() < 0.5],
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(12))
def test_random_batches_stay_within_the_budget(impl: str, seed: int, device: torch.device) -> None:
    assert check_attention(random_example(seed, device, impl), attend(impl)) == []


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [16, 24, 80, 96, 128, 256])
def test_head_dims(impl: str, head_dim: int, device: torch.device) -> None:
    example = attention_example(1, [19], [[7, 0, 40]], head_dim=head_dim, device=device)
    assert check_attention(example, attend(impl)) == []


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_joint_mass_sums_to_one_and_rows_that_see_nothing_are_zero(impl: str, device: torch.device) -> None:
    example = attention_example(2, [4, 3], [[5, 6], [0, 0]], device=device)
    results = run_attention(example, attend(impl))
    total = results["mass"].sum(-1)
    torch.testing.assert_close(total[:4], torch.ones_like(total[:4]))
    assert (total[4:] == 0).all()
    assert (results["output"][4:] == 0).all()
    assert torch.isneginf(results["lse"][4:]).all()
    assert all(torch.isfinite(x).all() for name, x in results.items() if name.startswith("grad_"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
def test_a_modality_without_weight_changes_nothing(impl: str, softmax: str, device: torch.device) -> None:
    """An inactive modality equals one with no tokens; its keys and values are never read, NaN or not."""
    with_noise = attention_example(3, [9, 5], [[8, 6], [3, 20]], device=device, softmax=softmax, features=["gate"])
    active = torch.tensor([[True, False], [True, False]], device=device)
    segment = with_noise.layout.key_segments()
    noise = segment % 2 == 1
    poisoned = {
        name: x.masked_fill(noise[:, None, None], math.nan) if name in ("key", "value") else x
        for name, x in with_noise.tensors.items()
    }
    off = AttentionExample(
        {**poisoned, "active": active}, with_noise.layout, softmax, with_noise.grad_output, with_noise.grad_mass
    )
    empty = fusedmm.ModalityLayout.from_lengths(
        torch.tensor([9, 5], device=device), torch.tensor([[8, 0], [3, 0]], device=device)
    )
    kept = {name: x[~noise] if name in ("key", "value") else x for name, x in with_noise.tensors.items()}
    alone = AttentionExample(kept, empty, softmax, with_noise.grad_output, with_noise.grad_mass)
    got, expected = run_attention(off, attend(impl)), run_attention(alone, attend(impl))
    for name in ("output", "mass", "lse", "grad_query", "grad_gate"):
        torch.testing.assert_close(got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    for name in ("grad_key", "grad_value"):
        assert (got[name][noise] == 0).all()
        torch.testing.assert_close(got[name][~noise], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_stays_in_its_sample(impl: str, device: torch.device) -> None:
    clean = attention_example(4, [6, 6, 6], [[5, 9], [12, 3], [1, 30]], device=device)
    owner = clean.layout.key_segments() // 2
    tensors = dict(clean.tensors)
    for name in ("key", "value"):
        tensors[name] = tensors[name].masked_fill((owner == 1)[:, None, None], math.nan)
    dirty = AttentionExample(tensors, clean.layout, clean.softmax, clean.grad_output, clean.grad_mass)
    got, expected = run_attention(dirty, attend(impl)), run_attention(clean, attend(impl))
    rows = clean.layout.query_samples() != 1
    keys = owner != 1
    for name in ("output", "mass", "lse", "grad_query", "grad_log_prior", "grad_gate"):
        assert torch.equal(got[name][rows], expected[name][rows]), name
    for name in ("grad_key", "grad_value"):
        assert torch.equal(got[name][keys], expected[name][keys]), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_query_that_sees_one_key_has_no_gradient_of_scores(impl: str, device: torch.device) -> None:
    """Its softmax is constant: exactly 0, not the rounding error of a difference."""
    example = attention_example(5, [7, 4], [[1, 0], [0, 1]], dtype=torch.float16, device=device)
    results = run_attention(example, attend(impl))
    assert (results["grad_query"] == 0).all()
    assert (results["grad_key"] == 0).all()
    assert (results["grad_value"] != 0).any()


def test_a_modality_of_one_key_has_no_gradient_of_scores_under_per_modality() -> None:
    example = attention_example(5, [7], [[1, 1]], softmax="per_modality", features=["gate"])
    results = run_attention(example, attend("eager"))
    assert (results["grad_query"] == 0).all()
    assert (results["grad_key"] == 0).all()
    assert (results["grad_gate"] != 0).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_unsorted_keys_equal_sorted_keys(impl: str, device: torch.device) -> None:
    layout = fusedmm.ModalityLayout.from_lengths(
        torch.tensor([6, 3], device=device), torch.tensor([[9, 20], [0, 7]], device=device)
    )
    query, key, value = (torch.randn(n, 2, 16, device=device) for n in (9, 36, 36))
    query_time, key_time = torch.randint(0, 50, (9,)).to(device), torch.randint(0, 50, (36,)).to(device)
    got = fusedmm.gated_multimodal_attention(
        query, key, value, layout, query_time=query_time, key_time=key_time, lookback=30, impl=impl
    )
    order = torch.argsort(layout.key_segments() * 50 + key_time)
    expected = fusedmm.gated_multimodal_attention(
        query, key[order], value[order], layout.at_times(query_time, key_time[order], 30), impl=impl
    )
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
def test_dropout_drops_what_the_counters_say(impl: str, softmax: str, device: torch.device, monkeypatch) -> None:
    """Same seed, same mask in every implementation: Philox on (seed, query, head, key)."""
    seed = torch.tensor([2**61 + 12345], device=device)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seed)
    example = attention_example(
        6, [10, 33], [[20, 0], [7, 40]], heads=4, kv_heads=2, device=device, softmax=softmax, features=["gate"]
    )
    got = run_attention(example, functools.partial(attend(impl), dropout_p=0.3))
    scale = 32**-0.5
    expected = run_attention(
        example, functools.partial(reference.gated_multimodal_attention, scale=scale, seed=seed, dropout_p=0.3)
    )
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_rate_and_independence() -> None:
    kept = keep_mask(
        torch.tensor([7]), torch.arange(64)[:, None, None], torch.arange(4)[:, None], torch.arange(256), 0.3
    )
    assert abs(kept.float().mean().item() - 0.7) < 4 * math.sqrt(0.21 / kept.numel())
    rows = kept.flatten(0, 1).float()
    assert torch.corrcoef(rows)[~torch.eye(rows.shape[0], dtype=torch.bool)].abs().max() < 0.35


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_two_runs_agree_bit_for_bit(impl: str, device: torch.device) -> None:
    example = attention_example(7, [33, 5], [[40, 3], [0, 70]], device=device, features=FEATURES)
    first, second = run_attention(example, attend(impl)), run_attention(example, attend(impl))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_gradcheck_of_the_eager_operator() -> None:
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3, 0, 5]), torch.tensor([[4, 0], [2, 3], [1, 6]]))
    shapes = [(8, 4, 16), (16, 2, 16), (16, 2, 16), (8, 4, 2), (8, 4, 2), (8, 4, 16)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    for softmax in ("joint", "per_modality"):

        def attention(query, key, value, log_prior, gate, output_gate, softmax=softmax):
            prior = log_prior if softmax == "joint" else None
            result = fusedmm.gated_multimodal_attention(
                query, key, value, layout, log_prior=prior, gate=gate, output_gate=output_gate, softmax=softmax
            )
            return result.output, result.mass

        assert torch.autograd.gradcheck(attention, tensors)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_far_apart_modalities_keep_their_lse(impl: str, device: torch.device) -> None:
    """A modality that underflows beside another still reports its own lse: nothing is shared but the normaliser."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([1]).to(device), torch.tensor([[1, 1]]).to(device))
    query = torch.full((1, 1, 16), 4.0, device=device)
    key = torch.tensor([30.0, -30.0], device=device)[:, None, None].expand(2, 1, 16)
    result = fusedmm.gated_multimodal_attention(query, key, key, layout, impl=impl)
    torch.testing.assert_close(result.lse[0, 0], torch.tensor([480.0, -480.0], device=device))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("low", [-90.0, -1e4, -math.inf])
def test_a_prior_is_relative_to_the_modalities_that_are_there(impl: str, low: float, device: torch.device) -> None:
    """However far below an absent modality: all of the mass, but none to a prior of -inf."""
    layout = fusedmm.ModalityLayout.from_lengths(
        torch.tensor([3, 2]).to(device), torch.tensor([[0, 5], [4, 2]]).to(device)
    )
    query, key, value = (torch.randn(n, 2, 16, device=device) for n in (5, 11, 11))
    result = fusedmm.gated_multimodal_attention(
        query, key, value, layout, log_prior=torch.tensor([0.0, low], device=device), impl=impl
    )
    mass = result.mass[:, 0].tolist()
    for row, expected in zip(mass, [[0.0, float(low > -math.inf)]] * 3 + [[1.0, 0.0]] * 2, strict=True):
        assert row == pytest.approx(expected, abs=2e-3)  # a score beside -1e4 is rounded in float32


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_autocast_is_a_cast_of_the_inputs_and_nothing_else(impl: str) -> None:
    """Under autocast query, key and value are bfloat16, in both operators; all that follows is as exact as without."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3, 2]), torch.tensor([[4, 1], [0, 5]]))
    tensors = torch.randn(5, 2, 16), torch.randn(10, 2, 16).bfloat16(), torch.randn(10, 2, 16)
    cast = [x.bfloat16() for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended = fusedmm.gated_multimodal_attention(*tensors, layout, impl=impl)
        partials = fusedmm.modality_partials(*tensors, layout, impl=impl)
        merged, left_out = fusedmm.merge_modalities(partials), fusedmm.leave_one_out(partials)
        double = fusedmm.modality_partials(*(x.double() for x in tensors), layout, impl=impl)
    plain = fusedmm.modality_partials(*cast, layout, impl=impl)
    expected = fusedmm.gated_multimodal_attention(*cast, layout, impl=impl)
    for got, wanted in (
        (attended, expected),
        (partials, plain),
        (merged, fusedmm.merge_modalities(plain)),
        ([left_out], [fusedmm.leave_one_out(plain)]),
    ):
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
    assert double.output.dtype == torch.float64


class TestBadInput:
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([2, 3]), torch.tensor([[4, 1], [0, 5]]))
    query, key = torch.randn(5, 2, 16), torch.randn(10, 2, 16)

    def call(self, **changes):
        arguments = {"query": self.query, "key": self.key, "value": self.key, "layout": self.layout, **changes}
        return fusedmm.gated_multimodal_attention(
            arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), arguments.pop("layout"), **arguments
        )

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"value": torch.randn(9, 2, 16)}, fusedmm.ShapeError, "value has key=9, but the layout has key=10"),
            ({"query": torch.randn(6, 2, 16)}, fusedmm.ShapeError, "query has query=6, but the layout has query=5"),
            ({"query": torch.randn(5, 3, 16)}, fusedmm.ShapeError, "query heads must be a multiple of key heads"),
            ({"query": torch.randn(5, 0, 16)}, fusedmm.ShapeError, "at least 1, got 0 and 2"),
            ({"key": torch.randn(10, 2, 16).half()}, TypeError, "key must be float32, got float16"),
            ({"query": torch.ones(5, 2, 16).long()}, TypeError, "query must be float16 or .*, got int64"),
            ({"log_prior": torch.randn(5, 2, 3)}, fusedmm.ShapeError, "log_prior must broadcast from the right"),
            ({"gate": torch.randn(4, 2, 2)}, fusedmm.ShapeError, "gate must broadcast from the right"),
            ({"output_gate": torch.randn(5, 2, 8)}, fusedmm.ShapeError, "output_gate must broadcast"),
            ({"active": torch.ones(2, 3).bool()}, fusedmm.ShapeError, "active has modality=3, but the layout has"),
            ({"active": torch.ones(2, 2)}, TypeError, "active must be bool, got float32"),
            ({"query": [1.0]}, TypeError, "query must be a tensor, got list. Use torch.as_tensor"),
            ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
            ({"gate": [1.0, 2.0]}, TypeError, "gate must be a tensor, got list"),
            ({"log_prior": torch.zeros(2).numpy()}, TypeError, "log_prior must be a tensor, got ndarray"),
            ({"output_gate": 1.0}, TypeError, "output_gate must be a tensor, got float"),
            ({"active": [[True, False]] * 2}, TypeError, "active must be a tensor, got list"),
            ({"scale": "small"}, TypeError, "scale must be a number, got str"),
            ({"scale": float("nan")}, ValueError, "scale must be a number, got nan"),
            ({"dropout_p": [0.1]}, TypeError, "dropout_p must be a number, got list"),
            ({"layout": None}, TypeError, "layout must be a ModalityLayout, got NoneType. Build one with"),
            ({"layout": torch.ones(2, 2)}, TypeError, "layout must be a ModalityLayout, got Tensor"),
            ({"softmax": "sparse"}, ValueError, 'softmax must be "joint" or "per_modality"'),
            ({"softmax": "per_modality", "log_prior": torch.zeros(2)}, ValueError, "log_prior must be None"),
            ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
            ({"impl": "cuda"}, ValueError, "impl must be one of"),
            ({"lookback": 3}, ValueError, "lookback needs query_time and key_time"),
            ({"query_time": torch.arange(5)}, ValueError, "must be given together"),
            (
                {"query_time": torch.arange(5.0), "key_time": torch.arange(10)},
                TypeError,
                r"query_time must be int64, got float32 \(it cannot hold epoch times exactly\)",
            ),
            (
                {"query_time": torch.arange(5), "key_time": torch.arange(10), "lookback": -1},
                ValueError,
                "lookback must be a whole number of time units",
            ),
            (
                {"query": torch.randn(5, 2, 8), "key": torch.randn(10, 2, 8), "value": torch.randn(10, 2, 8)},
                NotImplementedError,
                "head dim must be 16 to 256, got 8",
            ),
        ],
    )
    def test_one_clear_error(self, changes, error, message) -> None:
        self.call()  # what passes is remembered: of this, and of nothing else
        with pytest.raises(error, match=f"^gated_multimodal_attention: .*{message}"):
            self.call(**changes)

    def test_triton_says_why_not(self) -> None:
        double = self.query.double(), self.key.double()
        with pytest.raises(NotImplementedError, match=r'dtype float64 .* Pass impl="eager"'):
            self.call(query=double[0], key=double[1], value=double[1], impl="triton")


@pytest.mark.parametrize("softmax", ["joint", "per_modality", "partials"])
def test_a_head_that_is_off_does_not_read_what_its_group_reads(softmax: str) -> None:
    """Query heads of one key head, one of which has the modality off: its NaN stays with the other, both ways."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3]), torch.tensor([[4, 5]]))
    query, key, value = torch.randn(3, 2, 16), torch.randn(9, 1, 16), torch.randn(9, 1, 16)
    poisoned = [t.index_fill(0, torch.arange(4), math.nan) for t in (key, value)]
    active = torch.ones(1, 2, 2, dtype=torch.bool)
    active[:, 0, 0] = False
    results = []
    for tokens in ((key, value), poisoned):
        leaves = [t.clone().requires_grad_() for t in (query, *tokens)]
        if softmax == "partials":
            output = fusedmm.modality_partials(*leaves, layout, active=active, impl="eager").output[:, 0]
        else:
            attended = fusedmm.gated_multimodal_attention(*leaves, layout, active=active, softmax=softmax, impl="eager")
            output = attended.output[:, 0]
        results.append((output, torch.autograd.grad(output.sum(), leaves)[0][:, 0]))
    for clean, found in zip(*results, strict=True):
        torch.testing.assert_close(found, clean)
