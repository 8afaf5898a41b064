"""Ranks over gloo: heads split by classes, weights sharded by FSDP2, rows selected over all ranks, score logs shared;
each against one process that has everything.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from fusedmm import LinearHead, Logits, TopKLogProbs, distillation_loss, distillation_scores
from fusedmm.score_log import ScoreLog
from fusedmm.selection import select_rows
from tests.interpreter import mend_interpreter

RANKS, ROWS, CLASSES = 2, 10, 26
PADDED = 28  # classes of both shards
WIDE = 520  # in shards of 286 and 234, which suit different tiles and, by themselves, different numbers of splits
IMPLEMENTATIONS = ("eager", "triton")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def problem() -> tuple[LinearHead, LinearHead, Tensor]:
    draw = torch.Generator().manual_seed(3)
    normal = [
        torch.randn(shape, generator=draw) for shape in ((ROWS, 16), (PADDED, 16), (PADDED,), (ROWS, 24), (PADDED, 24))
    ]
    labels = torch.randint(0, CLASSES, (ROWS,), generator=draw)
    labels[2] = -100
    return (
        LinearHead(*normal[:3], num_classes=CLASSES, softcap=6.0),
        LinearHead(*normal[3:], num_classes=CLASSES),
        labels,
    )


def check_classes_split_over_ranks(rank: int, group: dist.ProcessGroup) -> None:
    student, teacher, labels = problem()
    mine = slice(rank * PADDED // RANKS, (rank + 1) * PADDED // RANKS)
    settings: dict[str, Any] = {"alpha": 0.6, "label_smoothing": 0.1, "temperature": 2.0}
    for impl in IMPLEMENTATIONS:
        expected = distillation_scores(student, teacher, labels, beta=0.4, temperature=2.0, impl=impl)
        shards = [
            dataclasses.replace(h, weight=h.weight[mine], bias=None if h.bias is None else h.bias[mine], group=group)
            for h in (student, teacher)
        ]
        for field, value in zip(
            expected, distillation_scores(*shards, labels, beta=0.4, temperature=2.0, impl=impl), strict=True
        ):
            close(value, field)
        for beta in (0.0, 0.4, 1.0):
            for memory in ("fast", "lean"):
                results = []
                for head, other in ((student, teacher), shards):
                    leaf = dataclasses.replace(
                        head, hidden=head.hidden.clone().requires_grad_(), weight=head.weight.clone().requires_grad_()
                    )
                    loss = distillation_loss(leaf, other, labels, beta=beta, memory=memory, impl=impl, **settings)
                    results.append((loss.detach(), *torch.autograd.grad(loss, (leaf.hidden, leaf.weight))))
                (loss, grad_hidden, grad_weight), (got, got_hidden, got_weight) = results
                close(got, loss)
                close(got_hidden, grad_hidden)
                close(got_weight, grad_weight[mine])


def shard_of(head: LinearHead, rank: int, size: int, group: dist.ProcessGroup) -> LinearHead:
    """The rank's `size` classes of a head, of which the last rank may have fewer; the rest of them is padding."""
    classes, mine = head.weight.shape[0], slice(rank * size, rank * size + size)
    padding = (0, 0, 0, size * group.size() - classes)
    weight = torch.nn.functional.pad(head.weight.detach(), padding, value=torch.nan)[mine].requires_grad_()
    bias = None
    if head.bias is not None:
        bias = torch.nn.functional.pad(head.bias.detach(), padding[2:], value=torch.nan)[mine].requires_grad_()
    hidden = head.hidden.detach().clone().requires_grad_()
    return dataclasses.replace(head, hidden=hidden, weight=weight, bias=bias, num_classes=classes, group=group)


@dataclasses.dataclass(frozen=True)
class TopCase:
    """A top-k teacher for a student over `ranks` ranks.

    Rows 0 and 1 name classes of the first and of the last shard, as far as it has so many; the others any.
    """

    k: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: int = 26
    softcap: float | None = None
    forbidden: tuple[int, ...] = ()
    has_labels: bool = True

    def heads(self, size: int) -> tuple[LinearHead, TopKLogProbs, Tensor | None]:
        """Float64 student with all classes, teacher, labels; `size` classes a rank."""
        draw = torch.Generator().manual_seed(self.k)
        student = LinearHead(
            torch.randn(ROWS, 16, generator=draw, dtype=torch.float64).requires_grad_(),
            torch.randn(self.classes, 16, generator=draw, dtype=torch.float64).requires_grad_(),
            torch.randn(self.classes, generator=draw, dtype=torch.float64)
            .index_fill(0, torch.tensor(self.forbidden, dtype=torch.int64), -torch.inf)
            .requires_grad_(),
            softcap=self.softcap,
        )
        favour = torch.randn(ROWS, self.classes, generator=draw)
        favour[0, :size] += 100.0
        favour[1, (self.classes - 1) // size * size :] += 100.0
        indices = favour.topk(self.k).indices[:, torch.randperm(self.k, generator=draw)]
        full = torch.randn(ROWS, self.classes, generator=draw, dtype=torch.float64).mul_(2).log_softmax(-1)
        labels = torch.randint(0, self.classes, (ROWS,), generator=draw)
        labels[2] = -100
        teacher = TopKLogProbs(indices.T.contiguous().T, full.gather(1, indices))
        return student, teacher, labels if self.has_labels else None


ROW_TEMPERATURE = torch.linspace(0.5, 3.0, ROWS)
TOP_CASES = {
    "one class": TopCase(1, {"beta": 1.0}, has_labels=False),
    "every option": TopCase(
        5, {"temperature": ROW_TEMPERATURE, "alpha": 0.6, "label_smoothing": 0.1, "beta": 0.4}, softcap=6.0
    ),
    "all of a shard": TopCase(13, {"temperature": 2.0, "beta": 0.0, "alpha": 0.5, "label_smoothing": 0.1}),
    "every class": TopCase(26, {"beta": 0.4, "alpha": 0.5}),
    "forbidden": TopCase(5, {"beta": 0.0, "alpha": 0.5, "temperature": 2.0}, forbidden=(0, 3, 20, 25)),
    "several splits": TopCase(5, {"temperature": 2.0, "alpha": 0.5, "beta": 1.0}, classes=WIDE),
    "cross entropy": TopCase(5, {"alpha": 0.0}),
}


def near(found: Tensor, truth: Tensor, whole: Tensor | None = None) -> bool:
    """Within float32's rounding of the norm, of what `truth` is a part of."""
    size = torch.linalg.vector_norm(truth if whole is None else whole)
    return bool(torch.linalg.vector_norm(found.double() - truth) <= 2e-5 * size)


def check_top_k_teacher(case: TopCase, rank: int, group: dist.ProcessGroup) -> None:
    """Loss, gradients and scores of every implementation against the float64 reference of the whole student."""
    size = -(-11 * case.classes // (10 * group.size()))  # the last rank has fewer
    student, teacher, labels = case.heads(size)
    mine = slice(rank * size, rank * size + size)
    whole = [student.hidden, student.weight, student.bias]
    truth = distillation_loss(student, teacher, labels, reduction="sum", impl="reference", **case.settings)
    expected = torch.autograd.grad(truth, [x for x in whole if x is not None])
    options = {name: value for name, value in case.settings.items() if name in ("temperature", "beta")}
    fields = distillation_scores(student, teacher, labels, impl="reference", **options)
    for impl in ("reference", *IMPLEMENTATIONS):
        dtype = torch.float64 if impl == "reference" else torch.float32
        own = [None if x is None else x.detach().to(dtype) for x in whole]
        for memory in ("fast", "lean"):
            leaf = shard_of(dataclasses.replace(student, hidden=own[0], weight=own[1], bias=own[2]), rank, size, group)
            assert leaf.bias is not None
            loss = distillation_loss(leaf, teacher, labels, reduction="sum", memory=memory, impl=impl, **case.settings)
            grads = torch.autograd.grad(loss, [leaf.hidden, leaf.weight, leaf.bias])
            assert near(loss.detach(), truth.detach()), (impl, memory, loss, truth)
            assert near(grads[0], expected[0]), (impl, memory)
            for name, grad, all_ranks in zip(("weight", "bias"), grads[1:], expected[1:], strict=True):
                count = all_ranks[mine].shape[0]
                assert near(grad[:count], all_ranks[mine], all_ranks), (impl, memory, name)
                assert not grad[count:].any(), (impl, memory, name)
            for x in (loss.detach(), grads[0]):  # the same on every rank, to the bit
                others = [torch.empty_like(x) for _ in range(group.size())]
                dist.all_gather(others, x.contiguous(), group=group)
                assert all(torch.equal(x, other) for other in others), (impl, memory)
        scores = distillation_scores(leaf, teacher, labels, impl=impl, **options)
        for name, found, field in zip(scores._fields, scores, fields, strict=True):
            assert (found is None) == (field is None), (impl, name)
            if field is not None:
                close(found.double(), field)


def check_logits_split_over_ranks(rank: int, group: dist.ProcessGroup) -> None:
    """Unequal shards whose tiles would have different numbers of splits, against either kind of teacher."""
    draw, size = torch.Generator().manual_seed(7), 286
    mine, padding = slice(rank * size, min(rank * size + size, WIDE)), (0, 2 * size - WIDE)
    values = torch.randn(2, ROWS, WIDE, generator=draw).mul_(2)
    padded = torch.nn.functional.pad(values, padding, value=torch.nan)[..., rank * size : rank * size + size]
    top = values[1].log_softmax(-1).topk(7)
    teacher, own_teacher = Logits(values[1]), Logits(padded[1], num_classes=WIDE, group=group)
    known = TopKLogProbs(top.indices, top.values)
    labels = torch.randint(0, WIDE, (ROWS,), generator=draw)
    for given, own_given in ((teacher, own_teacher), (known, known)):
        leaf = values[0].double().requires_grad_()
        truth = distillation_loss(Logits(leaf), given, labels, beta=0.4, alpha=0.5, impl="reference")
        (expected,) = torch.autograd.grad(truth, leaf)
        fields = distillation_scores(Logits(values[0]), given, labels, beta=0.4, impl="reference")
        for impl in ("reference", *IMPLEMENTATIONS):
            own = padded[0].clone().requires_grad_()
            student = Logits(own, num_classes=WIDE, group=group)
            loss = distillation_loss(student, own_given, labels, beta=0.4, alpha=0.5, impl=impl)
            (grad,) = torch.autograd.grad(loss, own)
            assert near(loss.detach(), truth.detach()), impl
            assert near(grad[:, : mine.stop - mine.start], expected[:, mine], expected), impl
            scores = distillation_scores(student, own_given, labels, beta=0.4, impl=impl)
            for found, field in zip(scores, fields, strict=True):
                if field is not None:
                    assert found is not None
                    close(found, field)


def check_sharded_weight_is_gathered(rank: int) -> None:
    """Each rank has its own rows; with the global normalizer the gradient is that of all rows."""
    student, teacher, labels = problem()
    whole = student.weight.clone().requires_grad_()
    total = distillation_loss(dataclasses.replace(student, weight=whole), teacher, labels)
    (expected,) = torch.autograd.grad(total, whole)
    mesh = init_device_mesh("cpu", (RANKS,))
    sharded = distribute_tensor(student.weight, mesh, [Shard(0)]).requires_grad_()
    mine = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    loss = distillation_loss(
        dataclasses.replace(student, hidden=student.hidden[mine], weight=sharded),
        dataclasses.replace(teacher, hidden=teacher.hidden[mine]),
        labels[mine],
        normalizer=float((labels != -100).sum()),
    )
    loss.backward()
    close(sharded.grad.to_local(), expected.chunk(RANKS)[rank])
    # the same DTensor as this rank's classes
    group = mesh.get_group()
    split = [
        dataclasses.replace(head, weight=distribute_tensor(head.weight, mesh, [Shard(0)]), bias=None, group=group)
        for head in (student, teacher)
    ]
    close(
        distillation_loss(*split, labels), distillation_loss(dataclasses.replace(student, bias=None), teacher, labels)
    )
    # one with unequal shards, all of whose classes count
    odd, other = (LinearHead(head.hidden, head.weight[:27]) for head in (student, teacher))
    shards = [
        dataclasses.replace(head, weight=distribute_tensor(head.weight, mesh, [Shard(0)]), group=group)
        for head in (odd, other)
    ]
    smooth: dict[str, Any] = {"alpha": 0.5, "label_smoothing": 0.5}
    close(distillation_loss(*shards, labels, **smooth), distillation_loss(odd, other, labels, **smooth))


def check_rows_selected_over_ranks(rank: int, group: dist.ProcessGroup) -> None:
    scores = torch.randn(101, generator=torch.Generator().manual_seed(1)).round(
        decimals=1
    )  # ties within and across ranks
    mine = scores[:30] if rank == 0 else scores[30:]
    for keep in (0.0, 0.1, 0.35, 1.0):
        chosen = [torch.zeros(71, dtype=torch.bool) for _ in range(RANKS)]
        selected = select_rows(mine, keep, group=group)
        dist.all_gather(chosen, torch.nn.functional.pad(selected, (0, 71 - selected.shape[0])))
        assert torch.equal(torch.cat([chosen[0][:30], chosen[1]]), select_rows(scores, keep))


def check_score_log_is_shared(rank: int, group: dist.ProcessGroup) -> None:
    alone, shared = ScoreLog(20), ScoreLog(20)
    for epoch in range(4):
        draw = torch.Generator().manual_seed(epoch)
        order, margin = torch.randperm(20, generator=draw), torch.randn(20, generator=draw)
        alone.update(order, margin)
        mine = slice(rank * 10, rank * 10 + 10)
        shared.update(order[mine], margin[mine])
        shared.share(group)
    for a, b in zip(alone.statistics(), shared.statistics(), strict=True):
        torch.testing.assert_close(b, a)


def check_two_ranks(rank: int, group: dist.ProcessGroup) -> None:
    check_classes_split_over_ranks(rank, group)
    check_logits_split_over_ranks(rank, group)
    check_sharded_weight_is_gathered(rank)
    check_rows_selected_over_ranks(rank, group)
    check_score_log_is_shared(rank, group)


def check_top_k_teachers(rank: int, group: dist.ProcessGroup) -> None:
    for case in TOP_CASES.values():
        check_top_k_teacher(case, rank, group)


def run_rank(rank: int, store: str, ranks: int, check: Callable[[int, dist.ProcessGroup], None]) -> None:
    torch.set_num_threads(1)
    mend_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    check(rank, group)
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def ranks_interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU: for gloo the ranks hold their tensors on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"), RANKS, check_two_ranks), nprocs=RANKS)


@pytest.mark.parametrize("ranks", [2, 3])
def test_top_k_teachers_agree_with_one_rank(ranks: int, tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"), ranks, check_top_k_teachers), nprocs=ranks)
