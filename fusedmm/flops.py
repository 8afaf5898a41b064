"""FLOPs of the registered operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Importing this module registers them; nothing else of the package does, for PyTorch's counter imports Triton. Counted
are the matrix products that the result needs, 2 FLOPs a multiply and add, as PyTorch counts those of its own attention:
of attention what is visible and switched on, read from the batch's tensors (on a GPU that waits for them). A fake
tensor has no values to read: then every query is taken to see all keys of its sample, and samples to have one size.
"""

from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fusedmm.eager.attention_inputs import Inputs
from fusedmm.ops import distillation_op


@register_flop_formula(torch.ops.fusedmm.attention_forward, get_raw=True)
def attention_forward_flops(*arguments: Any, out_val: Any = None) -> int:
    """Scores, and the sum of values: 4 D a visible pair and query head."""
    x = Inputs(*arguments)
    return 4 * x.query.shape[2] * _visible_pairs(x)


@register_flop_formula(torch.ops.fusedmm.attention_backward, get_raw=True)
def attention_backward_flops(*arguments: Any, out_val: Any = None) -> int:
    """Scores again, R, and the gradients of query, key and value: 10 D a visible pair and query head."""
    x = Inputs(*arguments[8:])
    return 10 * x.query.shape[2] * _visible_pairs(x)


@register_flop_formula(
    [torch.ops.fusedmm.distillation_scores, torch.ops.fusedmm.distillation_rows],
    get_raw=True,
)
def distillation_forward_flops(*arguments: Any, out_val: Any = None) -> int:
    """Logits of the heads that are linear: 2 N V (Ds + Dt)."""
    own, teacher, product = _products(arguments)
    return product * (own + teacher)


@register_flop_formula(
    [torch.ops.fusedmm.distillation_fast, torch.ops.fusedmm.distillation_backward],
    get_raw=True,
)
def distillation_gradient_flops(*arguments: Any, out_val: Any = None) -> int:
    """Logits, made again in the backward of ``memory="lean"``, and the gradients asked for: 2 N V Ds each."""
    own, teacher, product = _products(arguments)
    gradients: int = sum(arguments[-3:-1])  # of the hidden rows, of the weight
    return product * (own * (1 + gradients) + teacher)


def _visible_pairs(x: Inputs) -> int:
    """Pairs of a query head and a key that it sees."""
    (total_q, heads, _), samples = x.query.shape, max(1, x.cu_seqlens_q.numel() - 1)
    if isinstance(x.cu_seqlens_q, FakeTensor) or x.cu_seqlens_q.is_meta:
        return int(heads * total_q * x.key.shape[0] // samples)
    queries = x.cu_seqlens_q.long().diff()  # [B]
    if x.visible is None:
        pairs = queries[:, None] * x.cu_seqlens_k.long().diff().view(samples, -1)  # [B, M]
    else:
        seen = x.visible.long().diff(dim=-1).squeeze(-1).clamp_min(0)  # [total_q, M]
        sample = torch.arange(samples, device=queries.device).repeat_interleave(queries)
        pairs = seen.new_zeros((samples, x.num_modalities)).index_add(0, sample, seen)
    if x.active is None:
        return heads * int(pairs.sum())
    return int((pairs[:, None] * x.active).sum())


def _products(arguments: tuple[Any, ...]) -> tuple[int, int, int]:
    """Width of the student's hidden rows and of the teacher's, 0 without a linear head, and 2 N V."""
    student, student_weight, _, teacher, teacher_weight = arguments[:5]
    classes = arguments[distillation_op.ARGUMENTS - 3]
    own, other = (
        0 if weight is None else hidden.shape[1]
        for hidden, weight in ((student, student_weight), (teacher, teacher_weight))
    )
    return own, other, 2 * student.shape[0] * classes
