"""The CPU path's ways through attention: blocks, one block of small samples, large samples a head at a time."""

import dataclasses
import functools
import math

import pytest
import torch

import fusedmm
from fusedmm.eager import attention as eager_attention
from fusedmm.eager import attention_heads, attention_inputs, attention_small
from fusedmm.eager.attention_groups import find_groups
from fusedmm.eager.attention_rows import add_keys, read_keys
from fusedmm.eager.products import has_onednn
from fusedmm.testing import (
    AttentionExample,
    attention_example,
    attention_truth,
    check_attention,
    over_budget,
    plain_attention,
    run_attention,
)

attend = functools.partial(fusedmm.gated_multimodal_attention, impl="eager")
needs_onednn = pytest.mark.skipif(
    not has_onednn(torch.empty(0), torch.float32), reason="PyTorch without oneDNN and MKL"
)


def scaled_scores(example: AttentionExample, size: float) -> AttentionExample:
    return dataclasses.replace(example, tensors={**example.tensors, "query": size * example.tensors["query"]})


def forward_complaints(example: AttentionExample) -> list[str]:
    """`check_attention` of the eager path's outputs alone."""
    results, truth = run_attention(example, attend), attention_truth(example)
    return over_budget(results, {name: truth[name] for name in ("output", "mass", "lse")}, plain_attention(example))


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
@pytest.mark.parametrize("features", [(), ("log_prior", "gate"), ("active", "times")])
@pytest.mark.parametrize(("size", "is_far"), [(1.0, False), (3.0, False), (60.0, True)])
def test_peaks_are_taken_off_where_exponentials_would_not_hold_them(
    size: float, is_far: bool, features: tuple[str, ...], softmax: str, monkeypatch
) -> None:
    """Large scores of either sign; modalities that nobody sees are no reason."""
    calls = []
    peaks = eager_attention._peaks
    monkeypatch.setattr(eager_attention, "_peaks", lambda *args: calls.append(args) or peaks(*args))
    example = attention_example(8, [40, 0, 7], [[30, 0, 30], [5, 5, 5], [1, 60, 9]], softmax=softmax, features=features)
    assert forward_complaints(scaled_scores(example, size)) == []
    assert bool(calls) == is_far


@pytest.mark.parametrize("features", [("times",), ("active",), ("active", "times"), ()])
def test_what_each_query_sees_is_counted_once_a_direction(
    features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For queries that see nothing, sums that are far, and rows of a single key; not at all where nothing is hidden."""
    calls = []
    count = attention_inputs._visible_counts
    monkeypatch.setattr(attention_inputs, "_visible_counts", lambda x: calls.append(x) or count(x))
    example = attention_example(8, [40, 0, 7], [[30, 0, 30], [5, 5, 5], [1, 60, 9]], features=features)
    assert check_attention(scaled_scores(example, 60.0 if features else 1.0), attend) == []
    assert len(calls) == (2 if features else 0)


@pytest.mark.parametrize("features", [(), ("log_prior",), ("gate",), ("log_prior", "gate")])
@pytest.mark.parametrize(("samples", "heads"), [(1, 1), (1, 4), (3, 1), (3, 2)])
def test_few_samples_of_one_shape_are_one_block(
    samples: int, heads: int, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In few operators, and as any other problem where exponentials without their peak do not hold."""
    found = []
    for name in ("forward", "backward"):
        small = getattr(attention_small, name)
        monkeypatch.setattr(
            attention_small, name, lambda *args, small=small, **keep: found.append(small(*args, **keep)) or found[-1]
        )
    k_lengths = [[9, 9, 9]] * samples
    example = attention_example(9, [7] * samples, k_lengths, heads=heads, kv_heads=heads, features=features)
    assert check_attention(example, attend) == []
    assert [result is None for result in found] == [False, False]
    results = run_attention(example, attend)
    assert all(results[name].is_contiguous() for name in ("output", "mass", "lse"))
    found.clear()
    assert forward_complaints(scaled_scores(example, 60.0)) == []
    assert [result is None for result in found] == [True, False]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_gate_may_be_as_large_as_a_number_beside_scores_far_from_0(needs_grad: bool) -> None:
    """With or without what the backward keeps; a quotient of gate and sum would be inf, and inf * 0 NaN."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3]), torch.tensor([[4, 4]]))
    query, key, value = (torch.randn(count, 1, 16) for count in (3, 8, 8))
    query[..., 0], key[..., 0] = 12.0, -12.0
    gate = torch.tensor([2e38, -3e30])
    tensors = [x.requires_grad_(needs_grad) for x in (query, key, value)]
    output = attend(*tensors, layout, gate=gate).output
    exact = [x.detach().double() for x in tensors]
    truth = fusedmm.gated_multimodal_attention(*exact, layout, gate=gate.double(), impl="reference").output
    torch.testing.assert_close(output.double() / 1e38, truth / 1e38, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
@pytest.mark.parametrize("features", [("gate",), ("gate", "active"), ("gate", "times")])
def test_gates_may_be_large_beside_small_sums_and_nothing(features: tuple[str, ...], softmax: str) -> None:
    """Of what is hidden the sum of exponentials is 0: the quotient would be inf, and inf * 0 NaN."""
    example = attention_example(5, [3, 4], [[4, 4]] * 2, softmax=softmax, features=features)
    large = dataclasses.replace(example, tensors={**example.tensors, "gate": example.tensors["gate"] * 1e30})
    assert check_attention(scaled_scores(large, 10.0), attend) == []


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("k_lengths", [[[4, 4]] * 2, [[4, 4], [3, 0]]])
def test_results_may_be_changed_in_place(k_lengths: list[list[int]], heads: int) -> None:
    """Autograd refuses it of a view that a function returns."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3, 3]), torch.tensor(k_lengths))
    query, key, value = (torch.randn(n, heads, 16, requires_grad=True) for n in (6, layout.total_k, layout.total_k))
    partials = fusedmm.modality_partials(query, key, value, layout, impl="eager")
    for result in (*attend(query, key, value, layout), *attend(query, key, value, layout, softmax="per_modality")):
        result.mul_(2)
    for result in partials:
        result.mul_(2)


def test_a_row_hidden_by_its_priors_is_nothing_in_one_block_too() -> None:
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3, 3]), torch.tensor([[4, 4]] * 2))
    query, key, value = (torch.randn(n, 2, 16, requires_grad=True) for n in (6, 16, 16))
    prior = torch.zeros(6, 2, 2).index_fill(0, torch.tensor([1]), -torch.inf).requires_grad_()
    results = attend(query, key, value, layout, log_prior=prior)
    assert all((x[1] == nothing).all() for x, nothing in zip(results, (0.0, 0.0, -torch.inf), strict=True))
    expected = attend(query, key, value, layout)
    torch.testing.assert_close(results.output[2:], expected.output[2:])
    upstream = torch.ones_like(results.output), torch.ones_like(results.mass)
    gradients = torch.autograd.grad(results[:2], (query, key, value, prior), upstream)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][1] == 0).all()


@pytest.mark.parametrize("k_lengths", [[[9, 9], [9, 8]], [[9, 8]] * 2, [[1, 0]] * 2, [[9, 9], [0, 0]]])
def test_other_shapes_are_not(k_lengths: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_small, "forward", None)
    example = attention_example(9, [7, 7], k_lengths, heads=2, kv_heads=2)
    assert check_attention(example, attend) == []


@pytest.mark.parametrize("features", [(), ("log_prior",), ("gate",), ("log_prior", "gate")])
def test_a_small_problem_keeps_what_its_backward_needs(
    features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged, so that a graph may be walked twice, and no more than 1 MiB."""
    handed, made = [], []
    backward, made_again = attention_small.backward, attention_small.made_again
    monkeypatch.setattr(attention_small, "backward", lambda kept, *args: handed.append(kept) or backward(kept, *args))
    monkeypatch.setattr(attention_small, "made_again", lambda *args: made.append(args) or made_again(*args))
    example = attention_example(9, [7] * 3, [[9, 9, 9]] * 3, heads=2, kv_heads=2, features=features)
    leaves = {name: x.requires_grad_() for name, x in example.tensors.items()}

    def gradients(times: int) -> list[tuple[torch.Tensor, ...]]:
        output, mass, _ = attend(layout=example.layout, **leaves)
        outputs, upstream = (output, mass), (example.grad_output, example.grad_mass)
        return [torch.autograd.grad(outputs, [*leaves.values()], upstream, retain_graph=True) for _ in range(times)]

    first, second = gradients(2)
    assert not made
    monkeypatch.setattr(attention_small, "KEPT", sum(t.nbytes for t in handed[0] if t is not None) - 1)
    (remade,) = gradients(1)
    assert len(made) == 1
    for once, again, anew in zip(first, second, remade, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, anew, rtol=1e-5, atol=1e-6)


@pytest.fixture
def by_head(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every sample a head at a time, in blocks of a few queries; names of what was called."""
    called = []
    monkeypatch.setattr(attention_heads, "ONEDNN_FLOPS", 0)
    monkeypatch.setattr(attention_heads, "LEAST_ROWS", 2)
    monkeypatch.setattr(attention_heads, "BLOCK_SCORES", 700)
    for name in ("forward", "backward_block"):
        function = getattr(attention_heads, name)
        monkeypatch.setattr(
            attention_heads, name, lambda *args, name=name, function=function: called.append(name) or function(*args)
        )
    return called


@needs_onednn
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "features", [(), ("log_prior",), ("gate", "times"), ("log_prior", "gate", "output_gate"), ("log_prior", "active")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_samples_a_head_at_a_time(
    dtype: torch.dtype, features: tuple[str, ...], kv_heads: int, by_head: list[str]
) -> None:
    k_lengths = [[30, 0, 31], [200, 1, 9], [5, 50, 7]]
    example = attention_example(
        4, [40, 0, 70], k_lengths, heads=4, kv_heads=kv_heads, head_dim=32, dtype=dtype, features=features
    )
    assert check_attention(example, attend) == []
    assert {"forward", "backward_block"} == set(by_head)
    assert len(by_head) > 4


@needs_onednn
@pytest.mark.parametrize("features", [(), ("log_prior", "gate"), ("times",)])
def test_peaks_are_taken_off_large_samples_too(features: tuple[str, ...], by_head: list[str]) -> None:
    example = attention_example(8, [40, 70], [[30, 0, 30], [60, 60, 9]], features=features)
    assert forward_complaints(scaled_scores(example, 60.0)) == []
    assert "forward" in by_head


@needs_onednn
@pytest.mark.parametrize("features", [(), ("gate",)])
def test_a_head_that_sees_one_key_of_a_large_sample_has_no_gradient_of_scores(
    features: tuple[str, ...], by_head: list[str]
) -> None:
    example = attention_example(3, [40], [[1, 60]], heads=4, kv_heads=2, features=features)
    active = torch.tensor([[[True, False], [True, True]] * 2])
    example = dataclasses.replace(example, tensors={**example.tensors, "active": active})
    results = run_attention(example, attend)
    assert bool((results["grad_query"][:, ::2] == 0).all())
    assert bool((results["grad_query"][:, 1::2] != 0).any())
    assert "backward_block" in by_head


@needs_onednn
def test_a_gate_that_overflows_beside_exponentials_does_not_beside_probabilities(by_head: list[str]) -> None:
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([8]), torch.tensor([[8, 4]]))
    query, key, value = torch.full((8, 1, 16), 2.5), torch.full((12, 1, 16), 2.5), torch.full((12, 1, 16), 3.0)
    result = attend(query, key, value, layout, gate=torch.tensor([1e28, 0.0]))
    torch.testing.assert_close(result.output, torch.full((8, 1, 16), 2e28))
    assert by_head == ["forward"]


@needs_onednn
@pytest.mark.parametrize(("queries", "keys", "is_by_head"), [(128, 256, True), (128, 252, False), (48, 1024, False)])
def test_a_head_pays_for_calls_of_its_own(queries: int, keys: int, is_by_head: bool) -> None:
    """At 4 MFLOP a product and thread."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([queries]), torch.tensor([[keys // 2] * 2]))
    query, key = torch.empty(queries, 2, 64), torch.empty(keys, 2, 64)
    bounds = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.query_tiles, layout.key_tiles
    settings = 2, 0.0, 0.125, "joint", "eager"
    x = attention_inputs.Inputs(query, key, key, None, None, None, *bounds, None, None, None, *settings)
    groups = x.groups()
    assert attention_heads.fits(x, groups) == [is_by_head]
    assert attention_heads.fits(x._replace(softmax="per_modality"), groups) == [False]
    assert attention_heads.fits(x._replace(query=query.double()), groups) == [False]


@needs_onednn
@pytest.mark.parametrize(("heads", "calls"), [(2, {0: 4, 1 << 18: 3}), (4, {0: 4, 1 << 18: 4})])
def test_samples_side_by_side_are_laid_out_together_while_they_are_small(
    heads: int, calls: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not where heads share a key head: their rows would not lie together. Either way results are the same."""
    monkeypatch.setattr(attention_heads, "ONEDNN_FLOPS", 0)
    k_lengths = [[200, 60], [200, 60], [280, 20], [200, 60]]  # the third is larger, and computed before the others
    example = attention_example(3, [130, 130, 200, 130], k_lengths, heads=heads, kv_heads=2)
    spans, found = attention_heads.spans, []
    for size, count in calls.items():
        monkeypatch.setattr(attention_heads, "STAGED", size)
        monkeypatch.setattr(attention_heads, "spans", lambda *args: found.append(spans(*args)) or found[-1])
        assert check_attention(example, attend) == []
        assert {len(each) for each in found} == {count}
        found.clear()


@needs_onednn
@pytest.mark.parametrize(
    ("features", "lowest", "is_column"),
    [
        (("log_prior",), -9.0, True),
        (("log_prior",), -11.0, False),
        (("log_prior",), -torch.inf, False),
        (("log_prior", "gate"), -9.0, False),
    ],
)
def test_moderate_priors_alone_are_columns_of_the_products(
    features: tuple[str, ...], lowest: float, is_column: bool, by_head: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widened, widen = [], attention_heads._with_modalities
    monkeypatch.setattr(attention_heads, "_with_modalities", lambda *args: widened.append(1) or widen(*args))
    example = attention_example(2, [90], [[200, 1, 9]], heads=4, kv_heads=2, head_dim=16, features=features)
    example.tensors["log_prior"].clamp_(-9.0, 9.0)[3, 1, 0] = lowest
    assert check_attention(example, attend) == []
    assert bool(widened) == is_column
    assert "forward" in by_head


def test_columns_of_modalities_are_float32_on_the_cpu_whatever_the_defaults() -> None:
    attention_heads._modalities.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            columns = attention_heads._modalities((2, 0, 1))
    finally:
        torch.set_default_dtype(torch.float32)
        attention_heads._modalities.cache_clear()
    one = torch.tensor(1.0 / math.log(2.0))
    assert torch.equal(columns, one * torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]))


@needs_onednn
@pytest.mark.parametrize("features", [(), ("log_prior", "gate")])
@pytest.mark.parametrize("size", [8.0, 20.0])
def test_gradients_of_sharp_softmaxes_stay_within_the_budget(
    size: float, features: tuple[str, ...], by_head: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of P that sum to 1 but for their own rounding: one that does not adds its lack times the output's gradient."""
    monkeypatch.setattr(attention_small, "KEPT", 0)
    for seed in range(6):
        small = attention_example(seed, [7] * 3, [[9, 9, 9]] * 3, heads=2, kv_heads=2, features=features)
        large = attention_example(seed, [17], [[9, 30, 9]], heads=2, kv_heads=2, features=features)
        for example in (small, large):
            assert check_attention(scaled_scores(example, size), attend) == []
    assert by_head.count("backward_block") > 0 or size > 8


@pytest.mark.parametrize(("keys", "groups"), [([252, 252], 1), ([256, 252], 2), ([256, 256], 2)])
def test_a_sample_with_a_head_for_products_of_its_own_shares_no_group(keys: list[int], groups: int) -> None:
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([128] * 2), torch.tensor([[n - 4, 4] for n in keys]))
    assert len(find_groups(layout.cu_seqlens_q, layout.cu_seqlens_k, 2, None, 2)) == groups


@pytest.mark.parametrize("heads", [1, 3])
def test_keys_of_groups_come_back_to_where_they_were(heads: int) -> None:
    """Of samples of other sizes, apart and beside each other, with segments that are missing or that nothing reads."""
    k_lengths = torch.tensor([[3, 9], [100, 95], [0, 12], [0, 0], [250, 80], [5, 6], [1, 0], [95, 100]])
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([2, 128, 3, 4, 128, 0, 1, 128]), k_lengths)
    active = torch.ones(8, heads, 2, dtype=torch.bool)
    active[0, :, 1] = False
    groups = find_groups(layout.cu_seqlens_q, layout.cu_seqlens_k, 2, active, heads)
    assert sum(len(group.samples) > 1 for group in groups) > 1
    assert any(len(group.samples) == 1 for group in groups)
    segment = layout.key_segments()
    is_read = active[:, 0].flatten()[segment] & (segment // 2 != 5)
    packed = torch.randn(layout.total_k, heads, 4)
    expected = torch.where(is_read[:, None, None], packed, 0.0)
    buffer = torch.zeros_like(packed)
    for add, times in ((False, 1), (True, 2)):
        for group in groups:
            padded = read_keys(packed, group, torch.float32)
            assert padded.shape == (heads * len(group.samples), group.size_k, 4)
            if group.padding is not None:
                assert (padded.view(heads, -1, group.size_k, 4)[:, group.padding] == 0).all()
            add_keys(buffer, group, padded, add)
        assert torch.equal(buffer, times * expected)
