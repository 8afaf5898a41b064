"""Everyone who can do a distillation case: this project, PyTorch's compositions, the libraries that are installed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedmm
from benchmarks.case import Prepared, Unavailable, Variant
from benchmarks.peers import require

CHUNK = 1024  # rows of the chunked compositions
MODES = ("forward", "both")  # a fast path takes the gradient in the forward: the backward alone says nothing


@dataclass(frozen=True)
class Problem:
    """Hidden states [N, D] and weights [V, D] of both heads, labels [N], and which loss."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor
    beta: float
    alpha: float

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The same in another dtype."""
        names = ("student", "student_weight", "teacher", "teacher_weight")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def student_head(self) -> fusedmm.LinearHead:
        return fusedmm.LinearHead(self.student, self.student_weight)

    def teacher_head(self) -> fusedmm.LinearHead:
        return fusedmm.LinearHead(self.teacher, self.teacher_weight)


def prepare(problem: Problem, loss: Callable[[Tensor, Tensor], Tensor]) -> Prepared:
    """Bind ``loss(student hidden, student weight)``."""
    leaves = {
        "student": problem.student.detach().clone().requires_grad_(),
        "student_weight": problem.student_weight.detach().clone().requires_grad_(),
    }
    upstream = {"loss": torch.ones((), device=problem.student.device, dtype=torch.float32)}
    return Prepared(lambda: {"loss": loss(leaves["student"], leaves["student_weight"])}, leaves, upstream)


def fused_loss(problem: Problem, *, memory: str = "fast", impl: str = "auto") -> Prepared:
    """This project's loss."""
    teacher = problem.teacher_head()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fusedmm.distillation_loss(
            fusedmm.LinearHead(hidden, weight),
            teacher,
            problem.labels,
            beta=problem.beta,
            alpha=problem.alpha,
            memory=memory,
            impl=impl,
        )

    return prepare(problem, loss)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Divergence of logits [N, V] summed over classes and rows, float32, as one writes it in plain PyTorch."""
    log_p, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if beta == 0.0:
        return F.kl_div(log_p, log_t, log_target=True, reduction="sum")
    if beta == 1.0:
        return F.kl_div(log_t, log_p, log_target=True, reduction="sum")
    mixture = torch.logaddexp(log_t + torch.tensor(beta).log(), log_p + torch.tensor(1 - beta).log())
    to_teacher = F.kl_div(mixture, log_t, log_target=True, reduction="sum")
    to_student = F.kl_div(mixture, log_p, log_target=True, reduction="sum")
    return beta * to_teacher + (1 - beta) * to_student


def _rows_loss(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, beta: float, alpha: float
) -> Tensor:
    logits = hidden @ weight.T
    if alpha == 1.0:
        return divergence(logits, teacher @ teacher_weight.T, beta)
    hard = F.cross_entropy(logits.float(), labels, reduction="sum")
    if alpha == 0.0:
        return hard
    return alpha * divergence(logits, teacher @ teacher_weight.T, beta) + (1 - alpha) * hard


def eager_loss(problem: Problem, *, compiled: bool = False) -> Prepared:
    """All logits at once, plain or through `torch.compile`."""
    run = torch.compile(_rows_loss, dynamic=False) if compiled else _rows_loss
    fixed = (problem.teacher, problem.teacher_weight, problem.labels, problem.beta, problem.alpha)
    rows = problem.student.shape[0]
    return prepare(problem, lambda hidden, weight: run(hidden, weight, *fixed) / rows)


def chunked_loss(problem: Problem) -> Prepared:
    """A Python loop over chunks of rows, each recomputed in the backward: how training scripts save memory."""
    rows = problem.student.shape[0]
    fixed = (problem.beta, problem.alpha)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, rows, CHUNK):
            part = slice(start, start + CHUNK)
            arguments = (hidden[part], weight, problem.teacher[part], problem.teacher_weight, problem.labels[part])
            total = total + checkpoint(_rows_loss, *arguments, *fixed, use_reentrant=False)
        return total / rows

    return prepare(problem, loss)


def liger(problem: Problem) -> Prepared:
    """Liger's fused linear JSD; its beta is ours."""
    require("liger-kernel")
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    run = LigerFusedLinearJSD(jsd_beta=problem.beta)
    return prepare(problem, lambda hidden, weight: run(hidden, weight, problem.teacher, problem.teacher_weight, None))


def liger_chunked(problem: Problem) -> Prepared:
    """Liger's chunked JSD, compiled as it is by default."""
    require("liger-kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    run = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=problem.beta)
    fixed = (problem.teacher, problem.teacher_weight, problem.labels)
    return prepare(problem, lambda hidden, weight: run(hidden, weight, *fixed))


def liger_cross_entropy(problem: Problem) -> Prepared:
    """Liger's fused linear cross entropy."""
    require("liger-kernel")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    run = LigerFusedLinearCrossEntropyLoss()
    return prepare(problem, lambda hidden, weight: run(weight, hidden, problem.labels))


def fla(problem: Problem) -> Prepared:
    """flash-linear-attention's fused KL divergence; its default, float32 products for dW, is an order slower."""
    require("fla-core")
    from fla.modules import FusedKLDivLoss

    run = FusedKLDivLoss(accumulate_grad_in_fp32=False)
    return prepare(problem, lambda hidden, weight: run(hidden, problem.teacher, weight, problem.teacher_weight))


def fla_cross_entropy(problem: Problem) -> Prepared:
    """flash-linear-attention's fused linear cross entropy, likewise."""
    require("fla-core")
    from fla.modules import FusedLinearCrossEntropyLoss

    run = FusedLinearCrossEntropyLoss(accumulate_grad_in_fp32=False)
    return prepare(problem, lambda hidden, weight: run(hidden, problem.labels, weight))


def trl(problem: Problem) -> Prepared:
    """TRL's generalised JSD, on logits."""
    require("trl")
    from trl.experimental.gkd import GKDTrainer

    rows = problem.student.shape[0]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        teacher = problem.teacher @ problem.teacher_weight.T
        total: Tensor = GKDTrainer.generalized_jsd_loss(hidden @ weight.T, teacher, beta=problem.beta, reduction="sum")
        return total / rows

    return prepare(problem, loss)


def cut_cross_entropy(problem: Problem) -> Prepared:
    """Apple's cut cross entropy."""
    require("cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    return prepare(problem, lambda hidden, weight: linear_cross_entropy(hidden, weight, problem.labels))


def quack(problem: Problem) -> Prepared:
    """QuACK's chunked linear cross entropy, with the scaled-exponential pipeline where it has one."""
    require("quack-kernels")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if problem.student.shape[0] % 8 or problem.student_weight.shape[0] % 8:
        raise Unavailable("quack wants rows and classes in multiples of 8")
    return prepare(problem, lambda hidden, weight: chunked_linear_cross_entropy(hidden, weight, problem.labels))


def torch_linear_cross_entropy(problem: Problem) -> Prepared:
    """PyTorch's own fused linear cross entropy, in chunks as it chooses."""
    run = getattr(F, "linear_cross_entropy", None)
    if run is None:
        raise Unavailable("torch.nn.functional.linear_cross_entropy is not in this torch")
    return prepare(problem, lambda hidden, weight: run(hidden, weight, problem.labels))


CROSS_ENTROPIES = {
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
    "liger": liger_cross_entropy,
    "fla": fla_cross_entropy,
}
COMPILED = ("quack", "liger-chunked")  # by CuTe and by torch.compile
DIVERGENCES = {"liger": liger, "liger-chunked": liger_chunked, "trl": trl}


def losses(kind: str, beta: float, alpha: float) -> tuple[Variant, ...]:
    """Everyone who can compute a loss."""
    found = [
        Variant("fusedmm", fused_loss, MODES, ours=True),
        Variant("fusedmm-lean", partial(fused_loss, memory="lean"), MODES, ours=True),
        Variant("eager", eager_loss, MODES),
        Variant("compile", partial(eager_loss, compiled=True), MODES, compiles=True),
        Variant("chunked", chunked_loss, MODES),
    ]
    libraries: dict[str, Callable[[Problem], Prepared]] = {}
    if alpha == 0.0:
        found.append(Variant("torch-linear-ce", torch_linear_cross_entropy, MODES))
        libraries |= CROSS_ENTROPIES
    else:
        libraries |= DIVERGENCES
        if beta == 0.0:
            libraries["fla"] = fla
    if kind == "cuda":
        found += [Variant(name, library, MODES, compiles=name in COMPILED) for name, library in libraries.items()]
    return tuple(found)


def fused_scores(problem: Problem, *, impl: str = "auto") -> Prepared:
    """This project's scores."""

    def forward() -> dict[str, Tensor]:
        heads = problem.student_head(), problem.teacher_head()
        scores = fusedmm.distillation_scores(*heads, problem.labels, impl=impl)
        return {name: score for name, score in scores._asdict().items() if score is not None}

    return Prepared(forward, {}, {})


def _row_scores(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    z, u = (hidden @ weight.T).float(), (teacher @ teacher_weight.T).float()
    log_p, log_t = z.log_softmax(-1), u.log_softmax(-1)
    p, t = log_p.exp(), log_t.exp()
    label = labels[:, None]
    student_nll, teacher_nll = (-x.gather(1, label)[:, 0] for x in (log_p, log_t))
    others = z.scatter(1, label, -torch.inf)
    return {
        "forward_kl": (t * (log_t - log_p)).sum(-1),
        "reverse_kl": (p * (log_p - log_t)).sum(-1),
        "hellinger": 1 - (p * t).sqrt().sum(-1),
        "student_entropy": -(p * log_p).sum(-1),
        "teacher_entropy": -(t * log_t).sum(-1),
        "student_confidence": p.amax(-1),
        "teacher_confidence": t.amax(-1),
        "agreement": (z.argmax(-1) == u.argmax(-1)).float(),
        "student_nll": student_nll,
        "teacher_nll": teacher_nll,
        "excess_loss": student_nll - teacher_nll,
        "el2n": p.scatter_add(1, label, -torch.ones_like(label, dtype=p.dtype)).norm(dim=-1),
        "margin": z.gather(1, label)[:, 0] - others.amax(-1),
        "grad_norm": (p - t).norm(dim=-1) * hidden.float().norm(dim=-1),
    }


def eager_scores(problem: Problem, *, compiled: bool = False, chunk: int | None = None) -> Prepared:
    """Every field from full logits, at once or a chunk of rows at a time."""
    run = torch.compile(_row_scores, dynamic=False) if compiled else _row_scores
    rows = problem.student.shape[0]
    step = chunk or rows

    def forward() -> dict[str, Tensor]:
        parts = [
            run(
                problem.student[start : start + step],
                problem.student_weight,
                problem.teacher[start : start + step],
                problem.teacher_weight,
                problem.labels[start : start + step],
            )
            for start in range(0, rows, step)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return Prepared(forward, {}, {})


SCORES = (
    Variant("fusedmm", fused_scores, ("forward",), ours=True),
    Variant("eager", eager_scores, ("forward",)),
    Variant("compile", partial(eager_scores, compiled=True), ("forward",), compiles=True),
    Variant("chunked", partial(eager_scores, chunk=CHUNK), ("forward",)),
)
