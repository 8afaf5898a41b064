"""Attention cases: the libraries' dense shapes, jagged multimodal mixes, times, switched-off modalities, small ones."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Prepared
from benchmarks.cases import attention_peers as peers
from benchmarks.cases.attention_peers import Problem, prepare
from fusedmm.reference import attention as reference
from fusedmm.testing import AttentionExample, attention_example

SEED = 0
LONG = 512
Lengths = Sequence[int]


@dataclass(frozen=True)
class Shape:
    """One batch: lengths, heads, and what of the operator is in use.

    Attributes:
        q_lengths: [B] queries.
        k_lengths: [B, M] keys.
        features: of `fusedmm.testing.attention_example`; with none of them nothing about modalities is asked for.
        active: share of the modalities that is switched on (the leading ones).
    """

    q_lengths: Lengths
    k_lengths: Sequence[Lengths]
    heads: int
    kv_heads: int
    head_dim: int
    features: tuple[str, ...] = ("log_prior", "gate")
    softmax: str = "joint"
    active: float = 1.0

    @property
    def modalities(self) -> int:
        return len(self.k_lengths[0])

    @property
    def is_long(self) -> bool:
        """Whether nearly all of the work is whole tiles of the ordinary kernel's main loop, as the static model has it:
        few queries and short segments have kernels of their own.
        """
        return min(self.q_lengths) >= LONG and min(map(min, self.k_lengths)) >= LONG

    def example(self, dtype: torch.dtype, device: torch.device) -> AttentionExample:
        """Draw the batch."""
        example = attention_example(
            SEED,
            self.q_lengths,
            self.k_lengths,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            device=device,
            softmax=self.softmax,
            features=self.features,
        )
        if self.active == 1.0:
            return example
        on = torch.arange(self.modalities, device=device) < round(self.active * self.modalities)
        active = on.expand(len(self.q_lengths), self.heads, -1)
        return replace(example, tensors={**example.tensors, "active": active})

    def visible_pairs(self) -> int:
        """Query-key pairs that count, of one head."""
        if "times" in self.features:
            ranges = self.example(torch.float32, torch.device("cpu")).layout.visibility
            assert ranges is not None
            return int((ranges.ranges[..., 1] - ranges.ranges[..., 0]).clamp_min(0).sum())
        on = round(self.active * self.modalities)
        return sum(q * sum(keys[:on]) for q, keys in zip(self.q_lengths, self.k_lengths, strict=True))


def mixed(
    batch: int, queries: tuple[int, int], modalities: Sequence[tuple[int, int]], missing: float
) -> dict[str, object]:
    """Lengths of a jagged batch: each drawn from its range, a modality missing with some probability."""
    rng = random.Random(SEED)
    q_lengths = [rng.randint(*queries) for _ in range(batch)]
    k_lengths = [[0 if rng.random() < missing else rng.randint(*span) for span in modalities] for _ in range(batch)]
    return {"q_lengths": q_lengths, "k_lengths": k_lengths}


def dense(batch: int, length: int, modalities: int = 4) -> dict[str, object]:
    """Lengths of a batch without padding, as the libraries benchmark it, the keys split evenly over the modalities."""
    return {"q_lengths": [length] * batch, "k_lengths": [[length // modalities] * modalities] * batch}


# A day of one market: bars, past volatility, news, filings, analysts, macro, options, order book.
MARKET = [(60, 60), (5, 5), (0, 400), (5, 120), (5, 40), (12, 12), (20, 200), (100, 400)]
# An earnings call: sentences, audio frames, daily bars, patches of the chart.
CALL = [(60, 140), (60, 140), (30, 60), (196, 196)]
VISION = [(576, 2880), (32, 512)]
PLAIN: dict[str, object] = {"features": ()}
PRIOR: dict[str, object] = {"features": ("log_prior",)}


def shapes(kind: str) -> dict[str, dict[str, object]]:
    """Arguments of `Shape` for every case of a kind of device, by name."""
    if kind == "cpu":
        heads: dict[str, object] = {"heads": 4, "kv_heads": 4, "head_dim": 64}
        found = {"dense-plain": {**dense(2, 256), **heads, **PLAIN}, "dense-prior": {**dense(2, 256), **heads, **PRIOR}}
        found["dense-gated"] = {**dense(2, 256), **heads}
        found["jagged-market-day"] = {**mixed(16, (20, 20), MARKET, 0.2), **heads}
        found["jagged-call"] = {**mixed(8, (32, 32), CALL, 0.2), **heads}
        found["jagged-vision-latents"] = {**mixed(2, (64, 64), VISION, 0.0), **heads}
        found["time-causal"] = {**mixed(4, (64, 128), [(64, 256)] * 4, 0.0), **heads}
        found["time-causal"]["features"] = ("log_prior", "gate", "times")
        for share in (1.0, 0.5, 0.25, 0.125):
            found[f"active-{share:g}"] = {**mixed(4, (64, 64), [(64, 64)] * 8, 0.0), **heads, "active": share}
        found["per-modality"] = {**mixed(4, (64, 64), [(100, 100)] * 5, 0.0), **heads, "softmax": "per_modality"}
        found["few-latents"] = {**mixed(4, (8, 8), [(512, 512)] * 4, 0.0), **heads}
        found["tiny"] = {**mixed(4, (16, 16), [(16, 16)] * 4, 0.0), **heads}
        return found
    found = {}
    for dim, heads_count in ((64, 32), (128, 16)):
        for batch, length, label in ((4, 4096, "4k"), (1, 16384, "16k")):
            common: dict[str, object] = {"heads": heads_count, "kv_heads": heads_count, "head_dim": dim}
            found[f"dense-plain-d{dim}-{label}"] = {**dense(batch, length), **common, **PLAIN}
            found[f"dense-prior-d{dim}-{label}"] = {**dense(batch, length), **common, **PRIOR}
            found[f"dense-gated-d{dim}-{label}"] = {**dense(batch, length), **common}
        found[f"dense-single-d{dim}-4k"] = {**dense(4, 4096, modalities=1), **common, **PLAIN}
    grouped: dict[str, object] = {"heads": 64, "kv_heads": 8, "head_dim": 128}  # cuDNN's published shape
    found["dense-plain-d128-gqa-4k"] = {**dense(2, 4096), **grouped, **PLAIN}
    half: dict[str, object] = {"heads": 16, "kv_heads": 16, "head_dim": 64}
    found["jagged-market-day"] = {**mixed(256, (64, 64), MARKET, 0.2), **half}
    found["jagged-call"] = {**mixed(128, (64, 64), CALL, 0.2), **half}
    found["jagged-vision-latents"] = {**mixed(64, (64, 256), VISION, 0.0), **half}
    found["jagged-long"] = {**mixed(16, (512, 2048), [(32, 4096)] * 4, 0.0), **half}
    found["time-causal"] = {**mixed(8, (1024, 2048), [(512, 2048)] * 4, 0.0), **half}
    found["time-causal"]["features"] = ("log_prior", "gate", "times")
    for share in (1.0, 0.5, 0.25, 0.125):
        found[f"active-{share:g}"] = {**mixed(8, (1024, 1024), [(1024, 1024)] * 8, 0.0), **half, "active": share}
    for length in (512, 2048, 8192):
        lengths = mixed(16384 // length, (length, length), [(length // 4, length // 4)] * 5, 0.0)
        found[f"per-modality-{length}"] = {**lengths, **half, "softmax": "per_modality"}
    found["few-latents"] = {**mixed(16, (16, 16), [(4096, 4096)] * 4, 0.0), **half}
    found["tiny"] = {**mixed(8, (16, 16), [(32, 32)] * 4, 0.0), **half}
    return found


def builders(kind: str) -> dict[str, Callable[[], Case]]:
    """Every attention case for a kind of device."""
    return {
        f"attention/{name}": partial(build, f"attention/{name}", kind, arguments)
        for name, arguments in shapes(kind).items()
    }


def build(name: str, kind: str, arguments: Mapping[str, object]) -> Case:
    """Make a case from the arguments of its `Shape`."""
    shape = Shape(**arguments)  # type: ignore[arg-type]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    pairs = shape.visible_pairs()
    forward = 4.0 * shape.heads * shape.head_dim * pairs
    total_q, total_k = sum(shape.q_lengths), sum(map(sum, shape.k_lengths))
    rows = 2 * total_q * shape.heads + 2 * total_k * shape.kv_heads
    moved = float(rows * shape.head_dim * dtype.itemsize)
    asks_modalities = bool(shape.features)
    # Lengths down to a fifth keep what makes the case, empty segments and tails among it, at a size for float64.
    small = replace(
        shape,
        q_lengths=[max(1, min(q, 40 + q % 7)) for q in shape.q_lengths[:4]],
        k_lengths=[[min(k, 24 + k % 13) for k in keys] for keys in shape.k_lengths[:4]],
    )
    variants = peers.variants(kind, shape.features, shape.softmax, uniform=len(set(shape.q_lengths)) == 1)
    who = "fusedmm" if shape.modalities == 1 else ""  # what others make of one modality, dense-plain shows
    return Case(
        name=name,
        sizes={
            "batch": len(shape.q_lengths),
            "total_q": total_q,
            "total_k": total_k,
            "modalities": shape.modalities,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "active": shape.active,
            "softmax": shape.softmax,
            "visible_pairs": pairs,
            "dtype": str(dtype).removeprefix("torch."),
        },
        problem=lambda device: Problem(shape.example(dtype, device), asks_modalities),
        small=lambda device: Problem(small.example(dtype, device), asks_modalities),
        reference=prepare_reference,
        variants=tuple(variant for variant in variants if variant.name.startswith(who)),
        flops={"forward": forward, "backward": 2.5 * forward, "both": 3.5 * forward},
        bytes={"forward": moved, "backward": 2 * moved, "both": 3 * moved},
        dtype=dtype,
        launch_bound=any(word in name for word in ("tiny", "few-latents")),
        kernels=forward_kernels(shape) if kind == "cuda" and shape.is_long else {},
        terms=terms if asks_modalities else None,
    )


def forward_kernels(shape: Shape) -> dict[tuple[str, str], str]:
    """The forward kernel of each path in the static table: what has no row there is like the plain one."""
    features = "timed" if "times" in shape.features else "gated" if "gate" in shape.features else "plain"
    names = {"fusedmm-portable": "attention_forward", "fusedmm-hopper": "attention_hopper_forward"}
    softmax = f"{shape.softmax},{features if shape.softmax == 'joint' else 'plain'}"
    return {("forward", variant): f"{name}[{softmax},d{shape.head_dim},bf16]" for variant, name in names.items()}


def prepare_reference(problem: Problem, dtype: torch.dtype) -> Prepared:
    """Bind the reference, computing in ``dtype``."""
    example = problem.example.cast(torch.float64) if dtype == torch.float64 else problem.example

    def attention(query: Tensor, key: Tensor, value: Tensor, **others: Tensor) -> Sequence[Tensor]:
        return reference.gated_multimodal_attention(
            query,
            key,
            value,
            example.layout,
            scale=query.shape[-1] ** -0.5,
            softmax=example.softmax,
            compute_dtype=dtype,
            active=example.tensors.get("active"),
            **others,  # type: ignore[arg-type]
        )

    return prepare(replace(problem, example=example), attention)


def terms(problem: Problem, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a prior is a difference that may cancel; this is what it is a difference of."""
    example = problem.example
    delta = (example.grad_output * truth["output"]).abs().sum(-1) + (example.grad_mass * truth["mass"]).abs().sum(-1)
    return {"grad_log_prior": delta}
