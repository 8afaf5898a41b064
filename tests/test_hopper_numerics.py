"""The Hopper kernels against the float64 reference: on a Hopper GPU, or from their Gluon source on NumPy (see
gluon_simulator.py).

Layouts, times, switched-off segments and the schedule of partitions are drawn at random: every seed is another order of
loads, products and waits.
"""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusedmm.layout import ModalityLayout
from fusedmm.ops.attention import layout_arguments
from fusedmm.reference.attention import modality_partials
from fusedmm.testing import attention_example, attention_truth, over_budget, plain_attention

pytest.importorskip("triton")
from fusedmm.kernels.attention.arguments import AttentionProblem
from fusedmm.kernels.attention.hopper import launch, passes
from fusedmm.kernels.launch import device_arch
from tests.gluon_launch import hopper_attention, simulate


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Without a GPU, launches of the Hopper kernels run in the simulator: two CTAs at most, always a new schedule."""
    if device.type == "cuda":
        if device_arch(device) != "sm_90":
            pytest.skip("needs a Hopper GPU, or none")
        return
    seeds = iter(range(1000))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(passes.Launch, "run", lambda self: simulate(self, next(seeds)).write_back())


LAYOUTS = {
    "jagged": ([130, 0, 5, 64], [[300, 0, 17], [3, 5, 130], [0, 0, 0], [0, 33, 1]]),
    "no queries of the first, no keys of the last": ([0, 70, 3], [[5, 4], [257, 128], [0, 0]]),
    "long": ([200], [[390, 140]]),
}


CASES = [
    ((), {"heads": 1, "kv_heads": 1, "head_dim": 64}),
    (("log_prior", "gate", "output_gate", "active"), {"heads": 4, "kv_heads": 2, "head_dim": 64}),
    (("log_prior", "gate", "active", "times"), {"heads": 2, "kv_heads": 2, "head_dim": 96}),
    (("gate", "times", "lookback"), {"heads": 2, "kv_heads": 1, "head_dim": 128}),
]


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("features", "shape"), CASES)
def test_joint(name: str, features: tuple[str, ...], shape: dict[str, int], device: torch.device) -> None:
    for seed in range(2):
        example = attention_example(
            seed, *LAYOUTS[name], dtype=torch.bfloat16, device=device, features=features, **shape
        )
        truth = attention_truth(example)
        actual = hopper_attention(example, "joint", example.grad_output, example.grad_mass)
        delta = (example.grad_output * truth["output"]).abs().sum(-1) + (example.grad_mass * truth["mass"]).abs().sum(
            -1
        )
        assert over_budget(actual, truth, plain_attention(example), terms={"grad_log_prior": delta}) == []


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("features", "shape"), CASES)
def test_per_modality(name: str, features: tuple[str, ...], shape: dict[str, int], device: torch.device) -> None:
    example = attention_example(
        5, *LAYOUTS[name], dtype=torch.bfloat16, softmax="per_modality", device=device, features=features, **shape
    )
    actual = hopper_attention(example, "per_modality", example.grad_output, example.grad_mass)
    assert over_budget(actual, attention_truth(example), plain_attention(example)) == []


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("features", "shape"), CASES)
def test_partials(name: str, features: tuple[str, ...], shape: dict[str, int], device: torch.device) -> None:
    kept = [feature for feature in features if feature in ("active", "times", "lookback")]
    example = attention_example(7, *LAYOUTS[name], dtype=torch.bfloat16, device=device, features=kept, **shape)
    layout, active = example.layout, example.tensors.get("active")
    query = example.tensors["query"]
    grad_output = torch.randn(*example.grad_mass.shape, query.shape[-1]).to(device)
    actual = hopper_attention(example, "partials", grad_output, example.grad_mass)

    def reference(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [example.tensors[name].to(dtype).requires_grad_() for name in ("query", "key", "value")]
        output, lse = modality_partials(*leaves, layout, active=active, scale=query.shape[-1] ** -0.5)
        visible_lse = torch.where(torch.isfinite(lse), lse, 0.0)
        loss = (output * grad_output).sum() + (visible_lse * example.grad_mass).sum()
        gradients = torch.autograd.grad(loss, leaves)
        named = zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True)
        return {"output": output.detach(), "lse": lse.detach(), **dict(named)}

    truth = reference(torch.float64)
    rounded = {
        name: x.to(torch.bfloat16) if name != "lse" else x.float() for name, x in reference(torch.float32).items()
    }
    assert over_budget(actual, truth, [rounded]) == []
    assert torch.equal(actual["mass"], torch.isfinite(truth["lse"]).float())


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("seed", range(4))
def test_random_layouts(seed: int, device: torch.device) -> None:
    draw = random.Random(seed)
    samples, modalities = draw.randint(1, 3), draw.randint(1, 4)
    q_lengths = [draw.choice((0, 1, 63, 64, 65, 129, draw.randint(1, 200))) for _ in range(samples)]
    k_lengths = [[draw.choice((0, 1, 5, 128, 129, draw.randint(1, 200))) for _ in range(modalities)] for _ in q_lengths]
    q_lengths[0], k_lengths[0][0] = max(q_lengths[0], 1), max(k_lengths[0][0], 1)
    features = draw.sample(("log_prior", "gate", "output_gate", "active", "times"), draw.randint(0, 5))
    options = {"dtype": torch.bfloat16, "device": device, "features": features}
    example = attention_example(seed, q_lengths, k_lengths, heads=2, kv_heads=1, head_dim=64, **options)
    truth = attention_truth(example)
    actual = hopper_attention(example, "joint", example.grad_output, example.grad_mass)
    delta = (example.grad_output * truth["output"]).abs().sum(-1) + (example.grad_mass * truth["mass"]).abs().sum(-1)
    assert over_budget(actual, truth, plain_attention(example), terms={"grad_log_prior": delta}) == []


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("features", [("log_prior",), ("log_prior", "active", "times")])
def test_a_faint_modality_keeps_its_lse(features: tuple[str, ...], device: torch.device) -> None:
    """However far a modality's scores lie below those before it, lse and mass are its own; hidden ones stay hidden."""
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64}
    layout = ([70, 3], [[5, 140, 0, 7], [0, 1, 33, 2]])
    example = attention_example(3, *layout, dtype=torch.float16, device=device, features=features, **shape)
    prior = torch.zeros(73, 2, 4)
    prior[..., 1:] = torch.tensor([-60.0, -70.0, -100.0])
    prior[::2, 1, 1:] = torch.tensor([-1000.0, -torch.inf, 100.0])
    example = replace(example, tensors={**example.tensors, "log_prior": prior.to(device)})
    truth = attention_truth(example)
    below = truth["lse"].amax(-1, keepdim=True) - truth["lse"]
    assert ((below > 90) & below.isfinite()).sum() > 10
    actual = hopper_attention(example, "joint", example.grad_output, example.grad_mass)
    assert over_budget(actual, truth, plain_attention(example)) == []
    torch.testing.assert_close(actual["lse"].double(), truth["lse"], rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(actual["mass"].double(), truth["mass"], rtol=1e-3, atol=1e-36)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("softmax", ["joint", "per_modality", "partials"])
def test_lse_is_rounded_once(softmax: str, device: torch.device) -> None:
    """Its error is a factor on every probability of the backward. Scores are integers in base 2, exact in float32."""
    query = torch.randint(-4, 5, (40, 1, 64)).to(device, torch.float16)
    key = torch.randint(-4, 5, (60, 1, 64)).to(device, torch.float16)
    layout = ModalityLayout.from_lengths(torch.tensor([40]).to(device), torch.tensor([[7, 53]]).to(device))
    problem = AttentionProblem(**layout_arguments(layout, None), softmax=softmax, scale=math.log(2.0))
    _, _, lse = launch.attention_forward(query, key, key, problem)
    scores = math.log(2.0) * (query[:, 0].double() @ key[:, 0].double().T)
    truth = torch.stack((scores[:, :7].logsumexp(1), scores[:, 7:].logsumexp(1)), 1)
    spacing = torch.exp2(torch.floor(torch.log2(truth.abs())) - 23)
    assert ((lse[:, 0] - truth).abs() <= 0.5 * spacing + 1e-6).all()


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("softmax", ["joint", "per_modality", "partials"])
def test_nan_stays_in_its_sample_and_out_of_inactive_segments(softmax: str, device: torch.device) -> None:
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64}
    features = () if softmax == "partials" else ("gate",)
    layout = ([70, 40], [[30, 9], [140, 3]])
    kind = "joint" if softmax == "joint" else "per_modality"
    example = attention_example(
        1, *layout, dtype=torch.bfloat16, softmax=kind, device=device, features=features, **shape
    )
    active = torch.tensor([[True, False], [True, True]], device=device)[:, None].expand(2, 2, 2)
    tensors = {**example.tensors, "active": active}
    bounds = example.layout.cu_seqlens_k.tolist()
    grad_output, grad_statistic = example.grad_output, example.grad_mass
    if softmax == "partials":
        grad_output = torch.randn(70 + 40, 2, 2, 64).to(device)
    clean = hopper_attention(replace(example, tensors=tensors), softmax, grad_output, grad_statistic)
    bad = {name: tensors[name].clone() for name in ("query", "key", "value")}
    for name in ("key", "value"):
        bad[name][bounds[1] : bounds[4]] = math.nan  # an inactive segment, and all of the next sample
    bad["query"][70:] = math.nan
    spoiled = hopper_attention(replace(example, tensors={**tensors, **bad}), softmax, grad_output, grad_statistic)
    for name, x in clean.items():
        rows = slice(0, bounds[1]) if name in ("grad_key", "grad_value") else slice(0, 70)
        assert torch.equal(spoiled[name][rows], x[rows]), name
    for name in ("grad_key", "grad_value"):
        assert not spoiled[name][bounds[1] : bounds[2]].any(), name
