"""Attention of which only the output is asked: `need_mass=False`, and what PyTorch's own attention then computes."""

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedmm
from fusedmm.eager import attention_plain
from fusedmm.testing import attention_example

Lengths = list[int]


def calls_of_plain(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of calls of PyTorch's attention, each time that it is asked."""
    calls: list[int] = []
    attend, runs = attention_plain.attend, attention_plain._runs

    def watched(*arguments: object) -> torch.Tensor | None:
        output = attend(*arguments)
        calls.append(0 if output is None else len(runs(*bounds(*arguments[3:6]))))
        return output

    monkeypatch.setattr(attention_plain, "attend", watched)
    return calls


def bounds(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, modalities: int) -> tuple[tuple[int, ...], ...]:
    return tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()[::modalities])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "calls"),
    [
        ([7, 7, 7], [[3, 2], [5, 0], [0, 5]], 1),  # of one size
        ([7, 0, 7], [[3, 2], [4, 9], [1, 4]], 2),  # one without queries, whose keys lie between the others'
        ([7, 7, 5], [[3, 2], [1, 4], [4, 9]], 2),
        ([7, 5, 7], [[3, 2], [0, 0], [3, 2]], 0),  # one without keys
        ([0, 0, 0], [[3, 2], [3, 2], [3, 2]], 0),
    ],
)
def test_the_output_alone_is_the_same(
    q_lengths: Lengths,
    k_lengths: list[Lengths],
    calls: int,
    kv_heads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_plain, "RUN_SCORES", 0)
    found = calls_of_plain(monkeypatch)
    example = attention_example(1, q_lengths, k_lengths, heads=4, kv_heads=kv_heads, dtype=dtype, features=())
    leaves = [example.tensors[name].clone().requires_grad_() for name in ("query", "key", "value")]
    attend = functools.partial(fusedmm.gated_multimodal_attention, *leaves, example.layout, scale=0.3)
    whole, alone = attend(), attend(need_mass=False)
    assert found == [calls]
    assert alone.mass.shape == alone.lse.shape == (0,)
    assert (alone.mass.dtype, alone.output.dtype) == (whole.mass.dtype, dtype)
    precision = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    close = functools.partial(torch.testing.assert_close, atol=precision, rtol=precision)
    close(alone.output, whole.output)
    upstream = example.grad_output.to(dtype)
    close(*(torch.autograd.grad(results.output, leaves, upstream) for results in (alone, whole)))


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize(
    ("features", "options"),
    [
        (("log_prior",), {}),
        (("gate",), {}),
        (("output_gate",), {}),
        (("active",), {}),
        (("times",), {}),
        ((), {"softmax": "per_modality"}),
        ((), {"dropout_p": 0.5}),
    ],
)
def test_what_pytorchs_attention_does_not_know_it_is_not_asked(
    features: tuple[str, ...], options: dict[str, object], impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calls_of_plain(monkeypatch)
    example = attention_example(1, [7, 7], [[3, 2], [4, 1]], features=features)
    results = []
    for need_mass in (True, False):
        torch.manual_seed(0)
        results.append(
            fusedmm.gated_multimodal_attention(
                **example.tensors, layout=example.layout, impl=impl, need_mass=need_mass, **options
            )
        )
    assert torch.equal(results[0].output, results[1].output)
    assert results[1].mass.numel() == 0
    assert found == []


@pytest.mark.parametrize("dim", [0, 2])
def test_inputs_in_any_order_give_a_contiguous_output_without_a_matrix_of_scores(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of channels with gaps PyTorch would keep all probabilities for the backward."""
    found = calls_of_plain(monkeypatch)
    example = attention_example(1, [70], [[30, 20]], features=())
    tensors = {name: x.transpose(dim, 1).contiguous().transpose(dim, 1) for name, x in example.tensors.items()}
    output = fusedmm.gated_multimodal_attention(**tensors, layout=example.layout, need_mass=False).output
    assert found == [int(dim == 0)]
    assert output.is_contiguous()
    torch.testing.assert_close(output, fusedmm.gated_multimodal_attention(**tensors, layout=example.layout).output)


def test_fused_attention_that_is_switched_off_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls_of_plain(monkeypatch)
    example = attention_example(1, [70], [[30, 20]], features=())
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        fusedmm.gated_multimodal_attention(**example.tensors, layout=example.layout, need_mass=False)
    assert found == [0]


def test_small_samples_of_many_sizes_are_not_called_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls_of_plain(monkeypatch)
    example = attention_example(1, [7, 6, 5], [[3, 2], [4, 9], [1, 4]], features=())
    fusedmm.gated_multimodal_attention(**example.tensors, layout=example.layout, need_mass=False)
    assert found == [0]


def test_a_compiler_sees_the_registered_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls_of_plain(monkeypatch)
    example = attention_example(1, [7, 7], [[3, 2], [4, 1]], features=())

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return fusedmm.gated_multimodal_attention(query, key, value, example.layout, need_mass=False).output

    whole = fusedmm.gated_multimodal_attention(**example.tensors, layout=example.layout)
    torch.testing.assert_close(attend(**example.tensors), whole.output)
    assert found == []
