"""Statistics of every row of two heads, one pass over the classes; the logits live in registers.

`_statistics_kernel` gives the state (see state.py) of one block of rows over one split of the classes;
`_merge_statistics_kernel` merges the splits (and the ranks) of a row and turns the state into scores, or into what a
gradient needs. With Z = 1 + others and c = lse_t - lse_s, taken as a difference of peaks plus the logarithm of a ratio:

    KL(t || p) = u_k + slope / Z - c   at the teacher's k        KL(p || t) = c - u_k - slope / Z   at the student's k

FLOPs: 2 N V (Ds + Dt). Bytes: each weight once for every block of rows (from L2 where programs of one split run
together), hidden states once for every tile of classes from L2. float32 throughout; bitwise reproducible: a fixed
order, no atomics.
"""

import torch
import triton
import triton.language as tl

from fusedmm.kernels.distillation.arguments import DistillationProblem
from fusedmm.kernels.distillation.config import row_threads, vocabulary_splits
from fusedmm.kernels.distillation.heads import HeadTensors, launch_heads
from fusedmm.kernels.distillation.rows import load_state, row_inputs, state_pointers, store_state
from fusedmm.kernels.distillation.saved import SAVED
from fusedmm.kernels.distillation.state import (
    SIZE_LOSS,
    SIZE_SCORES,
    empty_state,
    label_scores,
    merge_states,
    state_size,
    tile_state,
)
from fusedmm.kernels.distillation.tiles import logit_slabs, program_tile
from fusedmm.kernels.launch import LAUNCH_OPTIONS, device_arch
from fusedmm.kernels.softmax import LN_2

FIELDS = 16  # rows of scores
LOSSES = 3  # forward KL, reverse KL, cross entropy
MERGED_ROWS, MERGE_WARPS = 32, 1  # of a program that merges


@triton.jit
def _statistics_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    teacher_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    labels_ptr,
    row_temperature_ptr,
    state_ptr,
    student_stride_n,
    student_weight_stride_v,
    student_size_d,
    student_softcap,
    teacher_stride_n,
    teacher_weight_stride_v,
    teacher_size_d,
    teacher_softcap,
    inverse_temperature,
    num_rows,
    num_classes,
    first_class,
    tiles_per_split,
    num_splits,
    IS_SCORES: tl.constexpr,
    IS_UNIT: tl.constexpr,
    IS_SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    row_block, split = program_tile(tl.cdiv(num_rows, BLOCK_N), num_splits, GROUP_N)
    SIZE: tl.constexpr = state_size(IS_SCORES)
    block_n = row_block * BLOCK_N
    first = split * tiles_per_split * BLOCK_V
    state_ptrs, mask_n = state_pointers(state_ptr, split, block_n, num_rows, BLOCK_N, SIZE)
    store_state(empty_state(BLOCK_N, IS_SCORES), state_ptrs, mask_n)
    for first_v in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, num_classes), BLOCK_V):
        # The compiler cannot see that this adds 0, so it forms addresses of rows when a tile needs them, in place of
        # keeping them in registers beside the logits.
        first_n = block_n + tl.minimum(first_v, 0)
        students, teachers = logit_slabs(
            student_ptr, student_weight_ptr, student_bias_ptr,
            student_stride_n, student_weight_stride_v, student_size_d, student_softcap,
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr,
            teacher_stride_n, teacher_weight_stride_v, teacher_size_d, teacher_softcap,
            first_n, num_rows, first_v, num_classes, IS_SHARED, BLOCK_N, BLOCK_V, BLOCK_D, SLABS,
        )  # fmt: skip
        inverse, labels = row_inputs(
            row_temperature_ptr, labels_ptr, first_n, num_rows, inverse_temperature, first_class, num_classes, BLOCK_N
        )
        tile = tile_state(
            students, teachers, inverse, labels - first_v, num_classes - first_v,
            first_class + first_v,
            IS_SCORES, IS_UNIT, labels_ptr is not None, LANES,
        )  # fmt: skip
        tl.debug_barrier()  # a row's numbers are stored by one thread and loaded by all that share it
        state_ptrs, mask_n = state_pointers(state_ptr, split, first_n, num_rows, BLOCK_N, SIZE)
        state = load_state(state_ptrs, mask_n, SIZE)
        tl.debug_barrier()
        store_state(merge_states(state, tile, inverse, IS_SCORES), state_ptrs, mask_n)


@triton.jit
def _merge_statistics_kernel(
    state_ptr,
    labels_ptr,
    row_temperature_ptr,
    saved_ptr,
    fields_ptr,
    inverse_temperature,
    label_smoothing,
    num_rows,
    total_classes,
    num_splits,
    ignore_index,
    IS_SCORES: tl.constexpr,
    IS_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_n = tl.program_id(0) * BLOCK_N
    rows = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    inverse = tl.full([BLOCK_N], 1.0, tl.float32) * inverse_temperature
    if row_temperature_ptr is not None:
        inverse = 1.0 / tl.load(row_temperature_ptr + rows, mask=mask_n, other=1.0)
    row_stride = tl.full([], 1, tl.int64) * num_rows
    SIZE: tl.constexpr = state_size(IS_SCORES)
    state = empty_state(BLOCK_N, IS_SCORES)
    for split in range(num_splits):
        state_ptrs, _ = state_pointers(state_ptr, split, first_n, num_rows, BLOCK_N, SIZE)
        part = load_state(state_ptrs, mask_n, SIZE)
        state = merge_states(state, part, inverse, IS_SCORES)
    counts = tl.full([BLOCK_N], 1, tl.int1)
    if labels_ptr is not None:
        counts = tl.load(labels_ptr + rows, mask=mask_n, other=0) != ignore_index

    student_sum = 1.0 + state[2]
    teacher_sum = 1.0 + state[7]
    student_shift = state[0] * inverse
    teacher_shift = state[5] * inverse
    gap = (teacher_shift - student_shift) + tl.log2(teacher_sum / student_sum)  # c = lse_t - lse_s
    student_slope = state[3] / student_sum
    teacher_slope = state[8] / teacher_sum
    forward_kl = (state[9] + teacher_slope - gap) * LN_2
    reverse_kl = (gap - state[4] - student_slope) * LN_2
    unit_others = state[10]
    if IS_UNIT:
        unit_others = state[2]
    unit_sum = 1.0 + unit_others
    student_nll = ((state[0] - state[11]) + tl.log2(unit_sum)) * LN_2

    if IS_SCORES:
        spread = student_sum / teacher_sum
        bend = 1.0 - spread
        distance = tl.maximum(state[19] + 2.0 * bend * state[20] + bend * bend * state[21], 0.0)
        teacher_unit = state[15]
        if IS_UNIT:
            teacher_unit = state[7]
        teacher_nll = ((state[5] - state[12]) + tl.log2(1.0 + teacher_unit)) * LN_2
        el2n, margin = label_scores(state[0], unit_others, state[14], state[11], state[13])
        fields = (
            forward_kl, reverse_kl, 1.0 - state[18] / tl.sqrt(student_sum * teacher_sum),
            (tl.log2(student_sum) - state[16] / student_sum) * LN_2,
            (tl.log2(teacher_sum) - state[17] / teacher_sum) * LN_2,
            1.0 / student_sum, 1.0 / teacher_sum, tl.where(state[1] == state[6], 1.0, 0.0),
            tl.sqrt(distance) / student_sum, student_nll, teacher_nll, student_nll - teacher_nll,
            el2n, margin,
        )  # fmt: skip
    else:
        mean = state[12] / total_classes
        cross_entropy = student_nll + label_smoothing * (state[11] - mean) * LN_2
        fields = (forward_kl, reverse_kl, cross_entropy)  # type: ignore[assignment]
    for i in tl.static_range(len(fields)):
        tl.store(fields_ptr + i * row_stride + rows, tl.where(counts, fields[i], 0.0), mask=mask_n)
    _save(
        state,
        student_shift,
        teacher_shift,
        student_sum,
        teacher_sum,
        student_slope,
        teacher_slope,
        unit_others,
        gap,
        saved_ptr + rows,
        row_stride,
        mask_n,
    )


@triton.jit
def _save(
    state,
    student_shift,
    teacher_shift,
    student_sum,
    teacher_sum,
    student_slope,
    teacher_slope,
    unit_others,
    gap,
    saved_ptrs,
    row_stride,
    mask_n,
):
    """What gradients need, in the order of `fusedmm.kernels.distillation.saved`."""
    saved = (
        student_shift, teacher_shift, tl.log2(student_sum), tl.log2(teacher_sum), state[1], state[6],
        state[2] / student_sum, state[7] / teacher_sum, state[4], state[9], student_slope, -teacher_slope,
        state[0], tl.log2(1.0 + unit_others), unit_others / (1.0 + unit_others), gap,
    )  # fmt: skip
    for i in tl.static_range(len(saved)):
        tl.store(saved_ptrs + i * row_stride, saved[i], mask=mask_n)


def statistics(
    student: HeadTensors,
    teacher: HeadTensors,
    problem: DistillationProblem,
    *,
    for_scores: bool,
    split_classes: int,
) -> torch.Tensor:
    """States [splits, N, size] float32 of this rank's classes; tiles and splits are chosen for `split_classes` classes,
    so that ranks with unequal shards agree.
    """
    arch = device_arch(student.source.device)
    num_rows = student.source.shape[0]
    config, heads = launch_heads(
        student,
        teacher,
        arch=arch,
        kind="scores" if for_scores else "loss",
        num_classes=problem.num_classes,
        columns=split_classes,
    )
    splits = vocabulary_splits(arch, num_rows, split_classes, config)
    size = (SIZE_SCORES if for_scores else SIZE_LOSS).value
    state = student.source.new_empty((splits, num_rows, size), dtype=torch.float32)
    if num_rows == 0:
        return state
    _statistics_kernel[(triton.cdiv(num_rows, config.blocks["BLOCK_N"]) * splits,)](
        **heads,
        labels_ptr=problem.labels,
        row_temperature_ptr=problem.row_temperature,
        state_ptr=state,
        inverse_temperature=1.0 / problem.temperature,
        num_rows=num_rows,
        num_classes=problem.num_classes,
        first_class=problem.first_class,
        tiles_per_split=triton.cdiv(triton.cdiv(problem.num_classes, config.blocks["BLOCK_V"]), splits),
        num_splits=splits,
        IS_SCORES=for_scores,
        IS_UNIT=problem.is_unit,
        LANES=row_threads(arch),
        **config.launch_options(),
    )
    return state


def merge_statistics(
    state: torch.Tensor, problem: DistillationProblem, *, for_scores: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Saved statistics [SAVED, N], and scores [FIELDS, N] (the last two are 0) or losses [LOSSES, N], from the states
    of all splits and ranks; 0 where a row is ignored.
    """
    splits, num_rows, _ = state.shape
    saved = state.new_empty((SAVED, num_rows))
    fields = state.new_zeros((FIELDS if for_scores else LOSSES, num_rows))
    if num_rows == 0:
        return saved, fields
    _merge_statistics_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
        state_ptr=state,
        labels_ptr=problem.labels,
        row_temperature_ptr=problem.row_temperature,
        saved_ptr=saved,
        fields_ptr=fields,
        inverse_temperature=1.0 / problem.temperature,
        label_smoothing=problem.label_smoothing,
        num_rows=num_rows,
        total_classes=problem.total_classes,
        num_splits=splits,
        ignore_index=problem.ignore_index,
        IS_SCORES=for_scores,
        IS_UNIT=problem.is_unit,
        BLOCK_N=MERGED_ROWS,
        num_warps=MERGE_WARPS,
        **LAUNCH_OPTIONS,
    )
    return saved, fields
