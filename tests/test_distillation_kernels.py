"""What the Triton path of distillation must get right beyond the options that all implementations share: tiles cut into
slabs, groups of programs, rows that do not count, a single class.
"""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedmm import LinearHead, TopKLogProbs, distillation_loss, distillation_scores
from fusedmm.kernels.distillation.config import ROW_GROUP, Pass, tile_config, vocabulary_splits
from fusedmm.kernels.distillation.heads import HeadTensors, launch_heads
from fusedmm.kernels.distillation.state import SIZE_SCORES
from fusedmm.kernels.launch import ARCHITECTURES
from fusedmm.ops import distillation_waves

# What a warning of numpy about a row of NaN would turn into, only in the interpreter.
ignore_numpy = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


def head(rows: int, classes: int, dim: int, device: torch.device, dtype: torch.dtype, seed: int) -> LinearHead:
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, dim, generator=draw).to(device, dtype) for size in (rows, classes))
    return LinearHead(hidden, weight / 2, torch.randn(classes, generator=draw).to(device, dtype))


def as_float64(source: LinearHead) -> LinearHead:
    assert source.bias is not None
    return LinearHead(source.hidden.double(), source.weight.double(), source.bias.double())


def assert_scores_agree(student: LinearHead, teacher: LinearHead, labels: Tensor, temperature: float) -> None:
    found = distillation_scores(student, teacher, labels, temperature=temperature, beta=0.3, impl="triton")
    expected = distillation_scores(
        as_float64(student), as_float64(teacher), labels, temperature=temperature, beta=0.3, impl="reference"
    )
    for name, value, truth in zip(found._fields, found, expected, strict=True):
        assert value is not None, name
        assert truth is not None, name
        assert torch.linalg.vector_norm(value - truth) <= 3e-6 * torch.linalg.vector_norm(truth), name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_slabs_of_a_tile(temperature: float, device: torch.device) -> None:
    """Half-precision heads take the wide tiles, which are cut into slabs; 150 classes leave a tile half empty."""
    student = head(20, 150, 24, device, torch.float16, seed=0)
    teacher = head(20, 150, 40, device, torch.float16, seed=1)
    labels = torch.arange(20, device=device) * 7
    labels[3] = -100
    assert_scores_agree(student, teacher, labels, temperature)


def test_groups_of_row_blocks(device: torch.device) -> None:
    """More row blocks than run together, and not a multiple of them."""
    config = tile_config("sm_90", 70, has_matmul=True, is_float32=True, kind="scores")
    rows = (ROW_GROUP + 2) * config.blocks["BLOCK_N"] - 5
    student = head(rows, 70, 8, device, torch.float32, seed=0)
    teacher = head(rows, 70, 8, device, torch.float32, seed=1)
    assert_scores_agree(student, teacher, torch.arange(rows, device=device) % 70, 1.0)


@ignore_numpy
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_an_ignored_row_holds_reaches_no_gradient(beta: float, memory: str, device: torch.device) -> None:
    gradients = []
    for value in (0.0, torch.nan):
        student = head(6, 9, 4, device, torch.float32, seed=0)
        student.hidden[2] = value
        teacher = head(6, 9, 4, device, torch.float32, seed=1)
        teacher.hidden[2] = value
        leaves = [x.requires_grad_() for x in (student.hidden, student.weight, student.bias) if x is not None]
        labels = torch.tensor([1, 2, -100, 3, 4, 5], device=device)
        loss = distillation_loss(student, teacher, labels, alpha=0.5, beta=beta, memory=memory, impl="triton")
        gradients.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for without, with_nan in zip(*gradients, strict=True):
        assert torch.equal(without, with_nan)
    assert gradients[0][1][2].eq(0).all()


def test_a_single_class_has_no_rival(device: torch.device) -> None:
    student, teacher = (head(3, 1, 4, device, torch.float32, seed=seed) for seed in range(2))
    scores = distillation_scores(student, teacher, torch.tensor([0, 0, -100], device=device), impl="triton")
    assert scores.margin is not None
    assert scores.margin.tolist() == [torch.inf, torch.inf, 0.0]
    for value in (scores.forward_kl, scores.reverse_kl, scores.student_entropy, scores.el2n, scores.grad_norm):
        assert value is not None
        assert value.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_top_k_classes_wherever_they_lie(dtype: torch.dtype, device: torch.device) -> None:
    """In no order, all in one tile, at the edges of tiles and slabs, the last class, more than one block of them, and
    other ones in every row; in memory columns first; of half-precision heads, whose tiles are wide and cut into slabs.
    """
    student = head(12, 300, 24, device, dtype, seed=0)
    draw = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(300, generator=draw)[:20] for _ in range(12)])
    indices[0], indices[1] = torch.arange(20, 0, -1), torch.arange(280, 300)
    edges = torch.tensor([0, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 299])
    indices[2, :12], indices[2, 12:] = edges, torch.arange(100, 108)
    log_probs = torch.log_softmax(torch.randn(12, 21, generator=draw) * 2, -1)[:, :20].to(device)
    top = TopKLogProbs(indices.T.contiguous().T.to(device), log_probs)
    labels = torch.arange(12, device=device) * 25
    found, expected = (
        distillation_scores(each, top, labels, temperature=2.0, beta=0.3, impl=impl)
        for each, impl in ((student, "triton"), (as_float64(student), "reference"))
    )
    for name, value, truth in zip(found._fields, found, expected, strict=True):
        if truth is not None:
            assert value is not None, name
            assert torch.linalg.vector_norm(value - truth) <= 1e-5 * torch.linalg.vector_norm(truth), name
    for memory in ("fast", "lean"):
        gradients = []
        for each, impl in ((student, "triton"), (as_float64(student), "reference")):
            assert each.bias is not None
            leaves = [x.detach().requires_grad_() for x in (each.hidden, each.weight, each.bias)]
            loss = distillation_loss(
                LinearHead(*leaves), top, labels, alpha=0.6, beta=0.3, reduction="sum", memory=memory, impl=impl
            )
            gradients.append(torch.autograd.grad(loss, leaves))
        for value, truth in zip(*gradients, strict=True):
            allowed = 2e-3 if dtype == torch.float16 else 2e-5
            assert torch.linalg.vector_norm(value - truth) <= allowed * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 24), (torch.float16, 23)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tiles_of_which_every_class_is_one_of_the_top_k(
    smoothing: float, dtype: torch.dtype, dim: int, device: torch.device
) -> None:
    """Nothing is left of them for the rest; half-precision rows of odd length go without TMA. A label is one of the
    top-k, or of the rest.
    """
    student = head(5, 110, dim, device, dtype, seed=0)
    log_probs = torch.log_softmax(torch.randn(5, 71, generator=torch.Generator().manual_seed(1)), -1)[:, :70]
    top = TopKLogProbs(torch.arange(70, device=device).expand(5, -1), log_probs.to(device))
    labels, results = torch.tensor([0, 63, 69, 70, 109], device=device), []
    for each, impl in ((student, "triton"), (as_float64(student), "reference")):
        assert each.bias is not None
        leaves = [x.detach().requires_grad_() for x in (each.hidden, each.weight, each.bias)]
        arguments = {"temperature": 2.0, "alpha": 0.6, "label_smoothing": smoothing, "reduction": "sum"}
        loss = distillation_loss(LinearHead(*leaves), top, labels, memory="lean", impl=impl, **arguments)  # type: ignore[arg-type]
        scores = distillation_scores(each, top, labels, temperature=2.0, impl=impl)
        found = [x for x in scores if x is not None]
        results.append([loss.detach(), *found, *torch.autograd.grad(loss, leaves)])
    allowed = 2e-3 if dtype == torch.float16 else 2e-5
    for value, truth in zip(*results, strict=True):
        assert torch.linalg.vector_norm(value.double() - truth) <= allowed * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(("reduction", "upstream", "size"), [("mean", 1024.0, 1.0), ("sum", 1.0, 100.0)])
def test_float16_weight_gradients_over_waves(
    reduction: str, upstream: float, size: float, memory: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded after each wave, without the smallest lost (a loss scaled for float16, its mean over rows taken) and
    without overflow before the end (sums in the thousands).
    """
    monkeypatch.setattr(distillation_waves, "FAST_ELEMENTS", 1)
    monkeypatch.setattr(distillation_waves, "RANGE_INPUT_BYTES", 1)
    monkeypatch.setattr(distillation_waves, "RANGE_ELEMENTS", 1)
    student = head(300, 140, 8, device, torch.float16, seed=0)
    student = LinearHead(student.hidden * size, student.weight / size, student.bias)
    teacher = head(300, 140, 8, device, torch.float16, seed=1)
    gradients = []
    for each, other, impl in (
        (student, teacher, "triton"),
        (as_float64(student), as_float64(teacher), "reference"),
    ):
        assert each.bias is not None
        leaves = [x.detach().requires_grad_() for x in (each.hidden, each.weight, each.bias)]
        loss = distillation_loss(LinearHead(*leaves), other, reduction=reduction, memory=memory, impl=impl)
        scaled = upstream if memory == "lean" else 1.0  # fast has the gradient before it knows the upstream one
        gradients.append([grad / scaled for grad in torch.autograd.grad(loss * scaled, leaves)])
    if reduction == "sum":
        assert gradients[1][1].abs().max() > 1000
    for found, truth in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(found - truth) <= 2e-3 * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 1024, 8192])
def test_splits_fill_the_device_and_stay_small(rows: int, arch: str) -> None:
    """A program for most multiprocessors, with states that stay beside the 16 MiB allowed for scores."""
    config = tile_config(arch, 128256, has_matmul=True, is_float32=False, kind="scores")
    splits = vocabulary_splits(arch, rows, 128256, config)
    assert 1 <= splits <= 128256 // config.blocks["BLOCK_V"]
    assert 4 * SIZE_SCORES.value * splits * rows <= 15 << 20


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", get_args(Pass))
def test_programs_of_a_group_are_counted_in_32_bits(kind: Pass, arch: str) -> None:
    """Of 2^24 classes, the most whose numbers float32 holds: `program_tile` divides by a group's programs."""
    classes = 1 << 24
    for has_matmul, is_float32, is_aligned in itertools.product((False, True), repeat=3):
        traits = {"has_matmul": has_matmul, "is_float32": is_float32, "is_aligned": is_aligned}
        blocks = tile_config(arch, classes, kind=kind, **traits).blocks
        assert blocks["GROUP_N"] * (classes // blocks["BLOCK_V"]) < 2**31


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_heads_without_rows_have_no_descriptors(arch: str, rows: int) -> None:
    """TMA cannot describe an empty matrix; scores of no rows are no mistake."""
    heads = [
        HeadTensors(torch.zeros(rows, dim).bfloat16(), torch.zeros(40, dim).bfloat16(), None, None) for dim in (16, 24)
    ]
    _, arguments = launch_heads(*heads, arch=arch, kind="scores", num_classes=37, columns=37)
    described = {name for name, argument in arguments.items() if isinstance(argument, TensorDescriptor)}
    matrices = {f"{role}_{name}" for role in ("student", "teacher") for name in ("ptr", "weight_ptr")}
    assert described == (matrices if rows else set())
    if rows:
        assert list(arguments["teacher_weight_ptr"].shape) == [37, 24]


def test_alignment_is_that_of_the_rows_that_kernels_read() -> None:
    """16 bytes are 8 bfloat16; of a transposed weight the dense copy counts."""
    source = torch.zeros(4, 16).bfloat16()
    weights = torch.zeros(40, 24).bfloat16()
    for weight, expected in (
        (weights[:, :16], True),
        (weights[:, 4:20], False),
        (torch.zeros(40, 20).bfloat16(), False),
        (torch.zeros(16, 41).bfloat16().t(), True),
        (torch.zeros(20, 40).bfloat16().t(), False),
        (torch.zeros(1, 16).bfloat16().expand(40, 16), False),
    ):
        assert HeadTensors(source, weight, None, None).is_aligned == expected
