"""Distillation cases: losses of two linear heads at the shapes of the literature, few classes, scores alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Prepared, Variant
from benchmarks.cases import distillation_peers as peers
from benchmarks.cases.distillation_peers import Problem

LOGIT_STD = 3.0
SCORES_KERNEL = "distillation_statistics[scores,heads,labels,bf16]"  # its name in the static table
SEED = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of one batch and which loss; ``task`` is "loss" or "scores"."""

    rows: int
    classes: int
    student_dim: int
    teacher_dim: int
    task: str = "loss"
    beta: float = 0.0
    alpha: float = 1.0

    def problem(self, dtype: torch.dtype, device: torch.device) -> Problem:
        """Draw hidden states and weights so that logits have a standard deviation of `LOGIT_STD`."""
        generator = torch.Generator(device).manual_seed(SEED)

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

        return Problem(
            student=draw(self.rows, self.student_dim),
            student_weight=draw(self.classes, self.student_dim, std=LOGIT_STD / math.sqrt(self.student_dim)),
            teacher=draw(self.rows, self.teacher_dim),
            teacher_weight=draw(self.classes, self.teacher_dim, std=LOGIT_STD / math.sqrt(self.teacher_dim)),
            labels=torch.randint(self.classes, (self.rows,), generator=generator, device=device),
            beta=self.beta,
            alpha=self.alpha,
        )


def shapes(kind: str) -> dict[str, Shape]:
    """Every shape of a kind of device, by name."""
    if kind == "cpu":
        return {
            "kl": Shape(512, 4096, 128, 256),
            "jsd": Shape(512, 4096, 128, 256, beta=0.5),
            "cross-entropy": Shape(512, 4096, 128, 256, alpha=0.0),
            "small-v": Shape(4096, 32, 64, 64),
            "scores": Shape(512, 4096, 128, 256, task="scores"),
            "scores-small-v": Shape(4096, 32, 64, 64, task="scores"),
        }
    vocabulary = 128256
    return {
        "kl-2048-4096": Shape(8192, vocabulary, 2048, 4096),
        "kl-4096-4096": Shape(8192, vocabulary, 4096, 4096),
        "jsd-2048-4096": Shape(8192, vocabulary, 2048, 4096, beta=0.5),
        "jsd-4096-4096": Shape(8192, vocabulary, 4096, 4096, beta=0.5),
        "kl-n1024": Shape(1024, vocabulary, 4096, 4096),
        "jsd-n1024": Shape(1024, vocabulary, 4096, 4096, beta=0.5),
        "cross-entropy": Shape(8192, vocabulary, 4096, 4096, alpha=0.0),
        "small-v-64": Shape(64, 10, 128, 128),
        "small-v-1k": Shape(1024, 2, 256, 256),
        "small-v": Shape(65536, 100, 512, 512),
        "small-v-1000": Shape(65536, 1000, 512, 512),
        "small-v-1m": Shape(1 << 20, 10, 128, 128),
        "scores-2048-4096": Shape(8192, vocabulary, 2048, 4096, task="scores"),
        "scores-small-v": Shape(65536, 100, 512, 512, task="scores"),
    }


def builders(kind: str) -> dict[str, Callable[[], Case]]:
    """Every distillation case for a kind of device."""
    return {
        f"distillation/{name}": partial(build, f"distillation/{name}", kind, shape)
        for name, shape in shapes(kind).items()
    }


def build(name: str, kind: str, shape: Shape) -> Case:
    """Make a case."""
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    product = 2.0 * shape.rows * shape.classes
    teacher_dim = 0 if shape.alpha == 0.0 else shape.teacher_dim
    student_size = (shape.rows + shape.classes) * shape.student_dim * dtype.itemsize
    teacher_size = (shape.rows + shape.classes) * teacher_dim * dtype.itemsize
    flops = {"forward": product * (shape.student_dim + teacher_dim)}
    moved = {"forward": float(student_size + teacher_size)}
    variants: tuple[Variant, ...]
    if shape.task == "loss":
        flops["both"] = product * (3 * shape.student_dim + teacher_dim)
        moved["both"] = float(2 * student_size + teacher_size)
        variants = peers.losses(kind, shape.beta, shape.alpha)
    else:
        variants = peers.SCORES
    sweeps_alone = shape.task == "scores" and shape.classes > 1024  # one kernel does all of it
    # Partial tiles of every size, yet multiples that QuACK asks for, of 128 classes for the pipeline that is timed.
    small = Shape(72, min(shape.classes, 1152), 64, 48, shape.task, shape.beta, shape.alpha)
    return Case(
        name=name,
        sizes={
            "rows": shape.rows,
            "classes": shape.classes,
            "student_dim": shape.student_dim,
            "teacher_dim": shape.teacher_dim,
            "beta": shape.beta,
            "alpha": shape.alpha,
            "dtype": str(dtype).removeprefix("torch."),
        },
        problem=lambda device: shape.problem(dtype, device),
        small=lambda device: small.problem(dtype, device),
        reference=loss_reference if shape.task == "loss" else scores_reference,
        variants=variants,
        flops=flops,
        bytes=moved,
        dtype=dtype,
        launch_bound=shape.classes <= 1024,
        kernels={("forward", "fusedmm"): SCORES_KERNEL} if kind == "cuda" and sweeps_alone else {},
    )


def loss_reference(problem: Problem, dtype: torch.dtype) -> Prepared:
    """The definition in float64, or plain PyTorch in the problem's own dtype."""
    if dtype != torch.float64:
        return peers.eager_loss(problem)
    return peers.fused_loss(problem.cast(dtype), impl="reference")


def scores_reference(problem: Problem, dtype: torch.dtype) -> Prepared:
    """The same for scores."""
    if dtype != torch.float64:
        return peers.eager_scores(problem)
    return peers.fused_scores(problem.cast(dtype), impl="reference")
