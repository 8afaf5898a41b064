"""Modules end to end: padded tokens with masks in, packing, projections, attention and MLP, gradients of all
parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Prepared, Variant
from benchmarks.cases.attention_peers import Masks, formula
from fusedmm.nn import FusionBlock

SEED = 0


@dataclass(frozen=True)
class Shape:
    """A batch of padded tokens: how many of each modality at most, and how wide they are."""

    batch: int
    queries: int
    tokens: Mapping[str, int]
    widths: Mapping[str, int]
    embed_dim: int
    heads: int


@dataclass(frozen=True)
class Problem:
    """Inputs of one call, and how to make the module."""

    shape: Shape
    query: Tensor  # [B, Lq, E]
    tokens: Mapping[str, Tensor]  # [B, Lm, Em]
    masks: Mapping[str, Tensor]  # [B, Lm]
    upstream: Tensor  # [B, Lq, E]

    def module(self, impl: str, dtype: torch.dtype) -> FusionBlock:
        """The block, with the same parameters however it computes."""
        torch.manual_seed(SEED)
        block = FusionBlock(self.shape.embed_dim, self.shape.heads, self.shape.widths, impl=impl)
        return block.to(self.query.device, dtype)


def shapes(kind: str) -> dict[str, Shape]:
    """Every shape of a kind of device, by name."""
    call_widths = {"text": 384, "audio": 32, "bars": 16, "chart": 64}
    if kind == "cpu":
        return {"fusion-block": Shape(8, 16, {"text": 48, "audio": 48, "bars": 30, "chart": 49}, call_widths, 128, 4)}
    calls = {"text": 140, "audio": 140, "bars": 60, "chart": 196}
    return {
        "fusion-block": Shape(128, 64, calls, call_widths, 1024, 16),
        "fusion-block-tiny": Shape(4, 16, dict.fromkeys(calls, 64), call_widths, 256, 4),
    }


def builders(kind: str) -> dict[str, Callable[[], Case]]:
    """Every module case for a kind of device."""
    return {f"modules/{name}": partial(build, f"modules/{name}", kind, shape) for name, shape in shapes(kind).items()}


def build(name: str, kind: str, shape: Shape) -> Case:
    """Make a case. FLOPs are those of the projections, the attention and the MLP on real tokens."""
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    example = draw(shape, dtype, torch.device("cpu"))
    real = {modality: int(mask.sum()) for modality, mask in example.masks.items()}
    rows, width = shape.batch * shape.queries, shape.embed_dim
    projections = sum(2 * 2 * real[modality] * shape.widths[modality] * width for modality in real)
    forward = float(projections + rows * width * width * 2 * (2 + 8) + 4 * width * sum(real.values()) * shape.queries)
    parameters = sum(parameter.numel() for parameter in example.module("eager", torch.float32).parameters())
    tokens = sum(count * shape.widths[modality] for modality, count in real.items())
    moved = float((parameters + tokens + 2 * rows * width) * dtype.itemsize)
    small = Shape(2, 5, dict.fromkeys(shape.tokens, 7), shape.widths, 64, 4)
    return Case(
        name=name,
        sizes={
            "batch": shape.batch,
            "total_q": rows,
            "total_k": sum(real.values()),
            "modalities": len(real),
            "embed_dim": width,
            "heads": shape.heads,
            "dtype": str(dtype).removeprefix("torch."),
        },
        problem=partial(draw, shape, dtype),
        small=partial(draw, small, dtype),
        reference=lambda problem, wanted: prepare(problem, impl="reference", dtype=wanted),
        variants=variants(kind),
        flops={"forward": forward, "both": 3 * forward},
        bytes={"forward": moved, "both": 3 * moved},
        dtype=dtype,
        launch_bound="tiny" in name,
    )


def variants(kind: str) -> tuple[Variant, ...]:
    """The block with this project's attention, the same on padded tokens in plain PyTorch, and with the definition."""
    found = [
        Variant("fusedmm", prepare, ours=True),
        Variant("eager", prepare_padded),
        Variant("compile", partial(prepare_padded, compiled=True), compiles=True),
        Variant("reference-attention", partial(prepare, impl="reference")),
    ]
    if kind == "cuda":
        found.append(Variant("fusedmm-compiled", partial(prepare, compiled=True), ours=True, compiles=True))
    return tuple(found)


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random tokens, half to all of them real, one modality missing from every third sample."""
    generator = torch.Generator().manual_seed(SEED)
    tokens, masks = {}, {}
    for place, (modality, length) in enumerate(shape.tokens.items()):
        tokens[modality] = torch.randn(shape.batch, length, shape.widths[modality], generator=generator)
        lengths = torch.randint(length // 2, length + 1, (shape.batch,), generator=generator)
        lengths[place :: 3 * len(shape.tokens)] = 0
        masks[modality] = torch.arange(length) < lengths[:, None]
    query, upstream = (torch.randn(shape.batch, shape.queries, shape.embed_dim, generator=generator) for _ in range(2))
    return Problem(
        shape,
        query.to(device, dtype),
        {modality: x.to(device, dtype) for modality, x in tokens.items()},
        {modality: mask.to(device) for modality, mask in masks.items()},
        upstream.to(device, dtype),
    )


def prepare(
    problem: Problem, *, impl: str = "auto", compiled: bool = False, dtype: torch.dtype | None = None
) -> Prepared:
    """Bind the block to a batch."""
    wanted = dtype or problem.query.dtype
    module = problem.module(impl, wanted)
    run = torch.compile(module) if compiled else module
    query = problem.query.detach().to(wanted).requires_grad_()
    tokens = {modality: x.to(wanted) for modality, x in problem.tokens.items()}

    def forward() -> dict[str, Tensor]:
        return {"output": run(query, tokens, masks=problem.masks).output}

    leaves = {"query": query, **dict(module.named_parameters())}
    return Prepared(forward, leaves, {"output": problem.upstream.to(wanted)})


def padded_block(block: FusionBlock, query: Tensor, tokens: Mapping[str, Tensor], masks: Masks) -> Tensor:
    """The block as one writes it in plain PyTorch for padded tokens: all of them concatenated, one masked softmax."""
    attention = block.attention
    x = block.attention_norm(query)

    def heads(rows: Tensor) -> Tensor:
        split: Tensor = rows.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return split

    key, value = (
        heads(torch.cat([project[name](rows) for name, rows in tokens.items()], 1))
        for project in (attention.key_proj, attention.value_proj)
    )
    prior, gate = (
        factor.unflatten(0, x.shape[:2]).transpose(1, 2) for factor in attention.modality_gate(x.flatten(0, 1))
    )
    output, _ = formula(heads(attention.query_proj(x)), key, value, prior, gate, masks, "joint")
    x = query + attention.out_proj(output.transpose(1, 2).flatten(-2))
    result: Tensor = x + block.mlp(block.mlp_norm(x))
    return result


def prepare_padded(problem: Problem, *, compiled: bool = False) -> Prepared:
    """Bind the plain block, plain or through `torch.compile`, to a batch; its masks are made once."""
    module = problem.module("eager", problem.query.dtype)
    run = torch.compile(padded_block, dynamic=False) if compiled else padded_block
    query = problem.query.detach().clone().requires_grad_()
    batch, places = query.shape[0], list(problem.masks.values())
    modality = torch.arange(len(places), device=query.device).repeat_interleave(
        torch.tensor([mask.shape[1] for mask in places], device=query.device)
    )
    one_hot = nn.functional.one_hot(modality, len(places)).float().expand(batch, -1, -1)
    masks = Masks(one_hot, torch.cat(places, 1)[:, None, None])

    def forward() -> dict[str, Tensor]:
        return {"output": run(module, query, problem.tokens, masks)}

    return Prepared(forward, {"query": query, **dict(module.named_parameters())}, {"output": problem.upstream})
