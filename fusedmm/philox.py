"""Philox 4x32-10 in plain PyTorch, the same counters and rounds as Triton's ``tl.philox``.

Attention dropout depends only on (seed, query, head, key), so that every implementation and every tile size drops the
same probabilities.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def _high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def keep_mask(seed: Tensor, query: Tensor, head: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """True where a probability survives dropout.

    Args:
        seed: [1] int64.
        query: packed row of the query, int64; broadcasts with head and key.
        head: query head, int64.
        key: packed row of the key, int64.
        dropout_p: probability of being dropped, in [0, 1).
    """
    c0, c1, c2 = torch.broadcast_tensors(key, query, head)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high_b, low_b = _high_low(ROUND_B, c2)
        high_a, low_a = _high_low(ROUND_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEY_A) & WORD, (k1 + KEY_B) & WORD
    folded = torch.where(c0 >= 2**31, WORD - c0, c0)  # reflects the sign bit, as tl.uint_to_uniform_float does
    return folded.to(torch.float32) * 4.6566127342e-10 >= dropout_p
