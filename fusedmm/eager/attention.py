"""Gated multimodal attention composed from PyTorch's own operators: the CPU path.

Samples of similar size are padded together into chunks of bounded memory, and each chunk is a handful of batched matrix
products. Priors and padding ride along as extra columns of the products (one column a modality), so that no pass over
the scores is spent on them:

    [scale * q, log_prior, 1] @ [k, onehot(m), hidden]^T  = scores + prior, and -1e30 where a key is padding
    exp(scores - max) @ onehot(m)                         = the mass of each modality, and its lse
    dz @ [scale * k, onehot(m)]                           = dq and dlog_prior

``per_modality`` and partials treat each (sample, modality) as a problem of its own with one modality. Probabilities are
recomputed in the backward; what lives at once is one chunk, at most `CHUNK_ELEMENTS` probabilities (or one sample,
where that is more). Accumulation is float32, or float64 for float64 inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedmm.philox import keep_mask

CHUNK_ELEMENTS = 1 << 22
PADDING_ALLOWED = 1.25
SMALL_CHUNK_ELEMENTS = 1 << 16
HIDDEN = -1e30
UNDERFLOW = 1e-30


@dataclass(frozen=True)
class Inputs:
    """What both directions read: packed tensors and how they lie, as the registered operators take them."""

    query: Tensor  # [total_q, Hq, D]
    key: Tensor  # [total_k, Hkv, D]
    value: Tensor  # [total_k, Hkv, D]
    cu_seqlens_q: Tensor  # [B+1]
    cu_seqlens_k: Tensor  # [B*M+1]
    num_modalities: int
    log_prior: Tensor | None  # [total_q, Hq, M]
    gate: Tensor | None  # [total_q, Hq, M]
    active: Tensor | None  # [B, Hq, M]
    visible: Tensor | None  # [total_q, M, 2]
    seed: Tensor | None  # [1]
    dropout_p: float
    scale: float

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Chunk:
    """Problems padded together: c problems of at most q queries and k keys."""

    rows: Tensor  # [c, q] packed query rows
    keys: Tensor  # [c, k] packed key rows
    row_valid: Tensor | None  # [c, q]; None: no padding
    one_hot: Tensor  # [c, k, M'] modality of each key; all 0 for padding
    hidden: Tensor | None  # [c, 1 or Hkv, 1 or G, 1 or q, k] True where a key is not seen; None: all are
    unread: Tensor | None  # [c, 1 or Hkv, k] True where no query may touch a key
    modality_of: Tensor | None  # [c] the one modality of each problem, for partials


def forward(x: Inputs, softmax: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output without output gate ([total_q, Hq, D], or [total_q, Hq, M, D] for partials), mass and lse, in the
    accumulation dtype.
    """
    split = softmax != "joint"
    total_q, heads, dim = x.query.shape
    modalities = x.num_modalities
    planes = modalities if split else 1
    columns = 1 if split else modalities
    output = x.query.new_zeros((planes, total_q, heads, dim), dtype=x.compute_dtype)
    lse = output.new_full((planes, total_q, heads, columns), -torch.inf)
    mass = torch.zeros_like(lse)
    for chunk in _chunks(x, split):
        chunk_output, chunk_mass, chunk_lse = _forward_chunk(x, chunk, split)
        where = chunk.rows if chunk.modality_of is None else chunk.rows + chunk.modality_of[:, None] * total_q
        for buffer, result in ((output, chunk_output), (mass, chunk_mass), (lse, chunk_lse)):
            _put(buffer.flatten(0, 1), where, chunk.row_valid, result)
    if not split:
        return output[0], mass[0], lse[0]
    mass, lse = (t.squeeze(-1).permute(1, 2, 0).contiguous() for t in (mass, lse))
    if softmax == "partials":
        return output.permute(1, 2, 0, 3).contiguous(), mass, lse
    weights = mass.new_ones(mass.shape) if x.gate is None else x.gate.to(mass.dtype)
    return torch.einsum("mqhd,qhm->qhd", output, weights), mass, lse


def backward(
    x: Inputs,
    softmax: str,
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    inner: Tensor,
    mass: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_prior and gate in the accumulation dtype.

    Args:
        grad_output: of the output before the output gate, shaped like the forward's.
        grad_mass: [total_q, Hq, M] or None; constant masses (per_modality) have no gradient.
        grad_lse: [total_q, Hq, M] or None, for partials.
        inner: [total_q, Hq] or, for partials, [total_q, Hq, M]: the inner product of grad_output and output.
        mass, lse: [total_q, Hq, M] of the forward.
    """
    split = softmax != "joint"
    compute = x.compute_dtype
    grad_output = grad_output.to(compute)
    grad_query = torch.zeros_like(x.query, dtype=compute)
    grad_key = torch.zeros_like(x.key, dtype=compute)
    grad_value = torch.zeros_like(grad_key)
    grad_prior, grad_gate = torch.zeros_like(mass, dtype=compute), torch.zeros_like(mass, dtype=compute)
    if softmax == "joint":
        mu = torch.zeros_like(mass, dtype=compute) if grad_mass is None else grad_mass.to(compute)
        delta = inner[..., None] + (mu * mass).sum(-1, keepdim=True)
        offset = mu - delta  # [total_q, Hq, M]
        normaliser = torch.logsumexp(lse, -1, keepdim=True)
    else:
        normaliser = lse
        offset = torch.zeros_like(mass, dtype=compute)
        if softmax == "partials":
            offset = -inner if grad_lse is None else grad_lse.to(compute) - inner
    normaliser = normaliser.masked_fill(torch.isneginf(normaliser), torch.inf)
    certain = _certain_rows(x) if softmax == "joint" else None
    for chunk in _chunks(x, split):
        results = _backward_chunk(x, chunk, softmax, grad_output, offset, normaliser, certain)
        valid = chunk.row_valid
        rows = chunk.rows.flatten() if valid is None else chunk.rows[valid]
        chunk_query, chunk_key, chunk_value, chunk_prior, chunk_gate = results
        grad_query.index_add_(0, rows, chunk_query.flatten(0, 1) if valid is None else chunk_query[valid])
        real = chunk.one_hot.any(-1)
        for buffer, result in ((grad_key, chunk_key), (grad_value, chunk_value)):
            buffer.index_add_(0, chunk.keys[real], result[real])
        for buffer, result in ((grad_prior, chunk_prior), (grad_gate, chunk_gate)):
            if chunk.modality_of is None:
                _put(buffer, chunk.rows, valid, result)
            else:
                column = chunk.modality_of[:, None].expand_as(chunk.rows)
                column = column.flatten() if valid is None else column[valid]
                buffer[rows, :, column] = (
                    result.squeeze(-1).flatten(0, 1) if valid is None else result.squeeze(-1)[valid]
                )
    return grad_query, grad_key, grad_value, grad_prior, grad_gate


def _forward_chunk(x: Inputs, chunk: _Chunk, split: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output [c, q, Hq, D], mass and lse [c, q, Hq, M'] of one chunk."""
    scores, values = _scores(x, chunk, split)
    one_hot = chunk.one_hot[:, None, None]  # [c, 1, 1, k, M']
    if scores.shape[-1] == 0:
        scores = scores.new_full((*scores.shape[:-1], 1), HIDDEN)
        one_hot, values = (
            one_hot.new_zeros((*one_hot.shape[:3], 1, one_hot.shape[-1])),
            values.new_zeros((*values.shape[:3], 1, values.shape[-1])),
        )
    peak = scores.amax(-1, keepdim=True)
    nothing = peak <= HIDDEN / 10
    probabilities = (scores - peak.masked_fill(nothing, torch.inf)).exp_()
    sums = probabilities @ one_hot  # [c, Hkv, G, q, M']
    total = sums.sum(-1, keepdim=True).masked_fill_(nothing, 1.0)
    lse = sums.log() + peak
    if bool((sums < UNDERFLOW).any()) and sums.shape[-1] > 1:
        lse = _separate_lse(scores, chunk.one_hot)
    weights = _gated(x, chunk, probabilities, split)
    output = (weights @ values) / total
    return _to_rows(output), _to_rows(sums / total), _to_rows(lse)


def _certain_rows(x: Inputs) -> Tensor | None:
    """[total_q, Hq, 1] True where a query sees a single key: its softmax is constant, and dz is exactly 0, not the
    rounding error of delta; None where there is no such row.
    """
    sample = torch.searchsorted(
        x.cu_seqlens_q[1:].long(), torch.arange(x.query.shape[0], device=x.query.device), right=True
    )
    if x.visible is not None:
        counts = (x.visible[..., 1] - x.visible[..., 0]).clamp_min(0).long()  # [total_q, M]
    else:
        counts = x.cu_seqlens_k.diff().long().view(-1, x.num_modalities)[sample]
    counts = counts[:, None].expand(-1, x.query.shape[1], -1)
    if x.active is not None:
        counts = counts * x.active[sample]
    certain = counts.sum(-1, keepdim=True) == 1
    return certain if bool(certain.any()) else None


def _separate_lse(scores: Tensor, one_hot: Tensor) -> Tensor:
    """lse of each modality with a maximum of its own: for modalities that underflow beside the largest score."""
    modality = one_hot.argmax(-1)[:, None, None, None].expand(scores.shape)
    scores = scores.masked_fill(~one_hot.any(-1)[:, None, None, None], HIDDEN)
    shape = (*scores.shape[:-1], one_hot.shape[-1])
    peak = scores.new_full(shape, HIDDEN).scatter_reduce(-1, modality, scores, "amax")
    nothing = peak <= HIDDEN / 10
    shifted = torch.exp(scores - peak.masked_fill(nothing, torch.inf).gather(-1, modality))
    return torch.where(nothing, -torch.inf, scores.new_zeros(shape).scatter_add(-1, modality, shifted).log() + peak)


def _backward_chunk(
    x: Inputs,
    chunk: _Chunk,
    softmax: str,
    grad_output: Tensor,
    offset: Tensor,
    normaliser: Tensor,
    certain: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    split = softmax != "joint"
    scores, values = _scores(x, chunk, split)
    one_hot = chunk.one_hot[:, None, None]
    probabilities = scores.sub_(_of_problem(x, chunk, normaliser, split)).exp_()  # [c, Hkv, G, q, k]
    if softmax == "partials" and chunk.modality_of is not None:
        gradient = _heads_first(grad_output[chunk.rows, :, chunk.modality_of[:, None]], x.key.shape[1])
    else:
        gradient = _heads_first(grad_output[chunk.rows], x.key.shape[1])
    if chunk.row_valid is not None:
        gradient = gradient.masked_fill(~chunk.row_valid[:, None, None, :, None], 0.0)
    products = gradient @ values.transpose(-1, -2)  # R
    if x.seed is not None:
        products = products * _keep(x, chunk)
    products = products * probabilities  # P R
    grad_gate = products @ one_hot
    gate = None if x.gate is None or softmax == "partials" else _of_problem(x, chunk, x.gate, split)
    shift = _of_problem(x, chunk, offset, split)
    if softmax == "per_modality":  # dz = gate P (R - sum P R)
        shift = -grad_gate if gate is None else -gate * grad_gate
    if chunk.row_valid is not None:
        shift = shift.masked_fill(~chunk.row_valid[:, None, None, :, None], 0.0)
    weighted = probabilities if gate is None else probabilities * (gate @ one_hot.transpose(-1, -2))
    dz = products if gate is None else products * (gate @ one_hot.transpose(-1, -2))
    dz = dz + probabilities * (shift @ one_hot.transpose(-1, -2))
    if certain is not None:
        dz = dz.masked_fill_(_of_problem(x, chunk, certain, split).bool(), 0.0)
    if x.seed is not None:
        weighted = weighted * _keep(x, chunk)
    keys = _kv(x, chunk, x.key)[:, :, None]
    queries = _heads_first(_queries(x, chunk), x.key.shape[1])
    grad_query = (dz @ keys) * x.scale
    grad_key = (dz.flatten(2, 3).transpose(-1, -2) @ queries.flatten(2, 3)) * x.scale
    grad_value = weighted.flatten(2, 3).transpose(-1, -2) @ gradient.flatten(2, 3)
    if chunk.unread is not None:
        grad_key, grad_value = (g.masked_fill(chunk.unread[..., None], 0.0) for g in (grad_key, grad_value))
    return (
        _to_rows(grad_query),
        grad_key.transpose(1, 2),
        grad_value.transpose(1, 2),
        _to_rows(dz @ one_hot),
        _to_rows(grad_gate),
    )


def _scores(x: Inputs, chunk: _Chunk, split: bool) -> tuple[Tensor, Tensor]:
    """Scores plus prior [c, Hkv, G, q, k], `HIDDEN` where not visible, and values [c, Hkv, 1, k, D]."""
    kv_heads = x.key.shape[1]
    queries = _heads_first(_queries(x, chunk) * x.scale, kv_heads)  # [c, Hkv, G, q, D]
    keys, values = _kv(x, chunk, x.key), _kv(x, chunk, x.value)  # [c, Hkv, k, D]
    padding = (1.0 - chunk.one_hot.sum(-1, keepdim=True)) * HIDDEN  # [c, k, 1]
    columns = [queries, torch.ones_like(queries[..., :1])]
    rows = [keys, padding[:, None].expand(-1, kv_heads, -1, -1)]
    if x.log_prior is not None and not split:
        columns.append(_of_problem(x, chunk, x.log_prior.clamp_min(HIDDEN), split).to(queries.dtype))
        rows.append(chunk.one_hot[:, None].expand(-1, kv_heads, -1, -1))
    left, right = torch.cat(columns, -1), torch.cat(rows, -1)
    scores = (left.flatten(2, 3) @ right.transpose(-1, -2)).unflatten(2, left.shape[2:4])
    if chunk.hidden is not None:
        scores = scores.masked_fill_(chunk.hidden, HIDDEN)
    return scores, values[:, :, None]


def _queries(x: Inputs, chunk: _Chunk) -> Tensor:
    return x.query[chunk.rows].to(x.compute_dtype)


def _kv(x: Inputs, chunk: _Chunk, packed: Tensor) -> Tensor:
    """Keys or values [c, Hkv, k, D], 0 where nothing may be read."""
    padded = packed[chunk.keys].to(x.compute_dtype).transpose(1, 2)
    return padded if chunk.unread is None else padded.masked_fill(chunk.unread[..., None], 0.0)


def _of_problem(x: Inputs, chunk: _Chunk, per_query: Tensor, split: bool) -> Tensor:
    """Rows and columns of a [total_q, Hq, M or 1] tensor that belong to the chunk: [c, Hkv, G, q, M']."""
    if split and chunk.modality_of is not None:
        picked = per_query[chunk.rows, :, chunk.modality_of[:, None]][..., None]
    else:
        picked = per_query[chunk.rows]
    return _heads_first(picked.to(x.compute_dtype), x.key.shape[1])


def _gated(x: Inputs, chunk: _Chunk, probabilities: Tensor, split: bool) -> Tensor:
    weights = probabilities
    if x.gate is not None and not split:
        weights = weights * (_of_problem(x, chunk, x.gate, split) @ chunk.one_hot[:, None, None].transpose(-1, -2))
    return weights if x.seed is None else weights * _keep(x, chunk)


def _keep(x: Inputs, chunk: _Chunk) -> Tensor:
    """Dropout's factor [c, Hkv, G, q, k]: 0, or 1 / (1 - p)."""
    assert x.seed is not None
    kv_heads = x.key.shape[1]
    head = torch.arange(x.query.shape[1], device=x.query.device).view(1, kv_heads, -1, 1, 1)
    kept = keep_mask(x.seed, chunk.rows[:, None, None, :, None], head, chunk.keys[:, None, None, None, :], x.dropout_p)
    return kept.to(x.compute_dtype) / (1.0 - x.dropout_p)


def _heads_first(rows: Tensor, kv_heads: int) -> Tensor:
    """[c, q, Hq, X] to [c, Hkv, G, q, X]."""
    chunk, size, heads, width = rows.shape
    return rows.reshape(chunk, size, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)


def _to_rows(heads: Tensor) -> Tensor:
    """[c, Hkv, G, q, X] to [c, q, Hq, X]."""
    return heads.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _put(buffer: Tensor, rows: Tensor, valid: Tensor | None, result: Tensor) -> None:
    if valid is None:
        buffer.index_copy_(0, rows.flatten(), result.flatten(0, 1))
    else:
        buffer.index_copy_(0, rows[valid], result[valid])


def _chunks(x: Inputs, split: bool) -> Iterator[_Chunk]:
    """Group problems (samples, or segments where each is a softmax of its own) of similar size; those without a query
    or a key are left at zero.
    """
    modalities = x.num_modalities
    step = 1 if split else modalities
    bounds_k = x.cu_seqlens_k[::step].long()
    bounds_q = x.cu_seqlens_q.long()
    sample = torch.arange(bounds_k.numel() - 1, device=bounds_q.device) // (modalities // step)
    starts_q, starts_k = bounds_q[sample], bounds_k[:-1]
    lengths_q, lengths_k = bounds_q.diff()[sample], bounds_k.diff()
    for group in _groups(lengths_q.tolist(), lengths_k.tolist(), x.query.shape[1]):
        index = torch.tensor(group, device=bounds_q.device)
        yield _chunk(
            x, split, index, sample[index], starts_q[index], lengths_q[index], starts_k[index], lengths_k[index]
        )


def _groups(lengths_q: list[int], lengths_k: list[int], heads: int) -> Iterator[list[int]]:
    """Problems to pad together: as many as fit in a chunk while padding stays small."""
    order = sorted(
        (p for p in range(len(lengths_q)) if lengths_q[p] and lengths_k[p]),
        key=lambda p: (lengths_k[p], lengths_q[p]),
        reverse=True,
    )
    group: list[int] = []
    real = longest_q = longest_k = 0
    for problem in order:
        next_q, next_k = max(longest_q, lengths_q[problem]), max(longest_k, lengths_k[problem])
        next_real = real + lengths_q[problem] * lengths_k[problem]
        padded = (len(group) + 1) * next_q * next_k
        wasteful = padded > PADDING_ALLOWED * next_real and padded * heads > SMALL_CHUNK_ELEMENTS
        if group and (padded * heads > CHUNK_ELEMENTS or wasteful):
            yield group
            group = []
            next_q, next_k, next_real = lengths_q[problem], lengths_k[problem], lengths_q[problem] * lengths_k[problem]
        group.append(problem)
        real, longest_q, longest_k = next_real, next_q, next_k
    if group:
        yield group


def _chunk(
    x: Inputs,
    split: bool,
    problem: Tensor,
    sample: Tensor,
    start_q: Tensor,
    length_q: Tensor,
    start_k: Tensor,
    length_k: Tensor,
) -> _Chunk:
    device = problem.device
    position_q = torch.arange(int(length_q.max()), device=device)
    position_k = torch.arange(int(length_k.max()), device=device)
    row_valid = position_q < length_q[:, None]
    key_valid = position_k < length_k[:, None]
    rows = torch.where(row_valid, start_q[:, None] + position_q, start_q[:, None])
    keys = torch.where(key_valid, start_k[:, None] + position_k, start_k[:, None])
    if split:
        modality_of = problem % x.num_modalities
        modality = modality_of[:, None].expand_as(keys)
        one_hot = key_valid[..., None].to(x.compute_dtype)
    else:
        modality_of = None
        bounds = x.cu_seqlens_k[1:].long()
        modality = torch.searchsorted(bounds, keys, right=True) % x.num_modalities
        one_hot = torch.nn.functional.one_hot(modality, x.num_modalities).to(x.compute_dtype).mul_(key_valid[..., None])
    hidden, unread = _hidden(x, sample, rows, keys, modality, key_valid)
    return _Chunk(rows, keys, None if bool(row_valid.all()) else row_valid, one_hot, hidden, unread, modality_of)


def _hidden(
    x: Inputs, sample: Tensor, rows: Tensor, keys: Tensor, modality: Tensor, key_valid: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Keys that a query may not see [c, Hkv, G, q, k], and keys that nothing may read [c, Hkv, k]: padding, and
    segments switched off for a whole group of heads.
    """
    hidden = None
    unread = None if bool(key_valid.all()) else ~key_valid[:, None]
    if x.active is not None:
        kv_heads = x.key.shape[1]
        active = x.active[sample].unflatten(1, (kv_heads, -1))  # [c, Hkv, G, M]
        off = ~active.gather(-1, modality[:, None, None].expand(*active.shape[:3], -1))  # [c, Hkv, G, k]
        hidden = off[:, :, :, None]
        unread = off.all(2) if unread is None else unread | off.all(2)
    if x.visible is not None:
        ranges = x.visible[rows]  # [c, q, M, 2]
        index = modality[:, None].expand(-1, rows.shape[1], -1)
        outside = (keys[:, None] < ranges[..., 0].gather(-1, index)) | (
            keys[:, None] >= ranges[..., 1].gather(-1, index)
        )
        outside = outside[:, None, None]
        hidden = outside if hidden is None else hidden | outside
    return hidden, unread
