"""FusionBlock: a layer of a transformer around the fused attention."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fusedmm.nn.attention import FusionOutput, GatedMultimodalAttention, Modalities
from fusedmm.nn.batch import BatchOptions, MultimodalBatch


class FusionBlock(nn.Module):
    """A pre-norm fusion layer: gated multimodal cross-attention, then an MLP, each with a residual.

    ::

        x = query + attention(norm(query), tokens)
        y = x + mlp(norm(x))

    Args:
        embed_dim, num_heads, modalities: as in `GatedMultimodalAttention`.
        mlp_ratio: hidden width of the MLP over embed_dim.
        residual_dropout: dropout of both branches in training.
        attention_options: further arguments of `GatedMultimodalAttention` (num_kv_heads, softmax, prior, gate,
            output_gate, threshold, patience, momentum, dropout, bias, impl, device, dtype).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        modalities: Modalities,
        *,
        mlp_ratio: float = 4.0,
        residual_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.attention_norm = nn.RMSNorm(embed_dim, device=device, dtype=dtype)
        self.attention = GatedMultimodalAttention(
            embed_dim, num_heads, modalities, device=device, dtype=dtype, **attention_options
        )
        self.mlp_norm = nn.RMSNorm(embed_dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(hidden, embed_dim, device=device, dtype=dtype),
        )
        self.residual_dropout = nn.Dropout(residual_dropout)

    @property
    def modalities(self) -> dict[str, int]:
        """Names and token widths, in order."""
        return self.attention.modalities

    def forward(
        self,
        query: Tensor,
        tokens: Mapping[str, Tensor] | MultimodalBatch,
        **options: Unpack[BatchOptions],
    ) -> FusionOutput:
        """As `GatedMultimodalAttention.forward`."""
        batch = MultimodalBatch.of(query, tokens, self.modalities, **options)
        x = batch.pack_query(query, self.attention.embed_dim)
        fused = self.attention(self.attention_norm(x), batch)
        x = x + self.residual_dropout(fused.output)
        x = x + self.residual_dropout(self.mlp(self.mlp_norm(x)))
        return FusionOutput(batch.restore_query(x, query), batch.restore_query(fused.mass, query))
