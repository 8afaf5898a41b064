"""The definition of gated multimodal attention: one sample at a time, every matrix written out, any floating dtype,
differentiable by autograd.

z_j    = scale * q . k_j + log_prior[m(j)]                            over the visible keys
lse_m  = log sum_{j in m} exp(z_j)
P_j    = exp(z_j - logsumexp_m lse_m)  (joint)    or    exp(z_j - lse_{m(j)})  (per_modality)
mass_m = sum_{j in m} P_j
output = sigmoid(output_gate) * sum_j gate[m(j)] P_j v_j
"""

import torch
from torch import Tensor

from fusedmm.layout import ModalityLayout
from fusedmm.philox import keep_mask


def gated_multimodal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ModalityLayout,
    *,
    log_prior: Tensor | None = None,
    gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    active: Tensor | None = None,
    softmax: str = "joint",
    scale: float,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mass and lse in ``compute_dtype`` (None: float64 for float64, else float32).

    Times come from ``layout.visibility``. The other arguments are those of `fusedmm.gated_multimodal_attention`,
    already checked and expanded: log_prior and gate [total_q, Hq, M], active [B, Hq, M].
    """
    compute = compute_dtype or (torch.float64 if query.dtype == torch.float64 else torch.float32)
    outputs, masses, lses = [], [], []
    for sample in range(layout.batch_size):
        rows, weights, values, lse = _sample_probabilities(
            query, key, value, layout, sample, log_prior, active, softmax, scale, compute
        )
        modality = _one_hot(layout, sample, compute)
        mass = weights @ modality
        if gate is not None:
            weights = weights * (gate[rows].to(compute) @ modality.T)
        if seed is not None:
            weights = weights * _kept(query, layout, sample, seed, dropout_p) / (1.0 - dropout_p)
        outputs.append(torch.einsum("qhk,khd->qhd", weights, values))
        masses.append(mass)
        lses.append(lse)
    empty = query.new_zeros((0, *query.shape[1:]), dtype=compute)
    no_mass = empty.new_zeros((0, query.shape[1], layout.num_modalities))
    output = torch.cat([empty, *outputs])
    if output_gate is not None:
        output = output * torch.sigmoid(output_gate.to(compute))
    return output, torch.cat([no_mass, *masses]), torch.cat([no_mass, *lses])


def modality_partials(
    query: Tensor, key: Tensor, value: Tensor, layout: ModalityLayout, *, active: Tensor | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """One softmax a modality: outputs [total_q, Hq, M, D] and lse [total_q, Hq, M], in the accumulation dtype."""
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    outputs, lses = [], []
    for sample in range(layout.batch_size):
        _, weights, values, lse = _sample_probabilities(
            query, key, value, layout, sample, None, active, "per_modality", scale, compute
        )
        outputs.append(torch.einsum("qhk,km,khd->qhmd", weights, _one_hot(layout, sample, compute), values))
        lses.append(lse)
    empty = query.new_zeros((0, query.shape[1], layout.num_modalities, query.shape[2]), dtype=compute)
    return torch.cat([empty, *outputs]), torch.cat([empty[..., 0], *lses])


def _sample_probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ModalityLayout,
    sample: int,
    log_prior: Tensor | None,
    active: Tensor | None,
    softmax: str,
    scale: float,
    compute: torch.dtype,
) -> tuple[slice, Tensor, Tensor, Tensor]:
    """Query rows of a sample, its probabilities [q, h, k], values repeated for every query head [k, h, d], and lse [q,
    h, m].
    """
    rows, keys = _rows(layout, sample), _keys(layout, sample)
    group = query.shape[1] // key.shape[1]
    modality = _key_modalities(layout, sample)
    visible = _visible(layout, sample, query.shape[1], active)  # [q, h, k]
    readable = visible.any(0).T[..., None]  # what no query of the sample sees is never read, NaN or not: [k, h, 1]
    sees = visible.any(-1)[..., None]  # nor is a query of it that sees nothing: [q, h, 1]
    queries = torch.where(sees, query[rows].to(compute), 0.0)
    keys_by_head = torch.where(readable, key[keys].to(compute).repeat_interleave(group, 1), 0.0)
    values_by_head = torch.where(readable, value[keys].to(compute).repeat_interleave(group, 1), 0.0)
    scores = torch.einsum("qhd,khd->qhk", queries, keys_by_head) * scale
    if log_prior is not None:
        scores = scores + log_prior[rows].to(compute)[..., modality]
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.stack([_logsumexp(scores[..., modality == m]) for m in range(layout.num_modalities)], -1)
    normaliser = _logsumexp(lse)[..., None] if softmax == "joint" else lse[..., modality]
    finite = torch.where(torch.isneginf(normaliser), 0.0, normaliser)
    return rows, torch.exp(scores - finite), values_by_head, lse


def _logsumexp(x: Tensor) -> Tensor:
    """logsumexp over the last dimension: -inf, and no gradient, where there is nothing (also no NaN gradient)."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -torch.inf)
    peak = x.detach().amax(-1, keepdim=True)
    nothing = torch.isneginf(peak)
    total = torch.exp(x - torch.where(nothing, 0.0, peak)).sum(-1, keepdim=True)
    return torch.where(nothing, -torch.inf, torch.log(torch.where(nothing, 1.0, total)) + peak).squeeze(-1)


def _visible(layout: ModalityLayout, sample: int, heads: int, active: Tensor | None) -> Tensor:
    rows, keys = _rows(layout, sample), _keys(layout, sample)
    modality = _key_modalities(layout, sample)
    visible = torch.ones(
        (rows.stop - rows.start, heads, keys.stop - keys.start), dtype=torch.bool, device=layout.cu_seqlens_q.device
    )
    if active is not None:
        visible = visible & active[sample][:, modality]
    if layout.visibility is not None:
        query_time, key_time = layout.visibility.query_time[rows, None], layout.visibility.key_time[None, keys]
        in_time = key_time <= query_time
        if layout.visibility.lookback is not None:
            age = query_time - key_time  # negative where it does not fit in int64: older than any look-back
            in_time &= (age >= 0) & (age < layout.visibility.lookback[modality])
        visible = visible & in_time[:, None]
    return visible


def _kept(query: Tensor, layout: ModalityLayout, sample: int, seed: Tensor, dropout_p: float) -> Tensor:
    rows, keys = _rows(layout, sample), _keys(layout, sample)
    index = [
        torch.arange(*bounds, device=query.device)
        for bounds in ((rows.start, rows.stop), (0, query.shape[1]), (keys.start, keys.stop))
    ]
    return keep_mask(seed, index[0][:, None, None], index[1][:, None], index[2], dropout_p)


def _rows(layout: ModalityLayout, sample: int) -> slice:
    return slice(*layout.cu_seqlens_q[sample : sample + 2].tolist())


def _keys(layout: ModalityLayout, sample: int) -> slice:
    bounds = layout.cu_seqlens_k[:: layout.num_modalities]
    return slice(*bounds[sample : sample + 2].tolist())


def _key_modalities(layout: ModalityLayout, sample: int) -> Tensor:
    keys = _keys(layout, sample)
    return layout.key_segments()[keys] % layout.num_modalities


def _one_hot(layout: ModalityLayout, sample: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(_key_modalities(layout, sample), layout.num_modalities).to(dtype)
