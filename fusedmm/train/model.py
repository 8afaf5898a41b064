"""The forecaster: a small encoder a modality, learned latent queries, fusion blocks, a linear head on top of a frozen
ridge.

Every fusion shares encoders, queries, depth and head; only how tokens reach the queries differs:
``gated`` is this project's `fusedmm.nn.FusionBlock`, ``plain`` one softmax over all tokens, ``concat`` the mean of each
modality.
Shapes: B samples, L latent queries, E width, M modalities, F features of a token, T targets, P past features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.nn import FusionBlock, FusionOutput
from fusedmm.train.config import ModelConfig
from fusedmm.train.filter import MOMENTUM, PATIENCE

GAP_FREQUENCIES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the time-gap encoding over log(1 + gap): from one period over 11 powers of ten to one over a factor of 5."""


class Forecast(NamedTuple):
    """What the model says about a batch."""

    prediction: Tensor
    """[B, T] float32: targets, or logits where the targets are classes."""
    mass: Tensor
    """[B, M] float32: attention mass by modality, mean over blocks, queries and heads; 0 where nothing is visible."""


@dataclass(frozen=True)
class Sizes:
    """What a model must know of its data."""

    modalities: Mapping[str, int]
    """Features of a token, by modality."""
    num_past: int
    num_targets: int


class TokenEncoder(nn.Module):
    """Tokens of one modality and their age -> the model's width. [B, Lm, F], gap int64 [B, Lm] -> [B, Lm, E]."""

    def __init__(self, num_features: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Linear(num_features, dim)
        self.age = nn.Linear(1 + 2 * len(GAP_FREQUENCIES), dim, bias=False)
        self.mix = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, gap: Tensor) -> Tensor:
        """Encode; differences of times are exact int64 before they become float32 logarithms."""
        dtype = self.features.weight.dtype
        hidden = self.features(tokens.to(dtype)) + self.age(encode_gap(gap).to(dtype))
        encoded: Tensor = self.norm(self.dropout(self.mix(F.gelu(hidden))))
        return encoded


class GatedBlock(nn.Module):
    """This project's `fusedmm.nn.FusionBlock`.

    With one softmax a modality every mass is 1 or 0: what is returned then is the gates' share.
    """

    def __init__(self, modalities: tuple[str, ...], config: ModelConfig, filter_below: float) -> None:
        super().__init__()
        self.fusion = FusionBlock(
            config.dim,
            config.heads,
            modalities,
            mlp_ratio=config.mlp_ratio,
            softmax=config.softmax,
            output_gate=config.output_gate,
            threshold=filter_below or None,
            patience=PATIENCE,
            momentum=MOMENTUM,
        )

    def forward(self, query: Tensor, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOutput:
        """[B, L, E] and visible tokens of each modality -> the updated queries and their mass [B, L, H, M]."""
        output, mass = self.fusion(query, tokens, masks=masks)
        if self.fusion.attention.softmax == "per_modality":
            with torch.no_grad():
                gate = self.fusion.attention.modality_gate(self.fusion.attention_norm(query)).gate
                mass = mass * gate / (mass * gate).sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return FusionOutput(output, mass)


class PlainBlock(nn.Module):
    """Pre-norm cross-attention over the tokens of all modalities with one softmax, then an MLP: the fusion without
    priors and gates.
    """

    def __init__(self, dim: int, heads: int, modalities: tuple[str, ...], mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.heads, self.modalities = heads, modalities
        self.query_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.kind = nn.Parameter(0.5 * torch.randn(len(modalities), dim))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, query: Tensor, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOutput:
        """[B, L, E] and visible tokens of each modality -> the updated queries and their mass [B, L, H, M]."""
        marked = [tokens[name] + self.kind[m] for m, name in enumerate(self.modalities)]
        keys = torch.cat(marked, dim=1)  # [B, K, E]
        member = torch.cat(
            [torch.full((tokens[name].shape[1],), m, device=query.device) for m, name in enumerate(self.modalities)]
        )
        visible = torch.cat([masks[name] for name in self.modalities], dim=1)[:, None, None]  # [B, 1, 1, K]
        k, v = self.key_value(keys).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, K, D]
        q = self.query(self.query_norm(query)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, L, D]
        attended = F.scaled_dot_product_attention(q, k, v, visible)
        with torch.no_grad():  # the same attention over one-hot values is the mass
            one_hot = F.one_hot(member, len(self.modalities)).to(v.dtype).expand(*v.shape[:3], -1)
            mass = F.scaled_dot_product_attention(q, k, one_hot, visible).transpose(1, 2)
        query = query + self.out(attended.transpose(1, 2).flatten(2))
        return FusionOutput(query + self.mlp(self.mlp_norm(query)), mass)


class ConcatBlock(nn.Module):
    """The mean of each modality's visible tokens, side by side, through an MLP into every query: the fusion without
    attention.
    """

    def __init__(self, dim: int, modalities: tuple[str, ...], mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.modalities = modalities
        self.missing = nn.Parameter(0.02 * torch.randn(len(modalities), dim))
        self.norm = nn.LayerNorm((len(modalities) + 1) * dim)
        self.mlp = nn.Sequential(nn.Linear((len(modalities) + 1) * dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, query: Tensor, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOutput:
        """[B, L, E] and visible tokens -> the updated queries; mass counts every present modality alike."""
        count = torch.stack([masks[name].sum(dim=1) for name in self.modalities], dim=1)  # [B, M]
        totals = [(tokens[name] * masks[name][..., None]).sum(dim=1) for name in self.modalities]
        total = torch.stack(totals, dim=1)  # [B, M, E]
        present = (count > 0)[..., None]
        mean = torch.where(present, total / count.clamp(min=1)[..., None], self.missing)
        joined = torch.cat([query, mean.flatten(1)[:, None].expand(-1, query.shape[1], -1)], dim=-1)
        share = (present / present.sum(dim=1, keepdim=True).clamp(min=1)).float()  # [B, M, 1]
        mass = share.transpose(1, 2)[:, None].expand(-1, query.shape[1], -1, -1)
        return FusionOutput(query + self.mlp(self.norm(joined)), mass)


class Forecaster(nn.Module):
    """Multimodal forecaster; see the module's docstring.

    Args:
        sizes: of the data, restricted to the modalities this model may see.
        config: widths and options.
        fusion: "gated", "plain" or "concat".
        filter_below: importance under which the gated fusion lets a modality go, see `fusedmm.train.filter`; 0: never.
    """

    skip_weight: Tensor
    skip_bias: Tensor
    target_scale: Tensor

    def __init__(self, sizes: Sizes, config: ModelConfig, fusion: str, filter_below: float = 0.0) -> None:
        super().__init__()
        dim, names = config.dim, tuple(sizes.modalities)
        self.modalities, self.fusion = names, fusion
        self.encoders = nn.ModuleDict(
            {name: TokenEncoder(width, dim, config.dropout) for name, width in sizes.modalities.items()}
        )
        self.latents = nn.Parameter(0.02 * torch.randn(config.latents, dim))
        self.context = nn.Linear(sizes.num_past, dim) if sizes.num_past else None
        self.blocks = nn.ModuleList(self._block(config, fusion, filter_below) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.latents * dim)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.latents * dim, sizes.num_targets)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("skip_weight", torch.zeros(sizes.num_targets, sizes.num_past))
        self.register_buffer("skip_bias", torch.zeros(sizes.num_targets))
        self.register_buffer("target_scale", torch.ones(()))

    def set_skip(self, weight: Tensor, bias: Tensor, target_scale: float) -> None:
        """Set the frozen ridge, weight [T, P] and bias [T], and the unit of the head's output."""
        self.skip_weight.copy_(weight)
        self.skip_bias.copy_(bias)
        self.target_scale.fill_(target_scale)

    def _block(self, config: ModelConfig, fusion: str, filter_below: float) -> nn.Module:
        if fusion == "concat":
            return ConcatBlock(config.dim, self.modalities, config.mlp_ratio)
        if fusion == "plain":
            return PlainBlock(config.dim, config.heads, self.modalities, config.mlp_ratio)
        return GatedBlock(self.modalities, config, filter_below)

    def forward(
        self,
        tokens: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        times: Mapping[str, Tensor],
        time: Tensor,
        past: Tensor,
    ) -> Forecast:
        """Forecast a batch; a token later than its sample's time is never seen.

        Args:
            tokens: [B, Lm, F] float32 a modality.
            masks: [B, Lm] bool, True where there is a token.
            times: [B, Lm] int64, when a token was knowable.
            time: [B] int64, when the forecast is made.
            past: [B, P] float32, standardised past features.
        """
        seen = {name: masks[name] & (times[name] <= time[:, None]) for name in self.modalities}
        encoded = {
            name: self.encoders[name](tokens[name], (time[:, None] - times[name]).clamp(min=0))
            for name in self.modalities
        }
        query = self.latents.expand(time.shape[0], -1, -1)
        if self.context is not None:
            query = query + self.context(past.to(query.dtype))[:, None]
        shares = []
        for block in self.blocks:
            query, mass = block(query, encoded, seen)
            shares.append(mass.float().mean(dim=(1, 2)))
        output = self.target_scale * self.head(self.dropout(self.norm(query.flatten(1)))).float()
        return Forecast(output + F.linear(past, self.skip_weight, self.skip_bias), torch.stack(shares).mean(dim=0))


def encode_gap(gap: Tensor) -> Tensor:
    """Age of a token, int64 [...] >= 0 -> float32 [..., 1 + 2 * frequencies] of log(1 + gap)."""
    log_gap = torch.log1p(gap.float())[..., None]
    phase = log_gap * torch.tensor(GAP_FREQUENCIES, device=gap.device)
    return torch.cat([0.1 * log_gap, phase.sin(), phase.cos()], dim=-1)
