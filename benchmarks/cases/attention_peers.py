"""Everyone who can do an attention case: this project, PyTorch's compositions, and the libraries that are installed.

All take packed tensors. What a user would prepare once a batch (padding indices, one-hot columns, masks) is prepared
outside the timed call, except where a name says ``+mask``; that favours the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedmm
from benchmarks.case import Prepared, Variant
from fusedmm.testing import AttentionExample

Attention = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """A batch, and whether the task asks for the mass of each modality beside the output."""

    example: AttentionExample
    asks_mass: bool

    @cached_property
    def padded(self) -> "Padded":
        """The batch's padding, made once."""
        return Padded(self.example)


@dataclass(frozen=True)
class Masks:
    """What each query of padded samples may see.

    Attributes:
        one_hot: [B, Lk, M] modality of each key, float32; 0 in the padding.
        visible: [B, 1 or Hq, Lq or 1, Lk] bool; None: all.
        blind: [B, 1 or Hq, Lq or 1, 1] bool, queries that see nothing; None: there are none.
    """

    one_hot: Tensor
    visible: Tensor | None
    blind: Tensor | None = None


class Padded:
    """The batch as padded tensors [B, H, L, X], and what each query may see.

    Samples of one length are viewed, not copied, and a mask that hides nothing is left out: with one, neither PyTorch's
    flash kernels nor cuDNN's run. Padding goes through index_copy and index_select, whose gradients are cheap.
    """

    def __init__(self, example: AttentionExample) -> None:
        layout = example.layout
        modalities = layout.num_modalities
        self._queries = _Places(layout.cu_seqlens_q)
        self._keys = _Places(layout.cu_seqlens_k[::modalities])
        segments = layout.key_segments()
        modality = self._keys.pad(segments % modalities)  # [B, Lk]
        valid = self._keys.pad(torch.ones_like(segments, dtype=torch.bool))
        one_hot = F.one_hot(modality, modalities).float() * valid[..., None]
        visible = valid[:, None, None]
        if "active" in example.tensors:
            chosen = modality[:, None].expand(-1, example.tensors["active"].shape[1], -1)
            visible = visible & example.tensors["active"].gather(2, chosen)[:, :, None]
        if layout.visibility is not None:
            ranges = self._queries.pad(layout.visibility.ranges)  # [B, Lq, M, 2]
            index = modality[:, None].expand(-1, ranges.shape[1], -1)
            low, high = (ranges[..., side].gather(2, index) for side in (0, 1))
            rows = self._keys.pad(torch.arange(layout.total_k, device=modality.device))[:, None]
            visible = visible & ((rows >= low) & (rows < high))[:, None]
        blind = ~visible.any(-1, keepdim=True)
        self.masks = Masks(one_hot, None if bool(visible.all()) else visible, blind if bool(blind.any()) else None)

    def queries(self, packed: Tensor) -> Tensor:
        """[total_q, H, X] to [B, H, Lq, X]."""
        return self._queries.pad(packed).transpose(1, 2)

    def keys(self, packed: Tensor, heads: int) -> Tensor:
        """[total_k, Hkv, X] to [B, H, Lk, X], key heads repeated for their group."""
        return repeat_heads(self._keys.pad(packed).transpose(1, 2), heads, 1)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, H, Lq, X] to [total_q, H, X]."""
        return self._queries.unpad(padded.transpose(1, 2))


class _Places:
    """Where packed rows lie among B * L padded ones; `index` is None where every sample has L rows."""

    def __init__(self, bounds: Tensor) -> None:
        starts, lengths = bounds[:-1].long(), bounds.diff().long()
        self.shape = (lengths.numel(), int(lengths.max()))
        place = torch.arange(self.shape[1], device=bounds.device)
        valid = place < lengths[:, None]
        self.index = None if bool(valid.all()) else valid.flatten().nonzero().flatten()
        assert int(starts[0]) == 0

    def pad(self, packed: Tensor) -> Tensor:
        """[total, ...] to [B, L, ...], zeros in the padding."""
        if self.index is not None:
            rows = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
            packed = rows.index_copy(0, self.index, packed)
        return packed.view(*self.shape, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, L, ...] to [total, ...]."""
        rows = padded.flatten(0, 1)
        return rows if self.index is None else rows.index_select(0, self.index)


def repeat_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    """Key heads repeated for their group; ``x`` itself where each query head has one."""
    group = heads // x.shape[dim]
    return x if group == 1 else x.repeat_interleave(group, dim)


def prepare(problem: Problem, attention: Attention, key_order: Tensor | None = None) -> Prepared:
    """Bind ``attention(query, key, value, **others)``, which gives the output and, if the task asks, the mass. Others
    have a gradient: what is switched on is no argument, but in the example.

    With ``key_order`` keys and values are handed over in that order of their packed rows.
    """
    example = problem.example
    order = {} if key_order is None else dict.fromkeys(("key", "value"), key_order)
    tensors = {name: x[order[name]] if name in order else x for name, x in example.tensors.items()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items() if name != "active"}
    others = {name: x for name, x in leaves.items() if name not in ("query", "key", "value")}
    names = ("output", "mass") if problem.asks_mass else ("output",)

    def forward() -> dict[str, Tensor]:
        results = attention(leaves["query"], leaves["key"], leaves["value"], **others)
        return dict(zip(names, results, strict=False))

    upstream = {"output": example.grad_output.to(tensors["query"].dtype), "mass": example.grad_mass}
    return Prepared(forward, leaves, {name: upstream[name] for name in names}, order)


def fused(problem: Problem) -> Prepared:
    """This project's operator."""
    example = problem.example

    def attention(query: Tensor, key: Tensor, value: Tensor, **others: Tensor) -> Sequence[Tensor]:
        return fusedmm.gated_multimodal_attention(
            query,
            key,
            value,
            example.layout,
            active=example.tensors.get("active"),
            softmax=example.softmax,
            need_mass=problem.asks_mass,
            **others,  # type: ignore[arg-type]
        )

    return prepare(problem, attention)


def formula(
    query: Tensor, key: Tensor, value: Tensor, prior: Tensor | None, gate: Tensor | None, masks: Masks, kind: str
) -> tuple[Tensor, Tensor]:
    """The definition on padded tensors [B, H, L, X], as one writes it in plain PyTorch: output and mass."""
    one_hot = masks.one_hot[:, None]  # [B, 1, Lk, M]
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if prior is not None:
        scores = scores + prior @ one_hot.transpose(-1, -2)
    if masks.visible is not None:
        scores = scores.masked_fill(~masks.visible, -torch.inf)
    if kind == "per_modality":
        peak = scores.amax(-1, keepdim=True)
        weights = (scores - (peak if masks.blind is None else peak.masked_fill(masks.blind, 0.0))).exp()
        sums = weights @ one_hot  # [B, H, Lq, M]
        probabilities = weights * (sums.clamp_min(1e-30).reciprocal() @ one_hot.transpose(-1, -2))
    else:
        probabilities = scores.softmax(-1)
        if masks.blind is not None:
            probabilities = probabilities.masked_fill(masks.blind, 0.0)
    mass = probabilities @ one_hot
    if gate is not None:
        probabilities = probabilities * (gate @ one_hot.transpose(-1, -2))
    return probabilities.to(value.dtype) @ value, mass


def plain_formula(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    """The same where nothing about modalities is asked for."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if masks.visible is not None:
        scores = scores.masked_fill(~masks.visible, -torch.inf)
    probabilities = scores.softmax(-1)
    if masks.blind is not None:
        probabilities = probabilities.masked_fill(masks.blind, 0.0)
    output: Tensor = probabilities.to(value.dtype) @ value
    return output


def eager(problem: Problem, *, compiled: bool = False) -> Prepared:
    """The formula on padded tensors, plain or through `torch.compile`."""
    padded, kind = problem.padded, problem.example.softmax
    asked: Callable[..., Any] = formula if problem.asks_mass else plain_formula
    run = torch.compile(asked, dynamic=False) if compiled else asked

    def attention(
        query: Tensor, key: Tensor, value: Tensor, log_prior: Tensor | None = None, gate: Tensor | None = None
    ) -> Sequence[Tensor]:
        heads = query.shape[1]
        q, k, v = padded.queries(query), padded.keys(key, heads), padded.keys(value, heads)
        if not problem.asks_mass:
            return (padded.pack(run(q, k, v, padded.masks)),)
        prior, gates = (None if x is None else padded.queries(x) for x in (log_prior, gate))
        output, mass = run(q, k, v, prior, gates, padded.masks, kind)
        return padded.pack(output), padded.pack(mass)

    return prepare(problem, attention)


def loops(problem: Problem) -> Prepared:
    """A Python loop over samples, each the formula on exactly its own tokens: how models with packed inputs do it."""
    layout, kind = problem.example.layout, problem.example.softmax
    q_bounds, k_bounds = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k[:: layout.num_modalities].tolist()
    whole = problem.padded.masks
    samples = []
    for b in range(layout.batch_size):
        q, k = slice(q_bounds[b], q_bounds[b + 1]), slice(k_bounds[b], k_bounds[b + 1])
        queries, keys = slice(0, q.stop - q.start), slice(0, k.stop - k.start)
        visible, blind = (None if x is None else x[b : b + 1] for x in (whole.visible, whole.blind))
        if visible is not None:
            visible = visible[:, :, queries if visible.shape[2] > 1 else slice(None), keys]
            visible = None if bool(visible.all()) else visible
        if blind is not None:
            blind = blind[:, :, queries if blind.shape[2] > 1 else slice(None)]
            blind = blind if bool(blind.any()) else None
        samples.append((q, k, Masks(whole.one_hot[b : b + 1, keys], visible, blind)))

    def attention(
        query: Tensor, key: Tensor, value: Tensor, log_prior: Tensor | None = None, gate: Tensor | None = None
    ) -> Sequence[Tensor]:
        outputs, masses = [], []
        for q, k, masks in samples:
            queries = query[q].transpose(0, 1)[None]
            keys, values = (repeat_heads(x[k].transpose(0, 1)[None], query.shape[1], 1) for x in (key, value))
            if not problem.asks_mass:
                outputs.append(plain_formula(queries, keys, values, masks)[0].transpose(0, 1))
                continue
            prior, gates = (None if x is None else x[q].transpose(0, 1)[None] for x in (log_prior, gate))
            output, mass = formula(queries, keys, values, prior, gates, masks, kind)
            outputs.append(output[0].transpose(0, 1))
            masses.append(mass[0].transpose(0, 1))
        return (torch.cat(outputs), torch.cat(masses)) if problem.asks_mass else (torch.cat(outputs),)

    return prepare(problem, attention)


def sdpa_padded(problem: Problem) -> Prepared:
    """One call of scaled_dot_product_attention on padded tensors.

    Where the task asks for priors and mass, they ride along as one more query and key column and as one-hot value
    columns for each modality; gates cannot."""
    padded = problem.padded
    mask, blind = padded.masks.visible, padded.masks.blind
    if mask is not None and blind is not None:
        mask = mask | blind  # a row that sees nothing would be NaN
    columns = padded.masks.one_hot[:, None]

    def attention(query: Tensor, key: Tensor, value: Tensor, log_prior: Tensor | None = None) -> Sequence[Tensor]:
        heads, dim = query.shape[1], query.shape[2]
        q, k, v = padded.queries(query), padded.keys(key, heads), padded.keys(value, heads)
        if problem.asks_mass:
            one_hot = columns.expand(-1, heads, -1, -1).to(v.dtype)
            if log_prior is not None:
                q = torch.cat((q, padded.queries(log_prior).to(q.dtype) * dim**0.5), -1)
                k = torch.cat((k, one_hot), -1)
            v = torch.cat((v, one_hot), -1)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=dim**-0.5)
        output = padded.pack(output if blind is None else output.masked_fill(blind, 0.0))
        return (output[..., :dim], output[..., dim:].float()) if problem.asks_mass else (output,)

    return prepare(problem, attention)


def sdpa_dense(problem: Problem, *, backend: str) -> Prepared:
    """One call on samples of one length without any padding, through the backend that is named."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch = problem.example.layout.batch_size

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            output = F.scaled_dot_product_attention(q, k, v, enable_gqa=query.shape[1] != key.shape[1])
        return (output.transpose(1, 2).flatten(0, 1),)

    return prepare(problem, attention)


def variants(kind: str, features: Sequence[str], softmax: str, *, uniform: bool) -> tuple[Variant, ...]:
    """Everyone who can do all of a case's task."""
    from benchmarks.cases import attention_gpu as gpu
    from benchmarks.cases import attention_paths as paths

    found = [
        Variant("fusedmm", fused, ours=True),
        Variant("eager", eager),
        Variant("compile", partial(eager, compiled=True), compiles=True),
        Variant("loops", loops),
    ]
    plain, dense = not features, uniform and not features
    if softmax == "joint" and "gate" not in features:
        found.append(Variant("sdpa", sdpa_padded))
    if kind == "cuda":
        on_path = {f"fusedmm-{path}": partial(paths.on_path, path=path) for path in ("portable", "hopper")}
        found += [Variant(name, prepare, ours=True) for name, prepare in on_path.items()]
        if dense:
            found += [Variant(f"sdpa-{name}", partial(sdpa_dense, backend=backend)) for name, backend in gpu.BACKENDS]
        if plain:
            found += [Variant("varlen", gpu.varlen), Variant("flash-attn-4", gpu.flash_attention_4, compiles=True)]
        elif "times" not in features:
            found += [
                Variant("varlen+merge", gpu.varlen_merge, ("forward",), compiles=True),  # its LSE has no gradient
                Variant("flash-attn-4+merge", gpu.flash_attention_4_merge, compiles=True),
            ]
        found.append(Variant("flex", gpu.flex, compiles=True))
        found.append(Variant("flex+mask", partial(gpu.flex, count_mask=True), compiles=True))
    return tuple(found)
