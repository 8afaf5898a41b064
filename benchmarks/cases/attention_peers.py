"""Everyone who can do an attention case: this project, PyTorch's compositions, and the libraries that are installed.

All take packed tensors. What a user would prepare once a batch (padding indices, one-hot columns, masks) is prepared
outside the timed call, except where a name says ``+mask``; that favours the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

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


class Padded:
    """Where packed rows lie in padded tensors [B, L], and what each query may see.

    Attributes:
        q_rows, k_rows: [B, Lq], [B, Lk] packed row of each place; padding repeats row 0.
        q_valid: [B, Lq] bool.
        one_hot: [B, Lk, M] modality of each key, float32; 0 in the padding.
        visible: [B, 1 or Hq, Lq or 1, Lk] bool.
        blind: [B, 1 or Hq, Lq or 1, 1] bool, queries that see nothing.
    """

    def __init__(self, example: AttentionExample) -> None:
        layout = example.layout
        modalities = layout.num_modalities
        self.q_rows, self.q_valid = _places(layout.cu_seqlens_q)
        self.k_rows, k_valid = _places(layout.cu_seqlens_k[::modalities])
        modality = (layout.key_segments() % modalities)[self.k_rows]  # [B, Lk]
        self.one_hot = F.one_hot(modality, modalities).float() * k_valid[..., None]
        visible = k_valid[:, None, None]
        if "active" in example.tensors:
            chosen = modality[:, None].expand(-1, example.tensors["active"].shape[1], -1)
            visible = visible & example.tensors["active"].gather(2, chosen)[:, :, None]
        if layout.visibility is not None:
            ranges = layout.visibility.ranges[self.q_rows]  # [B, Lq, M, 2]
            index = modality[:, None].expand(-1, ranges.shape[1], -1)
            low, high = (ranges[..., side].gather(2, index) for side in (0, 1))
            rows = self.k_rows[:, None]
            visible = visible & ((rows >= low) & (rows < high))[:, None]
        self.visible = visible
        self.blind = ~visible.any(-1, keepdim=True)

    def queries(self, packed: Tensor) -> Tensor:
        """[total_q, H, X] to [B, H, Lq, X]."""
        return packed[self.q_rows].transpose(1, 2)

    def keys(self, packed: Tensor, heads: int) -> Tensor:
        """[total_k, Hkv, X] to [B, H, Lk, X], key heads repeated for their group."""
        return packed[self.k_rows].transpose(1, 2).repeat_interleave(heads // packed.shape[1], 1)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, H, Lq, X] to [total_q, H, X]."""
        return padded.transpose(1, 2)[self.q_valid]


def _places(bounds: Tensor) -> tuple[Tensor, Tensor]:
    starts, lengths = bounds[:-1].long(), bounds.diff().long()
    place = torch.arange(int(lengths.max()), device=bounds.device)
    valid = place < lengths[:, None]
    return torch.where(valid, starts[:, None] + place, 0), valid


def prepare(problem: Problem, attention: Attention) -> Prepared:
    """Bind ``attention(query, key, value, **others)``, which gives the output and, if the task asks, the mass."""
    example = problem.example
    leaves = {name: x.detach().clone().requires_grad_() for name, x in example.tensors.items() if name != "active"}
    others = {name: x for name, x in leaves.items() if name not in ("query", "key", "value")}
    if "active" in example.tensors:
        others["active"] = example.tensors["active"]
    names = ("output", "mass") if problem.asks_mass else ("output",)

    def forward() -> dict[str, Tensor]:
        results = attention(leaves["query"], leaves["key"], leaves["value"], **others)
        return dict(zip(names, results, strict=False))

    upstream = {"output": example.grad_output.to(example.tensors["query"].dtype), "mass": example.grad_mass}
    return Prepared(forward, leaves, {name: upstream[name] for name in names})


def fused(problem: Problem) -> Prepared:
    """This project's operator."""
    example = problem.example

    def attention(query: Tensor, key: Tensor, value: Tensor, **others: Tensor) -> Sequence[Tensor]:
        return fusedmm.gated_multimodal_attention(
            query,
            key,
            value,
            example.layout,
            softmax=example.softmax,
            **others,  # type: ignore[arg-type]
        )

    return prepare(problem, attention)


def formula(
    query: Tensor, key: Tensor, value: Tensor, prior: Tensor | None, gate: Tensor | None, padded: Padded, kind: str
) -> tuple[Tensor, Tensor]:
    """The definition on padded tensors [B, H, L, X], as one writes it in plain PyTorch: output and mass."""
    one_hot = padded.one_hot[:, None]  # [B, 1, Lk, M]
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if prior is not None:
        scores = scores + prior @ one_hot.transpose(-1, -2)
    scores = scores.masked_fill(~padded.visible, -torch.inf)
    if kind == "joint":
        probabilities = scores.softmax(-1).masked_fill(padded.blind, 0.0)
    else:
        weights = (scores - scores.amax(-1, keepdim=True).masked_fill(padded.blind, 0.0)).exp()
        sums = weights @ one_hot  # [B, H, Lq, M]
        probabilities = weights * (sums.clamp_min(1e-30).reciprocal() @ one_hot.transpose(-1, -2))
    mass = probabilities @ one_hot
    if gate is not None:
        probabilities = probabilities * (gate @ one_hot.transpose(-1, -2))
    return probabilities.to(value.dtype) @ value, mass


def eager(problem: Problem, *, compiled: bool = False) -> Prepared:
    """The formula on padded tensors, plain or through `torch.compile`."""
    padded, kind = problem.padded, problem.example.softmax
    run = torch.compile(formula, dynamic=False) if compiled else formula

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_prior: Tensor | None = None,
        gate: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Sequence[Tensor]:
        heads = query.shape[1]
        prior, gates = (None if x is None else padded.queries(x) for x in (log_prior, gate))
        output, mass = run(
            padded.queries(query), padded.keys(key, heads), padded.keys(value, heads), prior, gates, padded, kind
        )
        return padded.pack(output), padded.pack(mass)

    return prepare(problem, attention)


def loops(problem: Problem) -> Prepared:
    """A Python loop over samples, each the formula on exactly its own tokens: how models with packed inputs do it."""
    layout, kind = problem.example.layout, problem.example.softmax
    modalities = layout.num_modalities
    q_bounds, k_bounds = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k[::modalities].tolist()
    masks = problem.padded
    samples = []
    for b in range(layout.batch_size):
        q, k = slice(q_bounds[b], q_bounds[b + 1]), slice(k_bounds[b], k_bounds[b + 1])
        view = object.__new__(Padded)
        view.one_hot = masks.one_hot[b : b + 1, : k.stop - k.start]
        rows = slice(0, q.stop - q.start) if masks.visible.shape[2] > 1 else slice(0, 1)
        view.visible = masks.visible[b : b + 1, :, rows, : k.stop - k.start]
        view.blind = masks.blind[b : b + 1, :, rows]
        samples.append((q, k, view))

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_prior: Tensor | None = None,
        gate: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Sequence[Tensor]:
        group = query.shape[1] // key.shape[1]
        outputs, masses = [], []
        for q, k, view in samples:
            prior, gates = (None if x is None else x[q].transpose(0, 1)[None] for x in (log_prior, gate))
            keys, values = (x[k].transpose(0, 1)[None].repeat_interleave(group, 1) for x in (key, value))
            output, mass = formula(query[q].transpose(0, 1)[None], keys, values, prior, gates, view, kind)
            outputs.append(output[0].transpose(0, 1))
            masses.append(mass[0].transpose(0, 1))
        return torch.cat(outputs), torch.cat(masses)

    return prepare(problem, attention)


def sdpa_padded(problem: Problem) -> Prepared:
    """One call of scaled_dot_product_attention on padded tensors.

    Where the task asks for priors and mass, they ride along as one more query and key column and as one-hot value
    columns for each modality; gates cannot."""
    padded = problem.padded
    mask = padded.visible | padded.blind  # a row that sees nothing would be NaN
    columns = padded.one_hot[:, None]

    def attention(
        query: Tensor, key: Tensor, value: Tensor, log_prior: Tensor | None = None, active: Tensor | None = None
    ) -> Sequence[Tensor]:
        heads, dim = query.shape[1], query.shape[2]
        q, k, v = padded.queries(query), padded.keys(key, heads), padded.keys(value, heads)
        if problem.asks_mass:
            one_hot = columns.expand(-1, heads, -1, -1).to(v.dtype)
            if log_prior is not None:
                q = torch.cat((q, padded.queries(log_prior).to(q.dtype) * dim**0.5), -1)
                k = torch.cat((k, one_hot), -1)
            v = torch.cat((v, one_hot), -1)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=dim**-0.5)
        output = padded.pack(output.masked_fill(padded.blind, 0.0))
        return output[..., :dim], output[..., dim:].float()

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
        Variant("compile", partial(eager, compiled=True)),
        Variant("loops", loops),
    ]
    plain, dense = not features, uniform and not features
    if softmax == "joint" and "gate" not in features:
        found.append(Variant("sdpa", sdpa_padded))
    if kind == "cuda":
        found += [Variant(f"fusedmm-{path}", partial(paths.on_path, path=path)) for path in ("portable", "hopper")]
        if dense:
            found += [Variant(f"sdpa-{name}", partial(sdpa_dense, backend=backend)) for name, backend in gpu.BACKENDS]
        if plain:
            found += [Variant("varlen", gpu.varlen), Variant("flash-attn-4", gpu.flash_attention_4)]
        elif "times" not in features:
            found.append(Variant("varlen+merge", gpu.varlen_merge, modes=("forward",)))
        found += [Variant("flex", gpu.flex), Variant("flex+mask", partial(gpu.flex, count_mask=True))]
    return tuple(found)
