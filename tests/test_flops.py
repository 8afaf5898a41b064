"""PyTorch's counter of FLOPs knows the registered operators, and counts what is visible alone."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fusedmm
import fusedmm.flops
from fusedmm import LinearHead, Logits, ModalityLayout


def counted(call) -> tuple[int, int]:
    """FLOPs of a forward, and of its backward too."""
    with FlopCounterMode(display=False) as counter:
        out = call()
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops()


def packed(total: int, heads: int, dim: int) -> torch.Tensor:
    return torch.randn(total, heads, dim, requires_grad=True)


def test_dense_attention_counts_as_pytorch_counts_its_own() -> None:
    query, key, value = packed(6, 4, 16), packed(10, 4, 16), packed(10, 4, 16)
    layout = ModalityLayout.from_lengths(torch.tensor([3, 3]), torch.tensor([[2, 3], [2, 3]]))
    ours = counted(lambda: fusedmm.gated_multimodal_attention(query, key, value, layout).output)
    rows, keys = (2, 4, 3, 16), (2, 4, 5, 16)
    forward, backward = sdpa_flop_count(rows, keys, keys), sdpa_backward_flop_count(rows, rows, keys, keys)
    assert ours == (forward, forward + backward)


def test_only_visible_and_active_pairs_count() -> None:
    query, key, value = packed(3, 2, 16), packed(7, 2, 16), packed(7, 2, 16)
    layout = ModalityLayout.from_lengths(torch.tensor([2, 1]), torch.tensor([[3, 0], [2, 2]]))
    with torch.no_grad():
        whole = counted(lambda: fusedmm.gated_multimodal_attention(query, key, value, layout).output)
        active = torch.tensor([[True, True], [False, True]])
        part = counted(lambda: fusedmm.gated_multimodal_attention(query, key, value, layout, active=active).output)
        times = {"query_time": torch.tensor([0, 5, 1]), "key_time": torch.tensor([0, 1, 9, 0, 1, 1, 2])}
        seen = counted(lambda: fusedmm.gated_multimodal_attention(query, key, value, layout, **times).output)
    pair = 2 * 4 * 16
    assert whole == (pair * 10, pair * 10)
    assert part == (pair * 8, pair * 8)
    assert seen == (pair * 6, pair * 6)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_distillation_counts_logits_and_gradients(memory) -> None:
    rows, classes, own, other = 6, 10, 8, 12
    student = LinearHead(torch.randn(rows, own, requires_grad=True), torch.randn(classes, own, requires_grad=True))
    teacher = LinearHead(torch.randn(rows, other), torch.randn(classes, other))
    product = 2 * rows * classes
    with torch.no_grad():
        scores = counted(lambda: fusedmm.distillation_scores(student, teacher).forward_kl)
        given = counted(lambda: fusedmm.distillation_scores(Logits(torch.randn(rows, classes)), teacher).forward_kl)
    assert scores == (product * (own + other),) * 2
    assert given == (product * other,) * 2
    _, both = counted(lambda: fusedmm.distillation_loss(student, teacher, memory=memory))
    again = own + other if memory == "lean" else 0
    assert both == product * (3 * own + other + again)


def test_values_that_are_not_there_are_taken_to_be_even() -> None:
    from torch._subclasses import FakeTensorMode

    from fusedmm.eager.attention_inputs import Inputs
    from fusedmm.flops import attention_forward_flops

    with FakeTensorMode():
        query, key = torch.empty(6, 4, 16), torch.empty(10, 4, 16)
        bounds = torch.empty(3, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
    settings = 2, 0.0, 1.0, "joint", "eager"
    inputs = Inputs(query, key, key, None, None, None, *bounds, *bounds, None, None, None, *settings)
    assert attention_forward_flops(*inputs) == 4 * 16 * 4 * 6 * 5
