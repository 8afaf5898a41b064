"""Two ranks over gloo: heads split by classes, weights sharded by FSDP2, rows selected over all ranks, score logs
shared; each against one process that has everything.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from fusedmm import LinearHead, distillation_loss, distillation_scores
from fusedmm.score_log import ScoreLog
from fusedmm.selection import select_rows
from tests.interpreter import mend_interpreter

RANKS, ROWS, CLASSES = 2, 10, 26
PADDED = 28  # classes of both shards
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


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    mend_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    assert group is not None
    check_classes_split_over_ranks(rank, group)
    check_sharded_weight_is_gathered(rank)
    check_rows_selected_over_ranks(rank, group)
    check_score_log_is_shared(rank, group)
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"),), nprocs=RANKS)
