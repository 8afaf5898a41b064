"""A student against a teacher's top-k classes: one sweep over the student's classes, then K + 1 numbers a row.

`_top_sweep_kernel` walks one split of the classes. A row's top-k classes, sorted, are met in order: each is lifted out
of its tile, and its logit kept. What stays is the rest, whose log-sum-exp is therefore a sum over the other classes
and not 1 minus a sum, which would cancel for a confident student. `_top_merge_kernel` merges the splits (and the ranks)
of a row and gives the logits of student and teacher over the K classes and the rest as one bucket, for the kernels of
two heads; and what concerns the student alone, over all classes: rest and top-k merged. Class numbers are those over
all ranks; a rank leaves the logits of top-k classes that are another's `ABSENT`.

FLOPs: 2 N V Ds, where a teacher's head of the same size would double them. Bytes: the weight once for every group of
row blocks, as statistics.py, and 16 N K of top-k classes and logits; never a row of the weight gathered, which would be
2 N K Ds. Floor: the time of the FLOPs, ten times that of the bytes at 8192 rows of 4096 dimensions, of which tiles of
128 x 256 reach 75 % by the model of sm_90's machine code, those of 128 x 128 on sm_100 56 %, of 64 x 128 on sm_80 all.
Beside it a tile costs log2(K) loads a row, to find its classes, and as many passes as the most of its classes that one
row has, 1 to 3 of K = 64 in a vocabulary of 10^5. float32, the teacher's bucket float64; bitwise reproducible.
"""

import torch
import triton
import triton.language as tl

from fusedmm.kernels.distillation.arguments import DistillationProblem
from fusedmm.kernels.distillation.config import row_threads, vocabulary_splits
from fusedmm.kernels.distillation.heads import HeadTensors, launch_heads
from fusedmm.kernels.distillation.rows import load_state, row_inputs, state_pointers, store_state
from fusedmm.kernels.distillation.state import NO_CLASS, NOTHING, label_scores
from fusedmm.kernels.distillation.statistics import MERGED_ROWS
from fusedmm.kernels.distillation.tiles import ABSENT, LOWEST, head_slabs, program_tile
from fusedmm.kernels.distillation.top_state import (
    TOP_SIZE_LOSS,
    TOP_SIZE_SCORES,
    count_below,
    empty_top_state,
    lift,
    merge_top_states,
    top_state_size,
    top_tile_state,
)
from fusedmm.kernels.launch import LAUNCH_OPTIONS, device_arch
from fusedmm.kernels.softmax import LN_2

# Numbers of the student alone, as `_top_merge_kernel` writes them.
# Rows that a gradient needs beside the buckets', of the student alone; cross entropy follows them.
REST_SHIFT, REST_LOG_SUM = tl.constexpr(0), tl.constexpr(1)  # of its share of the rest
UNIT, STUDENT_ARG = tl.constexpr(2), tl.constexpr(5)  # three rows as in `saved`, and the most likely class
STUDENT_SAVED = 6
STUDENT_SCORES = (
    "student_entropy",
    "student_confidence",
    "teacher_confidence",
    "student_arg",
    "student_nll",
    "el2n",
    "margin",
    "rest_squares",
)
BLOCK_K = 16
TOP_MERGE_WARPS = 4


@triton.jit
def _top_sweep_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    classes_ptr,
    labels_ptr,
    row_temperature_ptr,
    state_ptr,
    top_ptr,
    student_stride_n,
    student_weight_stride_v,
    student_size_d,
    student_softcap,
    inverse_temperature,
    num_rows,
    num_classes,
    first_class,
    size_k,
    tiles_per_split,
    num_splits,
    IS_SCORES: tl.constexpr,
    IS_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    row_block, split = program_tile(tl.cdiv(num_rows, BLOCK_N), num_splits, GROUP_N)
    SIZE: tl.constexpr = top_state_size(IS_SCORES)
    block_n = row_block * BLOCK_N
    first = split * tiles_per_split * BLOCK_V
    state_ptrs, mask_n = state_pointers(state_ptr, split, block_n, num_rows, BLOCK_N, SIZE)
    store_state(empty_top_state(BLOCK_N, IS_SCORES), state_ptrs, mask_n)
    start = count_below(_row_pointers(classes_ptr, block_n, num_rows, size_k, BLOCK_N), size_k, first_class + first)
    for first_v in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, num_classes), BLOCK_V):
        first_n = block_n + tl.minimum(first_v, 0)  # see `_statistics_kernel`
        students = head_slabs(
            student_ptr, student_weight_ptr, student_bias_ptr,
            student_stride_n, student_weight_stride_v, student_size_d, student_softcap,
            first_n, num_rows, first_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D, SLABS,
        )  # fmt: skip
        inverse, labels = row_inputs(
            row_temperature_ptr, labels_ptr, first_n, num_rows, inverse_temperature, first_class, num_classes, BLOCK_N
        )
        state_ptrs, mask_n = state_pointers(state_ptr, split, first_n, num_rows, BLOCK_N, SIZE)
        class_ptrs = _row_pointers(classes_ptr, first_n, num_rows, size_k, BLOCK_N)
        end = count_below(class_ptrs, size_k, first_class + first_v + BLOCK_V)
        top_ptrs = _row_pointers(top_ptr, first_n, num_rows, size_k, BLOCK_N)
        students = lift(students, class_ptrs, top_ptrs, mask_n, start, end, first_class + first_v)
        start = end
        tile = top_tile_state(
            students, inverse, labels - first_v, num_classes - first_v, first_class + first_v,
            IS_SCORES, IS_UNIT, labels_ptr is not None, LANES,
        )  # fmt: skip
        tl.debug_barrier()  # a row's numbers are stored by one thread and loaded by all that share it
        state = load_state(state_ptrs, mask_n, SIZE)
        tl.debug_barrier()
        store_state(merge_top_states(state, tile, inverse, IS_SCORES), state_ptrs, mask_n)


@triton.jit
def _row_pointers(ptr, first_n, num_rows, size_k, BLOCK_N: tl.constexpr):
    """Where rows [BLOCK_N] of a matrix [N, K] start, of those beyond the last the last."""
    rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), num_rows - 1)
    return ptr + rows.to(tl.int64) * size_k


@triton.jit
def _top_merge_kernel(
    state_ptr,
    classes_ptr,
    top_ptr,
    log_probs_ptr,
    labels_ptr,
    row_temperature_ptr,
    own_ptr,
    target_ptr,
    numbers_ptr,
    inverse_temperature,
    label_smoothing,
    num_rows,
    total_classes,
    size_k,
    num_splits,
    IS_SCORES: tl.constexpr,
    IS_UNIT: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_n = tl.program_id(0) * BLOCK_N
    offs_n = tl.minimum(first_n + tl.arange(0, BLOCK_N), num_rows - 1).to(tl.int64)
    mask_n = first_n + tl.arange(0, BLOCK_N) < num_rows
    inverse, labels = row_inputs(
        row_temperature_ptr, labels_ptr, first_n, num_rows, inverse_temperature, 0, total_classes, BLOCK_N
    )
    row_stride = tl.full([], 1, tl.int64) * num_rows
    SIZE: tl.constexpr = top_state_size(IS_SCORES)
    rest = empty_top_state(BLOCK_N, IS_SCORES)
    for split in range(num_splits):
        state_ptrs, _ = state_pointers(state_ptr, split, first_n, num_rows, BLOCK_N, SIZE)
        rest = merge_top_states(rest, load_state(state_ptrs, mask_n, SIZE), inverse, IS_SCORES)

    whole = rest
    largest = tl.full([BLOCK_N], NOTHING, tl.float32)
    known = tl.zeros([BLOCK_N], tl.float64)  # the teacher's mass on the top-k
    for first in range(0, size_k, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        at = offs_n[:, None] * size_k + offs_k[None, :]
        mask = (offs_k < size_k)[None, :]
        classes = tl.load(classes_ptr + at, mask=mask, other=NO_CLASS)
        top = tl.load(top_ptr + at, mask=mask, other=ABSENT)  # [BLOCK_N, BLOCK_K]
        columns = tl.arange(0, BLOCK_K)[None, :]
        label = tl.max(tl.where(classes == labels[:, None], columns, -1), 1)
        tile = top_tile_state((top,), inverse, label, size_k - first, 0, IS_SCORES, IS_UNIT, labels_ptr is not None, 0)
        arg = tl.sum(tl.where(columns == tile[1].to(tl.int32)[:, None], classes, 0), 1).to(tl.float32)
        whole = merge_top_states(whole, (tile[0], arg) + tile[2:], inverse, IS_SCORES)  # noqa: RUF005
        log_probs = tl.load(log_probs_ptr + at, mask=mask, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(log_probs.to(tl.float32), 1))
        known += tl.sum(tl.exp(log_probs.to(tl.float64)), 1)

    scale = tl.minimum(0.5 / inverse, 0.5)
    columns = size_k
    if HAS_REST:
        columns = size_k + 1
    for first in range(0, size_k, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        at = offs_n[:, None] * size_k + offs_k[None, :]
        mask = (offs_k < size_k)[None, :]
        top = tl.load(top_ptr + at, mask=mask, other=0.0)
        log_probs = tl.load(log_probs_ptr + at, mask=mask, other=0.0).to(tl.float32)
        to = offs_n[:, None] * columns + offs_k[None, :]
        own = (top - whole[0][:, None]) * (inverse * scale)[:, None] * LN_2
        target = tl.maximum(log_probs, LOWEST, propagate_nan=tl.PropagateNan.ALL) * scale[:, None]
        tl.store(own_ptr + to, own, mask=mask & mask_n[:, None])
        tl.store(target_ptr + to, target, mask=mask & mask_n[:, None])
    rest_log = tl.log2(1.0 + rest[2])
    if HAS_REST:
        own = ((rest[0] - whole[0]) * inverse + rest_log) * LN_2
        left = 1.0 - known
        target = tl.where(left > 0.0, tl.log(tl.where(left > 0.0, left, 1.0)), LOWEST).to(tl.float32)
        tl.store(own_ptr + offs_n * columns + size_k, own * scale, mask=mask_n)
        tl.store(target_ptr + offs_n * columns + size_k, target * scale, mask=mask_n)

    unit_sum = 1.0 + whole[3]
    nll = ((whole[0] - whole[4]) + tl.log2(unit_sum)) * LN_2
    if IS_SCORES:
        whole_sum = 1.0 + whole[2]
        rest_sum = 1.0 + rest[2]
        el2n, margin = label_scores(whole[0], whole[3], whole[8], whole[4], whole[5])
        mass = known.to(tl.float32)
        if HAS_REST:
            mass = tl.maximum(mass, 1.0)
        numbers = (
            (tl.log2(whole_sum) - whole[6] / whole_sum) * LN_2,  # entropy
            1.0 / whole_sum,  # confidence
            tl.exp(largest) / mass,  # confidence of the teacher
            whole[1],  # the most likely class
            nll,
            el2n,
            margin,
            (1.0 + rest[7]) / (rest_sum * rest_sum),  # sum over the rest of the squared shares of it
        )
    else:
        cross_entropy = nll + label_smoothing * (whole[4] - whole[5] / total_classes) * LN_2
        numbers = (  # type: ignore[assignment]
            rest[0] * inverse, rest_log,  # shift and log of the sum of the rest's share
            whole[0], tl.log2(unit_sum), whole[3] / unit_sum, whole[1],  # of the softmax at T = 1: and 1 - p_k, k
            cross_entropy,
        )  # fmt: skip
    for i in tl.static_range(len(numbers)):
        tl.store(numbers_ptr + i * row_stride + offs_n, numbers[i], mask=mask_n)


def top_statistics(
    student: HeadTensors,
    classes: torch.Tensor,
    problem: DistillationProblem,
    *,
    for_scores: bool,
    split_classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [splits, N, size] float32 of the rest of this rank's classes, and the student's logits in base 2 of the
    top-k classes [N, K], `ABSENT` where they are another rank's. `classes` [N, K] int32 ascends in each row; the rest
    as in `statistics`.
    """
    arch = device_arch(student.source.device)
    num_rows, size_k = classes.shape
    config, head = launch_heads(
        student, arch=arch, kind="top_sweep", num_classes=problem.num_classes, columns=split_classes
    )
    splits = vocabulary_splits(arch, num_rows, split_classes, config)
    size = (TOP_SIZE_SCORES if for_scores else TOP_SIZE_LOSS).value
    state = torch.empty((splits, num_rows, size), dtype=torch.float32, device=classes.device)
    top = state.new_full((num_rows, size_k), ABSENT.value)
    if num_rows == 0:
        return state, top
    _top_sweep_kernel[(triton.cdiv(num_rows, config.blocks["BLOCK_N"]) * splits,)](
        **head,
        classes_ptr=classes,
        labels_ptr=problem.labels,
        row_temperature_ptr=problem.row_temperature,
        state_ptr=state,
        top_ptr=top,
        inverse_temperature=1.0 / problem.temperature,
        num_rows=num_rows,
        num_classes=problem.num_classes,
        first_class=problem.first_class,
        size_k=size_k,
        tiles_per_split=triton.cdiv(triton.cdiv(problem.num_classes, config.blocks["BLOCK_V"]), splits),
        num_splits=splits,
        IS_SCORES=for_scores,
        IS_UNIT=problem.is_unit,
        LANES=row_threads(arch),
        **config.launch_options(),
    )
    return state, top


def merge_top_statistics(
    state: torch.Tensor,
    top: torch.Tensor,
    classes: torch.Tensor,
    log_probs: torch.Tensor,
    problem: DistillationProblem,
    *,
    for_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits over the top-k classes and the rest, of student and teacher [N, K + 1] float32 (K columns where those are
    all classes), and numbers of the student alone, [8, N] scores or [7, N] for the loss; from the states of all splits
    and ranks, the top-k logits of all ranks, the top-k classes and the teacher's log-probabilities of them [N, K].

    The logits are to be divided by ``min(temperature, 1) / 2``: what is forbidden, -1e30 / temperature then, is above
    -1e30 here, and no kernel of two heads takes it for a class that its own heads forbid.
    """
    splits, num_rows, _ = state.shape
    size_k = classes.shape[1]
    has_rest = size_k < problem.total_classes
    own, target = (state.new_empty((num_rows, size_k + has_rest)) for _ in range(2))
    numbers = state.new_empty((len(STUDENT_SCORES) if for_scores else STUDENT_SAVED + 1, num_rows))
    if num_rows == 0:
        return own, target, numbers
    _top_merge_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
        state_ptr=state,
        classes_ptr=classes,
        top_ptr=top,
        log_probs_ptr=log_probs,
        labels_ptr=problem.labels,
        row_temperature_ptr=problem.row_temperature,
        own_ptr=own,
        target_ptr=target,
        numbers_ptr=numbers,
        inverse_temperature=1.0 / problem.temperature,
        label_smoothing=problem.label_smoothing,
        num_rows=num_rows,
        total_classes=problem.total_classes,
        size_k=size_k,
        num_splits=splits,
        IS_SCORES=for_scores,
        IS_UNIT=problem.is_unit,
        HAS_REST=has_rest,
        BLOCK_N=MERGED_ROWS,
        BLOCK_K=BLOCK_K,
        num_warps=TOP_MERGE_WARPS,
        **LAUNCH_OPTIONS,
    )
    return own, target, numbers
