"""The accuracy promise, measured against float64: bfloat16 heads at logit std 3, 10 and 30, and a nearly converged
student; and what bfloat16 logits do.

``python tests/test_distillation_accuracy.py`` writes the table of docs/distillation.md, and a test holds it to what the
present code gives.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedmm import LinearHead, Logits, distillation_loss, distillation_scores
from fusedmm.ops.distillation_waves import ROUNDED_SUMS, fast_rows, lean_sizes

DOCS = Path(__file__).resolve().parent.parent / "docs" / "distillation.md"
BEGIN, END = "<!-- accuracy:begin -->\n", "<!-- accuracy:end -->"
ROWS, CLASSES, DIM = 256, 4096, 128
LARGE = 8192, 128256, 4096  # rows, classes and width whose waves are emulated
WAVES = {"fast": -(-LARGE[0] // fast_rows(*LARGE[:2])), "lean": -(-LARGE[0] // lean_sizes(*LARGE)[0])}
BETAS = {"forward KL": 0.0, "JSD(0.5)": 0.5, "reverse KL": 1.0}
GAP = 1e-3  # nats between a nearly converged student and its teacher
PROMISE = 0.01  # relative norm of the error of a gradient
Gradients = tuple[Tensor, Tensor]


def heads(std: float, near: bool) -> tuple[LinearHead, LinearHead]:
    """bfloat16 heads whose logits have this standard deviation; near: the student's hidden states are the teacher's
    plus noise.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    hidden, weight = normal(ROWS, DIM), normal(CLASSES, DIM) * std / DIM**0.5
    if near:
        noisy = hidden + normal(ROWS, DIM) * (2 * GAP) ** 0.5 / std
        return LinearHead(noisy.bfloat16(), weight.bfloat16()), LinearHead(hidden.bfloat16(), weight.bfloat16())
    other = LinearHead(normal(ROWS, DIM).bfloat16(), (normal(CLASSES, DIM) * std / DIM**0.5).bfloat16())
    return LinearHead(hidden.bfloat16(), weight.bfloat16()), other


def cases() -> Iterator[tuple[str, LinearHead, LinearHead]]:
    for std in (3.0, 10.0, 30.0):
        yield f"std {std:.0f}", *heads(std, near=False)
    for std in (3.0, 10.0, 30.0):
        yield f"std {std:.0f}, gap {GAP:g}", *heads(std, near=True)


def gradient_of_logits(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Gradient of the mean divergence in the student's logits, by autograd in the dtype of the logits."""
    z = student.detach().requires_grad_()
    log_p, log_t = torch.log_softmax(z, -1), torch.log_softmax(teacher, -1)
    p, t = log_p.exp(), log_t.exp()
    if beta == 0.0:
        rows = (t * (log_t - log_p)).sum(-1)
    elif beta == 1.0:
        rows = (p * (log_p - log_t)).sum(-1)
    else:
        mixture = (beta * t + (1 - beta) * p).clamp_min(1e-30).log()
        rows = beta * (t * (log_t - mixture)).sum(-1) + (1 - beta) * (p * (log_p - mixture)).sum(-1)
    return torch.autograd.grad(rows.mean(), z)[0]


def exact(student: LinearHead, teacher: LinearHead, beta: float) -> Gradients:
    hidden, weight = student.hidden.double(), student.weight.double()
    grad = gradient_of_logits(hidden @ weight.T, teacher.hidden.double() @ teacher.weight.double().T, beta)
    return grad @ weight, grad.T @ hidden


def bfloat16_logits(student: LinearHead, teacher: LinearHead, beta: float) -> Gradients:
    """Chunks of logits from a bfloat16 matmul, the divergence in float32: what Liger's fused linear JSD and TRL's
    function do to numbers.
    """
    logits = [(head.hidden.float() @ head.weight.float().T).bfloat16().float() for head in (student, teacher)]
    grad = gradient_of_logits(logits[0], logits[1], beta).bfloat16().float()
    return grad @ student.weight.float(), grad.T @ student.hidden.float()


def on_a_gpu(memory: str, student: LinearHead, teacher: LinearHead, beta: float) -> Gradients:
    """Roundings of the Triton path with bfloat16 matmuls: float32 logits, dZ and dX rounded once, dW after each of the
    waves that the `LARGE` problem has.
    """
    logits = [head.hidden.float() @ head.weight.float().T for head in (student, teacher)]
    z = logits[0].requires_grad_()
    loss = distillation_loss(Logits(z), Logits(logits[1]), beta=beta, impl="eager")
    grad = torch.autograd.grad(loss, z)[0].bfloat16().float()
    waves = WAVES[memory]
    assert waves <= ROUNDED_SUMS  # else the sum is float32
    total = torch.zeros_like(student.weight)
    for wave_grad, wave_hidden in zip(grad.chunk(waves), student.hidden.chunk(waves), strict=True):
        total = (total.float() + wave_grad.T @ wave_hidden.float()).bfloat16()
    return (grad @ student.weight.float()).bfloat16(), total


def ours(memory: str) -> Callable[[LinearHead, LinearHead, float], Gradients]:
    def gradients(student: LinearHead, teacher: LinearHead, beta: float) -> Gradients:
        hidden, weight = student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_()
        loss = distillation_loss(LinearHead(hidden, weight), teacher, beta=beta, memory=memory, impl="eager")
        grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
        return grad_hidden, grad_weight

    return gradients


METHODS: dict[str, Callable[[LinearHead, LinearHead, float], Gradients]] = {
    "eager, fast": ours("fast"),
    "eager, lean": ours("lean"),
    "roundings of Triton, fast": partial(on_a_gpu, "fast"),
    "roundings of Triton, lean": partial(on_a_gpu, "lean"),
    "bfloat16 logits (peers)": bfloat16_logits,
}


def errors(method: str, student: LinearHead, teacher: LinearHead, beta: float) -> tuple[float, float]:
    """Relative norm of the error of dX and dW."""
    pairs = zip(METHODS[method](student, teacher, beta), exact(student, teacher, beta), strict=True)
    error_hidden, error_weight = (float((a.double() - b).norm() / b.norm()) for a, b in pairs)
    return error_hidden, error_weight


@pytest.mark.parametrize(("label", "beta"), BETAS.items(), ids=BETAS.keys())
@pytest.mark.parametrize(("name", "student", "teacher"), list(cases()), ids=[name for name, _, _ in cases()])
def test_gradients_are_within_the_promise(
    name: str, student: LinearHead, teacher: LinearHead, label: str, beta: float
) -> None:
    """And are what the table in the docs says, up to what another CPU's matmuls may change."""
    (row,) = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| {name} | {label} |")]
    for method, cell in zip(METHODS, row.split("|")[3:-1], strict=True):
        error = max(errors(method, student, teacher, beta))
        assert abs(100 * error - float(cell.strip(" %"))) <= 0.02 + 5 * error, method
        assert error <= PROMISE or "peers" in method, method


def test_bfloat16_logits_break_the_promise() -> None:
    """The table's point: the test above would notice rounded logits."""
    assert max(errors("bfloat16 logits (peers)", *heads(10.0, near=True), 0.5)) > PROMISE


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("std", [3.0, 30.0])
def test_identical_heads_give_zero(std: float, impl: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if impl == "eager" else torch.float32  # the interpreter cannot multiply bfloat16
    hidden, weight = (
        torch.randn(8, 32, device=device).to(dtype),
        (torch.randn(300, 32, device=device) * std / 32**0.5).to(dtype),
    )
    student, teacher = LinearHead(hidden, weight), LinearHead(hidden.clone(), weight.clone())
    scores = distillation_scores(student, teacher, beta=0.3, impl=impl)
    for name in ("forward_kl", "reverse_kl", "hellinger", "grad_norm", "divergence", "total_variation"):
        assert getattr(scores, name).abs().max() <= 1e-6, name
    assert bool((scores.agreement == 1).all())


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 17])
@pytest.mark.parametrize("classes", [2, 3, 64])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_identical_heads_have_identical_logits(softcap: float | None, classes: int, rows: int) -> None:
    """Of any number of rows: a temperature of 0.1 shows every rounding in grad_norm."""
    hidden, weight = torch.randn(rows, 16), torch.randn(classes, 16)
    scores = distillation_scores(*[LinearHead(hidden, weight, softcap=softcap)] * 2, temperature=0.1, impl="eager")
    assert bool((scores.grad_norm <= 1e-7 * hidden.norm(dim=-1) / 0.1).all())


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("classes", [40, 300])
def test_scores_of_a_nearly_converged_student(classes: int, impl: str, device: torch.device) -> None:
    """A gap of 1e-3 nats at logit std 30: closed forms that subtract sums lose it."""
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(16, 32, generator=draw), torch.randn(classes, 32, generator=draw) * 30 / 32**0.5
    noisy = hidden + torch.randn(16, 32, generator=draw) * (2 * GAP) ** 0.5 / 30
    student, teacher = LinearHead(noisy.to(device), weight.to(device)), LinearHead(hidden.to(device), weight.to(device))
    doubled = [LinearHead(head.hidden.double(), head.weight.double()) for head in (student, teacher)]
    expected = distillation_scores(*doubled, beta=0.5, impl="reference")
    got = distillation_scores(student, teacher, beta=0.5, impl=impl)
    for name in ("forward_kl", "reverse_kl", "hellinger", "divergence", "total_variation", "grad_norm"):
        a, b = getattr(got, name).double(), getattr(expected, name).double()
        assert (a - b).norm() <= PROMISE * b.norm(), name


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("std", [3.0, 30.0])
@pytest.mark.parametrize("head", ["logits", "few"])
def test_a_divergence_from_a_mixture_keeps_its_digits_where_one_head_has_all(
    head: str, std: float, beta: float
) -> None:
    """log(mix / t) is 0 there, and not what is left of two large logarithms; an error of 3 roundings of log 2."""
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(64, 65, generator=generator) * std for _ in range(2)]

    def loss(impl: str, dtype: torch.dtype) -> torch.Tensor:
        weight = torch.eye(65, dtype=dtype)
        pair = (Logits(x.to(dtype)) if head == "logits" else LinearHead(x.to(dtype), weight) for x in logits)
        return distillation_loss(*pair, beta=beta, reduction="none", impl=impl)

    error = (loss("eager", torch.float32) - loss("reference", torch.float64)).abs().max()
    assert float(error) <= 2.5e-7


def table() -> str:
    """Worse of dX and dW, in Markdown."""
    lines = ["| case | divergence | " + " | ".join(METHODS) + " |", "|---" * (2 + len(METHODS)) + "|"]
    for name, student, teacher in cases():
        for label, beta in BETAS.items():
            cells = [f"{100 * max(errors(method, student, teacher, beta)):.2f} %" for method in METHODS]
            lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the docs."""
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
